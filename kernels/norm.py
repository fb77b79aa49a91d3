"""Layer norm and RMS norm of rows, alone or after a residual add, forward and backward.

x (rows, columns) in rows of any one stride; results are contiguous. A row of up to MAX_BYTES (in
the backward MAX_BLOCK_BWD columns) is read once and stays in registers; a longer one is read twice,
its mean and variance merged from those of its blocks (Chan, Golub and LeVeque, "Updating formulae
and a pairwise algorithm for computing sample variances", 1979). A program of the forward owns
BLOCK_ROWS rows; one of the backward every n-th group of them, and a row of partial sums of dweight
and dbias, which a second kernel adds up. The floor is one read of each input and one write of each
result: 2 times the size of x, 3 in the backward, with the residual 4 in both.
"""

import math

import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch, processors
from fastattn.kernels.tuning import Config, choose
from torch import Tensor

MAX_BYTES = 8192 if INTERPRETED else 32768  # of a row in registers
MAX_BLOCK_BWD = 2048 if INTERPRETED else 8192  # columns; two accumulators beside x and dy


def _rows_of_program(x: Tensor, block: int) -> int:
    if INTERPRETED:
        return max(1, min(32768 // block, triton.next_power_of_2(x.shape[0])))
    return max(1, 2048 // block)


def configurations_fwd(x: Tensor) -> list[Config]:
    """Short rows share a program; a warp gets 512 elements, up to 16 warps."""
    columns = max(x.shape[1], 16)
    block = triton.next_power_of_2(columns)
    if block * x.itemsize > MAX_BYTES:
        block = 2048 if INTERPRETED else 4096
    rows = _rows_of_program(x, block)
    warps = 16 if block < columns else max(1, min(16, block * rows // 512))
    shapes = [(rows, warps), (rows, max(1, warps // 2)), (rows, min(16, warps * 2)), (1, warps)]
    return [
        dict(BLOCK_ROWS=rows, BLOCK_COLUMNS=block, num_warps=warps)
        for rows, warps in dict.fromkeys(shapes)
    ]


def configurations_bwd(x: Tensor) -> list[Config]:
    """Two programs of 8 warps a multiprocessor; longer rows take one of 16.

    STAGES - 1 groups of rows are under way to shared memory. BLOCK_ROWS of rows that do not stay in
    registers share the reading and writing of partial sums.
    """
    columns = x.shape[1]
    if columns > MAX_BLOCK_BWD:
        block = 2048 if INTERPRETED else 1024
        shapes = [(4, block, 16, 2), (4, block, 16, 1), (2, 2 * block, 16, 2), (2, block, 8, 2)]
    else:
        block = triton.next_power_of_2(max(columns, 16))
        rows = _rows_of_program(x, block)
        warps = 8 if block < 8192 else 16
        ahead = 3 if x.itemsize == 2 else 2
        other = 5 - ahead if block * x.itemsize < 32768 else 1
        shapes = [
            (rows, block, warps, ahead), (rows, block, warps, other), (rows, block, warps, 1),
            (rows, block, 16, ahead), (max(rows, 4096 // block), block, 16, ahead),
        ]  # fmt: skip
    return [
        dict(BLOCK_ROWS=rows, BLOCK_COLUMNS=block, STAGES=stages, num_warps=warps)
        for rows, block, warps, stages in dict.fromkeys(shapes)
    ]


@triton.jit
def _tile(ptr, row, column, rows, columns, stride):
    """Rows of a matrix, 0 outside of it: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, value, row, column, rows, columns):
    """To a contiguous matrix, rounded to its dtype."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _parameter(ptr, column, columns):
    """Of weight or bias: (1, BLOCK_COLUMNS), loaded in one dim for a layout of its own."""
    return tl.load(ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _summed(x_ptr, residual_ptr, row, column, rows, columns, x_stride, residual_stride):
    """x, or the sum as it is rounded, in float32: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    x = _tile(x_ptr, row, column, rows, columns, x_stride)
    s = x.to(tl.float32)
    if residual_ptr is not None:
        residual = _tile(residual_ptr, row, column, rows, columns, residual_stride)
        s = (s + residual.to(tl.float32)).to(x.dtype).to(tl.float32)
    return s


@triton.jit
def _moments(x, column, columns, count, CENTERED: tl.constexpr):
    """Mean of the `count` columns of a block and sum of squares about it, of each row.

    Of RMS norm the sum is about 0.
    """
    if CENTERED:
        mean = tl.sum(x, 1) / count
        x = tl.where((column < columns)[None, :], x - mean[:, None], 0.0)
    else:
        mean = tl.zeros((x.shape[0],), tl.float32)
    return mean, tl.sum(x * x, 1)


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, stats_ptr,
    rows, columns, x_stride, residual_stride, eps,
    CENTERED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # So written, the compiler knows what divides them.
    columns = columns // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    residual_stride = residual_stride // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    # Asked for early, weight and bias arrive while the rows are summed.
    EARLY: tl.constexpr = BLOCKS == 1 and BLOCK_COLUMNS <= 8192
    if BLOCKS == 1:
        x = _summed(x_ptr, residual_ptr, row, column, rows, columns, x_stride, residual_stride)
        if EARLY and weight_ptr is not None:
            weight = _parameter(weight_ptr, column, columns)
        if EARLY and bias_ptr is not None:
            bias = _parameter(bias_ptr, column, columns)
        mean, squares = _moments(x, column, columns, columns, CENTERED)
    else:
        mean = tl.zeros((BLOCK_ROWS,), tl.float32)
        squares = tl.zeros((BLOCK_ROWS,), tl.float32)
        for block in range(BLOCKS):
            first = block * BLOCK_COLUMNS
            here = first + column
            x = _summed(x_ptr, residual_ptr, row, here, rows, columns, x_stride, residual_stride)
            count = tl.minimum(columns - first, BLOCK_COLUMNS).to(tl.float32)
            block_mean, block_squares = _moments(x, here, columns, count, CENTERED)
            share = count / (first + count)
            delta = block_mean - mean
            mean += delta * share
            squares += block_squares + delta * delta * (first * share)
    rstd = tl.rsqrt(squares / columns + eps)
    if stats_ptr is not None:
        if CENTERED:
            tl.store(stats_ptr + row, mean, mask=row < rows)
        tl.store(stats_ptr + (rows if CENTERED else 0) + row, rstd, mask=row < rows)
    for block in range(BLOCKS):
        here = block * BLOCK_COLUMNS + column
        if BLOCKS > 1:
            x = _summed(x_ptr, residual_ptr, row, here, rows, columns, x_stride, residual_stride)
        if not EARLY and weight_ptr is not None:
            weight = _parameter(weight_ptr, here, columns)
        if not EARLY and bias_ptr is not None:
            bias = _parameter(bias_ptr, here, columns)
        if residual_ptr is not None:
            _store(sum_ptr, x, row, here, rows, columns)
        if CENTERED:
            x -= mean[:, None]
        y = x * rstd[:, None]
        if weight_ptr is not None:
            y *= weight
        if bias_ptr is not None:
            y += bias
        _store(y_ptr, y, row, here, rows, columns)


@triton.jit
def _stats(stats_ptr, row, rows, CENTERED: tl.constexpr):
    """Mean (0 of RMS norm) and rstd of each row, 0 beyond the last."""
    rstd = tl.load(stats_ptr + (rows if CENTERED else 0) + row, mask=row < rows, other=0.0)
    mean = tl.zeros_like(rstd)
    if CENTERED:
        mean = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
    return mean, rstd


@triton.jit
def _normed_and_dy(
    x_ptr, dy_ptr, row, column, rows, columns, x_stride, dy_stride, mean, rstd,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """The norm before weight and bias, and dy: (BLOCK_ROWS, BLOCK_COLUMNS)."""
    normed = _tile(x_ptr, row, column, rows, columns, x_stride).to(tl.float32)
    dy = _tile(dy_ptr, row, column, rows, columns, dy_stride).to(tl.float32)
    if CENTERED:
        normed -= mean[:, None]
    return normed * rstd[:, None], dy


@triton.jit
def _norm_bwd_kernel(
    x_ptr, dy_ptr, ds_ptr, weight_ptr, stats_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, columns, x_stride, dy_stride, ds_stride,
    CENTERED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # So written, the compiler knows what divides them.
    columns = columns // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    ds_stride = ds_stride // ALIGN * ALIGN
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    if weight_ptr is not None:
        weight = _parameter(weight_ptr, column, columns)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    groups = tl.cdiv(rows, BLOCK_ROWS)
    for group in tl.range(program, groups, tl.num_programs(0), num_stages=STAGES):
        row = group * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mean, rstd = _stats(stats_ptr, row, rows, CENTERED)
        normed, dy = _normed_and_dy(
            x_ptr, dy_ptr, row, column, rows, columns, x_stride, dy_stride, mean, rstd, CENTERED
        )
        g = dy
        if weight_ptr is not None:
            g = dy * weight
        dx = g - normed * (tl.sum(g * normed, 1) / columns)[:, None]
        if CENTERED:
            dx -= (tl.sum(g, 1) / columns)[:, None]
        dx *= rstd[:, None]
        if ds_ptr is not None:
            dx += _tile(ds_ptr, row, column, rows, columns, ds_stride).to(tl.float32)
        _store(dx_ptr, dx, row, column, rows, columns)
        if dweight_ptr is not None:
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
    at = program * columns + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=column < columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=column < columns)


@triton.jit
def _add_partial(ptr, value, program, column, columns, first):
    """Add to the program's partial sum, which its first group of rows begins."""
    at = program * columns + column
    before = tl.load(ptr + at, mask=(column < columns) & (not first), other=0.0)
    tl.store(ptr + at, before + tl.sum(value, 0), mask=column < columns)


@triton.jit
def _long_norm_bwd_kernel(
    x_ptr, dy_ptr, ds_ptr, weight_ptr, stats_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, columns, x_stride, dy_stride, ds_stride,
    CENTERED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # So written, the compiler knows what divides them.
    columns = columns // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    ds_stride = ds_stride // ALIGN * ALIGN
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    for group in tl.range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = group * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mean, rstd = _stats(stats_ptr, row, rows, CENTERED)
        g_normed = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        g_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for block in tl.range(blocks, num_stages=STAGES):
            column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            normed, g = _normed_and_dy(
                x_ptr, dy_ptr, row, column, rows, columns, x_stride, dy_stride, mean, rstd, CENTERED
            )
            if weight_ptr is not None:
                g *= _parameter(weight_ptr, column, columns)
            g_normed += g * normed
            g_sum += g
        normed_mean = (tl.sum(g_normed, 1) / columns)[:, None]
        g_mean = (tl.sum(g_sum, 1) / columns)[:, None]
        for block in tl.range(blocks, num_stages=STAGES):
            column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            normed, dy = _normed_and_dy(
                x_ptr, dy_ptr, row, column, rows, columns, x_stride, dy_stride, mean, rstd, CENTERED
            )
            g = dy
            if weight_ptr is not None:
                g = dy * _parameter(weight_ptr, column, columns)
            dx = g - normed * normed_mean
            if CENTERED:
                dx -= g_mean
            dx *= rstd[:, None]
            if ds_ptr is not None:
                dx += _tile(ds_ptr, row, column, rows, columns, ds_stride).to(tl.float32)
            _store(dx_ptr, dx, row, column, rows, columns)
            if dweight_ptr is not None:
                _add_partial(dweight_ptr, dy * normed, program, column, columns, group == program)
            if dbias_ptr is not None:
                _add_partial(dbias_ptr, dy, program, column, columns, group == program)
        # The next group's partial sums begin with what any thread of this one stored.
        tl.debug_barrier()


@triton.jit
def _total(ptr, column, partials, columns, BLOCK_PARTIALS: tl.constexpr):
    """The sum of a matrix (partials, columns) over its rows, always in the same order."""
    total = tl.zeros((BLOCK_PARTIALS, column.shape[0]), tl.float32)
    for first in range(0, partials, BLOCK_PARTIALS):
        row = first + tl.arange(0, BLOCK_PARTIALS).to(tl.int64)
        total += _tile(ptr, row, column, partials, columns, columns)
    return tl.sum(total, 0)


@triton.jit
def _sum_parameter_grads_kernel(
    dweight_partials_ptr, dbias_partials_ptr, dweight_ptr, dbias_ptr, partials, columns,
    BLOCK_PARTIALS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if dweight_ptr is not None:
        dweight = _total(dweight_partials_ptr, column, partials, columns, BLOCK_PARTIALS)
        dweight = dweight.to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + column, dweight, mask=column < columns)
    if dbias_ptr is not None:
        dbias = _total(dbias_partials_ptr, column, partials, columns, BLOCK_PARTIALS)
        dbias = dbias.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + column, dbias, mask=column < columns)


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    stats: Tensor | None,
    *,
    eps: float,
    centered: bool,
) -> None:
    """Write the norm of x (rows, columns) to `y`, with a residual of the sum, which is `total`.

    `stats` gets mean and rstd of each row, (2, rows) in float32; of RMS norm rstd alone, (1, rows).
    Columns of x, residual and all of the others are contiguous.
    """
    rows, columns = x.shape
    options = choose("norm_fwd", _shape_class(x), configurations_fwd(x), x)
    launch(
        _norm_fwd_kernel, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        x, residual, weight, bias, y, total, stats,
        rows, columns, x.stride(0), _stride(residual), eps,
        CENTERED=centered, ALIGN=math.gcd(16, columns, x.stride(0), _stride(residual)),
        BLOCKS=triton.cdiv(columns, options["BLOCK_COLUMNS"]), **options,
    )  # fmt: skip


def partials_bwd(x: Tensor) -> int:
    """How many partial sums of dweight and dbias `norm_bwd` writes for x (rows, columns)."""
    return _programs_bwd(x, _options_bwd(x))


def norm_bwd(
    x: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor,
    partials: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    centered: bool,
) -> None:
    """Write the gradients of x (rows, columns), to which ds is added, of weight and of bias.

    `partials` is scratch memory, (how many of dweight and dbias there are, `partials_bwd(x)`,
    columns) in float32. Columns of x, dy, ds and all of the others are contiguous.
    """
    rows, columns = x.shape
    options = _options_bwd(x)
    launch(
        _norm_bwd_kernel if columns <= MAX_BLOCK_BWD else _long_norm_bwd_kernel,
        (_programs_bwd(x, options),),
        x, dy, ds, weight, stats, dx,
        None if partials is None or dweight is None else partials[0],
        None if partials is None or dbias is None else partials[-1],
        rows, columns, x.stride(0), dy.stride(0), _stride(ds),
        CENTERED=centered, ALIGN=math.gcd(16, columns, x.stride(0), dy.stride(0), _stride(ds)),
        **options,
    )  # fmt: skip
    if partials is not None:
        rows, block = (8, 4096) if INTERPRETED else (128, 32)
        launch(
            _sum_parameter_grads_kernel, (triton.cdiv(columns, block),),
            partials[0], partials[-1], dweight, dbias, partials.shape[1], columns,
            BLOCK_PARTIALS=rows, BLOCK_COLUMNS=block, num_warps=8,
        )  # fmt: skip


def _options_bwd(x: Tensor) -> Config:
    return choose("norm_bwd", _shape_class(x), configurations_bwd(x), x)


def _programs_bwd(x: Tensor, options: Config) -> int:
    programs = processors(x) * max(1, 16 // options["num_warps"])
    return min(programs, triton.cdiv(x.shape[0], options["BLOCK_ROWS"]))


def _shape_class(x: Tensor) -> tuple:
    return x.dtype, triton.next_power_of_2(x.shape[1])


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def shipped() -> None:
    """Launch every kernel in every configuration, on meta tensors: see `aot`."""
    half, single = torch.bfloat16, torch.float32
    shapes = ((half, 256), (half, 8192), (half, 16384), (single, 8192), (single, 16384))
    for dtype, columns in shapes:
        x = torch.empty(4096, columns, device="meta", dtype=dtype)
        weight = torch.empty(columns, device="meta", dtype=dtype)
        stats = torch.empty(2, 4096, device="meta", dtype=torch.float32)
        partials = torch.empty(2, partials_bwd(x), columns, device="meta", dtype=torch.float32)
        norm_fwd(x, x, weight, weight, x, x, stats, eps=1e-5, centered=True)
        norm_bwd(x, x, x, weight, stats, x, partials, weight, weight, centered=True)
        if dtype == half and columns == 8192:
            norm_fwd(x, None, None, None, x, None, None, eps=1e-5, centered=False)
            norm_bwd(x, x, None, None, stats, x, None, None, None, centered=False)
            norm_bwd(x, x, None, weight, stats, x, partials[:1], weight, None, centered=False)
