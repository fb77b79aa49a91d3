"""The operators: one file an op, from public function to torch.library registration."""

from fastattn.ops.attention import attention

__all__ = ["attention"]
