"""Generation from any decoder: greedy, sampling, beam search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastattn.models.sampling import draw, filter_logits, penalize, wide


class Decoding(Protocol):
    """One batch's decoding in progress: what generation asks of a model."""

    def step(self, tokens: Tensor) -> Tensor:
        """Appends `tokens` ``(rows, seqlen)``; logits ``(rows, vocab_size)`` of what follows."""

    def reorder(self, rows: Tensor) -> None:
        """Makes row i continue what row ``rows[i]`` was; the number of rows may change."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate.

    Args:
        max_new_tokens: the most tokens to generate in a row.
        eos_id: the token, or tokens, that end a row; None: every row gets `max_new_tokens`.
        pad_id: fills a row after its end.
        min_new_tokens: no row ends before it has as many, its end not counted.
        num_beams: 1, or the width of a beam search.
        length_penalty: of a beam search, which returns the hypothesis with the greatest
            ``log probability / length ** length_penalty``, its end counted in its length.
        repetition_penalty: as in `fastattn.models.sampling.penalize`, of what was generated and,
            in a `Decoder`, of the prompt.
        do_sample: draw each token from its distribution instead of taking the most probable.
        temperature, top_k, top_p, min_p: of the distribution, as in
            `fastattn.models.sampling.filter_logits`.
        generator: of the draws; default torch's own.

    Raises:
        ValueError: a value is out of range, or has no effect beside the others.
    """

    max_new_tokens: int
    eos_id: int | Sequence[int] | None
    pad_id: int = 0
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("min_new_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected 0 < {name} <= 1, got {value}")
        beams = self.num_beams
        if self.do_sample and beams > 1:
            raise ValueError(f"num_beams: expected 1 with do_sample=True, got {beams}")
        filtered = any(x is not None for x in (self.top_k, self.top_p, self.min_p))
        if not self.do_sample and (self.temperature != 1.0 or filtered):
            raise ValueError(
                "do_sample: expected True beside temperature, top_k, top_p or min_p, got False"
            )
        if beams == 1 and self.length_penalty != 1.0:
            raise ValueError(f"num_beams: expected more than 1 beside length_penalty, got {beams}")
        if beams > 1 and self.repetition_penalty != 1.0:
            raise ValueError(f"num_beams: expected 1 beside repetition_penalty, got {beams}")

    def eos(self, device: torch.device) -> Tensor:
        """The tokens that end a row, int64 ``(n,)``."""
        ends = self.eos_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return torch.tensor(ends, dtype=torch.int64, device=device)


