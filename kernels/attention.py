"""Scaled dot-product attention, forward, and decoding split over keys.

q (batch, heads, seqlen_q, head_dim), k and v (batch, heads_kv, seqlen_k, .), packed or paged, with
every feature of `attention_scores.Call`. A program owns BLOCK_M rows and walks over the keys that
they see, BLOCK_N at a time, with an online softmax (FlashAttention-2, Dao 2023, arXiv 2307.08691):
blocks that no row sees are skipped, and only those on the edge of band and lengths are masked. The
floor is 4 * head_dim flops a visible score.

Where there are few rows, a program owns those of all heads that share keys, and a part of the keys
(Flash-Decoding, Dao et al. 2023); a second kernel combines the parts. The floor there is one read
of the keys and values.
"""

import math

import torch
import triton
import triton.language as tl
from fastattn.kernels import launch as launching
from fastattn.kernels.attention_scores import (
    LN2,
    LOG2E,
    SIZES,
    Call,
    extent,
    kept,
    key_range,
    load_tile,
    rows_of,
    sample_calls,
    transformed,
)
from fastattn.kernels.launch import INTERPRETED, launch, precision, target
from fastattn.kernels.tuning import Config, choose
from torch import Tensor

PACKED_ROWS = 64  # up to so many rows of all heads that share keys, one program takes them
FLOAT8_SCALE = tl.constexpr(256.0)  # weights up to 1 would leave half of the exponents unused
L2_BYTES = 32 << 20  # of keys and values that programs running at a time should read


def configurations(on: Tensor, head_dim: int, rows: int, crowding: int) -> list[Config]:
    """Tiles by chip, width of the elements and head_dim: registers hold scores and results.

    What a call adds to the scores takes registers too: more warps share a tile then. float32 is
    multiplied without matrix units. The half-precision shapes start from those that FlexAttention
    ships for A100 and H100. On gfx9, where float32 has matrix units too, threads of 4 warps have
    twice the registers of 8, and no product is made twice of 32 rows a warp or, by 16 keys, of 16.
    """
    chip, wide = target(on), on.dtype == torch.float32
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    few = max(16, triton.next_power_of_2(rows)) if rows <= PACKED_ROWS else 0
    if INTERPRETED:
        shapes = [(few or 128, 128, 4, 1)]
    elif few == 16 and (wide or size == 2):
        least = 32 if on.dtype == torch.float8_e4m3fn else 16
        shapes = [(few, (64, 32, least)[size], 8, 1), (few, least, 4, 1), (few, 32, 4, 1)]
    elif few == 16 or (few and not (wide or crowding or size == 2)):
        stages = 1 if chip.backend == "hip" else 3
        shapes = [(few, 64, 4, stages), (few, 128, 4, stages), (few, 64, 8, stages)]
    elif wide and not chip.gfx9:
        block_m, block_n = ((64, 32), (16 if crowding else 32, 32), (16, 16))[size]
        shapes = [(block_m, block_n, 8, 1), (32, 16, 4, 1)]
    elif chip.backend == "hip":
        roomy = chip.gfx9 and not wide and crowding < 2 and size < 2
        fits = 32 if wide and size == 2 else 64
        shapes = [(128, (64, 32)[size], 4, 1) if roomy else (fits, 16, 4, 1), (32, 16, 4, 1)]
    elif crowding == 2 or (size == 2 and (crowding or not chip.large)):
        shapes = [((64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1))[size], (64, 32, 4, 1)]
    elif crowding:
        shapes = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)]
        if size == 1 and chip.family < 90:
            shapes = [(64, 64, 8, 2), (64, 32, 4, 2)]
    elif size == 0:
        shapes = [(128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 4, 3), (64, 64, 4, 3)]
        if chip.family >= 100:
            shapes = [(128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 4, 3)]
    elif size == 1:
        shapes = [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 32, 4, 3)]
    else:
        shapes = [(128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)]
        if chip.family < 90:
            shapes = [(64, 64, 8, 2), (64, 32, 4, 3)]
    most = few or 128
    return [
        dict(BLOCK_M=min(block_m, most), BLOCK_N=block_n, num_warps=warps, num_stages=stages)
        for block_m, block_n, warps, stages in shapes
    ]


