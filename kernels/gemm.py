"""Matrix products by tiles: the loop over the inner dim, and ``a @ b + more_a @ more_b + bias``.

a (rows, inner) and b (inner, columns) lie in any strides: a transposed matrix is a view. A program
owns a tile of BLOCK_M x BLOCK_N, or every n-th one if persistent; tiles go down GROUP at a time, so
that neighbours share operands in L2 (Tillet, Kung and Cox, "Triton", MAPL 2019). Where there are
few tiles, programs share out the inner dim of each, and a second kernel adds their sums in order.
The floor is 2 * rows * columns * inner flops or, of few rows, one read of b.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch, precision, processors, target
from fastattn.kernels.tuning import Config, choose
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP = 8  # rows of tiles
_SPLITS = (1, 2, 4, 8, 16, 32, 64)  # shares of the inner dim


class _Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    DESCRIPTORS: bool = False  # operands are read by TMA where they can be
    PERSISTENT: bool = False

    @property
    def shared(self) -> int:
        """Bytes of shared memory that stages of half-precision operands take."""
        return 2 * self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K


# Of the same blocks, the first is the heuristic's; descriptors have not been measured yet.
_HALF_SM90 = (
    _Tile(128, 256, 64, 8, 3),
    _Tile(128, 256, 64, 8, 4),
    _Tile(128, 256, 64, 8, 4, DESCRIPTORS=True),
    _Tile(128, 256, 64, 8, 4, DESCRIPTORS=True, PERSISTENT=True),
    _Tile(128, 128, 64, 8, 4),
    _Tile(128, 128, 64, 8, 4, DESCRIPTORS=True, PERSISTENT=True),
    _Tile(64, 128, 64, 4, 4),
    _Tile(64, 64, 128, 4, 3),
    _Tile(16, 128, 128, 4, 4),
    _Tile(16, 32, 256, 4, 4),
)
_HALF_SM80 = (
    _Tile(128, 128, 64, 8, 3),
    _Tile(64, 128, 64, 4, 3),
    _Tile(64, 64, 64, 4, 4),
    _Tile(16, 128, 128, 4, 3),
    _Tile(16, 32, 256, 4, 4),
)
_HALF_GFX9 = (
    _Tile(128, 128, 64, 8, 2),
    _Tile(64, 128, 64, 4, 2),
    _Tile(64, 64, 64, 4, 2),
    _Tile(16, 128, 64, 4, 2),
    _Tile(16, 32, 128, 4, 2),
)
_HALF_GFX11 = (
    _Tile(64, 128, 32, 8, 2),
    _Tile(64, 64, 32, 4, 2),
    _Tile(16, 128, 32, 4, 2),
    _Tile(16, 32, 64, 4, 2),
)
_TF32 = (
    _Tile(128, 128, 32, 8, 3),
    _Tile(64, 128, 32, 4, 3),
    _Tile(16, 128, 64, 4, 3),
    _Tile(16, 32, 128, 4, 3),
)
_FLOAT32 = (
    _Tile(128, 128, 16, 8, 3),
    _Tile(64, 128, 16, 8, 3),
    _Tile(64, 64, 16, 4, 3),
    _Tile(16, 128, 32, 8, 4),
    _Tile(16, 32, 64, 4, 4),
)
# Without alignment a thread loads element by element, each into a register of its own. On AMD the
# largest of these, and of float32's, would spill.
_HALF_UNALIGNED = (
    _Tile(32, 128, 32, 8, 2),
    _Tile(16, 128, 32, 8, 2),
)
_FLOAT32_UNALIGNED = (
    _Tile(32, 128, 16, 8, 2),
    _Tile(16, 128, 16, 8, 2),
)
_HALF_INTERPRETER = (_Tile(256, 256, 256, 4, 1, DESCRIPTORS=True, PERSISTENT=True),)
_FLOAT32_INTERPRETER = (_Tile(256, 256, 256, 4, 1),)


class _Cost(NamedTuple):
    """What a program's work beside its products costs, counted in products."""

    load: float  # of a tile's element, for each step of the inner dim
    launch: float  # of the kernel that adds partial sums
    partial: float  # of writing and reading one partial sum


_COST = _Cost(64, 1.3e7, 11)
_COST_FLOAT32 = _Cost(16, 5e5, 0.5)
_COST_INTERPRETER = _Cost(64, 3e7, 0)


