"""Generation from any decoder: greedy, sampling, beam search."""

from typing import Protocol

import torch
from torch import Tensor


class Decoding(Protocol):
    """One batch's decoding in progress: what generation asks of a model."""

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` ``(rows, seqlen)``; logits ``(rows, vocab_size)`` of what follows."""

    def reorder(self, rows: Tensor) -> None:
        """Makes row i continue what row ``rows[i]`` was; the number of rows may change."""


@torch.no_grad()
def generate(
    decoding: Decoding,
    prompt: Tensor,
    *,
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `prompt` until `eos_id`, at most `max_new_tokens`.

    Args:
        decoding: at its beginning; each row of `prompt` is one of its rows.
        prompt: ``(batch, seqlen)``, seqlen at least 1.
        eos_id: ends a row; None: every row gets `max_new_tokens`.
        pad_id: fills a row after its end.
        max_new_tokens: the most tokens to generate in a row.
        num_beams: 1, or the width of a beam search.
        length_penalty: of a beam search, which returns the hypothesis with the greatest
            ``log probability / length ** length_penalty``, its end counted in its length.
        do_sample: draw each token from its distribution instead of taking the most probable.
        temperature, top_k, top_p: of the distribution, as in `filter_logits`.
        generator: of the draws; default torch's own.

    Returns:
        The new tokens, ``(batch, n)`` with n the longest row's, in the dtype of `prompt`.

    Raises:
        ValueError: an argument is out of range, or has no effect beside the others.
    """
    _check(max_new_tokens, num_beams, length_penalty, do_sample, temperature, top_k, top_p)
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise ValueError(
            f"prompt: expected (batch, seqlen) with seqlen >= 1, got {tuple(prompt.shape)}"
        )
    if num_beams > 1:
        return _beam_search(
            decoding, prompt, eos_id, pad_id, max_new_tokens, num_beams, length_penalty
        )
    batch = prompt.shape[0]
    out = prompt.new_full((batch, max_new_tokens), pad_id)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    tokens = prompt
    for length in range(max_new_tokens):
        logits = decoding.step(tokens)
        if do_sample:
            probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
            token = _draw(probabilities, generator)
        else:
            token = logits.argmax(-1)
        token = token.masked_fill(ended, pad_id)
        out[:, length] = token
        if eos_id is not None:
            ended |= token == eos_id
            if ended.all():
                return out[:, : length + 1]
        tokens = token[:, None]
    return out


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Logits ``(rows, vocab_size)`` over `temperature`, -inf where a token may not be drawn.

    Args:
        logits: any dtype; the result is in float32, or float64.
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: keep the k most probable tokens (Fan et al. 2018), and those as probable as the
            last of them.
        top_p: of these, keep the fewest most probable whose probabilities sum to at least
            `top_p` (Holtzman et al. 2020).
    """
    logits = _wide(logits) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        # A token stays if those before it do not suffice; so the first always stays.
        dropped = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return logits


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    if not probabilities.shape[0]:
        return probabilities.new_empty(0, dtype=torch.long)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _beam_search(
    decoding: Decoding,
    prompt: Tensor,
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int,
    beams: int,
    length_penalty: float,
) -> Tensor:
    """Beam search (Wu et al. 2016, section 7, without coverage), all rows and beams at once.

    Of the `beams` best continuations in a step, those that end are hypotheses and leave the beam,
    which the next best refill. A row is done when nothing in its beam can still overtake its best
    hypothesis, so stopping early never changes the result.
    """
    batch, device = prompt.shape[0], prompt.device
    rows = torch.arange(batch, device=device)[:, None]  # (batch, 1)
    logp = _wide(decoding.step(prompt)).log_softmax(-1)
    vocab_size = logp.shape[-1]
    logp = logp[:, None].expand(batch, beams, vocab_size)
    scores = logp.new_full((batch, beams), -torch.inf)
    scores[:, 0] = 0  # all beams begin alike: only one may count
    live = prompt.new_full((batch, beams, max_new_tokens), pad_id)
    best = prompt.new_full((batch, max_new_tokens), pad_id)
    best_score = logp.new_full((batch,), -torch.inf)
    for length in range(1, max_new_tokens + 1):
        candidates = (scores[:, :, None] + logp).flatten(1)  # (batch, beams * vocab_size)
        top, index = candidates.topk(min(2 * beams, candidates.shape[1]))
        parent, token = index // vocab_size, index % vocab_size
        last = length == max_new_tokens
        ends = torch.zeros_like(token, dtype=torch.bool) if eos_id is None else token == eos_id
        complete = torch.ones_like(ends) if last else ends.clone()
        complete[:, beams:] = False
        score, which = (top / length**length_penalty).masked_fill(~complete, -torch.inf).max(1)
        better = score > best_score
        which = which[:, None]
        hypothesis = live[rows, parent.gather(1, which)][:, 0]
        hypothesis[:, length - 1] = token.gather(1, which)[:, 0]
        best = torch.where(better[:, None], hypothesis, best)
        best_score = torch.where(better, score, best_score)
        if last:
            break
        scores, kept = top.masked_fill(ends, -torch.inf).topk(beams)
        # Log probabilities only fall: the most that the beam's best can still reach.
        reach = max_new_tokens if length_penalty > 0 else length + 1
        if (scores[:, 0] / reach**length_penalty <= best_score).all():
            break
        parent, token = parent.gather(1, kept), token.gather(1, kept)
        live = live[rows, parent]
        live[:, :, length - 1] = token
        source = rows.expand(batch, beams) if length == 1 else rows * beams + parent
        decoding.reorder(source.flatten())
        logp = _wide(decoding.step(token.flatten()[:, None])).log_softmax(-1)
        logp = logp.view(batch, beams, vocab_size)
    return _trimmed(best, eos_id)


def _trimmed(tokens: Tensor, eos_id: int | None) -> Tensor:
    """The columns up to the last end; all if some row has none."""
    if eos_id is None or not tokens.shape[0]:
        return tokens
    is_end = tokens == eos_id
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(lengths.max())]


def _check(
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")
    if do_sample and num_beams > 1:
        raise ValueError(f"num_beams: expected 1 with do_sample=True, got {num_beams}")
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("do_sample: expected True beside temperature, top_k or top_p, got False")
    if num_beams == 1 and length_penalty != 1.0:
        raise ValueError(f"num_beams: expected more than 1 beside length_penalty, got {num_beams}")
