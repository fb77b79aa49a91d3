"""What attention's kernels share: a call's operands, the keys that a block sees, and its scores.

Scores are kept in units of log2, so that a weight is one exp2. Rows and keys come as index tensors
that broadcast against each other, (BLOCK_M, 1) and (1, BLOCK_N) or transposed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastattn.kernels.philox import keep_tile
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNBOUNDED = 1 << 28  # sums of a position, an offset and a bound stay below 2^31
FARTHEST = tl.constexpr(1 << 27)
SIZES = ("seqlen_q", "seqlen_k", "offset")  # of kernels, which are not compiled for each


class Rows(NamedTuple):
    """A tensor (batch, heads, rows, columns) of unit last stride, or a vector for each head."""

    ptr: Any
    batch: int  # strides
    head: int
    row: int


class Broadcast(NamedTuple):
    """A mask or bias of the scores, each stride 0 where it is broadcast."""

    ptr: Any
    batch: int
    head: int
    row: int
    column: int


class Call(NamedTuple):
    """What a call says beside q, k and v; absent features are None, decided when compiled."""

    heads: int
    seqlen_q: int  # of the longest sequence
    seqlen_k: int
    softmax_scale: float
    softcap: float | None
    window_left: int | None
    window_right: int | None
    offset: int
    offsets: Tensor | None  # (batch,)
    seqlens_k: Tensor | None  # (batch,)
    cu_seqlens_q: Tensor | None  # (batch + 1,)
    cu_seqlens_k: Tensor | None
    mask: Broadcast | None
    bias: Broadcast | None
    alibi: Broadcast | None  # slopes, strides of batch and head
    sinks: Tensor | None  # (heads,)
    seed: Tensor | None
    threshold: int
    keep_scale: float
    block_table: Tensor | None  # (batch, max_pages), contiguous rows
    max_pages: int
    page_size: int

    @property
    def in_kernels(self) -> "Call":
        """Without the sizes, which kernels take beside it, lest each be compiled for its own."""
        return self._replace(seqlen_q=0, seqlen_k=0, offset=0)

    @property
    def plain(self) -> bool:
        """Whether a score is a product times a positive factor, which then folds into exp2."""
        return self.softcap is self.bias is self.alibi is None and self.softmax_scale > 0

    @property
    def crowding(self) -> int:
        """How many registers scores take beyond those of plain attention: 0 to 2, of a mask 1."""
        if not self.plain or self.seed is not None:
            return 2
        return int(self.mask is not None)

    @property
    def shape_class(self) -> tuple:
        """What of a call the best configuration depends on, beside dtype and head_dim."""
        longest = next(n for n in (1024, 4096, 1 << 40) if self.seqlen_k <= n)
        return min(longest, 16384), self.window_right is not None, self.crowding


@triton.jit
def extent(call, batch, seqlen_q, seqlen_k, offset):
    """Of one sequence: where its rows start in q and k, its lengths, the diagonal's offset."""
    start_q = tl.cast(0, tl.int64)
    start_k = tl.cast(0, tl.int64)
    len_q = seqlen_q
    len_k = seqlen_k
    if call.cu_seqlens_q is not None:
        start_q = tl.load(call.cu_seqlens_q + batch).to(tl.int64)
        len_q = (tl.load(call.cu_seqlens_q + batch + 1) - start_q).to(tl.int32)
    if call.cu_seqlens_k is not None:
        start_k = tl.load(call.cu_seqlens_k + batch).to(tl.int64)
        len_k = (tl.load(call.cu_seqlens_k + batch + 1) - start_k).to(tl.int32)
    if call.seqlens_k is not None:
        len_k = tl.minimum(len_k, tl.load(call.seqlens_k + batch))
    if call.offsets is not None:
        # Sums of a position, an offset and a bound stay below 2^31.
        offset = tl.maximum(tl.minimum(tl.load(call.offsets + batch), FARTHEST), -FARTHEST)
    return start_q, start_k, len_q, len_k, offset