def _tiles(tensor: Tensor, aligned: bool) -> tuple[tuple[_Tile, ...], _Cost]:
    where, single = target(tensor), tensor.dtype == torch.float32
    hip, gfx11 = where.backend == "hip", str(where.arch).startswith("gfx11")
    if where.backend == "interpreter":
        return _FLOAT32_INTERPRETER if single else _HALF_INTERPRETER, _COST_INTERPRETER
    if not aligned:
        return (_FLOAT32_UNALIGNED if single else _HALF_UNALIGNED)[hip:], _COST
    if precision(tensor.dtype) == "tf32":
        return _TF32, _COST
    if single:
        return _FLOAT32[gfx11:], _COST_FLOAT32
    if hip:
        return _HALF_GFX11 if gfx11 else _HALF_GFX9, _COST
    if not where.large:
        return tuple(tile for tile in _HALF_SM80 if tile.shared <= 96 * 1024), _COST
    return _HALF_SM90 if where.family >= 90 else _HALF_SM80, _COST


def _aligned(matrix: Tensor) -> bool:
    """Whether Triton reads 16 bytes at a time: it looks at numbers modulo 16."""
    (unit, length), (apart, _) = sorted(zip(matrix.stride(), matrix.shape))
    return unit == 1 and (apart | length | matrix.data_ptr()) % 16 == 0


def configurations(
    operands: Sequence[Tensor | None], shape: tuple[int, int, int], *,
    accumulators: int = 1, narrowest: int = 1, largest: int = 1 << 16, most_splits: int = 1,
) -> list[Config]:  # fmt: skip
    """Tiles by predicted time, and the best one's variants.

    Args:
        operands: matrices on the device where the kernel will run.
        shape: rows, columns and inner dim of the product.
        accumulators: products that a program computes side by side; they share a tile's columns.
        narrowest, largest: bounds of a tile's columns and elements, those of all accumulators.
        most_splits: into how many shares the inner dim may go.
    """
    present = [matrix for matrix in operands if matrix is not None]
    tiles, cost = _tiles(present[0], aligned=all(map(_aligned, present)))
    available = processors(present[0])
    return _ranked(tiles, cost, available, shape, accumulators, narrowest, largest, most_splits)


