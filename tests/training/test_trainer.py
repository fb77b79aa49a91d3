"""Training: each task learns and is saved; stopped runs go on; accumulation, clipping, init."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastattn import models
from fastattn.training import config, schedule, state
from fastattn.training.config import TASKS
from fastattn.training.trainer import Trainer


def _log(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", TASKS)
def test_each_task_learns_and_is_saved(trainer, task):
    run = trainer(task, training=dict(steps=30, learning_rate=1e-2), model=dict(dropout=0.0))
    before = run.evaluate("train")["loss"]
    metrics = run.run()
    assert metrics["train_loss"] < before
    assert 0 <= metrics["held_out_accuracy"] <= 1
    folder = run.folder / "model"
    loaded = models.load(folder)
    for name, weight in loaded.state_dict().items():
        assert weight.equal(run.model.state_dict()[name])
    assert (folder / "tokenizer.json").exists() == (task != "image-classification")
    assert (folder / "labels.json").exists() == task.endswith("classification")
    assert json.loads((run.folder / "metrics.json").read_text()) == metrics
    rows = _log(run.folder)
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_translation_counts_whole_answers(trainer):
    run = trainer(training=dict(steps=250, learning_rate=1e-2, batch=16, eval_every=250),
                  model=dict(dropout=0.0, d_model=32, d_ff=64))  # fmt: skip
    assert run.run()["train_exact"] > 0.5


@pytest.mark.parametrize("task", ["language-modeling", "image-classification"])
def test_accumulation_is_a_larger_batch(trainer, task):
    options = dict(steps=3, eval_every=3)
    model = dict(dropout=0.0)
    large = trainer(task, "large", training=dict(**options, batch=8), model=model)
    small = trainer(task, "small", training=dict(**options, batch=4, accumulate=2), model=model)
    # The same examples, whatever their order is.
    batches = [large.order[number] for number in range(3)]
    small.order = [part for batch in batches for part in (batch[:3], batch[3:])]
    for run in (small, large):
        # Adam makes steps of rounding errors where a gradient is 0.
        run.optimizer = torch.optim.SGD(run.model.parameters())
        run.run()
    for expected, got in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_stopped_at_any_step_it_goes_on_alike(trainer):
    whole = trainer(folder="whole", training=dict(steps=11))
    whole.run()
    for last in (1, 3, 7):
        folder = f"stopped {last}"
        stopped = trainer(folder=folder, training=dict(steps=11))
        step = stopped._train_step

        def interrupted(stopped=stopped, step=step, last=last):
            if stopped.step == last:
                raise KeyboardInterrupt
            return step()

        stopped._train_step = interrupted
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        resumed = trainer(folder=folder, training=dict(steps=11), resume=True)
        assert resumed.step == last
        torch.manual_seed(last)
        torch.set_rng_state(state.read(resumed.folder / "state.pt")["random"]["cpu"])
        resumed.run()
        assert _log(resumed.folder) == _log(whole.folder)
        for expected, got in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert got.equal(expected)


COMMAND = """
import sys, torch
torch.set_num_threads(1)
from fastattn.training import run
sys.exit(run(sys.argv[1], [], __import__("pathlib").Path(sys.argv[2]), "--resume" in sys.argv))
"""


def _start(path, folder, *options):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path), str(folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_killed_it_goes_on_alike(values, tmp_path):
    path = tmp_path / "config.json"
    made = values(training=dict(steps=400, save_every=7, eval_every=50, accumulate=2))
    path.write_text(json.dumps(made))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = _start(path, killed)
    deadline = time.monotonic() + 60
    while not (killed / "log.csv").exists() or len(_log(killed)) < 30:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    assert 0 < state.read(killed / "state.pt")["step"] < 400
    for folder, options in ((whole, ()), (killed, ("--resume",))):
        process = _start(path, folder, *options)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert _log(killed) == _log(whole)
    first, second = (models.load(folder / "model").state_dict() for folder in (whole, killed))
    assert all(weight.equal(second[name]) for name, weight in first.items())
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
    for each in metrics:
        del each["seconds"]
    assert metrics[0] == metrics[1]


def test_tensorboard_has_the_same_curve(trainer, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = dict(log="tensorboard", eval_every=5)
    run = trainer(training=dict(steps=8, **options))
    run.run()
    events = accumulator.EventAccumulator(str(run.folder)).Reload()
    told = {name: {} for name in events.Tags()["scalars"]}
    for name, steps in told.items():
        steps.update((event.step, event.value) for event in events.Scalars(name))
    rows = _log(run.folder)
    assert set(told) == set(rows[0]) - {"step"}
    for name, steps in told.items():
        logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert steps == pytest.approx(logged)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="log='tensorboard' needs it: pip install"):
        trainer(folder="other", training=options)


def test_stops_early(trainer):
    run = trainer(training=dict(steps=50, learning_rate=0.0, eval_every=2, patience=3))
    metrics = run.run()
    assert metrics["steps"] == 8 and metrics["best_step"] == 2


def test_a_loss_that_is_not_finite_stops_it(trainer):
    run = trainer(training=dict(learning_rate=1e30, clip=0.0, warmup=0, steps=50))
    with pytest.raises(FloatingPointError, match="the loss of step .* is"):
        run.run()


def test_a_preset_gives_the_sizes_that_the_run_does_not(values, tmp_path):
    made = values("text-classification")
    made["model"] = dict(preset="bert-tiny", num_layers=1)
    found = Trainer(config.from_dict(made), tmp_path / "run").model.config
    expected = models.preset("bert-tiny", num_layers=1)
    data = dict(vocab_size=found.vocab_size, max_positions=found.max_positions)
    assert found == expected.changed(**data, types=found.types, pad_id=found.pad_id)
    assert found.vocab_size < 100
    made["model"] = dict(preset="gpt2")
    with pytest.raises(ValueError, match="preset: expected one of bert-base, .* for Sequence"):
        Trainer(config.from_dict(made), tmp_path / "other")


def test_begins_with_another_model(trainer):
    first = trainer("masked-language-modeling", "first")
    first.run()
    folder = first.folder / "model"
    second = trainer("text-classification", "second", training=dict(init=str(folder)))
    new = ["classifier.bias", "classifier.weight", "pooler.bias", "pooler.weight"]
    assert second.new == new
    theirs, ours = models.load(folder).state_dict(), second.model.state_dict()
    assert ours["encoder.embedding.tokens.weight"].equal(theirs["encoder.embedding.tokens.weight"])
    assert second.task.tokenizer.to_str() == first.task.tokenizer.to_str()
    second.run()
    with pytest.raises(ValueError, match="model.preset: expected none beside training.init"):
        trainer("text-classification", "third", training=dict(init=str(folder)),
                model=dict(preset="bert-tiny"))  # fmt: skip
    with pytest.raises(ValueError, match=r"training.init: .*: expected shape"):
        trainer("text-classification", "third", training=dict(init=str(folder)),
                model=dict(d_ff=32))  # fmt: skip


def test_bfloat16_and_checkpointed_activations(trainer):
    metrics = trainer(
        "language-modeling",
        training=dict(dtype="bfloat16"),
        model=dict(checkpoint_activations=True),
    ).run()
    assert 0 < metrics["train_loss"] < 10


def test_a_run_is_not_overwritten(trainer):
    trainer().run()
    with pytest.raises(FileExistsError, match="--resume"):
        trainer()
    with pytest.raises(ValueError, match="expected the configuration of the run to resume"):
        trainer(training=dict(batch=5), resume=True)
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        trainer(folder="other", resume=True)


def test_half_a_state_is_refused(trainer):
    run = trainer()
    run.run()
    path = run.folder / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole state"):
        trainer(resume=True)


@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt", "constant"])
def test_schedules(kind):
    options = config.TrainingConfig(
        steps=100, warmup=10, learning_rate=1.0, schedule=kind, min_learning_rate=0.1
    )
    rates = [schedule.learning_rate(options, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    last = {"cosine": 0.1, "inverse_sqrt": 10**-0.5, "constant": 1.0}[kind]
    assert rates[-1] == pytest.approx(last)


def test_weights_that_decay(trainer):
    run = trainer()
    decayed, others = run.optimizer.param_groups
    names = {id(p): name for name, p in run.model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.dim() > 1 for p in decayed["params"])
    assert {"input_embedding.tokens.weight"} <= {names[id(p)] for p in others["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
