"""Text from a trained model: ``python -m fastattn generate``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastattn import models
from fastattn.training import tokens
from fastattn.training.tokens import BOS, EOS, PAD


def stream(model: Any, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """Pieces of the text that continues `prompt`, or of its translation, as they are made.

    Args:
        model: `fastattn.models.Decoder` or `fastattn.models.Transformer`.
        tokenizer: the one that it was trained with.
        prompt: text.
        options: of `fastattn.models.generation.Options`; with beams there is one piece.

    Raises:
        TypeError: another kind of model.
        ValueError: an option is out of range.
    """
    ids = tokenizer.encode(prompt).ids
    if isinstance(model, models.Transformer):
        given = torch.tensor([[*ids, EOS]])
        options |= dict(bos_id=BOS)
    elif isinstance(model, models.Decoder):
        given = torch.tensor([[BOS, *ids]])
    else:
        raise TypeError(f"model: expected Decoder or Transformer, got {type(model).__name__}")
    given = given.to(next(model.parameters()).device)
    options |= dict(eos_id=EOS, pad_id=PAD)
    if options.get("num_beams", 1) > 1:
        yield tokenizer.decode(model.generate(given, **options)[0].tolist())
        return
    made: list[int] = []
    told = ""
    for token in model.stream(given, **options):
        made.append(int(token))
        text = tokenizer.decode(made)
        # A character may take several tokens, and a mark tells of one that is not whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(told) :]
            told = text


def run(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    beams: int,
    seed: int,
) -> int:
    """Prints the text as it is made; the exit status.

    Args:
        folder: of a run of ``python -m fastattn train``, or of its model.
        prompt, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, beams, seed:
            as on the command line; tokens are drawn if one of the four filters is given.
    """
    if not (folder / models.CONFIG).is_file() and (folder / "model").is_dir():
        folder = folder / "model"
    draws = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options: dict[str, Any] = {name: x for name, x in draws.items() if x is not None}
    if options:
        options |= dict(do_sample=True, generator=torch.Generator().manual_seed(seed))
    options |= dict(repetition_penalty=repetition_penalty, num_beams=beams)
    try:
        model: Any = models.load(folder)
        tokenizer = tokens.read(folder / "tokenizer.json")
        if isinstance(model, models.Decoder):
            print(prompt, end="")
            room = model.config.max_positions - len(tokenizer.encode(prompt).ids) - 1
            max_new_tokens = min(max_new_tokens, max(room, 1))
        else:
            max_new_tokens = min(max_new_tokens, model.config.max_positions)
        for piece in stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, **options):
            print(piece, end="", flush=True)
        print()
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        print(f"fastattn generate: {error}", file=sys.stderr)
        return 1
    return 0
