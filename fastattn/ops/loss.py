"""What both cross entropies take beside their tensors, and the checks of targets."""

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyScalars(NamedTuple):
    """What a call says beside its tensors."""

    ignore_index: int
    label_smoothing: float
    reduction: str


def check_scalars(scalars) -> None:
    """Raise unless `label_smoothing` and `reduction` are allowed."""
    if not 0.0 <= scalars.label_smoothing <= 1.0:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing <= 1, got {scalars.label_smoothing}"
        )
    if scalars.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: expected one of {', '.join(REDUCTIONS)}, got {scalars.reduction!r}"
        )


def check_targets(targets: Tensor, rows: tuple[int, ...], like: str, device: torch.device) -> None:
    """Raise unless `targets` are int64 of shape `rows`, on the device of the argument `like`."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected torch.int64, got {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets: expected device {device} as {like}, got {targets.device}")
    if tuple(targets.shape) != rows:
        raise ValueError(f"targets: expected shape {rows}, got {tuple(targets.shape)}")


def raise_invalid(targets: Tensor, row: int, vocabulary: int, ignore_index: int) -> None:
    """Raise for the target of the flat index `row`, which is no class."""
    raise ValueError(
        f"targets: expected 0 <= target < {vocabulary} or ignore_index={ignore_index}, "
        f"got {targets.reshape(-1)[row].item()} at row {row}"
    )


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the loss of logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
