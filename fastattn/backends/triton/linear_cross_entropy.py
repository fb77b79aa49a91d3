"""The last linear layer and cross entropy: torch's products, the Triton kernel between them.

A chunk of rows at a time (after Liger, Hsu et al. 2024, arXiv 2410.10989): a product makes its
logits, float32; the kernel makes the losses and the logits' gradient of them; products add that to
the gradients of x and the weight, float32 as well. Nothing is read back from a GPU: there a row
whose target is no class is not refused, its loss and gradient are NaN.
"""

import torch
from torch import Tensor

from fastattn.backends.triton.cross_entropy import first_invalid, reduced, row_factors
from fastattn.backends.triton.device import Kernels

_kernels = Kernels("linear_cross_entropy")

# Products of so many rows pay for streaming the weight and its gradient once a chunk; where x is
# larger, a chunk has about as many logits as x has elements, which memory then holds too (Liger).
_CHUNK_ROWS = 1024
_ALIGNMENT = 128  # of a chunk's rows and of the logits' row stride, in elements

_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Since then torch.addmm adds to, and torch.mm writes, float32 products of half-precision matrices.
_ADDMM_WIDENS = _TORCH >= (2, 10)
_MM_WIDENS = _ADDMM_WIDENS or (_TORCH >= (2, 8) and not torch.version.hip)


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    return ["an empty d_model or vocabulary"] if 0 in (problem.d_model, problem.vocabulary) else []


def linear_cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], int]:
    """The loss, the rows' statistics, the gradients for dloss 1, the first invalid row or -1."""
    losses = t.x.new_empty(problem.rows, dtype=torch.float32)
    stats = t.x.new_empty((problem.rows, 2), dtype=torch.float32)
    factor = row_factors(problem, t.targets, losses.new_ones(()))
    gradients = _run(problem, t, losses, stats, factor)
    invalid = first_invalid(t.targets, problem.vocabulary, problem.ignore_index)
    return reduced(problem, losses, t.targets), stats, gradients, invalid


def linear_cross_entropy_bwd(problem, t, stats, dloss) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, None where not asked for."""
    factor = row_factors(problem, t.targets, dloss)
    gradients = _run(problem, t, None, stats.contiguous(), factor)
    return tuple(None if one is None else one.to(problem.dtype) for one in gradients)


def _run(
    problem, t, losses: Tensor | None, stats: Tensor, factor: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the rows' losses times their factors, float32, None where not asked for.

    Writes the losses and the statistics; without `losses`, reads the statistics.
    """
    wanted = (problem.x_grad, problem.weight_grad, problem.bias_grad)
    new = torch.empty if problem.rows else torch.zeros
    gradients = tuple(
        new(tuple(one.shape), dtype=torch.float32, device=one.device) if want else None
        for one, want in zip(t[:3], wanted, strict=True)
    )
    if not problem.rows:
        return gradients
    if gradients[2] is not None:
        gradients[2].zero_()
    x, targets = t.x, t.targets.contiguous()
    weight = t.weight if 1 in t.weight.stride() else t.weight.contiguous()
    bias = None if t.bias is None else t.bias.contiguous()
    if problem.weight_grad:
        # Ignored rows may be NaN, and 0 * NaN would be NaN in the sum over the rows.
        x = x.masked_fill((targets == problem.ignore_index)[:, None], 0.0)
    largest = None
    if problem.dtype == torch.float16:
        factor, largest = _normalized(factor)
    size = _chunk_rows(problem)
    buffers = _buffers(problem, min(size, problem.rows), x.device)
    for start in range(0, problem.rows, size):
        chunk = slice(start, min(start + size, problem.rows))
        logits, dlogits, rest = (
            None if buffer is None else buffer[: chunk.stop - start] for buffer in buffers
        )
        _product(x[chunk], weight.T, logits, None)
        _kernels.linear_cross_entropy_chunk(
            logits, bias, targets[chunk], None if losses is None else losses[chunk], stats[chunk],
            factor if factor.numel() == 1 else factor[chunk], dlogits, rest,
            ignore_index=problem.ignore_index, label_smoothing=problem.label_smoothing,
        )  # fmt: skip
        if dlogits is not None:
            _add_gradients(gradients, chunk, x, weight, dlogits, 1.0)
        if rest is not None:
            _add_gradients(gradients, chunk, x, weight, rest, 1.0 / _kernels.REST_SCALE)
    if largest is not None:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(largest)
    return gradients


def _normalized(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The factors divided by the largest finite one, and this: float16 would lose small ones."""
    largest = factor.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    largest = largest.masked_fill(largest == 0, 1.0)
    return factor / largest, largest


def _chunk_rows(problem) -> int:
    """How many rows' logits are in memory at a time: in chunks of about equal size."""
    most = max(_CHUNK_ROWS, problem.rows * problem.d_model // problem.vocabulary)
    chunks = -(-problem.rows // most)
    return _aligned(-(-problem.rows // chunks))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _buffers(problem, rows: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """For a chunk's logits, for their gradient, and for what rounding it to float16 left."""

    def buffer(dtype: torch.dtype) -> Tensor:
        padded = (rows, _aligned(problem.vocabulary))
        return torch.empty(padded, dtype=dtype, device=device)[:, : problem.vocabulary]

    logits = buffer(torch.float32)
    if not (problem.x_grad or problem.weight_grad or problem.bias_grad):
        return logits, None, None
    if problem.dtype == torch.float32:
        return logits, logits, None
    # Of float16 a loss scale may ask for more than its 11 bits.
    rest = buffer(problem.dtype) if problem.dtype == torch.float16 else None
    return logits, buffer(problem.dtype), rest


def _add_gradients(gradients, chunk: slice, x, weight, dlogits: Tensor, factor: float) -> None:
    """Add what the logits' gradient times `factor` gives; a chunk's first part has factor 1."""
    dx, dweight, dbias = gradients
    first = factor == 1.0
    if dx is not None:
        _product(dlogits, weight, dx[chunk], None if first else factor)
    if dweight is not None:
        _product(dlogits.T, x[chunk], dweight, None if first and not chunk.start else factor)
    if dbias is not None:
        dbias.add_(dlogits.sum(0, dtype=torch.float32), alpha=factor)


def _product(a: Tensor, b: Tensor, out: Tensor, add: float | None) -> None:
    """``a @ b`` in float32, written to `out`, or multiplied by `add` and added to it."""
    if a.dtype == torch.float32 or not (a.is_cuda and _MM_WIDENS):
        beta, alpha = (0.0, 1.0) if add is None else (1.0, add)
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)
    elif add is None:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _ADDMM_WIDENS:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=add, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=torch.float32), alpha=add)
