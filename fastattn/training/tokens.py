"""Text as tokens, by the tokenizers library: learnt from examples, or read from a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fastattn.training.config import TokenizerConfig

PAD, BOS, EOS, UNKNOWN, MASK = range(5)
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]


def learn(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of that kind, for these texts; its first tokens are ``SPECIAL``."""
    if config.kind == "characters":
        characters = sorted({character for text in texts for character in text})
        vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(SPECIAL)
        return _of_text(tokenizer)
    options: dict[str, Any] = dict(
        vocab_size=config.vocab_size, special_tokens=SPECIAL, show_progress=False
    )
    trainer: trainers.Trainer
    if config.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    tokenizer.train_from_iterator(texts, trainer)
    return _of_text(tokenizer)


def read(path: str | Path) -> Tokenizer:
    """The tokenizer in a file; its first tokens must be ``SPECIAL``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or has other special tokens.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises no kind of its own.
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    found = [tokenizer.id_to_token(number) for number in range(len(SPECIAL))]
    if found != SPECIAL:
        raise ValueError(f"{path}: expected the first tokens {SPECIAL}, got {found}")
    return _of_text(tokenizer)


def _of_text(tokenizer: Tokenizer) -> Tokenizer:
    """The same, to which "[MASK]" in a text is six characters."""
    tokenizer.encode_special_tokens = True
    return tokenizer
