"""Softmax over the last dim, scaled, biased, masked, with dropout, and its logarithm.

x (..., rows, columns) in any strides; out is contiguous. A program owns BLOCK_ROWS rows; a row of
up to MAX_BLOCK columns is read once and stays in registers, a longer one is read twice, its maximum
and sum first (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
The floor is one read and one write of the tensor.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch
from fastattn.kernels.philox import keep_tile
from fastattn.kernels.tuning import Config, choose
from torch import Tensor

MAX_BLOCK = 1024 if INTERPRETED else 8192  # columns


def configurations(columns: int) -> list[Config]:
    """Short rows share a program; a warp gets about 512 elements, up to 16 warps."""
    block = min(triton.next_power_of_2(max(columns, 64)), MAX_BLOCK)
    rows = max(1, (16384 if INTERPRETED else 2048) // block)
    warps = max(1, min(16, block * rows // 512))
    shapes = [(rows, warps), (rows, max(1, warps // 2)), (rows, min(16, warps * 2)), (1, warps)]
    return [
        dict(BLOCK_ROWS=rows, BLOCK_COLUMNS=block, num_warps=warps)
        for rows, warps in dict.fromkeys(shapes)
    ]


@triton.jit
def row_offset(row, size1, size2, strides):
    """Where each row starts in a tensor of three leading dims (., size1, size2)."""
    at = row // (size1 * size2) * strides[0]
    return at + row // size2 % size1 * strides[1] + row % size2 * strides[2]


@triton.jit
def _scores(
    x_ptr, mask_ptr, bias_ptr, row, column, rows, columns, causal_rows, scale,
    size1, size2, x_strides, mask_strides, bias_strides,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """``scale * x + bias``, -inf where hidden: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row_offset(row, size1, size2, x_strides)
    at = at[:, None] + column[None, :] * x_strides[3]
    scores = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(tl.float32) * scale
    if bias_ptr is not None:
        at = row_offset(row, size1, size2, bias_strides)
        at = at[:, None] + column[None, :] * bias_strides[3]
        scores += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    seen = inside
    if CAUSAL:
        seen = seen & (column[None, :] <= (row % causal_rows)[:, None])
    if mask_ptr is not None:
        at = row_offset(row, size1, size2, mask_strides)
        at = at[:, None] + column[None, :] * mask_strides[3]
        seen = seen & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _finite_max(row_max):
    """The maximum, 0 for a row that sees nothing: its exponentials are then 0, not NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, bias_ptr, seed_ptr, out_ptr, weights_ptr,
    rows, columns, causal_rows, scale, threshold, keep_scale,
    size1, size2, x_strides, mask_strides, bias_strides,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    if BLOCKS == 1:
        scores = _scores(
            x_ptr, mask_ptr, bias_ptr, row, column, rows, columns,
            causal_rows, scale, size1, size2, x_strides, mask_strides, bias_strides, CAUSAL,
        )  # fmt: skip
        row_max = tl.max(scores, 1)
        row_sum = tl.sum(tl.exp(scores - _finite_max(row_max)[:, None]), 1)
    else:
        for block in range(BLOCKS):
            block_scores = _scores(
                x_ptr, mask_ptr, bias_ptr, row, block * BLOCK_COLUMNS + column, rows, columns,
                causal_rows, scale, size1, size2, x_strides, mask_strides, bias_strides, CAUSAL,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(block_scores, 1))
            finite = _finite_max(new_max)
            block_sum = tl.sum(tl.exp(block_scores - finite[:, None]), 1)
            row_sum = row_sum * tl.exp(row_max - finite) + block_sum
            row_max = new_max
    row_max = _finite_max(row_max)
    factor = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
    log_sum = row_max + tl.log(row_sum)
    for block in range(BLOCKS):
        here = block * BLOCK_COLUMNS + column
        if BLOCKS > 1:
            scores = _scores(
                x_ptr, mask_ptr, bias_ptr, row, here, rows, columns,
                causal_rows, scale, size1, size2, x_strides, mask_strides, bias_strides, CAUSAL,
            )  # fmt: skip
        if LOG:
            # -inf - -inf, in a row that sees nothing, would be NaN.
            out = tl.where(scores == float("-inf"), scores, scores - log_sum[:, None])
        else:
            out = tl.exp(scores - row_max[:, None]) * factor[:, None]
        at = row[:, None] * columns + here[None, :]
        inside = (row < rows)[:, None] & (here < columns)[None, :]
        if seed_ptr is not None:
            tl.store(weights_ptr + at, out.to(weights_ptr.dtype.element_ty), mask=inside)
            first = block * BLOCK_COLUMNS
            keep = keep_tile(seed, threshold, row, first, row >> 32, 0, BLOCK_ROWS, BLOCK_COLUMNS)
            out = tl.where(keep, out * keep_scale, 0.0)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights_and_gradient(
    p_ptr, dout_ptr, seed, threshold, keep_scale, row, block, rows, columns, size1, size2,
    dout_strides,
    LOG: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """p, and the gradient of the weights before dropout, 0 where hidden: (., BLOCK_COLUMNS)."""
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    missing: tl.constexpr = float("-inf") if LOG else 0.0
    p = tl.load(p_ptr + row[:, None] * columns + column[None, :], mask=inside, other=missing)
    at = row_offset(row, size1, size2, dout_strides)
    at = at[:, None] + column[None, :] * dout_strides[3]
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        first = block * BLOCK_COLUMNS
        keep = keep_tile(seed, threshold, row, first, row >> 32, 0, BLOCK_ROWS, BLOCK_COLUMNS)
        dout = tl.where(keep, dout * keep_scale, 0.0)
    if LOG:
        dout = tl.where(p == float("-inf"), 0.0, dout)
    return p.to(tl.float32), dout


@triton.jit
def _softmax_bwd_kernel(
    p_ptr, dout_ptr, seed_ptr, dx_ptr, dscores_ptr,
    rows, columns, scale, threshold, keep_scale, size1, size2, dout_strides,
    LOG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    DROPOUT: tl.constexpr = seed_ptr is not None
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    delta = tl.zeros((BLOCK_ROWS,), tl.float32)
    for block in range(BLOCKS):
        p, dout = _weights_and_gradient(
            p_ptr, dout_ptr, seed, threshold, keep_scale, row, block, rows, columns, size1, size2,
            dout_strides, LOG, DROPOUT, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        delta += tl.sum(dout if LOG else p * dout, 1)
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    for block in range(BLOCKS):
        here = block * BLOCK_COLUMNS + column
        at = row[:, None] * columns + here[None, :]
        inside = (row < rows)[:, None] & (here < columns)[None, :]
        # Of a single block the compiler keeps the values that it loaded above.
        p, dout = _weights_and_gradient(
            p_ptr, dout_ptr, seed, threshold, keep_scale, row, block, rows, columns, size1, size2,
            dout_strides, LOG, DROPOUT, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        if LOG:
            dscores = tl.where(p == float("-inf"), 0.0, dout - tl.exp(p) * delta[:, None])
        else:
            dscores = p * (dout - delta[:, None])
        if dscores_ptr is not None:
            tl.store(dscores_ptr + at, dscores.to(dscores_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + at, (dscores * scale).to(dx_ptr.dtype.element_ty), mask=inside)


def softmax_fwd(
    x: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    weights: Tensor | None,
    *,
    causal_rows: int,
    scale: float,
    threshold: int,
    keep_scale: float,
    log: bool,
) -> None:
    """Write the softmax of x, (., ., ., columns), to `out` and, before dropout, to `weights`.

    Mask and bias are expanded to x; `out` and `weights` are contiguous. `causal_rows` is the length
    of the period after which the causal band starts again, 0 for none.
    """
    rows, columns, options = _launch_options("softmax_fwd", x)
    launch(
        _softmax_fwd_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        x, mask, bias, seed, out, weights,
        rows, columns, causal_rows, scale, threshold, keep_scale,
        x.shape[1], x.shape[2], x.stride(), _strides(mask), _strides(bias),
        CAUSAL=causal_rows > 0, LOG=log, **options,
    )  # fmt: skip


def softmax_bwd(
    p: Tensor,
    dout: Tensor,
    seed: Tensor | None,
    dx: Tensor,
    dscores: Tensor | None,
    *,
    scale: float,
    threshold: int,
    keep_scale: float,
    log: bool,
) -> None:
    """Write the gradients of x and, where asked for, of the scaled and biased scores.

    `p` is the weights before dropout, or the result with `log`. All but `dout`, (., ., ., columns),
    are contiguous.
    """
    rows, columns, options = _launch_options("softmax_bwd", dout)
    launch(
        _softmax_bwd_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        p, dout, seed, dx, dscores,
        rows, columns, scale, threshold, keep_scale, dout.shape[1], dout.shape[2], dout.stride(),
        LOG=log, **options,
    )  # fmt: skip


def _launch_options(name: str, x: Tensor) -> tuple[int, int, Config]:
    columns = x.shape[-1]
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    shape_class = (x.dtype, triton.next_power_of_2(columns))
    options = dict(choose(name, shape_class, configurations(columns), x))
    options["BLOCKS"] = triton.cdiv(columns, options["BLOCK_COLUMNS"])
    return rows, columns, options


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""
    half, single = torch.bfloat16, torch.float32
    for dtype, columns in ((half, 64), (half, 1024), (half, 40000), (single, 40000)):
        x = torch.empty(2, 4, 8, columns, device="meta", dtype=dtype)
        mask = torch.empty(2, 4, 8, columns, device="meta", dtype=torch.bool)
        seed = torch.empty(1, device="meta", dtype=torch.int64)
        scalars: dict[str, Any] = dict(scale=0.5, threshold=1 << 30, keep_scale=2.0)
        softmax_fwd(x, mask, x, seed, x, x, causal_rows=8, log=False, **scalars)
        softmax_bwd(x, x, seed, x, x, log=False, **scalars)
        if columns == 1024:
            softmax_fwd(x, None, None, None, x, None, causal_rows=0, log=True, **scalars)
            softmax_bwd(x, x, None, x, None, log=True, **scalars)
