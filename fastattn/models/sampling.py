"""What a token is drawn from: logits changed and filtered, in the order of Hugging Face's."""

import math

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits ``(rows, vocab_size)`` over `temperature`, -inf where a token may not be drawn.

    Args:
        logits: any dtype; the result is in float32, or float64.
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: keep the k most probable tokens (Fan et al. 2018), and those as probable as the
            last of them.
        top_p: of these, keep the fewest most probable whose probabilities sum to at least
            `top_p` (Holtzman et al. 2020).
        min_p: of these, keep those at least `min_p` times as probable as the most probable
            (Nguyen et al. 2024).
    """
    logits = wide(logits) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        # A token stays if those before it do not suffice; so the first always stays.
        dropped = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    if min_p is not None:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Makes tokens that were seen less probable (Keskar et al. 2019, section 4.1).

    Args:
        logits: ``(rows, vocab_size)``.
        seen: boolean ``(rows, vocab_size)``.
        repetition_penalty: divides their positive logits and multiplies the negative ones.
    """
    penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return torch.where(seen, penalized, logits)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token of each row of ``(rows, vocab_size)``."""
    if not probabilities.shape[0]:
        return probabilities.new_empty(0, dtype=torch.long)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def wide(logits: Tensor) -> Tensor:
    """At least in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
