"""Gives the layers of an existing model fastattn's forward, in place, and takes it back.

A layer of torch becomes the layer of `fastattn.nn` by a change of its ``__class__``: it stays the
same object with the same parameters, buffers, hooks, flags and names, so that optimizers,
references from elsewhere, state dicts and wrappers around the model don't notice.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch
from torch.nn.utils import parametrize

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

_REPLACEMENTS: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.RMSNorm: RMSNorm,
}
_ORIGINALS = {ours: torchs for torchs, ours in _REPLACEMENTS.items()}
_MARK = "_fastattn_accelerated"


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
            (name or "(the model)", _type_name(original), f"now {_type_name(replacement)}")
            for name, _, original, replacement in self.swapped
        ]
        rows += [
            (name or "(the model)", _type_name(type(module)), f"kept: {reason}")
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
    """Make the attention, Transformer and norm layers of `model` run on fastattn, in place.

    Every `torch.nn.MultiheadAttention`, `torch.nn.TransformerEncoderLayer`,
    `torch.nn.TransformerDecoderLayer`, `torch.nn.LayerNorm` and `torch.nn.RMSNorm` in it, itself
    included, becomes the class of that name in `fastattn.nn` (which see for what differs); the
    objects and all that they hold stay. Layers of a subclass are left alone, since their forward
    may be their own, and reported. A second call finds nothing left to swap::

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
        original = type(module)
        if original in _ORIGINALS:
            continue
        reason = _refusal(module)
        if reason is not None:
            skipped.append(Skipped(name, module, reason))
        elif original in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[original]
            module.__dict__[_MARK] = True
            swapped.append(Swapped(name, module, original, type(module)))
    return Report(swapped, skipped)


def restore(model: torch.nn.Module) -> int:
    """Undo `accelerate`: give each layer of `model` that it swapped torch's class back.

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
    stuck = [module for module in ours if type(module) not in _ORIGINALS]
    for module in ours:
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
            del module.__dict__[_MARK]
    if stuck:
        raise RuntimeError(
            f"model: cannot restore a layer that became {_type_name(type(stuck[0]))} after "
            "fastattn.accelerate; undo that first"
        )
    return len(ours)


def _refusal(module: torch.nn.Module) -> str | None:
    """Why a layer of these kinds is not swapped; None if it is, or is of another kind."""
    if not isinstance(module, tuple(_REPLACEMENTS)) or isinstance(module, tuple(_ORIGINALS)):
        return None
    if parametrize.is_parametrized(module):
        return "parametrized; accelerate first, then parametrize"
    if type(module) not in _REPLACEMENTS:
        bases = [base for base in type(module).__mro__ if base in _REPLACEMENTS]
        return f"a subclass of {_type_name(bases[0])}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return None


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected torch.nn.Module, got {type(model).__name__}")


def _type_name(kind: type) -> str:
    module = kind.__module__
    for package in ("torch.nn", "fastattn.nn"):
        if module.startswith(f"{package}."):
            module = package
    return f"{module}.{kind.__name__}"
