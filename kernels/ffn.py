"""Feed-forward networks: the hidden layer, and its gradient; the other products are `gemm`'s.

``dropout(act(x W1^T + b1)) W2^T + b2`` and the gated form ``(act(x Wg^T) * (x Wu^T)) Wd^T``
(Shazeer, "GLU variants improve transformer", 2020). x (rows, d_model), hidden (rows, d_ff). A
program owns a tile of the hidden layer, of both products of the gated form: bias, activation and
dropout are applied to its sums in registers, and in the backward the hidden layer's gradient
becomes that of the pre-activation there, while the hidden layer is made again.
The floor is 2 * rows * d_model * d_ff flops a product or, of few rows, one read of the weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastattn.kernels.activation import activate, activate_with_slope
from fastattn.kernels.gemm import (
    GROUP,
    configurations,
    grid,
    halves,
    load_bias,
    load_tile,
    multiply,
    multiply_pair,
    operand,
    store_tile,
    sum_partials,
    tile_origin,
)
from fastattn.kernels.launch import INTERPRETED, launch, precision, processors
from fastattn.kernels.philox import keep_tile
from fastattn.kernels.tuning import Config, choose
from torch import Tensor


@triton.jit
def _dropout_factor(
    seed_ptr, threshold, keep_scale, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What dropout multiplies a tile of the hidden layer by."""
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    seed = tl.load(seed_ptr)
    keep = keep_tile(seed, threshold, rows, column, rows >> 32, 0, BLOCK_M, BLOCK_N)
    return tl.where(keep, keep_scale, 0.0)


