"""Attention's backward: the gradients of q, k, v and of a bias.

Weights are computed again from q, k and lse (FlashAttention-2, Dao 2023, arXiv 2307.08691), with
``ds = p * (dout.v - delta)``, ``delta = dout.out - dlse``. Nothing is added by atomics: equal calls
give equal bits. One kernel owns blocks of keys and writes dk and dv, summed over the heads that
share them; one owns blocks of rows and writes dq, one owns blocks of the bias. What the band hides
is skipped. The floor is 14 * head_dim flops a visible score: 5 products, of which 2 are made twice.
"""

import math

import torch
import triton
import triton.language as tl
from fastattn.kernels.attention_scores import (
    LOG2E,
    SIZES,
    Call,
    broadcast_of,
    extent,
    kept,
    key_range,
    load_tile,
    query_range,
    rows_of,
    sample_calls,
    store_tile,
    transformed,
)
from fastattn.kernels.launch import INTERPRETED, launch, precision, target
from fastattn.kernels.tuning import Config, choose
from torch import Tensor


def configurations(on: Tensor, head_dim: int, crowding: int, own_keys: bool) -> list[Config]:
    """Tiles by chip, width of the elements and head_dim; `own_keys` is the kernel of dk and dv.

    That one holds two results and two tiles of scores in registers, so the side that it owns
    shrinks first. gfx9 as in `attention.configurations`.
    """
    chip, wide = target(on), on.dtype == torch.float32
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if INTERPRETED:
        shapes = [(128, 128, 4, 1)]
    elif wide and not chip.gfx9:
        middle = (16, 32) if crowding and not own_keys else (32, 16)
        shapes = [(*((32, 32), middle, (16, 16))[size], 8, 1), (16, 16, 4, 1)]
    elif chip.backend == "hip":
        roomy = chip.gfx9 and not (wide or crowding or size)
        fits = 32 if wide and size == 2 else 64
        shapes = [(128, 32, 4, 1) if roomy else (fits, 16, 4, 1), (32, 16, 4, 1)]
    elif crowding and own_keys:
        shapes = [((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1))[size], (32, 32, 4, 1)]
    elif crowding or size == 2:
        shapes = [((64, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1))[size], (32, 32, 4, 1)]
    elif size == 0 or not own_keys:
        shapes = [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 4, 2), (128, 128, 8, 2)]
        if size == 1 and chip.family < 90:
            shapes = [(64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 1)]
    else:
        shapes = [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 1)]
        if chip.family < 90:
            shapes = [(64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 1)]
    sides = ("BLOCK_N", "BLOCK_M") if own_keys else ("BLOCK_M", "BLOCK_N")
    return [
        {sides[0]: own, sides[1]: other, "num_warps": warps, "num_stages": stages}
        for own, other, warps, stages in shapes
    ]


@triton.jit
def _row_statistics(lse, delta, batch, head, first_row, local, inside):
    """What the kernel of delta wrote. A row outside, its dout and delta 0, gives gradient 0."""
    at = batch * lse.batch + head * lse.head + first_row * lse.row
    row_lse = tl.load(lse.ptr + at + local, mask=inside, other=0.0)
    return row_lse, tl.load(delta.ptr + at + local, mask=inside, other=0.0)


@triton.jit
def _weights(
    products, dp, row_lse, row_delta, call, batch, head, i0, di, j0, dj, keep, offset, len_q, len_k,
    PLAIN: tl.constexpr, BOUNDARY: tl.constexpr,
):  # fmt: skip
    """The weights that dropout keeps, the gradient of the scores, and that before the softcap."""
    scores, slope = transformed(
        products, call, batch, head, 0, i0, di, j0, dj, offset, len_q, len_k, PLAIN, BOUNDARY
    )
    if PLAIN:
        scores = scores * (call.softmax_scale * LOG2E)
    p = tl.exp2(scores - row_lse)
    weights = p
    if call.seed is not None:
        weights = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * call.keep_scale, 0.0)
    ds = p * (dp - row_delta)
    return weights, ds, ds * slope


