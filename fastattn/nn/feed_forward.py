"""Position-wise feed-forward networks (Vaswani et al. 2017, section 3.3), plain and gated."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.hooks import hooked
from fastattn.ops import ffn, gated_ffn

_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_NAMED: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda module: "relu",
    nn.SiLU: lambda module: "silu",
    nn.GELU: lambda module: _GELUS.get(module.approximate),
}


def feed_forward(
    x: Tensor,
    linear1: nn.Linear,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Dropout | None,
    linear2: nn.Linear,
) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))``, in one `fastattn.ffn` where that is the same.

    It is where the modules are what their annotations say, not subclassed, parametrized, quantised
    or hooked, and the activation is one that the op knows; otherwise each is called.
    """
    known = activation_name(activation)
    if (
        known is not None
        and (dropout is None or (type(dropout) is nn.Dropout and not hooked(dropout)))
        and _plain(linear1, linear2)
        and not x.is_nested
    ):
        dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
        if dropout_p < 1.0:
            return ffn(
                x,
                linear1.weight,
                linear1.bias,
                linear2.weight,
                linear2.bias,
                activation=known,
                dropout_p=dropout_p,
            )
    hidden = activation(linear1(x))
    return linear2(hidden if dropout is None else dropout(hidden))


def gated_feed_forward(
    x: Tensor,
    gate: nn.Linear,
    up: nn.Linear,
    activation: Callable[[Tensor], Tensor],
    down: nn.Linear,
    known: str | None,
) -> Tensor:
    """``down(activation(gate(x)) * up(x))``, in one `fastattn.gated_ffn` where that is the same.

    It is where the modules are torch's own without biases or hooks, and `known`, the name of the
    activation, is not None.
    """
    biased = any(linear.bias is not None for linear in (gate, up, down))
    if known is not None and _plain(gate, up, down) and not biased:
        return gated_ffn(x, gate.weight, up.weight, down.weight, activation=known)
    return down(activation(gate(x)) * up(x))


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the ops know `activation`, None if they don't."""
    if isinstance(activation, nn.Module):
        name = _MODULES.get(type(activation))
        return None if name is None or hooked(activation) else name(activation)
    for function, known in _FUNCTIONS.items():
        if activation is function:
            return known
    return None


def _plain(*linears: nn.Module) -> bool:
    """Whether these are torch's own Linear whose weights are all that there is to them."""
    return all(type(linear) is nn.Linear for linear in linears) and not hooked(*linears)


def make_activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The module of that name, or the callable itself; raises ValueError for another name."""
    if not isinstance(activation, str):
        return activation
    if activation not in _NAMED:
        raise ValueError(
            f"activation: expected one of {', '.join(_NAMED)} or a callable, got {activation!r}"
        )
    return _NAMED[activation]()


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(x))))`` in one fused op.

    The state dict is that of the feed-forward half of `torch.nn.TransformerEncoderLayer`:
    ``linear1.weight (d_ff, d_model)``, ``linear2.weight (d_model, d_ff)``, and their biases.

    Args:
        d_model: size of input and output.
        d_ff: size of the hidden layer.
        dropout: probability of dropping a hidden element in training.
        activation: "relu", "gelu" (by erf), "gelu_tanh", "silu", or any callable, which is fused
            if it is one of torch's for these.
        bias: learn additive biases.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.activation = make_activation(activation)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to ``(..., d_model)``."""
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


class GatedFeedForward(nn.Module):
    """``down_proj(activation(gate_proj(x)) * up_proj(x))`` in one fused op (Shazeer 2020).

    The state dict has the names of Llama's: ``gate_proj.weight`` and ``up_proj.weight``
    ``(d_ff, d_model)``, ``down_proj.weight (d_model, d_ff)``.

    Args:
        d_model: size of input and output.
        d_ff: size of the hidden layer.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU),
            or any callable, which is fused if it is one of torch's for these.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.activation = make_activation(activation)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_model)`` to ``(..., d_model)``."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        known = activation_name(self.activation)
        return gated_feed_forward(x, gate, up, self.activation, down, known)


class Run(NamedTuple):
    """A feed-forward network among the modules of a `torch.nn.Sequential`."""

    first: int  # index of its first module
    modules: tuple[nn.Module, nn.Module, nn.Module | None, nn.Module]
    end: int  # index after its last


def feed_forward_runs(modules: Iterable[nn.Module]) -> Iterator[Run]:
    """Each run of Linear, activation, perhaps Dropout, and Linear, none of which is in two."""
    found = list(modules)
    index = 0
    while index + 2 < len(found):
        first, activation, *rest = found[index : index + 4]
        dropout = rest.pop(0) if type(rest[0]) is nn.Dropout else None
        run = rest and type(first) is nn.Linear is type(rest[0])
        if run and activation_name(activation) is not None:
            end = index + (3 if dropout is None else 4)
            yield Run(index, (first, activation, dropout, rest[0]), end)
            index = end
        else:
            index += 1


class Sequential(nn.Sequential):
    """`torch.nn.Sequential`, whose feed-forward networks run as one `fastattn.ffn` each.

    These are its runs of Linear, activation (ReLU, GELU, SiLU), perhaps Dropout, and Linear.
    """

    def forward(self, input: Any) -> Any:
        """The modules one after another."""
        modules = list(self)
        index = 0
        for run in feed_forward_runs(modules):
            for module in modules[index : run.first]:
                input = module(input)
            input = feed_forward(input, *run.modules)  # type: ignore[arg-type]
            index = run.end
        for module in modules[index:]:
            input = module(input)
        return input