@triton.jit
def _finish_hidden(
    gate, up, hidden_ptr, preact_ptr, b1_ptr, seed_ptr,
    row, column, rows, d_ff, threshold, keep_scale,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """From a tile's products to the hidden layer, by PART columns to spare registers."""
    if gate.shape[1] > PART:
        gate, right = halves(gate)
        right_up = up
        if GATED:
            up, right_up = halves(up)
        _finish_hidden(
            gate, up, hidden_ptr, preact_ptr, b1_ptr, seed_ptr,
            row, column, rows, d_ff, threshold, keep_scale, GATED, ACTIVATION, PART,
        )  # fmt: skip
        _finish_hidden(
            right, right_up, hidden_ptr, preact_ptr, b1_ptr, seed_ptr,
            row, column + gate.shape[1], rows, d_ff, threshold, keep_scale, GATED, ACTIVATION, PART,
        )  # fmt: skip
    else:
        if b1_ptr is not None:
            gate += load_bias(b1_ptr, column, d_ff, gate.shape[1])
        if preact_ptr is not None:
            store_tile(preact_ptr, gate, row, column, rows, d_ff)
            if GATED:
                store_tile(preact_ptr + tl.cast(rows, tl.int64) * d_ff, up, row, column, rows, d_ff)
        hidden = activate(gate, ACTIVATION)
        if GATED:
            hidden *= up
        if seed_ptr is not None:
            hidden *= _dropout_factor(
                seed_ptr, threshold, keep_scale, row, column, gate.shape[0], gate.shape[1]
            )
        store_tile(hidden_ptr, hidden, row, column, rows, d_ff)


@triton.jit
def _hidden_tile(
    index, hidden_ptr, preact_ptr, x, w1, w_up, b1_ptr, seed_ptr,
    rows, d_model, d_ff, threshold, keep_scale, down, across, strides,
    X: tl.constexpr, W1: tl.constexpr, W_UP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(index, down, across, BLOCK_M, BLOCK_N, GROUP)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = gate
    if w_up is None:
        gate = multiply(
            gate, x, w1, row, column, rows, d_ff, 0, d_model, strides,
            X, W1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        gate, up = multiply_pair(
            gate, up, x, w1, w_up, row, column, rows, d_ff, 0, d_model, strides,
            X, W1, W_UP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    _finish_hidden(
        gate, up, hidden_ptr, preact_ptr, b1_ptr, seed_ptr,
        row, column, rows, d_ff, threshold, keep_scale, w_up is not None, ACTIVATION, PART,
    )  # fmt: skip


@triton.jit
def _hidden_fwd_kernel(
    hidden_ptr, preact_ptr, x, w1, w_up, b1_ptr, seed_ptr,
    rows, d_model, d_ff, threshold, keep_scale, down, across, strides,
    X: tl.constexpr, W1: tl.constexpr, W_UP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for index in range(tl.program_id(0), down * across, tl.num_programs(0)):
            _hidden_tile(
                index, hidden_ptr, preact_ptr, x, w1, w_up, b1_ptr, seed_ptr,
                rows, d_model, d_ff, threshold, keep_scale, down, across, strides,
                X, W1, W_UP, ACTIVATION, PRECISION, GROUP, PART, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _hidden_tile(
            tl.program_id(0), hidden_ptr, preact_ptr, x, w1, w_up, b1_ptr, seed_ptr,
            rows, d_model, d_ff, threshold, keep_scale, down, across, strides,
            X, W1, W_UP, ACTIVATION, PRECISION, GROUP, PART, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _finish_preact(
    dhidden, dpreact_ptr, hidden_ptr, sums_ptr, preact_ptr, seed_ptr,
    row, column, rows, d_ff, threshold, keep_scale,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """From a tile of the hidden layer's gradient to the pre-activation's, by PART columns."""
    BLOCK_M: tl.constexpr = dhidden.shape[0]
    BLOCK_N: tl.constexpr = dhidden.shape[1]
    if BLOCK_N > PART:
        left, right = halves(dhidden)
        _finish_preact(
            left, dpreact_ptr, hidden_ptr, sums_ptr, preact_ptr, seed_ptr,
            row, column, rows, d_ff, threshold, keep_scale, GATED, ACTIVATION, PART,
        )  # fmt: skip
        _finish_preact(
            right, dpreact_ptr, hidden_ptr, sums_ptr, preact_ptr, seed_ptr,
            row, column + BLOCK_N // 2, rows, d_ff, threshold, keep_scale, GATED, ACTIVATION, PART,
        )  # fmt: skip
    else:
        if seed_ptr is not None:
            factor = _dropout_factor(seed_ptr, threshold, keep_scale, row, column, BLOCK_M, BLOCK_N)
            dhidden *= factor
        gate = load_tile(
            preact_ptr, (d_ff, 1), row, column, rows, d_ff, "strided", BLOCK_M, BLOCK_N
        )
        hidden, slope = activate_with_slope(gate.to(tl.float32), ACTIVATION)
        if GATED:
            second = tl.cast(rows, tl.int64) * d_ff
            up = load_tile(
                preact_ptr + second, (d_ff, 1), row, column, rows, d_ff, "strided", BLOCK_M, BLOCK_N
            ).to(tl.float32)
            store_tile(dpreact_ptr + second, dhidden * hidden, row, column, rows, d_ff)
            dhidden *= up
            hidden *= up
        dgate = dhidden * slope
        store_tile(dpreact_ptr, dgate, row, column, rows, d_ff)
        if sums_ptr is not None:
            across = tl.arange(0, BLOCK_N)
            tl.store(sums_ptr + column + across, tl.sum(dgate, 0), mask=across < d_ff - column)
        if hidden_ptr is not None:
            if seed_ptr is not None:
                hidden *= factor
            store_tile(hidden_ptr, hidden, row, column, rows, d_ff)


@triton.jit
def _preact_tile(
    index, dpreact_ptr, hidden_ptr, sums_ptr, dy, w2, preact_ptr, seed_ptr,
    rows, d_ff, d_out, threshold, keep_scale, down, across, strides,
    DY: tl.constexpr, W2: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(index, down, across, BLOCK_M, BLOCK_N, GROUP)
    dhidden = multiply(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), dy, w2, row, column, rows, d_ff, 0, d_out,
        strides, DY, W2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if sums_ptr is not None:
        sums_ptr += (row // BLOCK_M).to(tl.int64) * d_ff
    _finish_preact(
        dhidden, dpreact_ptr, hidden_ptr, sums_ptr, preact_ptr, seed_ptr,
        row, column, rows, d_ff, threshold, keep_scale, GATED, ACTIVATION, PART,
    )  # fmt: skip


@triton.jit
def _preact_bwd_kernel(
    dpreact_ptr, hidden_ptr, sums_ptr, dy, w2, preact_ptr, seed_ptr,
    rows, d_ff, d_out, threshold, keep_scale, down, across, strides,
    DY: tl.constexpr, W2: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for index in range(tl.program_id(0), down * across, tl.num_programs(0)):
            _preact_tile(
                index, dpreact_ptr, hidden_ptr, sums_ptr, dy, w2, preact_ptr, seed_ptr,
                rows, d_ff, d_out, threshold, keep_scale, down, across, strides,
                DY, W2, GATED, ACTIVATION, PRECISION, GROUP, PART, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _preact_tile(
            tl.program_id(0), dpreact_ptr, hidden_ptr, sums_ptr, dy, w2, preact_ptr, seed_ptr,
            rows, d_ff, d_out, threshold, keep_scale, down, across, strides,
            DY, W2, GATED, ACTIVATION, PRECISION, GROUP, PART, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _column_sums_kernel(
    sums_ptr, x_ptr, rows, columns, share, strides,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    split = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS
    first = split * share
    last = tl.minimum(rows, first + share)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for row in range(first, last, BLOCK_ROWS):
        acc += load_tile(
            x_ptr, strides, row, column, last, columns, "strided", BLOCK_ROWS, BLOCK_COLUMNS
        ).to(tl.float32)
    across = tl.arange(0, BLOCK_COLUMNS)
    sums_ptr += split.to(tl.int64) * columns + column
    tl.store(sums_ptr + across, tl.sum(acc, 0), mask=across < columns - column)


def hidden_fwd(
    x: Tensor,
    w1: Tensor,
    w_up: Tensor | None,
    b1: Tensor | None,
    seed: Tensor | None,
    preact: Tensor | None,
    hidden: Tensor,
    *,
    activation: str,
    threshold: int,
    keep_scale: float,
) -> None:
    """Write the hidden layer, and what it is before the activation, gate and up, to `preact`.

    The operands, (rows, d_model) and (d_ff, d_model), lie in any strides; the results, (rows, d_ff)
    and with `w_up` (2, rows, d_ff), are contiguous, as is `b1`.
    """
    (rows, d_model), d_ff = x.shape, w1.shape[0]
    candidates = configurations(
        (x, w1, w_up), (rows, d_ff, d_model), accumulators=1 if w_up is None else 2, narrowest=128
    )
    options, down, across = _launch_options("hidden_fwd", x, w1.T, candidates)
    described = options.pop("DESCRIPTORS")
    m, n, k = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    operands = [
        operand(x, (m, k), described),
        operand(w1.T, (k, n), described),
        operand(None if w_up is None else w_up.T, (k, n), described),
    ]
    launch(
        _hidden_fwd_kernel, grid(down * across, options, x),
        hidden, preact, *(one.matrix for one in operands), b1, seed,
        rows, d_model, d_ff, threshold, keep_scale, down, across,
        tuple(one.strides for one in operands), *(one.layout for one in operands),
        ACTIVATION=activation, PRECISION=precision(x.dtype), GROUP=GROUP, PART=_part(x, seed),
        **options,
    )  # fmt: skip


def preact_bwd(
    dy: Tensor,
    w2: Tensor,
    preact: Tensor,
    seed: Tensor | None,
    dpreact: Tensor,
    hidden: Tensor | None,
    db1: Tensor | None,
    *,
    activation: str,
    threshold: int,
    keep_scale: float,
) -> None:
    """Write the gradient of `preact`; the hidden layer and the gradient of b1 where asked for.

    `preact` is (rows, d_ff) or, gated, (2, rows, d_ff). All but dy (rows, d_out) and w2
    (d_out, d_ff) are contiguous.
    """
    (rows, d_out), d_ff = dy.shape, w2.shape[1]
    # Dropout takes registers.
    largest = 1 << 16 if seed is None else (1 << 15) // dy.element_size()
    candidates = configurations((dy, w2), (rows, d_ff, d_out), narrowest=128, largest=largest)
    options, down, across = _launch_options("preact_bwd", dy, w2, candidates)
    described = options.pop("DESCRIPTORS")
    m, n, k = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    operands = [operand(dy, (m, k), described), operand(w2, (k, n), described)]
    sums = None
    if db1 is not None:
        sums = db1.new_empty((triton.cdiv(rows, m), d_ff), dtype=torch.float32)
    launch(
        _preact_bwd_kernel, grid(down * across, options, dy),
        dpreact, hidden, sums, *(one.matrix for one in operands), preact, seed,
        rows, d_ff, d_out, threshold, keep_scale, down, across,
        tuple(one.strides for one in operands), *(one.layout for one in operands),
        GATED=preact.dim() == 3, ACTIVATION=activation, PRECISION=precision(dy.dtype),
        GROUP=GROUP, PART=_part(dy, seed), **options,
    )  # fmt: skip
    if sums is not None and db1 is not None:
        sum_partials(sums, None, db1)


def column_sums(x: Tensor, out: Tensor) -> None:
    """Write the sum over the rows of x (rows, columns), in any strides, to `out`."""
    rows, columns = x.shape
    block_rows, block_columns = (256, 256) if INTERPRETED else (32, 128)
    blocks = triton.cdiv(columns, block_columns)
    splits = max(1, min(rows // (4 * block_rows), 4 * processors(x) // blocks))
    share = triton.cdiv(rows, splits)
    splits = triton.cdiv(rows, share)
    sums = out.new_empty((splits, columns), dtype=torch.float32)
    launch(
        _column_sums_kernel, (blocks * splits,),
        sums, x, rows, columns, share, x.stride(),
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip
    sum_partials(sums, None, out)


def _part(x: Tensor, seed: Tensor | None) -> int:
    """How many columns of its tile a program finishes at a time: 128 bytes, with dropout 64."""
    if INTERPRETED:
        return 128
    return 128 // x.element_size() if seed is None else 64


def _launch_options(
    name: str, a: Tensor, b: Tensor, candidates: list[Config]
) -> tuple[Config, int, int]:
    """The configuration of a kernel that owns tiles of a @ b, and how many there are each way."""
    (rows, inner), columns = a.shape, b.shape[1]
    shape_class = (a.dtype, *map(triton.next_power_of_2, (rows, columns, inner)))
    options = dict(choose(name, shape_class, candidates, a))
    down, across = triton.cdiv(rows, options["BLOCK_M"]), triton.cdiv(columns, options["BLOCK_N"])
    return options, down, across


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    seed = torch.empty(1, device="meta", dtype=torch.int64)
    sizes = (
        (4096, 16384, 4096), (16, 16384, 1024), (999, 999, 999), (512, 2048, 512), (9, 999, 999),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        for rows, d_ff, d_model in sizes[: 3 if dtype == torch.float32 else None]:
            x, w1, w2 = matrix(rows, d_model), matrix(d_ff, d_model), matrix(d_model, d_ff)
            hidden, preacts, b1 = matrix(rows, d_ff), matrix(2, rows, d_ff), matrix(d_ff)
            scalars: dict[str, Any] = dict(threshold=1 << 30, keep_scale=2.0)
            silu, gelu = scalars | dict(activation="silu"), scalars | dict(activation="gelu")
            hidden_fwd(x, w1, w1, None, None, preacts, hidden, **silu)
            preact_bwd(x, w2, preacts, None, preacts, hidden, None, **silu)
            if rows == 4096:
                hidden_fwd(x, w1, None, b1, seed, hidden, hidden, **gelu)
                preact_bwd(x, w2, hidden, seed, hidden, hidden, b1, **gelu)
    column_sums(hidden, b1)
