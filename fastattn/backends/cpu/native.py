"""The native module, and how its functions take tensors."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

# What this backend calls of the module.
ENTRY_POINTS = (
    "DTYPES",
    "UNBOUNDED",
    "AttentionFeatures",
    "attention_fwd",
    "attention_bwd",
    "softmax_fwd",
    "softmax_bwd",
    "ffn_fwd",
    "ffn_bwd",
    "norm_fwd",
    "norm_bwd",
    "cross_entropy_fwd",
    "cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_bwd",
    "rotary",
)

# Files of the module; there is none where the package was installed without native kernels.
_files = sorted(path.name for path in Path(__file__).parents[2].glob("_C*.so"))
MISSING: str | None = None
try:
    import fastattn._C as _C  # `from fastattn import` would speak of a circular import
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = f"native module not available: {error}"
else:
    _absent = [name for name in ENTRY_POINTS if not hasattr(_C, name)]
    if _absent:
        _C = None  # type: ignore[assignment]
        MISSING = f"native module older than the Python files, without {', '.join(_absent)}"

if MISSING is not None and _files:
    warnings.warn(
        f"fastattn runs on its slow reference backend, though {', '.join(_files)} is there: "
        f"{MISSING}. Install it again or, in a checkout, run python setup.py build_ext --inplace",
        RuntimeWarning,
        stacklevel=2,
    )

DTYPES: dict[torch.dtype, int] = {}
if _C is not None:
    DTYPES = {getattr(torch, name): index for name, index in _C.DTYPES.items()}


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is 1."""
    return tensor if tensor.stride()[-1] == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def matrix(tensor: Tensor | None) -> Tensor | None:
    """The matrix, copied if neither stride is 1."""
    if tensor is None or 1 in tensor.stride() or 1 in tensor.shape:
        return tensor
    return tensor.contiguous()


def matrix_address(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """The address and strides of what `matrix` returned, one of them 1; None for None."""
    if tensor is None:
        return None
    strides = tensor.stride()
    if 1 not in strides:
        # A stride over a single element may be anything.
        strides = tuple(1 if n == 1 else stride for n, stride in zip(tensor.shape, strides))
    return tensor.data_ptr(), strides


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()
