"""Trains the encoder-decoder model on dates, at first beside its twin on stock torch."""

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastattn import cross_entropy
from fastattn.demo.comparison import Timing
from fastattn.demo.dates import BOS, EOS, PAD, TARGET_LENGTH, Dates, Example
from fastattn.models import Transformer, load_torch

# float32 and the same batches: how far apart the two losses may be. Rounding errors grow from step
# to step, as they do between two runs of anything that is not bit for bit the same.
FIRST_STEPS = 20
FIRST_TOLERANCE = 1e-3
MEAN_TOLERANCE = 0.05
ACCURACY_BAR = 0.9


class Settings(NamedTuple):
    """Sizes of the model and of its training."""

    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 4
    d_ff: int = 256
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: int = 100
    steps: int = 800
    twin_steps: int = 120  # of these, with the stock twin beside
    evaluated: int = 1000  # examples, of the training's and of the held-out days each


class StockTransformer(nn.Module):
    """The same model of torch's own parts, around `torch.nn.Transformer`, with the same weights.

    Args:
        model: whose embeddings and output are copied, and which gets the layers' first weights.
    """

    causal: Tensor

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        config = model.config
        self.input_embedding = copy.deepcopy(model.input_embedding)
        self.target_embedding = copy.deepcopy(model.target_embedding)
        self.transformer = nn.Transformer(
            config.d_model,
            config.num_heads,
            config.num_layers,
            config.num_layers,
            config.d_ff,
            config.dropout,
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.output = copy.deepcopy(model.output)
        causal = nn.Transformer.generate_square_subsequent_mask(config.max_positions) < 0
        self.register_buffer("causal", causal, persistent=False)
        load_torch(model, self.transformer)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits ``(batch, seqlen_tgt, target_vocab_size)``, as `Transformer` gives."""
        padding, length = src == PAD, tgt.shape[1]
        x = self.transformer(
            self.input_embedding(src),
            self.target_embedding(tgt),
            tgt_mask=self.causal[:length, :length],
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.output(x)


@dataclass
class Result:
    """What the training gave."""

    settings: Settings
    model: Transformer
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the characters, a step
    stock_losses: list[float] = field(default_factory=list)
    timing: Timing = field(default_factory=lambda: Timing([], []))  # of the steps beside the twin
    seconds: float = 0.0  # of all steps of the model, without the twin's
    train_exact: float = 0.0
    held_out_exact: float = 0.0

    @property
    def first_difference(self) -> float:
        """The largest difference of the two losses in the first steps."""
        pairs = list(zip(self.losses, self.stock_losses))[:FIRST_STEPS]
        return max((abs(ours - theirs) for ours, theirs in pairs), default=0.0)

    @property
    def mean_difference(self) -> float:
        """The difference of the mean losses of the last half of the steps beside the twin."""
        steps = len(self.stock_losses)
        ours, theirs = self.losses[steps // 2 : steps], self.stock_losses[steps // 2 :]
        return abs(sum(ours) - sum(theirs)) / sum(theirs)

    @property
    def same_curves(self) -> bool:
        """Whether the losses are equal within the tolerances."""
        close = self.first_difference <= FIRST_TOLERANCE
        return close and self.mean_difference <= MEAN_TOLERANCE


class _Learner:
    """A model with its loss, optimizer and schedule."""

    def __init__(
        self, model: nn.Module, cross_entropy: Callable[..., Tensor], settings: Settings
    ) -> None:
        warmup, steps = settings.warmup, settings.steps

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

        self.model = model
        self.cross_entropy = cross_entropy
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def step(self, src: Tensor, tgt: Tensor) -> tuple[float, float, float]:
        """One step; its loss, the share of characters that were right, and its seconds."""
        start = time.perf_counter()
        logits = self.model(src, tgt[:, :-1])
        goal = tgt[:, 1:]
        loss = self.cross_entropy(logits.flatten(0, 1), goal.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        seconds = time.perf_counter() - start
        right = (logits.argmax(-1) == goal).float().mean().item()
        return loss.item(), right, seconds


def train(settings: Settings, dates: Dates, seed: int = 0) -> Result:
    """Train beside the twin, then alone, and count the exact matches."""
    torch.manual_seed(seed)
    model = Transformer(
        input_vocab_size=dates.input_vocab_size,
        target_vocab_size=dates.target_vocab_size,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        d_ff=settings.d_ff,
        dropout=0.0,
        max_positions=128,
        norm_first=True,
        pad_id=PAD,
    )
    stock = _Learner(StockTransformer(model), F.cross_entropy, settings)
    fast = _Learner(model, cross_entropy, settings)
    result = Result(settings, model)
    stream = _batches(settings, dates)
    with _bar(settings.twin_steps, "both") as bar:
        for number, (src, tgt) in enumerate(itertools.islice(stream, settings.twin_steps)):
            turns = (stock, fast) if number % 2 else (fast, stock)
            for learner in turns:
                loss, right, seconds = learner.step(src, tgt)
                if learner is fast:
                    result.losses.append(loss)
                    result.accuracies.append(right)
                    result.timing.fastattn.append(seconds)
                else:
                    result.stock_losses.append(loss)
                    result.timing.stock.append(seconds)
            bar.set_postfix_str(
                f"loss: torch {result.stock_losses[-1]:.4f}, fastattn {result.losses[-1]:.4f}, "
                f"accuracy {result.accuracies[-1]:.1%}",
                refresh=False,
            )
            bar.update()
    result.seconds = sum(result.timing.fastattn)
    alone = settings.steps - settings.twin_steps
    with _bar(alone, "fastattn alone") as bar:
        for src, tgt in itertools.islice(stream, alone):
            loss, right, seconds = fast.step(src, tgt)
            result.losses.append(loss)
            result.accuracies.append(right)
            result.seconds += seconds
            bar.set_postfix_str(f"loss {loss:.4f}, accuracy {right:.1%}", refresh=False)
            bar.update()
    model.eval()
    count = settings.evaluated
    result.train_exact = exact_match(model, dates, dates.sample(dates.train, count, seed="train"))
    result.held_out_exact = exact_match(
        model, dates, dates.sample(dates.held_out, count, seed="held out")
    )
    return result


def _bar(total: int, name: str) -> tqdm:
    # A log, unlike a terminal, keeps every line.
    seconds = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, desc=name, unit="step", mininterval=seconds, dynamic_ncols=True)


def _batches(settings: Settings, dates: Dates) -> Iterator[tuple[Tensor, Tensor]]:
    for seed in itertools.count(1):
        examples = dates.sample(dates.train, 16 * settings.batch, seed)
        yield from dates.batches(examples, settings.batch, seed)


def translate(model: Transformer, dates: Dates, examples: list[Example]) -> list[str]:
    """The model's answers, greedily."""
    answers: list[str] = []
    for start in range(0, len(examples), 256):
        tokens = model.generate(
            dates.encode_sources(examples[start : start + 256]),
            bos_id=BOS,
            eos_id=EOS,
            max_new_tokens=TARGET_LENGTH + 1,
        )
        answers += map(dates.decode_target, tokens.tolist())
    return answers


def exact_match(model: Transformer, dates: Dates, examples: list[Example]) -> float:
    """Share of `examples` that the model translates without a wrong character."""
    by_length = sorted(examples, key=lambda example: len(example.text))
    answers = translate(model, dates, by_length)
    right = sum(answer == example.iso for answer, example in zip(answers, by_length))
    return right / len(examples)


def cross_attention(model: Transformer, dates: Dates, example: Example) -> Tensor:
    """Where the model looks while it writes each character of the true answer.

    Returns:
        ``(characters, source tokens)``, the mean over heads and layers.
    """
    tgt = dates.encode_targets([example])[:, : len(example.iso)]
    weights = model.attention_weights(dates.encode_sources([example]), tgt)
    return torch.stack(weights.cross).mean((0, 2))[0]
