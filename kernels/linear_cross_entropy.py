"""Cross entropy of a chunk of rows of a linear layer's logits, and their gradient in the same pass.

logits (rows, columns), float32, as a product of matrices left them. A program owns BLOCK_ROWS rows:
it reads them for the losses, maxima and sums (see ``cross_entropy``), then once more, from the
end, which the cache still holds, and writes their gradient: float32 over the logits themselves,
else rounded to a tensor of its own (after Liger, Hsu et al. 2024, arXiv 2410.10989).
The floor is one read of the chunk and one write of its gradient.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from fastattn.kernels.cross_entropy import (
    block_gradient,
    block_logits,
    configurations,
    factor_stride,
    row_losses,
)
from fastattn.kernels.launch import launch
from fastattn.kernels.tuning import choose
from torch import Tensor

# Of what rounding a gradient to float16 leaves: at most 2^-12, it becomes at most a half.
REST_SCALE = 2.0**11


@triton.jit
def _linear_cross_entropy_kernel(
    logits_ptr, bias_ptr, targets_ptr, losses_ptr, stats_ptr, factor_ptr, dlogits_ptr, rest_ptr,
    rows, columns, row_stride, factor_stride, ignore_index, smooth, hot, rest_scale,
    SMOOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_at = row * row_stride
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    seen = (row < rows) & (target != ignore_index)
    if losses_ptr is not None:
        losses, row_max, row_sum = row_losses(
            logits_ptr, bias_ptr, row_at, target, seen, columns, 1, smooth,
            SMOOTH, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.store(losses_ptr + row, losses, mask=row < rows)
        tl.store(stats_ptr + 2 * row, row_max, mask=row < rows)
        tl.store(stats_ptr + 2 * row + 1, row_sum, mask=row < rows)
    else:
        row_max = tl.load(stats_ptr + 2 * row, mask=row < rows, other=0.0)
        row_sum = tl.load(stats_ptr + 2 * row + 1, mask=row < rows, other=0.0)
    if dlogits_ptr is not None:
        factor = tl.load(factor_ptr + row * factor_stride, mask=row < rows, other=0.0)
        live = seen & (row_sum != 0.0)
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        for block in range(blocks):
            first = (blocks - 1 - block) * BLOCK_COLUMNS
            column = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
            logits = block_logits(logits_ptr, bias_ptr, row_at, live, column, columns, 1)
            dlogits = block_gradient(
                logits, column, target, live, row_max, row_sum, factor, smooth, hot
            )
            at = row_at[:, None] + column[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            rounded = dlogits.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + at, rounded, mask=inside)
            if rest_ptr is not None:
                rest = (dlogits - rounded.to(tl.float32)) * rest_scale
                tl.store(rest_ptr + at, rest.to(rest_ptr.dtype.element_ty), mask=inside)


def linear_cross_entropy_chunk(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    losses: Tensor | None,
    stats: Tensor,
    factor: Tensor | None,
    dlogits: Tensor | None,
    rest: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Write each row's loss, maximum and sum, and the gradient of its logits times its factor.

    Without `losses` the statistics are given, without `dlogits` no gradient is written. A row that
    is ignored has 0, whatever its logits; one whose target is no class has NaN.

    Args:
        logits: (rows, columns), float32, of unit-strided rows, before the bias.
        bias: (columns,) or None.
        targets: (rows,). losses: (rows,) or None. stats: (rows, 2).
        factor: float32 of one element or (rows,) in any stride; None without `dlogits`.
        dlogits: of the shape and strides of the logits, or these themselves.
        rest: what rounding to `dlogits` left, times REST_SCALE, or None.
    """
    rows, columns = logits.shape
    shape_class = (logits.dtype, triton.next_power_of_2(columns))
    candidates = configurations(columns, logits.dtype)
    options = choose("linear_cross_entropy", shape_class, candidates, logits)
    launch(
        _linear_cross_entropy_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        logits, bias, targets, losses, stats, factor, dlogits, rest,
        rows, columns, logits.stride(0), 0 if factor is None else factor_stride(factor),
        ignore_index, label_smoothing / max(columns, 1), 1.0 - label_smoothing, REST_SCALE,
        SMOOTH=label_smoothing > 0.0, **options,
    )  # fmt: skip


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    targets = empty(1024, dtype=torch.int64)
    losses, stats, factor = empty(1024), empty(1024, 2), empty(1)
    plain: dict[str, Any] = dict(ignore_index=-100, label_smoothing=0.0)
    smoothed: dict[str, Any] = dict(ignore_index=-100, label_smoothing=0.1)
    for columns in (1024, 128256):
        logits = empty(1024, columns)
        linear_cross_entropy_chunk(logits, None, targets, losses, stats, None, None, None, **plain)
        dtypes = (torch.bfloat16, torch.float16) if columns > 1024 else (torch.float16,)
        for dtype, forward in itertools.product(dtypes, (True, False)):
            low = empty(1024, columns, dtype=dtype)
            rest = low if dtype == torch.float16 else None
            linear_cross_entropy_chunk(
                logits, low[0] if forward else None, targets, losses if forward else None, stats,
                factor, low, rest, **(smoothed if forward else plain),
            )  # fmt: skip
