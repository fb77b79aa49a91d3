"""Tells which backend ran what, of a call or of a model's layers, and why."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn import dispatch
from fastattn.dispatch import Choice, Explanation
from fastattn.integrations.accelerate import is_ours, replacement, type_name
from fastattn.nn import FeedForward, GatedFeedForward
from fastattn.nn.feed_forward import feed_forward, feed_forward_runs

_SEQLEN = 16  # of the inputs that a layer is asked with


class Row(NamedTuple):
    """One layer, and one call in it."""

    layer: str  # its name in the model
    kind: str  # its class
    choice: Choice | None  # None of a layer that is not on fastattn
    note: str  # why not


class ModelExplanation(Explanation):
    """The `Choice` of every call in a model, and the layer that made it; prints as a table.

    Attributes:
        rows: list of `Row`.
    """

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(row.choice for row in rows if row.choice is not None)
        self.rows = rows

    def __str__(self) -> str:
        """A line for each layer and kind of call in it; equal ones are counted."""
        counts: dict[tuple[str, str, str, str], int] = {}
        for row in self.rows:
            if row.choice is None:
                cells = row.layer or "(the model)", row.kind, "", f"torch: {row.note}"
            else:
                backend, refusals = row.choice.backend, row.choice.refusals
                why = [f"not {name}: {'; '.join(text)}" for name, text in refusals.items()]
                where = " | ".join([backend or "no backend", *why])
                cells = row.layer or "(the model)", row.kind, row.choice.problem.op, where
            counts[cells] = counts.get(cells, 0) + 1
        if not counts:
            return "no layer that fastattn knows, and no fastattn call"
        lines = [("layer", "class", "op", "backend, and why not the others")]
        lines += [
            (*cells[:2], cells[2] if n == 1 else f"{cells[2]} x{n}", cells[3])
            for cells, n in counts.items()
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(f"{text:<{w}}" for text, w in zip(line, widths)), line[3]])
            for line in lines
        )


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``fn(*args, **kwargs)`` and tell which backend ran each fastattn call in it, and why.

    `fn` is a function of the package or anything that calls some; of a model each call is told
    with its layer::

        print(fastattn.explain(fastattn.attention, q, k, v, causal=True))
        print(fastattn.explain(model, tokens))
        print(fastattn.explain(model))  # its layers alone, each asked with a small input

    Without inputs a model is not run, but each of its layers that fastattn knows; attention that
    a model calls without such a layer (Hugging Face's) shows with inputs only. A call that no
    backend may run (one was forced, say) is reported too, not raised.
    """
    if not isinstance(fn, nn.Module):
        with dispatch.recording() as seen:
            fn(*args, **kwargs)
        return Explanation(seen)
    if args or kwargs:
        return ModelExplanation(_of_call(fn, "", lambda: fn(*args, **kwargs)))
    return ModelExplanation(list(_of_layers(fn)))


def _of_call(model: nn.Module, prefix: str, call: Callable[[], Any]) -> list[Row]:
    """A row for each call of an op, with the innermost module that it was made in."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    names = {module: prefix + name for name, module in model.named_modules()}
    plain_call = nn.Module.__call__

    def told_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        start = len(seen)
        out = plain_call(module, *args, **kwargs)
        if module in names:
            for index in range(start, len(seen)):
                owners.setdefault(index, (names[module], module))
        return out

    with dispatch.recording() as seen:
        # Not by hooks: a module that has some is not fused with its neighbours.
        nn.Module.__call__ = told_call  # type: ignore[method-assign]
        try:
            call()
        finally:
            nn.Module.__call__ = plain_call  # type: ignore[method-assign]
    found = [(owners.get(index, (prefix, model)), choice) for index, choice in enumerate(seen)]
    return [Row(name, type_name(type(module)), choice, "") for (name, module), choice in found]


def _of_layers(model: nn.Module) -> Iterator[Row]:
    asked: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in asked:
            continue
        if is_ours(module) or isinstance(module, FeedForward | GatedFeedForward):
            asked.update(module.modules())
            prefix = f"{name}." if name else ""
            with torch.no_grad():
                rows = _of_call(module, prefix, lambda module=module: _ask(module))  # type: ignore
            for row in rows:
                yield row._replace(layer=row.layer.rstrip("."))
        elif (found := replacement(module)) is not None:
            note = found if isinstance(found, str) else "fastattn.accelerate(model) swaps it"
            yield Row(name, type_name(type(module)), None, note)


def _ask(layer: Any) -> None:
    """Calls a layer with a small input of the dtype and on the device of its parameters."""

    def zeros(*width: int) -> torch.Tensor:
        like = next(layer.parameters(), torch.empty(0))
        return torch.zeros(1, _SEQLEN, *width, dtype=like.dtype, device=like.device)

    if isinstance(layer, nn.MultiheadAttention):
        x = zeros(layer.embed_dim)
        key, value = zeros(layer.kdim), zeros(layer.vdim)
        same = layer._qkv_same_embed_dim
        layer(x, x if same else key, x if same else value, need_weights=False)
    elif isinstance(layer, nn.TransformerEncoderLayer):
        layer(zeros(layer.self_attn.embed_dim))
    elif isinstance(layer, nn.TransformerDecoderLayer):
        x = zeros(layer.self_attn.embed_dim)
        layer(x, x)
    elif isinstance(layer, nn.Sequential):
        for run in feed_forward_runs(layer):
            first: Any = run.modules[0]
            feed_forward(zeros(first.in_features), *run.modules)  # type: ignore[arg-type]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer(zeros(*layer.normalized_shape))
    else:
        first = next((m for m in layer.modules() if isinstance(m, nn.Linear)), None)
        layer(zeros(layer.weight.shape[-1] if first is None else first.in_features))
