"""Whether the CUDA kernels can run here, and how they take tensors."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import philox

# What this backend calls of the native module's part for CUDA.
ENTRY_POINTS = (
    "device_refusal",
    "AttentionCall",
    "attention_splits",
    "attention_dq_sum",
    "attention_fwd",
    "attention_bwd",
    "softmax_fwd",
    "softmax_bwd",
    "FFNFwdCall",
    "FFNBwdCall",
    "ffn_fwd_scratch",
    "ffn_bwd_scratch",
    "ffn_fwd",
    "ffn_bwd",
)
DEVICE = "cuda"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of csrc/dtype.h
ALIGNMENT = 16  # bytes that kernels move at once

kernels = None
MISSING: str | None = "not built with CUDA"
try:
    from fastattn import _C
except ImportError:
    pass
else:
    kernels = getattr(_C, "cuda", None)
    _absent = [name for name in ENTRY_POINTS if not hasattr(kernels, name)]
    if not _absent:
        MISSING = None
    elif kernels:
        MISSING = f"native module older than the Python files, without cuda.{_absent[0]}"


def refusals(problem) -> list[str]:
    """Why no CUDA kernel can run `problem`, whatever the op."""
    reasons = idle()
    if problem.device != DEVICE:
        reasons.append(f"device={problem.device}, only {DEVICE}")
    elif not reasons:
        reasons += unsuitable_devices()
    return reasons


@functools.cache
def _driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def idle() -> list[str]:
    """Why the kernels run on no device of this machine."""
    reasons = [] if MISSING is None else [MISSING]
    if not _driver():
        reasons.append("no NVIDIA driver")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    return reasons


@functools.cache
def unsuitable_devices() -> tuple[str, ...]:
    """The visible devices that the kernels do not run on: a problem does not say which is its own.

    One of each capability is asked, the current one if it has it, since that opens the device.
    """
    count, current = torch.cuda.device_count(), torch.cuda.current_device()
    asked: dict[tuple[int, int], str] = {}
    for index in sorted(range(count), key=current.__ne__):
        capability = torch.cuda.get_device_capability(index)
        if capability not in asked:
            asked[capability] = kernels.device_refusal(index)
    return tuple(
        f"{torch.cuda.get_device_name(index)}: {why}"
        for index in range(count)
        if (why := asked[torch.cuda.get_device_capability(index)])
    )


def where(tensor: Tensor) -> tuple[int, int]:
    """The number of a tensor's device, and the handle of the stream that is current on it."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def on_device_of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function (problem, tensors, ...) of an op, run with the device of its tensors current."""

    @functools.wraps(function)
    def call(problem: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        device = t[0].device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return function(problem, t, *args, **kwargs)
        with torch.cuda.device(device):
            return function(problem, t, *args, **kwargs)

    return call


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address, 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def address(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """The address and strides of a tensor, 0 in dims of size 1; None for None."""
    if tensor is None:
        return None
    strides = zip(tensor.shape, tensor.stride())
    return pointer(tensor), tuple(0 if size == 1 else stride for size, stride in strides)


def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied unless its rows are contiguous and begin at multiples of 16 bytes."""
    if tensor is None:
        return None
    *strides, last = tensor.stride()
    unit = ALIGNMENT // tensor.element_size()
    if (
        (last == 1 or tensor.shape[-1] == 1)
        and not tensor.data_ptr() % ALIGNMENT
        and all(size == 1 or not stride % unit for size, stride in zip(tensor.shape, strides))
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor made contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def dropout(problem, seed: Tensor | None) -> tuple[int, int, float]:
    """Where the seed lies, the least word that is kept, what a kept element is multiplied by."""
    dropout_p = problem.dropout_p
    return pointer(seed), philox.threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def multiples_of_8(problem, *names: str) -> list[str]:
    """A refusal for each of the named sizes that does not fill vectors of 16 bytes."""
    return [
        f"{name}={size}, only positive multiples of 8"
        for name in names
        if (size := getattr(problem, name)) % 8 or not size
    ]