@torch.no_grad()
def generate(
    decoding: Decoding, prompt: Tensor, *, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Continue each row of `prompt` to its end.

    Args:
        decoding: at its beginning; each row of `prompt` is one of its rows.
        prompt: ``(batch, seqlen)``, seqlen at least 1.
        mask: boolean ``(batch, seqlen)``, False where the prompt is padding.
        options: of `Options`.

    Returns:
        The new tokens, ``(batch, n)`` with n the longest row's, in the dtype of `prompt`.

    Raises:
        ValueError, TypeError: an argument is out of range, or has no effect beside the others.
    """
    chosen = Options(**options)
    if chosen.num_beams > 1:
        _check_prompt(prompt)
        return _beam_search(decoding, prompt, chosen)
    steps = list(stream(decoding, prompt, mask=mask, **options))
    return torch.stack(steps, 1)


@torch.no_grad()
def stream(
    decoding: Decoding, prompt: Tensor, *, mask: Tensor | None = None, **options: Any
) -> Iterator[Tensor]:
    """The tokens of `generate` as they are made, ``(batch,)`` a step; without beams."""
    chosen = Options(**options)
    if chosen.num_beams > 1:
        raise ValueError(f"num_beams: expected 1 in a stream, got {chosen.num_beams}")
    _check_prompt(prompt)
    return _steps(decoding, prompt, mask, chosen)


@torch.no_grad()
def _steps(
    decoding: Decoding, prompt: Tensor, mask: Tensor | None, options: Options
) -> Iterator[Tensor]:
    eos = options.eos(prompt.device)
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    seen: Tensor | None = None
    tokens = prompt
    for length in range(options.max_new_tokens):
        logits = _without_end(decoding.step(tokens), eos, length < options.min_new_tokens)
        if options.repetition_penalty != 1.0:
            if seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                took_part = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
                _mark(seen, prompt, took_part)
            logits = penalize(logits, seen, options.repetition_penalty)
        if options.do_sample:
            filtered = filter_logits(
                logits, options.temperature, options.top_k, options.top_p, options.min_p
            )
            token = draw(filtered.softmax(-1), options.generator)
        else:
            token = logits.argmax(-1)
        token = token.masked_fill(ended, options.pad_id)
        yield token.to(prompt.dtype)
        ended |= torch.isin(token, eos)
        if len(eos) and ended.all():
            return
        tokens = token[:, None]
        if seen is not None:
            _mark(seen, tokens, ~ended[:, None])


def _mark(seen: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Sets seen[row, token] of the tokens that `where` names."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    seen[rows[where], tokens[where].long()] = True


def _check_prompt(prompt: Tensor) -> None:
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise ValueError(
            f"prompt: expected (batch, seqlen) with seqlen >= 1, got {tuple(prompt.shape)}"
        )


def _beam_search(decoding: Decoding, prompt: Tensor, options: Options) -> Tensor:
    """Beam search (Wu et al. 2016, section 7, without coverage), all rows and beams at once.

    Of the `beams` best continuations in a step, those that end are hypotheses and leave the beam,
    which the next best refill. A row is done when nothing in its beam can still overtake its best
    hypothesis, so stopping early never changes the result.
    """
    beams, max_new_tokens, length_penalty = (
        options.num_beams,
        options.max_new_tokens,
        options.length_penalty,
    )
    batch, device = prompt.shape[0], prompt.device
    eos = options.eos(device)
    rows = torch.arange(batch, device=device)[:, None]  # (batch, 1)
    logp = _log_probabilities(decoding.step(prompt), eos, options.min_new_tokens > 0)
    vocab_size = logp.shape[-1]
    logp = logp[:, None].expand(batch, beams, vocab_size)
    scores = logp.new_full((batch, beams), -torch.inf)
    scores[:, 0] = 0  # all beams begin alike: only one may count
    live = prompt.new_full((batch, beams, max_new_tokens), options.pad_id)
    best = prompt.new_full((batch, max_new_tokens), options.pad_id)
    best_score = logp.new_full((batch,), -torch.inf)
    for length in range(1, max_new_tokens + 1):
        candidates = (scores[:, :, None] + logp).flatten(1)  # (batch, beams * vocab_size)
        top, index = candidates.topk(min((1 + len(eos)) * beams, candidates.shape[1]))
        parent, token = index // vocab_size, index % vocab_size
        last = length == max_new_tokens
        ends = torch.isin(token, eos)
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
        logits = decoding.step(token.flatten()[:, None])
        logp = _log_probabilities(logits, eos, length < options.min_new_tokens)
        logp = logp.view(batch, beams, vocab_size)
    return _trimmed(best, eos)


def _log_probabilities(logits: Tensor, eos: Tensor, too_early: bool) -> Tensor:
    return wide(_without_end(logits, eos, too_early)).log_softmax(-1)


def _without_end(logits: Tensor, eos: Tensor, too_early: bool) -> Tensor:
    return logits.index_fill(-1, eos, -torch.inf) if too_early else logits


def _trimmed(tokens: Tensor, eos: Tensor) -> Tensor:
    """The columns up to the last end; all if some row has none."""
    if not len(eos) or not tokens.shape[0]:
        return tokens
    is_end = torch.isin(tokens, eos)
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    return tokens[:, : int(lengths.max())]
