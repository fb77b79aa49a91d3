"""How a kernel is launched: on its tensors' device, interpreted, or compiled ahead of time."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Target(NamedTuple):
    """What a kernel is compiled for: it decides on the configuration."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int | str  # 80, 90, 100; "gfx942"; 0 for the interpreter

    @property
    def family(self) -> int:
        """Of NVIDIA's chips the one whose tiles this takes: 80, 90 or 100; of others 0."""
        if not isinstance(self.arch, int) or self.backend != "cuda":
            return 0
        # sm_120's shared memory and products are rather those of sm_86 than of sm_100.
        return self.arch // 10 * 10 if self.arch in (90, 100, 103) else 80

    @property
    def gfx9(self) -> bool:
        """Whether this is one of AMD's chips for servers, whose warps have 64 lanes."""
        return str(self.arch).startswith("gfx9")

    @property
    def large(self) -> bool:
        """Whether this is a chip for servers, with at least 160 KiB of shared memory."""
        return self.arch in (80, 90, 100, 103)


@triton.jit
def _probe():
    pass


# TRITON_INTERPRET=1 at import: kernels run in Python, on tensors of any device.
INTERPRETED: bool = not isinstance(_probe, triton.runtime.JITFunction)
INTERPRETER = Target("interpreter", 0)
_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")
if INTERPRETED:
    importlib.import_module("fastattn.kernels.interpreter")


class Compiled(NamedTuple):
    """One kernel compiled ahead of time."""

    kernel: str
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    result: Any  # Triton's CompiledKernel


_ahead_of_time: tuple[Target, list[Compiled]] | None = None


@contextmanager
def ahead_of_time(target: Target) -> Iterator[list[Compiled]]:
    """In the block, launches on meta tensors compile for `target` and run nothing.

    Triton's active driver must be one that reports this target.
    """
    global _ahead_of_time
    compiled: list[Compiled] = []
    _ahead_of_time = (target, compiled)
    try:
        yield compiled
    finally:
        _ahead_of_time = None


@functools.cache
def _target_of(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0])
    return Target("cuda", 10 * properties.major + properties.minor)


def target(tensor: Tensor) -> Target:
    """What a kernel on `tensor` is compiled for."""
    if _ahead_of_time is not None:
        return _ahead_of_time[0]
    return INTERPRETER if INTERPRETED else _target_of(tensor.device.index)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` on the device and the current stream of its first argument.

    Args:
        kernel: a ``triton.jit`` function.
        grid: how many programs; an empty one runs nothing.
        args: tensors, tuples of them, None for an absent one, and numbers. The first is a tensor or
            begins with one.
        options: constexprs, num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _ahead_of_time is not None:
        result = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
        _ahead_of_time[1].append(Compiled(kernel.__name__, options, result))
    elif INTERPRETED:
        kernel[grid](*args, **options)
    else:
        first = args[0]
        while isinstance(first, tuple):
            first = first[0]
        with torch.cuda.device(first.device):
            kernel[grid](*args, enable_fp_fusion=True, **options)


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products: TF32 only where torch's own products may use it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 the one switch cannot be read once the other is set.
    allowed = matmul.fp32_precision == "tf32" if _FP32_PRECISION else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@functools.cache
def _processors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """How many multiprocessors work on kernels on `tensor`."""
    if _ahead_of_time is not None:
        return 132
    return 16 if INTERPRETED else _processors_of(tensor.device.index)
