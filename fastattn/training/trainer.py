"""Trains a model as a configuration says; a run that is stopped goes on with the same curve."""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastattn import models
from fastattn.models.checkpoint import weights_once
from fastattn.models.replaced import replaced
from fastattn.training import data, state
from fastattn.training.config import RunConfig
from fastattn.training.log import Log
from fastattn.training.schedule import learning_rate
from fastattn.training.tasks import TASKS, Batch, Task

CONFIG, STATE, METRICS, MODEL = "run.json", "state.pt", "metrics.json", "model"


class Trainer:
    """One run, in a folder of its own.

    The folder gets ``run.json`` (its configuration), ``log.csv``, ``state.pt`` (to resume from),
    ``model`` (the weights with the least held-out loss, the tokenizer and the labels, for
    `fastattn.models.load` and ``python -m fastattn generate``), and at the end ``metrics.json``.

    Args:
        config: of the run.
        folder: of the run.
        resume: go on from the folder's state.

    Raises:
        FileExistsError: the folder has a run already, and `resume` was not asked for.
        FileNotFoundError, ValueError, ModuleNotFoundError: something is missing or wrong; the
            message names it.
    """

    def __init__(self, config: RunConfig, folder: Path, resume: bool = False) -> None:
        self.config, self.folder = config, folder
        options = config.training
        if not resume and (folder / STATE).exists():
            raise FileExistsError(
                f"{folder} has a run: --resume goes on with it, or choose another"
            )
        saved = state.read(folder / STATE) if resume else None
        if resume and json.loads((folder / CONFIG).read_text()) != config.to_dict():
            raise ValueError(f"{folder / CONFIG}: expected the configuration of the run to resume")
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = torch.device(_device(options.device))
        torch.manual_seed(config.seed)
        init = None if options.init is None else Path(options.init)
        dataset = data.load(config.data, config.task)
        self.task: Task = TASKS[config.task](config, dataset, init)
        first = None if init is None else models.load(init)
        self.model = self.task.build(first)
        self.new = [] if first is None else _begin_with(self.model, first)
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, options.weight_decay),
            lr=0.0,
            betas=(options.betas[0], options.betas[1]),
        )
        self.order = data.Order(
            lambda epoch: self.task.examples("train", epoch),
            self.task.length,
            options.batch,
            config.seed,
        )
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, float] = {}
        self.worse = 0  # evaluations since the best
        folder.mkdir(parents=True, exist_ok=True)
        if saved is not None:
            self._restore(saved)
        else:
            _write_json(folder / CONFIG, config.to_dict())
        self.log = Log(folder, self.step, options.log == "tensorboard")

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the metrics, which it also writes.

        Raises:
            KeyboardInterrupt: it was interrupted; its state was saved.
            FloatingPointError: the loss is not finite.
        """
        options = self.config.training
        try:
            with _bar(options.steps, self.step) as bar:
                while self.step < options.steps and not self._stops_early():
                    self._one(bar)
        except KeyboardInterrupt:
            self._save_state()
            raise
        finally:
            self.log.close()
        return self._finish()

    def _one(self, bar: tqdm) -> None:
        options = self.config.training
        start = time.perf_counter()
        loss = self._train_step()
        self.step += 1
        self.seconds += time.perf_counter() - start
        values = {}
        if self.step % options.log_every == 0 or self.step == 1:
            values = {"learning_rate": learning_rate(options, self.step), "train_loss": loss}
        last = self.step == options.steps
        if last or self.step % options.eval_every == 0:
            held_out = self.evaluate("held_out")
            values |= {
                "held_out_loss": held_out["loss"], "held_out_accuracy": held_out["accuracy"]
            }  # fmt: skip
            self._keep_best(held_out)
        if values:
            self.log.write(self.step, **values)
        if last or self.step % options.save_every == 0:
            self._save_state()
        best = f", held-out {self.best['loss']:.4f}" if self.best else ""
        bar.set_postfix_str(f"loss {loss:.4f}{best}", refresh=False)
        bar.update()

    def _train_step(self) -> float:
        """One step of the optimizer; the mean loss of its targets."""
        options = self.config.training
        self.model.train()
        first = self.step * options.accumulate
        batches = [
            self.task.batch(self.order[number], f"{self.config.seed} {number}")
            for number in range(first, first + options.accumulate)
        ]
        targets = sum(map(self.task.targets, batches))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self._autocast():
                loss = self.task.loss(
                    self.model, self._moved(batch), options.label_smoothing, False
                ).loss / max(targets, 1)  # fmt: skip
            loss.backward()
            total += loss.detach()
        mean = total.item()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of step {self.step + 1} is {mean}: a lower training.learning_rate or a "
                "longer training.warmup may help"
            )
        if options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    @torch.no_grad()
    def evaluate(self, name: str) -> dict[str, float]:
        """Loss, accuracy and perplexity of some "train" or "held_out" examples."""
        self.model.eval()
        loss, right, targets = 0.0, 0, 0
        examples = sorted(self._some(name), key=self.task.length)
        for start in range(0, len(examples), self.config.training.batch):
            batch = self.task.batch(examples[start : start + self.config.training.batch], None)
            with self._autocast():
                output = self.task.loss(self.model, self._moved(batch), 0.0, True)
            loss += output.loss.item()
            right += int(output.right)  # type: ignore[arg-type]
            targets += self.task.targets(batch)
        mean = loss / max(targets, 1)
        perplexity = math.exp(min(mean, 700.0))
        return {"loss": mean, "accuracy": right / max(targets, 1), "perplexity": perplexity}

    def _some(self, name: str) -> Sequence[Any]:
        return self.task.examples(name, 0)[: self.config.training.eval_examples]

    def _keep_best(self, held_out: dict[str, float]) -> None:
        if self.best and held_out["loss"] >= self.best["loss"]:
            self.worse += 1
            return
        self.best, self.worse = {**held_out, "step": self.step}, 0
        models.save(self.model, self.folder / MODEL)
        self.task.save(self.folder / MODEL)

    def _stops_early(self) -> bool:
        return 0 < self.config.training.patience <= self.worse

    def _finish(self) -> dict[str, float]:
        """The metrics of the best model."""
        best = models.load(self.folder / MODEL)
        self.model.load_state_dict(best.state_dict())
        metrics: dict[str, float] = {"steps": self.step, "seconds": round(self.seconds, 1)}
        metrics["parameters"] = int(self.model.num_parameters)  # type: ignore[arg-type]
        metrics["best_step"] = self.best["step"]
        for name in ("train", "held_out"):
            found = self.evaluate(name) | self.task.final(self.model, self._some(name))
            metrics |= {f"{name}_{key}": value for key, value in found.items()}
        _write_json(self.folder / METRICS, metrics)
        return metrics

    def _save_state(self) -> None:
        state.write(
            self.folder / STATE,
            {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "worse": self.worse,
                "model": weights_once(self.model),
                "optimizer": self.optimizer.state_dict(),
                "random": state.random_states(),
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(saved["model"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.best, self.worse = saved["best"], saved["worse"]
        state.restore_random_states(saved["random"])

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.training.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with replaced(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device: expected cpu or auto, as torch sees no GPU, got 'cuda'")
    return name


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and all others."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and id(parameter) not in tables and "positions" not in name
        (decayed if matrix else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _begin_with(model: nn.Module, first: nn.Module) -> list[str]:
    """Gives `model` the weights that `first` has by the same names; the names of the others.

    Raises:
        ValueError: a weight of the same name has another shape, or there is none.
    """
    theirs, own = weights_once(first), weights_once(model)
    common = own.keys() & theirs
    if not common:
        kinds = type(first).__name__, type(model).__name__
        raise ValueError(f"training.init: {kinds[0]} has no weight of {kinds[1]}")
    with torch.no_grad():
        for name in common:
            if own[name].shape != theirs[name].shape:
                raise ValueError(
                    f"training.init: {name}: expected shape {tuple(own[name].shape)}, "
                    f"got {tuple(theirs[name].shape)}"
                )
            own[name].copy_(theirs[name])
    return sorted(own.keys() - theirs)


def _bar(total: int, step: int) -> tqdm:
    # A log, unlike a terminal, keeps every line.
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, initial=step, unit="step", desc="train", mininterval=seconds,
        dynamic_ncols=True,
    )  # fmt: skip
