"""Gives the layers of an existing model fastattn's forward, in place, and takes it back.

A layer of torch becomes the layer of `fastattn.nn` by a change of its ``__class__``: it stays the
same object with the same parameters, buffers, hooks, flags and names, so that optimizers,
references from elsewhere, state dicts and wrappers around the model don't notice.
"""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch
from torch.nn.utils import parametrize

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import Sequential, feed_forward_runs
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

_REPLACEMENTS: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.Sequential: Sequential,
}
_OURS = tuple(_REPLACEMENTS.values())
_MARK = "_fastattn_original"  # in a swapped layer's __dict__: the class that it had


class Swapped(NamedTuple):
    """A layer that `accelerate` swapped."""

    name: str  # in the model, "" for the model itself
    module: torch.nn.Module
    original: type
    replacement: type


class Skipped(NamedTuple):
    """A layer that `accelerate` left alone, and why."""

    name: str
    module: torch.nn.Module
    reason: str


class Report(AbstractContextManager["Report"]):
    """What `accelerate` did to a model; prints as a table, and undoes it as a context manager.

    Attributes:
        swapped: list of `Swapped`.
        skipped: list of `Skipped`.
    """

    def __init__(self, swapped: list[Swapped], skipped: list[Skipped]) -> None:
        self.swapped = swapped
        self.skipped = skipped

    def restore(self) -> None:
        """Give every layer that this report swapped its class back."""
        _restore(entry.module for entry in self.swapped)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        rows = [
            (name or "(the model)", type_name(original), f"now {type_name(replacement)}")
            for name, _, original, replacement in self.swapped
        ]
        rows += [
            (name or "(the model)", type_name(type(module)), f"kept: {reason}")
            for name, module, reason in self.skipped
        ]
        if not rows:
            return "no layer that fastattn knows"
        rows = [("layer", "type", "result"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.skipped)} kept"])

    def __repr__(self) -> str:
        return f"<Report: {len(self.swapped)} swapped, {len(self.skipped)} kept>"


def accelerate(model: torch.nn.Module) -> Report:
    """Make the attention, feed-forward and norm layers of `model` run on fastattn, in place.

    Every `torch.nn.MultiheadAttention`, `torch.nn.TransformerEncoderLayer`,
    `torch.nn.TransformerDecoderLayer`, `torch.nn.LayerNorm` and `torch.nn.RMSNorm` in it, itself
    included, becomes the class of that name in `fastattn.nn` (which see for what differs), and so
    does a `torch.nn.Sequential` with a run of Linear, activation, perhaps Dropout, and Linear. Of a
    Hugging Face model the norms and feed-forward networks are swapped too: see
    `fastattn.integrations.transformers.layers`. The objects and all that they hold stay. Layers of
    a subclass are left alone, since their forward may be their own, and reported. A second call
    finds nothing left to swap::

        report = fastattn.accelerate(model)  # for good, or until fastattn.restore(model)
        print(report)

        with fastattn.accelerate(model):  # for the block
            model(x)

    A copy or a pickle of an accelerated model is accelerated too; a state dict never tells.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module(model)
    swapped, skipped = [], []
    for name, module in model.named_modules():
        if is_ours(module):
            continue
        found = replacement(module)
        if isinstance(found, str):
            skipped.append(Skipped(name, module, found))
        elif found is not None:
            original = type(module)
            module.__class__ = found
            module.__dict__[_MARK] = original
            swapped.append(Swapped(name, module, original, found))
    return Report(swapped, skipped)


def restore(model: torch.nn.Module) -> int:
    """Undo `accelerate`: give each layer of `model` that it swapped its class back.

    Layers that were made as layers of `fastattn.nn` stay.

    Returns:
        How many layers were restored.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: a layer was parametrized or given another class after it was swapped.
    """
    _check_module(model)
    return _restore(model.modules())


def _restore(modules: Iterable[torch.nn.Module]) -> int:
    ours = [module for module in modules if _MARK in module.__dict__]
    stuck = []
    for module in ours:
        original = module.__dict__[_MARK]
        if replacement_class(original) is type(module):
            module.__class__ = original
            del module.__dict__[_MARK]
        else:
            stuck.append(module)
    if stuck:
        raise RuntimeError(
            f"model: cannot restore a layer that became {type_name(type(stuck[0]))} after "
            "fastattn.accelerate; undo that first"
        )
    return len(ours)


def replacement(module: torch.nn.Module) -> type | str | None:
    """The class to swap a layer's for, why not, or None of a layer that fastattn does not know."""
    kind = type(module)
    found = replacement_class(kind)
    bases = [base for base in kind.__mro__[1:] if base in _REPLACEMENTS]
    if parametrize.is_parametrized(module):
        known = any(replacement_class(base) is not None for base in kind.__mro__[1:])
        return "parametrized; accelerate first, then parametrize" if known else None
    if isinstance(module, torch.nn.Sequential) and not any(feed_forward_runs(module)):
        return None
    if found is None:
        return f"a subclass of {type_name(bases[0])}" if bases else None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return found


def replacement_class(kind: type) -> type | None:
    """The class that stands in for `kind`, exactly."""
    if kind in _REPLACEMENTS:
        return _REPLACEMENTS[kind]
    if "transformers" in sys.modules and kind.__module__.startswith("transformers."):
        from fastattn.integrations.transformers.layers import replacement_class as theirs

        return theirs(kind)
    return None


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected torch.nn.Module, got {type(model).__name__}")


def is_ours(module: torch.nn.Module) -> bool:
    """Whether a layer runs on fastattn: it was swapped, or made as one of `fastattn.nn`."""
    return _MARK in module.__dict__ or type(module) in _OURS


def type_name(kind: type) -> str:
    """The name of a class, of torch and fastattn without the file that it is in."""
    module = kind.__module__
    for package in ("torch.nn", "fastattn.nn"):
        if module.startswith(f"{package}."):
            module = package
    return f"{module}.{kind.__name__}"
