"""What every op shares: when an eager call may skip torch's dispatcher, and autocast."""

import numbers
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_functorch_level = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors outside of every trace, transform and dispatch mode.

    A call on such tensors goes straight to its kernel; any other goes through
    ``torch.ops.fastattn``, which tracing, fake tensors, subclasses and transforms understand.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return (
        not torch._C._len_torch_dispatch_stack()
        and _functorch_level() is None
        and torch._C._get_tracing_state() is None
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast_enabled(device_type: str) -> bool:
    """Whether the caller is inside ``torch.autocast`` for this device type."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype (float64 stays); call only where autocast is enabled."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)
        for t in tensors
    )


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """`seed` as the int64 tensor of one element that kernels read."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected an int or an int64 tensor of one element, "
                f"got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.reshape(1).to(device)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2^63, got {seed}")
    return torch.tensor([seed], dtype=torch.int64, device=device)


_REMEMBERED = 4096


def remembered(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check(op, tensors, *scalars)`, run once for calls that differ in their data alone."""
    known: dict[tuple, Any] = {}

    def problem(op: str, tensors: tuple[Tensor | None, ...], *scalars: Any) -> Any:
        metadata = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]
        key = (op, scalars, *metadata)
        found = known.get(key)
        if found is None:
            found = check(op, tensors, *scalars)
            if len(known) >= _REMEMBERED:
                known.clear()
            known[key] = found
        return found

    return problem


def check_dropout(dropout_p: float) -> None:
    """Raise unless ``0 <= dropout_p < 1``."""
    if not isinstance(dropout_p, numbers.Real) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...]) -> None:
    """Raise unless `tensor` broadcasts to the shape `full`."""
    sizes = tuple(tensor.shape)
    if len(sizes) > len(full) or any(
        size not in (1, whole) for size, whole in zip(sizes[::-1], full[::-1], strict=False)
    ):
        raise ValueError(f"{name}: expected a shape broadcastable to {full}, got {sizes}")


def as_rank(tensor: Tensor | None, rank: int) -> Tensor | None:
    """`tensor` with leading dims of size 1 up to `rank`."""
    if tensor is None or tensor.dim() == rank:
        return tensor
    return tensor[(None,) * (rank - tensor.dim())]


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    str: "str",
}


def schema_of(*tuples: type) -> str:
    """The fields of NamedTuples as arguments of a torch.library schema.

    Operators return tensors only: where an op's function may return None, they return an empty one.
    """
    return ", ".join(
        f"{_SCHEMA_TYPES[kind]} {name}"
        for fields in tuples
        for name, kind in get_type_hints(fields).items()
    )
