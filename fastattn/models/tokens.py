"""What the models ask of the tokens, masks and images that they are given."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tokens(name: str, tokens: Tensor, max_positions: int, start: int = 0) -> None:
    """Raises ValueError or TypeError unless `tokens` are ``(batch, seqlen)`` and fit."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected tokens of torch.int64 or int32, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name}: expected (batch, seqlen), got shape {tuple(tokens.shape)}")
    if start + tokens.shape[1] > max_positions:
        raise ValueError(
            f"{name}: expected at most max_positions={max_positions} tokens a row, "
            f"got {start + tokens.shape[1]}"
        )


def check_beside(name: str, x: Tensor, tokens: Tensor) -> None:
    """Raises ValueError or TypeError unless `x` has a whole number beside each token."""
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected torch.int64 or int32, got {x.dtype}")
    if x.shape != tokens.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(tokens.shape)} as tokens, got {tuple(x.shape)}"
        )


def check_mask(mask: Tensor, batch: int, seqlen: int) -> None:
    """Raises ValueError or TypeError unless `mask` says of each token whether it takes part."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool (True = take part), got {mask.dtype}")
    if mask.shape != (batch, seqlen):
        raise ValueError(f"mask: expected shape {(batch, seqlen)}, got {tuple(mask.shape)}")


def check_token(name: str, token: int, vocab_size: int) -> None:
    """Raises ValueError unless `token` is one of the vocabulary."""
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: expected a token, 0 to {vocab_size - 1}, got {token}")


def check_ends(eos_id: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a row; raises ValueError for one outside of the vocabulary."""
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    for token in ends:
        check_token("eos_id", token, vocab_size)
    return ends