@triton.jit
def _attention_delta_kernel(
    out, dout, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, rows, heads, seqlen_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """delta of BLOCK_ROWS rows (batch, head, i); lse in units of log2, +inf for rows without keys.

    The weights of these rows, ``exp2(score - lse)``, are then 0.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DV)
    batch, head, i = row // (heads * seqlen_q), row // seqlen_q % heads, row % seqlen_q
    inside = (row < rows)[:, None] & (d < HEAD_DIM_V)[None, :]
    at = (batch * out.batch + head * out.head + i * out.row)[:, None] + d[None, :]
    o = tl.load(out.ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = (batch * dout.batch + head * dout.head + i * dout.row)[:, None] + d[None, :]
    do = tl.load(dout.ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < rows)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(lse2_ptr + row, lse, mask=row < rows)


@triton.jit
def _walk_rows(
    dk, dv, keys, values, q, dout, lse, delta, call, batch, first_head, group_size, first_key, dj,
    start_q, len_q, len_k, offset, first, last,
    PLAIN: tl.constexpr, BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the group's rows from `first` to before `last` give to dk and dv of some keys."""
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    di = tl.arange(0, BLOCK_M)
    # Not a loop over heads around one over rows: what they would share takes registers.
    for step in range(tl.cdiv(last - first, BLOCK_M) * group_size):
        first_row = first + step // group_size * BLOCK_M
        head = first_head + step % group_size
        inside = first_row + di < len_q
        at = start_q + first_row
        q_tile = load_tile(q, batch, head, at, di, inside, d, HEAD_DIM, False)  # (BLOCK_M, BLOCK_D)
        do = load_tile(dout, batch, head, at, di, inside, d_v, HEAD_DIM_V, False)
        row_lse, row_delta = _row_statistics(lse, delta, batch, head, at, di, inside)
        products = tl.dot(keys, tl.trans(q_tile), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        keep = 0
        if call.seed is not None:
            keep = kept(call, batch, head, first_row + di, first_key, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep)
        weights, _, ds = _weights(
            products, dp, row_lse[None, :], row_delta[None, :], call, batch, head, first_row,
            di[None, :], first_key, dj[:, None], keep, offset, len_q, len_k, PLAIN, BOUNDARY,
        )  # fmt: skip
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*SIZES, "blocks"])
def _attention_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, call, seqlen_q, seqlen_k, offset, blocks, heads_kv,
    group_size,
    PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head of k and v."""
    first_key = tl.program_id(0) % blocks * BLOCK_N
    batch_head = tl.program_id(0) // blocks
    batch = (batch_head // heads_kv).to(tl.int64)
    head_kv = (batch_head % heads_kv).to(tl.int64)
    start_q, start_k, len_q, len_k, offset = extent(call, batch, seqlen_q, seqlen_k, offset)
    if first_key >= len_k:
        return
    dj = tl.arange(0, BLOCK_N)
    inside = first_key + dj < len_k
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    at = start_k + first_key
    keys = load_tile(k, batch, head_kv, at, dj, inside, d, HEAD_DIM, False)
    values = load_tile(v, batch, head_kv, at, dj, inside, d_v, HEAD_DIM_V, False)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    last_key = tl.minimum(first_key + BLOCK_N, len_k) - 1
    start, full_start, full_end, end = query_range(
        call, first_key, last_key, offset, len_q, BLOCK_M
    )
    first_head = head_kv * group_size
    if call.window_right is not None:
        dk_tile, dv_tile = _walk_rows(
            dk_tile, dv_tile, keys, values, q, dout, lse, delta, call, batch, first_head,
            group_size, first_key, dj, start_q, len_q, len_k, offset, start,
            tl.minimum(full_start, end), PLAIN, True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    dk_tile, dv_tile = _walk_rows(
        dk_tile, dv_tile, keys, values, q, dout, lse, delta, call, batch, first_head, group_size,
        first_key, dj, start_q, len_q, len_k, offset, full_start, full_end, PLAIN,
        False, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    if call.window_left is not None:
        dk_tile, dv_tile = _walk_rows(
            dk_tile, dv_tile, keys, values, q, dout, lse, delta, call, batch, first_head,
            group_size, first_key, dj, start_q, len_q, len_k, offset, full_end, end, PLAIN,
            True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    if call.seed is not None:
        dv_tile = dv_tile * call.keep_scale
    dk_tile = dk_tile * call.softmax_scale
    store_tile(dk, dk_tile, batch, head_kv, at, dj, inside, d, HEAD_DIM)
    store_tile(dv, dv_tile, batch, head_kv, at, dj, inside, d_v, HEAD_DIM_V)


@triton.jit
def _walk_keys(
    dq, q_tile, do, row_lse, row_delta, k, v, call, batch, head, head_kv, first_row, di, start_k,
    len_q, len_k, offset, first, last,
    PLAIN: tl.constexpr, BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `first` to before `last` give to dq of a block of rows."""
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    dj = tl.arange(0, BLOCK_N)
    for first_key in range(first, last, BLOCK_N):
        inside = first_key + dj < len_k
        at = start_k + first_key
        keys = load_tile(k, batch, head_kv, at, dj, inside, d, HEAD_DIM, not BOUNDARY)
        values = load_tile(v, batch, head_kv, at, dj, inside, d_v, HEAD_DIM_V, not BOUNDARY)
        products = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        keep = 0
        if call.seed is not None:
            keep = kept(call, batch, head, first_row + di, first_key, BLOCK_M, BLOCK_N)
        _, _, ds = _weights(
            products, dp, row_lse[:, None], row_delta[:, None], call, batch, head, first_row,
            di[:, None], first_key, dj[None, :], keep, offset, len_q, len_k, PLAIN, BOUNDARY,
        )  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=[*SIZES, "blocks"])