@triton.jit
def key_range(call, first, last, offset, len_k, BLOCK_N: tl.constexpr):
    """The keys that rows first to last see: [start, end), of which [full_start, full_end) by all.

    All but `end` are multiples of BLOCK_N; start <= full_start <= full_end.
    """
    start = 0
    full_start = 0
    end = len_k
    full_end = len_k
    if call.window_left is not None:
        start = tl.maximum(first + offset - call.window_left, 0) // BLOCK_N * BLOCK_N
        full_start = tl.maximum(last + offset - call.window_left, 0)
        full_start = (full_start + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if call.window_right is not None:
        end = tl.minimum(last + offset + call.window_right + 1, len_k)
        full_end = tl.minimum(first + offset + call.window_right + 1, len_k)
    end = tl.maximum(end, 0)
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    past_end = (end + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_start = tl.minimum(full_start, tl.maximum(past_end, start))
    return start, full_start, tl.maximum(full_end, full_start), end


@triton.jit
def query_range(call, first, last, offset, len_q, BLOCK_M: tl.constexpr):
    """The rows that see keys first to last, as in `key_range`; full_end too may be any number."""
    start = 0
    full_start = 0
    end = len_q
    full_end = len_q
    if call.window_right is not None:
        start = tl.maximum(first - offset - call.window_right, 0) // BLOCK_M * BLOCK_M
        full_start = tl.maximum(last - offset - call.window_right, 0)
        full_start = (full_start + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if call.window_left is not None:
        end = tl.minimum(last - offset + call.window_left + 1, len_q)
        full_end = tl.minimum(first - offset + call.window_left + 1, len_q)
        full_end = tl.maximum(full_end, 0) // BLOCK_M * BLOCK_M
        full_end = tl.maximum(full_end, full_start)
    return start, full_start, full_end, end


@triton.jit
def load_tile(
    rows, batch, head, first_row, local, inside, columns,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows first_row + local of one head: (rows, columns), 0 outside. WHOLE: none is outside."""
    # One 64-bit address and 32-bit offsets that loops leave alone, to spare registers.
    at = rows.ptr + batch * rows.batch + head * rows.head + first_row * rows.row
    at = at + (local[:, None] * rows.row + columns[None, :])
    if columns.shape[0] != COLUMNS:
        tile = tl.load(at, mask=inside[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    elif WHOLE:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(rows, tile, batch, head, first_row, local, inside, columns, COLUMNS: tl.constexpr):
    """Write what `load_tile` reads, rounded to the tensor's dtype."""
    at = rows.ptr + batch * rows.batch + head * rows.head + first_row * rows.row
    tl.store(
        at + (local[:, None] * rows.row + columns[None, :]),
        tile.to(rows.ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < COLUMNS)[None, :],
    )


@triton.jit
def _element(broadcast, batch, head, dh, i0, di, j0, dj):
    """The address of elements (i0 + di, j0 + dj) of head + dh, as in `load_tile`."""
    at = broadcast.ptr + batch * broadcast.batch + head * broadcast.head
    at = at + (tl.cast(i0, tl.int64) * broadcast.row + tl.cast(j0, tl.int64) * broadcast.column)
    return at + (di * broadcast.row + dj * broadcast.column) + dh * broadcast.head


@triton.jit
def transformed(
    products, call, batch, head, dh, i0, di, j0, dj, offset, len_q, len_k,
    PLAIN: tl.constexpr, BOUNDARY: tl.constexpr,
):  # fmt: skip
    """Scores in units of log2 from the products q.k, -inf where hidden; and softcap's slope.

    The tile's rows are i0 + di, its keys j0 + dj, its head `head`, or ``head + dh`` row by row.
    PLAIN scores are still to be multiplied by ``softmax_scale * LOG2E``. Without BOUNDARY every row
    sees every key of the block as far as band and lengths go.
    """
    slope = 1.0
    scores = products
    i = i0 + di
    j = j0 + dj
    if not PLAIN:
        scores = scores * call.softmax_scale
        if call.softcap is not None:
            # tanh by exp2; its argument is limited, so that nothing overflows.
            t = tl.minimum(tl.maximum(scores / call.softcap, -15.0), 15.0)
            e = tl.exp2(t * (2.0 * LOG2E))
            t = tl.where(scores == scores, (e - 1.0) / (e + 1.0), scores)
            slope = 1.0 - t * t
            scores = call.softcap * t
        if call.bias is not None:
            at = _element(call.bias, batch, head, dh, i0, di, j0, dj)
            inside = (i < len_q) & (j < len_k)
            scores += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if call.alibi is not None:
            at = call.alibi.ptr + batch * call.alibi.batch + (head + dh) * call.alibi.head
            scores -= tl.load(at) * tl.abs(i + offset - j).to(tl.float32)
        scores = scores * LOG2E
    if BOUNDARY:
        seen = j < len_k
        if call.window_left is not None:
            seen = seen & (j >= i + (offset - call.window_left))
        if call.window_right is not None:
            seen = seen & (j <= i + (offset + call.window_right))
        scores = tl.where(seen, scores, float("-inf"))
    if call.mask is not None:
        at = _element(call.mask, batch, head, dh, i0, di, j0, dj)
        taken = tl.load(at, mask=(i < len_q) & (j < len_k), other=0)
        scores = tl.where(taken != 0, scores, float("-inf"))
    return scores, slope


@triton.jit
def kept(call, batch, head, rows, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which attention weights dropout keeps: (BLOCK_M, BLOCK_N)."""
    seed = tl.load(call.seed)
    return keep_tile(seed, call.threshold, rows, first_key, head, batch, BLOCK_M, BLOCK_N)


def rows_of(tensor: Tensor | None) -> Rows | None:
    """The tensor as kernels take it; all sequences of a packed one lie in its one batch."""
    if tensor is None:
        return None
    batch, head, row = tensor.stride()[:3]
    return Rows(tensor, batch if tensor.shape[0] > 1 else 0, head, row)


def broadcast_of(tensor: Tensor | None) -> Broadcast | None:
    """A mask or bias, 4-D with each dim full or 1, as kernels take it."""
    if tensor is None:
        return None
    strides = (0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride()))
    return Broadcast(tensor, *strides)


def sample_calls(seqlen_q: int) -> tuple[Call, Call]:
    """Calls without any feature but a causal band, and with all; on meta tensors."""
    vector = torch.empty(64, device="meta", dtype=torch.int32)
    scores = torch.empty(2, 8, seqlen_q, 512, device="meta", dtype=torch.float32)
    plain = Call(
        heads=8, seqlen_q=seqlen_q, seqlen_k=512, softmax_scale=0.125, softcap=None,
        window_left=None, window_right=0, offset=0, offsets=None, seqlens_k=None,
        cu_seqlens_q=None, cu_seqlens_k=None, mask=None, bias=None, alibi=None, sinks=None,
        seed=None, threshold=1 << 30, keep_scale=2.0, block_table=None, max_pages=0, page_size=0,
    )  # fmt: skip
    featured = plain._replace(
        softcap=30.0, window_left=128, offsets=vector, seqlens_k=vector,
        mask=broadcast_of(scores.to(torch.bool)), bias=broadcast_of(scores),
        alibi=Broadcast(scores, 0, 1, 0, 0), sinks=scores, seed=vector.to(torch.int64),
    )  # fmt: skip
    return plain, featured
