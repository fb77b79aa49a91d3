"""Cross entropy of the softmax over the last dim and class indices, with label smoothing.

logits (., ., ., columns) in any strides; the loss, the maximum and the sum of exp(logit - maximum)
of each row; the gradient is contiguous. In the forward a program owns BLOCK_ROWS rows and reads
them once, a block of columns at a time, with a running maximum (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018); in the backward it owns one block of columns of them.
The floor is one read of the logits in the forward, one read and one write in the backward.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch
from fastattn.kernels.softmax import row_offset
from fastattn.kernels.tuning import Config, choose
from torch import Tensor

# Of one row: two or three programs of 8 warps, of which one loads, fit on a multiprocessor.
MAX_BLOCK_BYTES = 16384


def configurations(columns: int, dtype: torch.dtype) -> list[Config]:
    """Short rows share a program; a thread holds 64 bytes of a block."""
    most = 4096 if INTERPRETED else MAX_BLOCK_BYTES // dtype.itemsize
    block = min(triton.next_power_of_2(max(columns, 64)), most)
    rows = max(1, (65536 if INTERPRETED else 2048) // block)
    warps = max(1, min(16, block * rows * dtype.itemsize // 2048))
    shapes = [
        (rows, block, warps),
        (rows, block, max(1, warps // 2)),
        (rows, block, min(16, warps * 2)),
        (rows, max(64, block // 2), max(1, warps // 2)),
        (1, block, warps),
    ]
    return [
        dict(BLOCK_ROWS=rows, BLOCK_COLUMNS=block, num_warps=warps)
        for rows, block, warps in dict.fromkeys(shapes)
    ]


@triton.jit
def block_logits(logits_ptr, bias_ptr, row_at, live, column, columns, column_stride):
    """Of live rows, -inf elsewhere: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    at = row_at[:, None] + column[None, :] * column_stride
    inside = live[:, None] & (column < columns)[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    return logits


@triton.jit
def row_losses(
    logits_ptr, bias_ptr, row_at, target, seen, columns, column_stride, smooth,
    SMOOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each row's loss, maximum and sum, (BLOCK_ROWS,): 0 where unseen, NaN for a wrong target."""
    valid = seen & (target >= 0) & (target < columns)
    chosen_at = row_at + target * column_stride
    chosen = tl.load(logits_ptr + chosen_at, mask=valid, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        chosen += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float32)
    # The mean logit is taken relative to this one: it may be far from 0.
    center = tl.where(chosen == float("-inf"), 0.0, chosen)
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    # Of a column in every block, added up at the end: (BLOCK_ROWS, BLOCK_COLUMNS).
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    distances = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        logits = block_logits(logits_ptr, bias_ptr, row_at, valid, column, columns, column_stride)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # 0 for a row of -inf so far: its exponentials are then 0, not NaN.
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        sums = sums * tl.exp(row_max - finite)[:, None] + tl.exp(logits - finite[:, None])
        row_max = new_max
        if SMOOTH:
            inside = (column < columns)[None, :]
            distances += tl.where(inside, logits - center[:, None], 0.0)
    row_sum = tl.sum(sums, 1)
    losses = tl.log(row_sum) + (row_max - chosen)
    if SMOOTH:
        losses -= smooth * tl.sum(distances, 1)
    losses = tl.where(row_sum == 0.0, float("inf"), losses)
    wrong = tl.where(seen, float("nan"), 0.0)
    return (
        tl.where(valid, losses, wrong),
        tl.where(valid, row_max, 0.0),
        tl.where(valid, row_sum, wrong),
    )


@triton.jit
def block_gradient(logits, column, target, live, row_max, row_sum, factor, smooth, hot):
    """(p - smooth - hot at the target) * factor, 0 in other rows: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    p = tl.exp(logits - row_max[:, None]) * (1.0 / row_sum)[:, None]
    wanted = tl.where(column[None, :] == target[:, None], smooth + hot, smooth)
    return tl.where(live[:, None], (p - wanted) * factor[:, None], 0.0)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, losses_ptr, stats_ptr,
    rows, columns, size1, size2, strides, ignore_index, smooth,
    SMOOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    seen = (row < rows) & (target != ignore_index)
    losses, row_max, row_sum = row_losses(
        logits_ptr, None, row_offset(row, size1, size2, strides), target, seen, columns,
        strides[3], smooth, SMOOTH, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    tl.store(losses_ptr + row, losses, mask=row < rows)
    tl.store(stats_ptr + 2 * row, row_max, mask=row < rows)
    tl.store(stats_ptr + 2 * row + 1, row_sum, mask=row < rows)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, stats_ptr, factor_ptr, dlogits_ptr,
    rows, columns, size1, size2, strides, factor_stride, ignore_index, smooth, hot,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    row_max = tl.load(stats_ptr + 2 * row, mask=row < rows, other=0.0)
    row_sum = tl.load(stats_ptr + 2 * row + 1, mask=row < rows, other=0.0)
    factor = tl.load(factor_ptr + row * factor_stride, mask=row < rows, other=0.0)
    live = (target != ignore_index) & (row_sum != 0.0)
    row_at = row_offset(row, size1, size2, strides)
    logits = block_logits(logits_ptr, None, row_at, live, column, columns, strides[3])
    dlogits = block_gradient(logits, column, target, live, row_max, row_sum, factor, smooth, hot)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dlogits_ptr + at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    stats: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Write the loss of each row of logits, (., ., ., columns), and its maximum and sum.

    Targets and losses, (rows,) in any shape, and `stats`, (rows, 2), are contiguous. A row that is
    ignored has 0, one whose target is no class has NaN.
    """
    rows, columns = targets.numel(), logits.shape[-1]
    options = _options("cross_entropy_fwd", logits)
    launch(
        _cross_entropy_fwd_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        logits, targets, losses, stats,
        rows, columns, logits.shape[1], logits.shape[2], logits.stride(), ignore_index,
        label_smoothing / max(columns, 1), SMOOTH=label_smoothing > 0.0, **options,
    )  # fmt: skip


def cross_entropy_bwd(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    factor: Tensor,
    dlogits: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Write the gradient of the logits, that of each row's own loss times its factor.

    `factor` is float32 of one element or (rows,) in any stride; `dlogits` is contiguous.
    """
    rows, columns = targets.numel(), logits.shape[-1]
    options = _options("cross_entropy_bwd", logits)
    blocks = triton.cdiv(columns, options["BLOCK_COLUMNS"])
    launch(
        _cross_entropy_bwd_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]) * blocks,),
        logits, targets, stats, factor, dlogits,
        rows, columns, logits.shape[1], logits.shape[2], logits.stride(),
        factor_stride(factor), ignore_index, label_smoothing / max(columns, 1),
        1.0 - label_smoothing, **options,
    )  # fmt: skip


def factor_stride(factor: Tensor) -> int:
    """From one row's factor to the next: 0 where there is one for all."""
    return factor.stride(0) if factor.numel() > 1 else 0


def _options(name: str, logits: Tensor) -> Config:
    columns = logits.shape[-1]
    shape_class = (logits.dtype, triton.next_power_of_2(columns))
    return choose(name, shape_class, configurations(columns, logits.dtype), logits)


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""
    for dtype, columns in itertools.product((torch.bfloat16, torch.float32), (64, 1024, 128256)):
        logits = torch.empty(1, 2, 512, columns, device="meta", dtype=dtype)
        targets = torch.empty(1024, device="meta", dtype=torch.int64)
        losses, stats, factor = (
            torch.empty(size, device="meta") for size in ((1024,), (1024, 2), (1,))
        )
        smoothing = 0.0 if columns == 1024 else 0.1
        scalars: dict[str, Any] = dict(ignore_index=-100, label_smoothing=smoothing)
        cross_entropy_fwd(logits, targets, losses, stats, **scalars)
        cross_entropy_bwd(logits, targets, stats, factor, logits, **scalars)
