"""The last linear layer and cross entropy on the native kernels."""

import torch
from torch import Tensor

from fastattn.backends.cpu import cross_entropy, native

# Of logits in memory at a time: so many bytes, or this part of them all if that is more. Each chunk
# reads the weight and its gradient again, which fewer rows would not pay for.
_CHUNK_BYTES = 32 << 20
_CHUNK_PART = 8
_CHUNK_ROWS = 288


def unsupported(problem) -> list[str]:
    """Why the kernels cannot run `problem`."""
    return ["an empty d_model or vocabulary"] if 0 in (problem.d_model, problem.vocabulary) else []


def _arguments(problem, t) -> tuple:
    """The native arguments of the inputs; `t` must be the result of `_prepared`."""
    return (
        native.DTYPES[problem.dtype],
        (problem.rows, problem.d_model, problem.vocabulary),
        (t.x.data_ptr(), t.x.stride()),
        native.matrix_address(t.weight),
        native.pointer(t.bias),
        *cross_entropy.targets_arguments(problem, t.targets),
    )


def _prepared(t):
    return t._replace(
        x=native.unit_last_stride(t.x),
        weight=native.matrix(t.weight),
        bias=native.contiguous(t.bias),
        targets=t.targets.contiguous(),
    )


def _gradients(problem, t) -> tuple[Tensor | None, ...]:
    wanted = (problem.x_grad, problem.weight_grad, problem.bias_grad)
    return tuple(
        torch.empty(tuple(one.shape), dtype=torch.float32) if want else None
        for one, want in zip(t[:3], wanted, strict=True)
    )


def _workspace(problem) -> Tensor | None:
    """Room for the logits of some rows, as many floats."""
    if not (problem.x_grad or problem.weight_grad or problem.bias_grad):
        return None
    most = max(_CHUNK_ROWS, _CHUNK_BYTES // (4 * problem.vocabulary), problem.rows // _CHUNK_PART)
    return torch.empty(min(most, problem.rows) * problem.vocabulary)


def _gradient_arguments(gradients, workspace: Tensor | None) -> tuple[int, ...]:
    return (
        *(native.pointer(one) for one in gradients),
        native.pointer(workspace),
        0 if workspace is None else workspace.nbytes,
    )


def linear_cross_entropy_fwd(problem, t) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...], int]:
    """The loss, the rows' statistics, the gradients for dloss 1, the first invalid row or -1."""
    t = _prepared(t)
    shape = (problem.rows,) if problem.reduction == "none" else ()
    loss = torch.empty(shape, dtype=torch.float32)
    stats = torch.empty((problem.rows, 2), dtype=torch.float32)
    gradients, workspace = _gradients(problem, t), _workspace(problem)
    invalid = native._C.linear_cross_entropy_fwd(
        *_arguments(problem, t),
        loss.data_ptr(),
        stats.data_ptr(),
        _gradient_arguments(gradients, workspace),
    )
    return loss, stats, gradients, invalid


def linear_cross_entropy_bwd(problem, t, stats, dloss) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, None where not asked for."""
    t = _prepared(t)
    dloss, stats = dloss.float().contiguous(), stats.contiguous()
    gradients, workspace = _gradients(problem, t), _workspace(problem)
    native._C.linear_cross_entropy_bwd(
        *_arguments(problem, t),
        dloss.data_ptr(),
        stats.data_ptr(),
        _gradient_arguments(gradients, workspace),
    )
    return tuple(None if one is None else one.to(problem.dtype) for one in gradients)
