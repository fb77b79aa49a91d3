"""Which configuration a kernel runs with: the tuned one of this GPU, else the heuristic's."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Config = dict[str, Any]  # constexprs such as BLOCK_M, with num_warps and num_stages


def choose(name: str, shape_class: tuple, candidates: Sequence[Config], tensor: Tensor) -> Config:
    """The configuration of kernel `name` for calls of `shape_class` on the device of `tensor`.

    Args:
        name: of the kernel's launcher, such as "softmax_fwd".
        shape_class: what the best configuration depends on, in coarse steps (dtype, powers of two).
        candidates: from which tuning chooses; the first is the heuristic's, taken without tuning.
        tensor: an argument of the kernel.
    """
    return candidates[0]
