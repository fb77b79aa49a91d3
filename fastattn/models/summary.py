"""What a model consists of: a table of its layers, their parameters and bytes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

Owners = dict[int, str]  # of each weight, the name of the first layer that has it


class Row(NamedTuple):
    """One layer, or several equal ones that follow each other, and all that is in them."""

    layer: str  # name in the model, such as "decoder.layers.0-5.self_attn"
    kind: str  # class
    depth: int  # layers that it is in
    parameters: int  # without those that it shares with an earlier layer
    trained: int  # of these
    bytes: int
    note: str


class Summary:
    """The layers of a model; prints as a table.

    Attributes:
        rows: list of `Row`.
        parameters: numbers in the model's weights; what is shared counts once.
        trained: of these, those with ``requires_grad``.
        bytes: of the weights, without buffers.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.parameters, self.trained, self.bytes = rows[0][3:6]

    def __str__(self) -> str:
        lines = [("layer", "class", "parameters", "share", "bytes", "")]
        parents = {-1: ""}
        for row in self.rows:
            label = "  " * row.depth + row.layer.removeprefix(parents[row.depth - 1])
            parents[row.depth] = f"{row.layer}." if row.depth else ""
            share = f"{row.parameters / self.parameters:.1%}" if self.parameters else ""
            sizes = f"{row.parameters:,}", share, _bytes(row.bytes)
            lines.append((label, row.kind, *sizes, row.note))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        formats = [f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths)]
        table = "\n".join("  ".join([*formats, "{}"]).format(*line).rstrip() for line in lines)
        return f"{table}\n{self.trained:,} of {self.parameters:,} parameters are trained"


def summary(model: nn.Module, *, depth: int = 3) -> Summary:
    """The layers of any module, with their parameters and bytes, and the heads of attention.

    ::

        print(models.summary(model))
        with torch.device("meta"):  # of a model too large to build
            print(models.summary(models.Decoder(models.preset("llama-3-8b"))))

    Args:
        model: any module, on any device.
        depth: how deep in one another layers are told apart, at least 0; containers
            (`torch.nn.ModuleList`, ``ModuleDict``) don't count. What has no weights is left out.

    Raises:
        TypeError: `model` is no module.
        ValueError: `depth` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected torch.nn.Module, got {type(model).__name__}")
    if depth < 0:
        raise ValueError(f"depth: expected at least 0, got {depth}")
    owners: Owners = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), name)
    return Summary(list(_rows("(the model)", {"": model}, 0, depth, owners)))


def _rows(
    label: str, alike: dict[str, nn.Module], level: int, depth: int, owners: Owners
) -> Iterator[Row]:
    """A row of equal layers, by their names, and those of what is in them."""
    inside = tuple(f"{name}." if name else "" for name in alike)
    first = next(iter(alike.values()))
    weights = {id(weight): weight for layer in alike.values() for weight in layer.parameters()}
    shared, own = [], []
    for key, weight in weights.items():
        if f"{owners[key]}.".startswith(inside):
            own.append(weight)
        else:
            shared.append(owners[key])
    notes = [f"x {len(alike)}"] if len(alike) > 1 else []
    notes += _heads(first)
    if own and not any(weight.requires_grad for weight in own):
        notes.append("frozen")
    notes += [f"shares that of {owner}" for owner in dict.fromkeys(shared)]
    yield Row(
        label,
        type(first).__name__,
        level,
        sum(weight.numel() for weight in own),
        sum(weight.numel() for weight in own if weight.requires_grad),
        sum(weight.numel() * weight.element_size() for weight in own),
        ", ".join(notes),
    )
    if level < depth:
        for inner, children in _children(first):
            path = f"{label}.{inner}" if level else inner
            layers = {
                f"{name}.{child}".removeprefix("."): layer.get_submodule(child)
                for name, layer in alike.items()
                for child in children
            }
            if any(True for layer in layers.values() for _ in layer.parameters()):
                yield from _rows(path, layers, level + 1, depth, owners)


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """The names of a module's children, equal ones of a list together; lists are looked into."""
    runs: list[list[str]] = []
    previous: Any = None
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child, f"{prefix}{name}.")
            continue
        weights = [(w.shape, w.dtype, w.requires_grad) for w in child.parameters()]
        heads = [_heads(module) for module in child.modules()]
        kind = name.isdigit(), repr(child), weights, heads
        if runs and name.isdigit() and kind == previous:
            runs[-1].append(prefix + name)
        else:
            runs.append([prefix + name])
        previous = kind
    for names in runs:
        last = names[-1].removeprefix(prefix)
        yield (names[0] if len(names) == 1 else f"{names[0]}-{last}"), names


def _heads(module: Any) -> list[str]:
    """What an attention layer says of its heads."""
    heads, head_dim = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return []
    heads_kv = getattr(module, "num_heads_kv", heads)
    kv = [] if heads_kv == heads else [f"heads_kv {heads_kv}"]
    return [f"heads {heads}", *kv, f"head_dim {head_dim}"]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
