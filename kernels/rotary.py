"""Rotary position embedding (Su et al. 2021, "RoFormer"): rotates pairs of elements of each token.

x and out (batch, heads, seqlen, head_dim) in any strides with a unit last one; cos and sin
(seqlen_max, pairs) or (batch, seqlen_max, pairs). A program owns BLOCK_TOKENS tokens, of whatever
sequences, in BLOCK_HEADS heads, which share the rows of the tables; elements beyond the pairs are
copied. The gradient is the rotation by the negative angle: the same kernel with sign = -1.
The floor is one read and one write of x.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch
from fastattn.kernels.tuning import Config, choose
from torch import Tensor

ELEMENTS = 1 << 18 if INTERPRETED else 1 << 12  # of a program


def configurations(tokens: int, heads: int, head_dim: int) -> list[Config]:
    """Up to 8 heads share a row of the tables, more where there are few tokens."""
    configs = []
    for most_heads, warps in ((8, 4), (4, 4), (16, 4), (8, 8), (8, 2), (2, 4)):
        rows = max(1, ELEMENTS // triton.next_power_of_2(head_dim))
        block_heads = min(triton.next_power_of_2(heads), most_heads, rows)
        block_tokens = min(triton.next_power_of_2(tokens), rows // block_heads)
        block_heads = min(triton.next_power_of_2(heads), rows // block_tokens)
        configs.append(dict(BLOCK_TOKENS=block_tokens, BLOCK_HEADS=block_heads, num_warps=warps))
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


@triton.jit
def _token_rows(head, sequence, position, strides, ALIGN: tl.constexpr):
    """Where head_dim begins: (BLOCK_HEADS, BLOCK_TOKENS, 1).

    Divided and multiplied, strides are known to the compiler as multiples.
    """
    heads = head * (strides[1] // ALIGN * ALIGN)
    sequences = sequence * (strides[0] // ALIGN * ALIGN)
    tokens = sequences + position * (strides[2] // ALIGN * ALIGN)
    return (heads[:, None] + tokens[None, :])[:, :, None]


@triton.jit
def _angles(
    ptr, sequence, row, pair, seen, strides,
    PAIRS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Of cos or sin, NaN outside of the table: (BLOCK_HEADS, BLOCK_TOKENS, BLOCK_PAIRS)."""
    at = sequence * (strides[0] // ALIGN * ALIGN) + row * (strides[1] // ALIGN * ALIGN)
    at = at[:, None] + pair[None, :]
    inside = seen[:, None] & (pair < PAIRS)[None, :]
    angles = tl.load(ptr + at, mask=inside, other=float("nan")).to(tl.float32)
    return tl.broadcast_to(angles[None, :, :], (BLOCK_HEADS, row.shape[0], pair.shape[0]))


@triton.jit(do_not_specialize=["offset"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, offsets_ptr, out_ptr,
    tokens, heads, seqlen, seqlen_max, offset, sign,
    x_strides, cos_strides, sin_strides, out_strides,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    head_blocks = tl.cdiv(heads, BLOCK_HEADS)
    program = tl.program_id(0)
    head = (program % head_blocks).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    first = (program // head_blocks).to(tl.int64) * BLOCK_TOKENS
    # Of each token only 32 bits are divided.
    token = (first % seqlen).to(tl.int32) + tl.arange(0, BLOCK_TOKENS)
    sequence = first // seqlen + token // seqlen
    position = (token % seqlen).to(tl.int64)
    seen = first + tl.arange(0, BLOCK_TOKENS) < tokens
    x_ptr += _token_rows(head, sequence, position, x_strides, ALIGN)
    out_ptr += _token_rows(head, sequence, position, out_strides, ALIGN)
    inside = ((head < heads)[:, None] & seen[None, :])[:, :, None]
    row = position + offset
    if offsets_ptr is not None:
        row = position + tl.load(offsets_ptr + sequence, mask=seen, other=0)
        seen = seen & (row >= 0) & (row < seqlen_max)
    for block in range((PAIRS + BLOCK_PAIRS - 1) // BLOCK_PAIRS):
        pair = block * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
        if INTERLEAVED:
            here = (2 * block * BLOCK_PAIRS + tl.arange(0, 2 * BLOCK_PAIRS))[None, None, :]
            inside_here = inside & (here < 2 * PAIRS)
            x = tl.load(x_ptr + here, mask=inside_here, other=0.0)
            a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_TOKENS, BLOCK_PAIRS, 2)))
        else:
            here = pair[None, None, :]
            inside_here = inside & (here < PAIRS)
            a = tl.load(x_ptr + here, mask=inside_here, other=0.0)
            b = tl.load(x_ptr + PAIRS + here, mask=inside_here, other=0.0)
        cos = _angles(
            cos_ptr, sequence, row, pair, seen, cos_strides, PAIRS, TABLE_ALIGN, BLOCK_HEADS
        )
        sin = sign * _angles(
            sin_ptr, sequence, row, pair, seen, sin_strides, PAIRS, TABLE_ALIGN, BLOCK_HEADS
        )
        a, b = a.to(tl.float32), b.to(tl.float32)
        # Explicit, so that both directions round alike.
        out_a = tl.fma(a, cos, -(b * sin)).to(out_ptr.dtype.element_ty)
        out_b = tl.fma(b, cos, a * sin).to(out_ptr.dtype.element_ty)
        if INTERLEAVED:
            out = tl.join(out_a, out_b)
            out = tl.reshape(out, (BLOCK_HEADS, BLOCK_TOKENS, 2 * BLOCK_PAIRS))
            tl.store(out_ptr + here, out, mask=inside_here)
        else:
            tl.store(out_ptr + here, out_a, mask=inside_here)
            tl.store(out_ptr + PAIRS + here, out_b, mask=inside_here)
    for block in range((HEAD_DIM - 2 * PAIRS + BLOCK_REST - 1) // BLOCK_REST):
        here = 2 * PAIRS + block * BLOCK_REST + tl.arange(0, BLOCK_REST)[None, None, :]
        inside_here = inside & (here < HEAD_DIM)
        tl.store(out_ptr + here, tl.load(x_ptr + here, mask=inside_here), mask=inside_here)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    *,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write x (batch, heads, seqlen, head_dim) to `out`, each pair rotated by its angle.

    The tables' first rows are those of token 0 of a sequence plus `offset`, or plus its entry of
    `offsets` (batch,): pairs of tokens whose row lies outside of the table become NaN. `inverse`
    rotates by the negative angles. Last strides are 1.
    """
    batch, heads, seqlen, head_dim = x.shape
    tokens, pairs = batch * seqlen, cos.shape[-1]
    if x.numel() == 0:
        return
    shape_class = (
        x.dtype, triton.next_power_of_2(head_dim), interleaved,
        min(triton.next_power_of_2(heads), 16), min(triton.next_power_of_2(tokens), 64),
    )  # fmt: skip
    options = choose("rotary", shape_class, configurations(tokens, heads, head_dim), x)
    cos_strides, sin_strides = ((0, *table.stride())[-3:] for table in (cos, sin))
    programs = triton.cdiv(tokens, options["BLOCK_TOKENS"])
    launch(
        _rotary_kernel, (programs * triton.cdiv(heads, options["BLOCK_HEADS"]),),
        x, cos, sin, offsets, out,
        tokens, heads, seqlen, cos.shape[-2], offset, -1.0 if inverse else 1.0,
        x.stride(), cos_strides, sin_strides, out.stride(),
        HEAD_DIM=head_dim, PAIRS=pairs, INTERLEAVED=interleaved,
        ALIGN=math.gcd(16, *x.stride()[:3], *out.stride()[:3]),
        TABLE_ALIGN=math.gcd(16, *cos_strides[:2], *sin_strides[:2]),
        BLOCK_PAIRS=min(triton.next_power_of_2(max(pairs, 1)), 2048),
        BLOCK_REST=min(triton.next_power_of_2(max(head_dim - 2 * pairs, 1)), 4096),
        **options,
    )  # fmt: skip


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""
    table = torch.empty(4096, 64, device="meta", dtype=torch.float32)
    offsets = torch.empty(4, device="meta", dtype=torch.int64)
    for dtype, interleaved in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        settings = dict(interleaved=interleaved, inverse=False)
        x = torch.empty(4, 32, 4096, 128, device="meta", dtype=dtype)
        rotary(x, table[:, :16], table[:, :16], offsets, x, offset=0, **settings)
    rotary(x[:, :, :1], table, table, None, x[:, :, :1], offset=0, **settings)
