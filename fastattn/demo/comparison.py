"""A stock torch model beside its accelerated copy: do they agree, and which is faster."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastattn

# float32: the largest error of an element, relative to the largest element of its tensor.
TOLERANCE = 1e-4


class Timing(NamedTuple):
    """Seconds of the same work on stock torch and on fastattn, taken by turns."""

    stock: list[float]
    fastattn: list[float]

    @property
    def stock_median(self) -> float:
        """Median seconds on stock torch."""
        return statistics.median(self.stock)

    @property
    def fastattn_median(self) -> float:
        """Median seconds on fastattn."""
        return statistics.median(self.fastattn)

    @property
    def speedup(self) -> float:
        """How many times as fast fastattn is, by the medians."""
        return self.stock_median / self.fastattn_median


class Workload(NamedTuple):
    """What to compare."""

    name: str
    detail: str  # sizes
    model: nn.Module  # of torch's own layers, without dropout
    forward: Callable[[nn.Module], Tensor]
    loss: Callable[[Tensor], Tensor]


class Comparison(NamedTuple):
    """What was found."""

    name: str
    detail: str
    swapped: int  # layers
    output_error: float
    gradient_error: float
    inference: Timing
    training: Timing

    @property
    def agrees(self) -> bool:
        """Whether outputs and gradients are equal within `TOLERANCE`."""
        return max(self.output_error, self.gradient_error) <= TOLERANCE


def compare(workload: Workload, rounds: int) -> Comparison:
    """Accelerate a copy of the model, check it against the stock one, and time both.

    Inference is in ``eval()`` and `torch.inference_mode`, so that stock torch takes its fast path.
    A training step is forward, loss, backward and Adam.
    """
    stock, accelerated = workload.model, copy.deepcopy(workload.model)
    report = fastattn.accelerate(accelerated)

    def infer(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return workload.forward(model)

    stock.eval(), accelerated.eval()
    output_error = error(infer(accelerated), infer(stock))
    inference = side_by_side(lambda: infer(stock), lambda: infer(accelerated), rounds)

    stock.train(), accelerated.train()
    for model in (stock, accelerated):
        workload.loss(workload.forward(model)).backward()
    gradient_error = max(
        error(_gradient(ours), _gradient(theirs))
        for ours, theirs in zip(accelerated.parameters(), stock.parameters(), strict=True)
    )

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        workload.loss(workload.forward(model)).backward()
        optimizer.step()

    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-6) for m in (stock, accelerated)]
    training = side_by_side(
        lambda: step(stock, optimizers[0]), lambda: step(accelerated, optimizers[1]), rounds
    )
    return Comparison(
        workload.name,
        workload.detail,
        len(report.swapped),
        output_error,
        gradient_error,
        inference,
        training,
    )


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two elements, relative to the largest element of `theirs`."""
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (largest or 1.0)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def side_by_side(stock: Callable, fast: Callable, rounds: int) -> Timing:
    """Seconds of each call, by turns, the first of each round alternating; one round to warm up."""
    timing = Timing([], [])
    for number in range(-1, rounds):
        turns = [(stock, timing.stock), (fast, timing.fastattn)]
        for function, seconds in turns if number % 2 else reversed(turns):
            start = time.perf_counter()
            function()
            if number >= 0:
                seconds.append(time.perf_counter() - start)
    return timing


def transformer(num_layers: int, batch: int, seqlen: int) -> Workload:
    """A stock `torch.nn.Transformer` of the paper's base width on random input."""
    d_model, heads, d_ff = 512, 8, 2048
    torch.manual_seed(0)
    model = nn.Transformer(d_model, heads, num_layers, num_layers, d_ff, 0.0, batch_first=True)
    src, tgt = torch.randn(2, batch, seqlen, d_model)
    goal = torch.randn(batch, seqlen, d_model)
    causal = nn.Transformer.generate_square_subsequent_mask(seqlen)
    return Workload(
        "torch.nn.Transformer",
        f"{num_layers}+{num_layers} layers, d_model {d_model}, {heads} heads, d_ff {d_ff}, "
        f"batch {batch}, {seqlen} source and {seqlen} target tokens, float32",
        model,
        lambda m: m(src, tgt, tgt_mask=causal, tgt_is_causal=True),
        lambda output: nn.functional.mse_loss(output, goal),
    )