def _attention_dq_kernel(
    q, k, v, dout, lse, delta, dq, call, seqlen_q, seqlen_k, offset, blocks, group_size,
    PLAIN: tl.constexpr, LATEST_FIRST: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M rows of one head."""
    block = tl.program_id(0) % blocks
    if LATEST_FIRST:
        block = blocks - 1 - block
    batch = (tl.program_id(0) // blocks // call.heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % call.heads).to(tl.int64)
    head_kv = head // group_size
    start_q, start_k, len_q, len_k, offset = extent(call, batch, seqlen_q, seqlen_k, offset)
    first_row = block * BLOCK_M
    if first_row >= len_q:
        return
    di = tl.arange(0, BLOCK_M)
    inside = first_row + di < len_q
    d = tl.arange(0, BLOCK_D)
    at = start_q + first_row
    q_tile = load_tile(q, batch, head, at, di, inside, d, HEAD_DIM, False)
    d_v = tl.arange(0, BLOCK_DV)
    do = load_tile(dout, batch, head, at, di, inside, d_v, HEAD_DIM_V, False)
    row_lse, row_delta = _row_statistics(lse, delta, batch, head, at, di, inside)
    last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
    start, full_start, full_end, end = key_range(call, first_row, last_row, offset, len_k, BLOCK_N)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if call.window_left is not None:
        dq_tile = _walk_keys(
            dq_tile, q_tile, do, row_lse, row_delta, k, v, call, batch, head, head_kv, first_row,
            di, start_k, len_q, len_k, offset, start, tl.minimum(full_start, end), PLAIN, True,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, q_tile, do, row_lse, row_delta, k, v, call, batch, head, head_kv, first_row,
        di, start_k, len_q, len_k, offset, full_start, full_end, PLAIN, False,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, q_tile, do, row_lse, row_delta, k, v, call, batch, head, head_kv, first_row,
        di, start_k, len_q, len_k, offset, full_end, end, PLAIN, True,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_tile = dq_tile * call.softmax_scale
    store_tile(dq, dq_tile, batch, head, at, di, inside, d, HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, "blocks_m", "blocks_n", "batches", "rows", "columns"])
def _attention_dbias_kernel(
    q, k, v, dout, lse, delta, dbias, call, seqlen_q, seqlen_k, offset, blocks_m, blocks_n,
    heads_bias, batches, heads, rows, columns, group_size,
    SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, PLAIN: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of the bias, summed over what the bias is broadcast over.

    `batches`, `heads`, `rows` and `columns` say how many batches and heads, blocks of rows and
    blocks of keys one program sums over: 1, or all of them.
    """
    tile = tl.program_id(0) % (blocks_m * blocks_n)
    own = tl.program_id(0) // (blocks_m * blocks_n)
    own_batch, own_head = (own // heads_bias).to(tl.int64), (own % heads_bias).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    di = tl.arange(0, BLOCK_M)
    dj = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(batches * heads * rows * columns):
        first_key = (tile % blocks_n + step % columns) * BLOCK_N
        first_row = (tile // blocks_n + step // columns % rows) * BLOCK_M
        head = own_head + step // (columns * rows) % heads
        batch = own_batch + step // (columns * rows * heads)
        start_q, start_k, len_q, len_k, diagonal = extent(call, batch, seqlen_q, seqlen_k, offset)
        last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
        # Not names of other values above: a loop's must keep their types.
        start, _start, _end, end = key_range(call, first_row, last_row, diagonal, len_k, BLOCK_N)
        if (first_key + BLOCK_N > start) & (first_key < end):
            head_kv = head // group_size
            inside = first_row + di < len_q
            at = start_q + first_row
            q_tile = load_tile(q, batch, head, at, di, inside, d, HEAD_DIM, False)
            do = load_tile(dout, batch, head, at, di, inside, d_v, HEAD_DIM_V, False)
            row_lse, row_delta = _row_statistics(lse, delta, batch, head, at, di, inside)
            inside = first_key + dj < len_k
            at = start_k + first_key
            keys = load_tile(k, batch, head_kv, at, dj, inside, d, HEAD_DIM, False)
            values = load_tile(v, batch, head_kv, at, dj, inside, d_v, HEAD_DIM_V, False)
            products = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
            keep = 0
            if call.seed is not None:
                keep = kept(call, batch, head, first_row + di, first_key, BLOCK_M, BLOCK_N)
            _p, ds, _ds = _weights(
                products, dp, row_lse[:, None], row_delta[:, None], call, batch, head, first_row,
                di[:, None], first_key, dj[None, :], keep, diagonal, len_q, len_k, PLAIN, True,
            )  # fmt: skip
            acc += ds
    i = tile // blocks_n * BLOCK_M + di
    j = tile % blocks_n * BLOCK_N + dj
    at = dbias.ptr + own_batch * dbias.batch + own_head * dbias.head
    at = at + i.to(tl.int64)[:, None] * dbias.row + j[None, :] * dbias.column
    inside = (i < seqlen_q)[:, None] & (j < seqlen_k)[None, :]
    if SUM_ROWS:
        acc = tl.broadcast_to(tl.sum(acc, 0, keep_dims=True), (BLOCK_M, BLOCK_N))
        inside = inside & (i == 0)[:, None]
    if SUM_COLUMNS:
        acc = tl.broadcast_to(tl.sum(acc, 1, keep_dims=True), (BLOCK_M, BLOCK_N))
        inside = inside & (j == 0)[None, :]
    tl.store(at, acc.to(dbias.ptr.dtype.element_ty), mask=inside)


def attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    call: Call,
    batch: int,
) -> None:
    """Write dq, dk, dv, the bias's gradient if asked for, and delta.

    Tensors as in `attention_fwd`; lse, dlse and delta are contiguous. Rows and keys that belong to
    no sequence, or lie behind its length, are not written, and without rows nothing is.
    """
    heads, heads_kv, head_dim, head_dim_v = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    if not lse.numel():
        return
    group_size = heads // heads_kv
    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (head_dim, head_dim_v))
    rows = lse.numel()
    lse2 = torch.empty_like(lse)
    block_rows = 64 if INTERPRETED else max(1, 2048 // block_dv)
    launch(
        _attention_delta_kernel, (triton.cdiv(rows, block_rows),),
        rows_of(out), rows_of(dout), lse, dlse, delta, lse2, rows, heads, lse.shape[-1],
        HEAD_DIM_V=head_dim_v, BLOCK_DV=block_dv, BLOCK_ROWS=block_rows, num_warps=4,
    )  # fmt: skip
    shared = dict(
        PLAIN=call.plain, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, BLOCK_D=block_d,
        BLOCK_DV=block_dv, PRECISION=precision(q.dtype),
    )  # fmt: skip
    banded = call.window_right is not None
    shape_class = (q.dtype, block_d, block_dv, *call.shape_class)

    def config(name: str, own_keys: bool) -> Config:
        found = configurations(q, max(block_d, block_dv), call.crowding, own_keys)
        return choose(name, shape_class, found, q)

    inputs = (rows_of(q), rows_of(k), rows_of(v), rows_of(dout), rows_of(lse2), rows_of(delta))
    sizes = (call.in_kernels, call.seqlen_q, call.seqlen_k, call.offset)
    own = config("attention_bwd_dkdv", True)
    blocks = triton.cdiv(call.seqlen_k, own["BLOCK_N"])
    launch(
        _attention_dkdv_kernel, (blocks * batch * heads_kv,),
        *inputs, rows_of(dk), rows_of(dv), *sizes, blocks, heads_kv, group_size, **shared, **own,
    )  # fmt: skip
    own = config("attention_bwd_dq", False)
    blocks = triton.cdiv(call.seqlen_q, own["BLOCK_M"])
    launch(
        _attention_dq_kernel, (blocks * batch * heads,),
        *inputs, rows_of(dq), *sizes, blocks, group_size, LATEST_FIRST=banded, **shared, **own,
    )  # fmt: skip
    if dbias is not None:
        blocks_m, blocks_n = blocks, triton.cdiv(call.seqlen_k, own["BLOCK_N"])
        full = (batch, heads, blocks_m, blocks_n)
        owned = tuple(1 if n == 1 else many for n, many in zip(dbias.shape, full))
        summed = tuple(many // own for own, many in zip(owned, full))
        launch(
            _attention_dbias_kernel, (math.prod(owned),),
            *inputs, broadcast_of(dbias), *sizes, owned[2], owned[3], owned[1], *summed, group_size,
            SUM_ROWS=dbias.shape[2] == 1, SUM_COLUMNS=dbias.shape[3] == 1, **shared, **own,
        )  # fmt: skip


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""

    def run(dtype: torch.dtype, head_dim: int, call: Call, of_bias: bool = False) -> None:
        q = torch.empty(2, 8, 512, head_dim, device="meta", dtype=dtype)
        k = torch.empty(2, 2, 512, head_dim, device="meta", dtype=dtype)
        lse = torch.empty(2, 8, 512, device="meta", dtype=torch.float32)
        dbias = torch.empty(2, 8, 512, 512, device="meta", dtype=dtype) if of_bias else None
        attention_bwd(q, k, k, q, q, lse, lse, lse, q, k, k, dbias, call, 2)

    half, single = torch.bfloat16, torch.float32
    plain, featured = sample_calls(512)
    banded = featured._replace(window_left=None)
    for head_dim in (64, 128, 256):
        run(half, head_dim, plain)
        run(half, head_dim, featured if head_dim == 128 else banded, of_bias=True)
    run(single, 64, plain)
    run(single, 128, banded, of_bias=True)  # in the tiles of plain attention
    run(single, 256, plain)