@functools.lru_cache(maxsize=4096)
def _ranked(
    tiles: tuple[_Tile, ...], cost: _Cost, available: int, shape: tuple[int, int, int],
    accumulators: int, narrowest: int, largest: int, most_splits: int,
) -> list[Config]:  # fmt: skip
    rows, columns, inner = shape
    whole = (rows, columns * accumulators, inner)
    usable = [
        tile
        for tile in tiles
        if narrowest <= tile.BLOCK_N and largest >= tile.BLOCK_M * tile.BLOCK_N
    ]
    usable = sorted(
        usable or tiles,
        key=lambda tile: _fastest(tile[:3], cost, available, whole, most_splits),
    )
    return [tile._asdict() | dict(BLOCK_N=tile.BLOCK_N // accumulators) for tile in usable[:6]]


@functools.lru_cache(maxsize=4096)
def _fastest(
    block: tuple[int, int, int], cost: _Cost, available: int, shape: tuple[int, int, int],
    most_splits: int,
) -> tuple[float, int]:  # fmt: skip
    """The predicted time of a product by tiles of the shape `block`, and in how many shares."""
    (m, n, k), (rows, columns, inner) = block, shape

    def time(splits: int) -> float:
        waves = triton.cdiv(triton.cdiv(rows, m) * triton.cdiv(columns, n) * splits, available)
        steps = triton.cdiv(triton.cdiv(inner, k), splits)
        work = waves * steps * k * (m * n + cost.load * (m + n))
        return work + (cost.launch + splits * rows * columns * cost.partial if splits > 1 else 0)

    return min((time(splits), splits) for splits in _SPLITS if splits <= most_splits)


class Operand(NamedTuple):
    """How a kernel reads a matrix: what it is passed, with its strides, and in which way."""

    matrix: Any  # Tensor or TensorDescriptor
    strides: tuple[int, ...]
    layout: str  # "strided"; "rows" or "columns" of a descriptor, whichever are contiguous


def operand(matrix: Tensor | None, block: tuple[int, int], described: bool) -> Operand:
    """How a kernel reads tiles of the shape `block`: if asked for by a descriptor, where it can."""
    if matrix is None:
        return Operand(None, (0, 0), "strided")
    strides = matrix.stride()
    if described and matrix.data_ptr() % 16 == 0:
        for layout, view, shape in (("rows", matrix, block), ("columns", matrix.T, block[::-1])):
            apart, unit = view.stride()
            if unit == 1 and apart * matrix.element_size() % 16 == 0 and apart > 0:
                return Operand(TensorDescriptor.from_tensor(view, list(shape)), strides, layout)
    return Operand(matrix, strides, "strided")


@triton.jit
def tile_origin(
    tile, down, across, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """First row and column of one of (down, across) tiles."""
    in_group = GROUP * across
    first = tile // in_group * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % in_group
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def load_tile(
    matrix, strides, row, column, rows, columns,
    LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile at (row, column) of a matrix (rows, columns), 0 outside."""
    if LAYOUT == "rows":
        return matrix.load([row, column])
    elif LAYOUT == "columns":
        return matrix.load([column, row]).T
    else:
        down = tl.arange(0, BLOCK_ROWS)
        across = tl.arange(0, BLOCK_COLUMNS)
        at = down.to(tl.int64)[:, None] * strides[0] + across.to(tl.int64)[None, :] * strides[1]
        start = tl.cast(row, tl.int64) * strides[0] + tl.cast(column, tl.int64) * strides[1]
        inside = (down < rows - row)[:, None] & (across < columns - column)[None, :]
        return tl.load(matrix + start + at, mask=inside, other=0.0)


@triton.jit
def store_tile(out_ptr, tile, row, column, rows, columns):
    """Write a tile of a contiguous matrix (rows, columns) at (row, column)."""
    down = tl.arange(0, tile.shape[0])
    across = tl.arange(0, tile.shape[1])
    at = down.to(tl.int64)[:, None] * columns + across[None, :]
    inside = (down < rows - row)[:, None] & (across < columns - column)[None, :]
    out_ptr += row.to(tl.int64) * columns + column
    tl.store(out_ptr + at, tile.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def halves(tile):
    """The left and the right half of a tile."""
    tile = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(tile, (0, 2, 1)))


@triton.jit
def load_bias(bias_ptr, column, columns, BLOCK_N: tl.constexpr):
    """The bias of a tile's columns in float32: (1, BLOCK_N)."""
    across = tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + column + across, mask=across < columns - column, other=0.0)
    return bias.to(tl.float32)[None, :]


@triton.jit
def multiply(
    acc, a, b, row, column, rows, columns, first, last, strides,
    A: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add a tile of a @ b, over the inner dim from `first` to `last`."""
    for k in range(first, last, BLOCK_K):
        a_tile = load_tile(a, strides[0], row, k, rows, last, A, BLOCK_M, BLOCK_K)
        b_tile = load_tile(b, strides[1], k, column, last, columns, B, BLOCK_K, BLOCK_N)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply_pair(
    acc, acc_c, a, b, c, row, column, rows, columns, first, last, strides,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the same tile of a @ b and of a @ c."""
    for k in range(first, last, BLOCK_K):
        a_tile = load_tile(a, strides[0], row, k, rows, last, A, BLOCK_M, BLOCK_K)
        b_tile = load_tile(b, strides[1], k, column, last, columns, B, BLOCK_K, BLOCK_N)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        c_tile = load_tile(c, strides[2], k, column, last, columns, C, BLOCK_K, BLOCK_N)
        acc_c = tl.dot(a_tile, c_tile, acc_c, input_precision=PRECISION)
    return acc, acc_c


@triton.jit
def _gemm_tile(
    index, out_ptr, a, b, more_a, more_b, bias_ptr, rows, columns, inner, share, down, across,
    strides,
    A: tl.constexpr, B: tl.constexpr, MORE_A: tl.constexpr, MORE_B: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split = index // (down * across)
    row, column = tile_origin(index % (down * across), down, across, BLOCK_M, BLOCK_N, GROUP)
    first = split * share
    last = tl.minimum(inner, first + share)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(
        acc, a, b, row, column, rows, columns, first, last, strides,
        A, B, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if more_a is not None:
        acc = multiply(
            acc, more_a, more_b, row, column, rows, columns, first, last,
            (strides[2], strides[3]), MORE_A, MORE_B, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, column, columns, BLOCK_N)
    store_tile(out_ptr + split.to(tl.int64) * rows * columns, acc, row, column, rows, columns)


@triton.jit
def _gemm_kernel(
    out_ptr, a, b, more_a, more_b, bias_ptr, rows, columns, inner, share, down, across, splits,
    strides,
    A: tl.constexpr, B: tl.constexpr, MORE_A: tl.constexpr, MORE_B: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for index in range(tl.program_id(0), down * across * splits, tl.num_programs(0)):
            _gemm_tile(
                index, out_ptr, a, b, more_a, more_b, bias_ptr, rows, columns, inner, share,
                down, across, strides,
                A, B, MORE_A, MORE_B, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _gemm_tile(
            tl.program_id(0), out_ptr, a, b, more_a, more_b, bias_ptr, rows, columns, inner, share,
            down, across, strides,
            A, B, MORE_A, MORE_B, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _sum_partials_kernel(
    partials_ptr, bias_ptr, out_ptr, size, columns, splits,
    BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    split = tl.arange(0, BLOCK_SPLITS)
    partials_ptr += split.to(tl.int64)[:, None] * size + at[None, :]
    acc = tl.zeros((BLOCK_SPLITS, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        there = (split < splits - first)[:, None] & inside[None, :]
        acc += tl.load(partials_ptr, mask=there, other=0.0)
        partials_ptr += tl.cast(size, tl.int64) * BLOCK_SPLITS
    out = tl.sum(acc, 0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + at % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    more_a: Tensor | None = None,
    more_b: Tensor | None = None,
) -> None:
    """Write ``a @ b + more_a @ more_b + bias`` to `out`, (rows, columns) and contiguous.

    The operands, more_a like a and more_b like b, lie in any strides.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    shape = (rows, columns, inner)
    matrices = (a, b, more_a, more_b)
    candidates = configurations(matrices, shape, most_splits=_SPLITS[-1])
    shape_class = (a.dtype, *map(triton.next_power_of_2, shape))
    options = dict(choose("gemm", shape_class, candidates, a))
    described = options.pop("DESCRIPTORS")
    m, n, k = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    _, cost = _tiles(a, aligned=True)
    splits = _fastest((m, n, k), cost, processors(a), shape, _SPLITS[-1])[1]
    steps = triton.cdiv(inner, k)
    share = triton.cdiv(steps, splits)  # of the steps
    splits = triton.cdiv(steps, share)  # none is empty
    partials = None
    if splits > 1:
        partials = out.new_empty((splits, rows, columns), dtype=torch.float32)
    blocks = ((m, k), (k, n), (m, k), (k, n))
    operands = [
        operand(matrix, block, described) for matrix, block in zip(matrices, blocks, strict=True)
    ]
    down, across = triton.cdiv(rows, m), triton.cdiv(columns, n)
    launch(
        _gemm_kernel, grid(down * across * splits, options, a),
        out if partials is None else partials, *(one.matrix for one in operands),
        bias if partials is None else None, rows, columns, inner, share * k, down, across, splits,
        tuple(one.strides for one in operands), *(one.layout for one in operands),
        PRECISION=precision(a.dtype), GROUP=GROUP, **options,
    )  # fmt: skip
    if partials is not None:
        sum_partials(partials, bias, out)


def grid(programs: int, options: Config, tensor: Tensor) -> tuple[int]:
    """As many programs as tiles or, persistent, as multiprocessors."""
    return (min(programs, processors(tensor)) if options["PERSISTENT"] else programs,)


def sum_partials(partials: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum of `partials`, (splits, ..., columns), over the splits and `bias` to `out`."""
    size, splits = out.numel(), partials.shape[0]
    block_splits = min(16, triton.next_power_of_2(splits))
    block = (65536 if INTERPRETED else 2048) // block_splits
    launch(
        _sum_partials_kernel, (triton.cdiv(size, block),),
        partials, bias, out, size, out.shape[-1], splits,
        BLOCK_SPLITS=block_splits, BLOCK=block, num_warps=4,
    )  # fmt: skip


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, device="meta", dtype=dtype)

    sizes = (
        (4096, 4096, 4096), (16, 16384, 1024), (16, 4096, 1024), (999, 999, 999), (9, 999, 999),
        (1024, 2048, 512), (512, 2048, 512), (512, 1024, 512),
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns, inner in sizes[: 5 if dtype == torch.float32 else None]:
            a, b, out = matrix(rows, inner), matrix(columns, inner).T, matrix(rows, columns)
            gemm(a, b, out, bias=matrix(1, columns)[0])
        # The gradients, of x in the gated form, and of weights.
        a, b, out = matrix(4096, 4096), matrix(4096, 4096), matrix(4096, 4096)
        gemm(a, b, out, more_a=a, more_b=b)
    gemm(a.T, b, out)