@triton.jit
def _keys(
    rows, call, batch, head_kv, start_k, first_key, local, inside, columns,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of rows of k or v: (BLOCK_N, columns)."""
    if call.block_table is None:
        first = start_k + first_key
        tile = load_tile(rows, batch, head_kv, first, local, inside, columns, COLUMNS, WHOLE)
    else:
        j = first_key + local
        entry = call.block_table + batch * call.max_pages + j // call.page_size
        page = tl.load(entry, mask=inside, other=0).to(tl.int64)
        at = page * rows.batch + (j % call.page_size).to(tl.int64) * rows.row
        at = rows.ptr + head_kv * rows.head + at[:, None] + columns[None, :]
        tile = tl.load(at, mask=inside[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def _walk(
    acc, row_max, row_sum, q, k, v, call, batch, head, dh, head_kv, first_row, di, start_k, len_q,
    len_k, offset, first, last,
    PLAIN: tl.constexpr, BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the blocks of keys from `first` to before `last`."""
    dj = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    for first_key in range(first, last, BLOCK_N):
        inside = first_key + dj < len_k
        keys = _keys(
            k, call, batch, head_kv, start_k, first_key, dj, inside, d, HEAD_DIM, not BOUNDARY
        )  # (BLOCK_N, BLOCK_D)
        products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        scores, _ = transformed(
            products, call, batch, head, dh, first_row, di[:, None], first_key, dj[None, :],
            offset, len_q, len_k, PLAIN, BOUNDARY,
        )  # fmt: skip
        block_max = tl.max(scores, 1)
        factor = call.softmax_scale * LOG2E
        if PLAIN:
            block_max = block_max * factor
        new_max = tl.maximum(row_max, block_max)
        # While a row has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        if PLAIN:
            p = tl.exp2(scores * factor - finite[:, None])
        else:
            p = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(row_max - finite)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        acc = acc * rescale[:, None]
        if call.seed is not None:
            heads = tl.reshape(head + dh + tl.zeros((BLOCK_M, 1), tl.int64), (BLOCK_M,))
            keep = kept(call, batch, heads, first_row + di, first_key, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        values = _keys(
            v, call, batch, head_kv, start_k, first_key, dj, inside, d_v, HEAD_DIM_V, not BOUNDARY
        )  # (BLOCK_N, BLOCK_DV)
        if values.dtype == tl.float8e4nv:
            p = p * FLOAT8_SCALE
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[*SIZES, "batches_heads", "blocks", "section", "parts", "lse_part"])
def _attention_fwd_kernel(
    q, k, v, out, lse, call, seqlen_q, seqlen_k, offset, batches_heads, blocks, section, group_size,
    parts, out_part, lse_part,
    PLAIN: tl.constexpr, LATEST_FIRST: tl.constexpr, PACKED_HEADS: tl.constexpr,
    SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (i, head), PACKED_HEADS heads of each i, over one of `parts` of their keys."""
    part = 0
    program = tl.program_id(0)
    if SPLIT:
        part = program % parts
        program = program // parts
    # Heads go by sections whose keys fit in the cache; in it, the longest blocks of rows first.
    first_head = program // (section * blocks) * section
    here = tl.minimum(section, batches_heads - first_head)
    block = program % (section * blocks) // here
    if LATEST_FIRST:
        block = blocks - 1 - block
    batch_head = first_head + program % (section * blocks) % here
    heads_here = call.heads // PACKED_HEADS
    batch = (batch_head // heads_here).to(tl.int64)
    head = (batch_head % heads_here * PACKED_HEADS).to(tl.int64)
    head_kv = head // group_size

    start_q, start_k, len_q, len_k, offset = extent(call, batch, seqlen_q, seqlen_k, offset)
    r = tl.arange(0, BLOCK_M)
    dh = 0
    first_row = block * BLOCK_M
    di = r
    if PACKED_HEADS > 1:
        # A block may start within a row's heads.
        first_row = block * BLOCK_M // PACKED_HEADS
        di = (block * BLOCK_M + r) // PACKED_HEADS - first_row
        dh = ((block * BLOCK_M + r) % PACKED_HEADS).to(tl.int64)[:, None]
    if first_row >= len_q:
        return
    inside = first_row + di < len_q
    d = tl.arange(0, BLOCK_D)
    at = q.ptr + batch * q.batch + head * q.head + (start_q + first_row) * q.row
    q_tile = tl.load(
        at + (di[:, None] * q.row + d[None, :]) + dh * q.head,
        mask=inside[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # (BLOCK_M, BLOCK_D)

    last_row = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // PACKED_HEADS, len_q - 1)
    start, full_start, full_end, end = key_range(call, first_row, last_row, offset, len_k, BLOCK_N)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), parts) * BLOCK_N
        start = start + part * share
        end = tl.minimum(end, start + share)
        full_start = tl.maximum(full_start, start)
        full_end = tl.maximum(tl.minimum(full_end, start + share), full_start)
    if call.sinks is not None:  # noqa: SIM102 (decided when compiled, the next one is not)
        if part == 0:
            sinks = tl.load(call.sinks + head + dh + tl.zeros((BLOCK_M, 1), tl.int64))
            row_max = tl.reshape(sinks, (BLOCK_M,)).to(tl.float32) * LOG2E
            row_sum += 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if call.window_left is not None:
        acc, row_max, row_sum = _walk(
            acc, row_max, row_sum, q_tile, k, v, call, batch, head, dh, head_kv, first_row, di,
            start_k, len_q, len_k, offset, start, tl.minimum(full_start, end), PLAIN, True,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, q_tile, k, v, call, batch, head, dh, head_kv, first_row, di,
        start_k, len_q, len_k, offset, full_start, full_end, PLAIN, False,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, q_tile, k, v, call, batch, head, dh, head_kv, first_row, di,
        start_k, len_q, len_k, offset, full_end, end, PLAIN, True,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    factor = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
    if call.seed is not None:
        factor = factor * call.keep_scale
    if v.ptr.dtype.element_ty == tl.float8e4nv:
        factor = factor / FLOAT8_SCALE
    d_v = tl.arange(0, BLOCK_DV)
    at = part * out_part + batch * out.batch + head * out.head + (start_q + first_row) * out.row
    tl.store(
        out.ptr + at + (di[:, None] * out.row + d_v[None, :]) + dh * out.head,
        (acc * factor[:, None]).to(out.ptr.dtype.element_ty),
        mask=inside[:, None] & (d_v < HEAD_DIM_V)[None, :],
    )
    if lse is not None:
        row_lse = tl.where(row_sum == 0.0, float("-inf"), row_max * LN2 + tl.log(row_sum))
        at = part * lse_part + batch * lse.batch + head * lse.head + (start_q + first_row) * lse.row
        at = lse.ptr + at + di[:, None] * lse.row + dh * lse.head
        tl.store(at, row_lse[:, None], mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "seqlen_q", "parts"])
def _attention_combine_kernel(
    parts_ptr, parts_lse_ptr, out, lse_ptr, rows, heads, seqlen_q, parts,
    BLOCK_PARTS: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One row (batch, head, i): the parts' results, each weighted by its share of the sum."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    d = tl.arange(0, BLOCK_DV)
    part_lse = tl.load(
        parts_lse_ptr + part * rows + row, mask=part < parts, other=float("-inf")
    )  # (BLOCK_PARTS,)
    top = tl.max(part_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_lse - top)
    total = tl.sum(weight, 0)
    at = (part * rows + row)[:, None] * HEAD_DIM_V + d[None, :]
    # A part without a sum has written nothing.
    inside = (part_lse > float("-inf"))[:, None] & (d < HEAD_DIM_V)[None, :]
    results = tl.load(parts_ptr + at, mask=inside, other=0.0)
    acc = tl.sum(results * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    batch = row // (heads * seqlen_q)
    at = batch * out.batch + row // seqlen_q % heads * out.head + row % seqlen_q * out.row
    tl.store(out.ptr + at + d, acc.to(out.ptr.dtype.element_ty), mask=d < HEAD_DIM_V)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    call: Call,
    batch: int,
    *,
    deterministic: bool = False,
) -> None:
    """Write attention's output and, if asked for, the contiguous log-sum-exp.

    q, k, v and out are (batch, heads, seqlen, .) of unit last stride, packed ones with batch 1, a
    paged cache (num_pages, heads_kv, page_size, .).
    """
    heads, heads_kv = q.shape[1], k.shape[1]
    if not q.shape[0] * heads * call.seqlen_q:
        return
    group_size = heads // heads_kv
    packed_heads = group_size if call.seqlen_q * group_size <= PACKED_ROWS else 1
    rows = call.seqlen_q * packed_heads
    least = 32 if q.dtype == torch.float8_e4m3fn else 16  # of a product's inner dim
    block_d, block_dv = (max(least, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    candidates = configurations(q, max(block_d, block_dv), rows, call.crowding)
    shape_class = (q.dtype, block_d, block_dv, rows <= PACKED_ROWS, *call.shape_class)
    config = choose("attention_fwd", shape_class, candidates, q)
    blocks = triton.cdiv(rows, config["BLOCK_M"])
    batches_heads = batch * (heads // packed_heads)
    programs = blocks * batches_heads
    parts = 1 if deterministic else _parts(q, programs, rows, call.seqlen_k, config["BLOCK_N"])
    section = 1
    if call.window_right is not None:
        bytes_a_head = call.seqlen_k * (q.shape[-1] + v.shape[-1]) * q.element_size()
        section = max(1, min(batches_heads, L2_BYTES * group_size // max(bytes_a_head, 1)))
    result, result_lse = out, lse
    out_part = lse_part = 0
    if parts > 1:
        batch_rows, seqlen_q = (batch, call.seqlen_q) if q.shape[0] == batch else (1, q.shape[2])
        shape = (parts, batch_rows, heads, seqlen_q)
        result = q.new_empty((*shape, v.shape[-1]), dtype=torch.float32)
        result_lse = q.new_empty(shape, dtype=torch.float32)
        if batch_rows != batch:  # rows that belong to no sequence
            result_lse.fill_(-math.inf)
        out_part, lse_part = result.stride(0), result_lse.stride(0)
        result, result_lse = result[0], result_lse[0]
    launch(
        _attention_fwd_kernel, (programs * parts,),
        rows_of(q), rows_of(k), rows_of(v), rows_of(result), rows_of(result_lse), call.in_kernels,
        call.seqlen_q, call.seqlen_k, call.offset, batches_heads, blocks, section, group_size,
        parts, out_part, lse_part,
        PLAIN=call.plain, LATEST_FIRST=call.window_right is not None, PACKED_HEADS=packed_heads,
        SPLIT=parts > 1, HEAD_DIM=q.shape[-1], HEAD_DIM_V=v.shape[-1], BLOCK_D=block_d,
        BLOCK_DV=block_dv, PRECISION=precision(q.dtype), **config,
    )  # fmt: skip
    if parts > 1:
        launch(
            _attention_combine_kernel, (lse_part,),
            result, result_lse, rows_of(out), lse, lse_part, heads, shape[-1], parts,
            BLOCK_PARTS=triton.next_power_of_2(parts), HEAD_DIM_V=v.shape[-1],
            BLOCK_DV=block_dv, num_warps=4,
        )  # fmt: skip


def _parts(on: Tensor, programs: int, rows: int, seqlen_k: int, block_n: int) -> int:
    """Over how many parts the keys are split, so that two programs a multiprocessor run."""
    if rows > PACKED_ROWS or not programs:
        return 1
    most = 2 * launching.processors(on) // programs
    return max(1, min(most, triton.cdiv(seqlen_k, 4 * block_n), 64))


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""

    def run(
        dtype: torch.dtype, head_dim: int, seqlen_q: int, call: Call, deterministic: bool = False
    ) -> None:
        q = torch.empty(2, 8, seqlen_q, head_dim, device="meta", dtype=dtype)
        k = torch.empty(2, 2, 512, head_dim, device="meta", dtype=dtype)
        lse = torch.empty(2, 8, seqlen_q, device="meta", dtype=torch.float32)
        attention_fwd(q, k, k, torch.empty_like(q), lse, call, 2, deterministic=deterministic)

    half, single = torch.bfloat16, torch.float32
    plain, featured = sample_calls(512)
    banded = featured._replace(window_left=None)
    for head_dim in (64, 128, 256):
        run(half, head_dim, 512, plain)
        run(half, head_dim, 512, featured if head_dim == 128 else banded)
        run(single, head_dim, 512, plain)
        run(half, head_dim, 1, sample_calls(1)[0])
        run(single, head_dim, 1, sample_calls(1)[0], deterministic=True)
    run(half, 64, 512, plain._replace(mask=featured.mask))
    run(half, 128, 512, plain._replace(mask=featured.mask))
    run(single, 128, 512, banded)
    for call in sample_calls(16):  # the rows of all heads that share keys fill a tile
        run(half, 128, 16, call)
    q = torch.empty(2, 8, 512, 128, device="meta", dtype=torch.float8_e4m3fn)
    if target(q).family >= 90:
        out = torch.empty_like(q, dtype=torch.bfloat16)
        attention_fwd(q, q, q, out, None, plain, 2)
