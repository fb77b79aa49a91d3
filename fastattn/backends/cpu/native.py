"""The native module, and how its functions take tensors."""

import torch
from torch import Tensor

try:
    from fastattn import _C

    MISSING = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = f"native module not available: {error}"

if _C is not None and not hasattr(_C, "DTYPES"):
    _C = None  # type: ignore[assignment]
    MISSING = "native module older than the Python files: build it again"

DTYPES: dict[torch.dtype, int] = {}
if _C is not None:
    DTYPES = {getattr(torch, name): index for name, index in _C.DTYPES.items()}


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is 1."""
    return tensor if tensor.stride()[-1] == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()
