"""Training of the models of `fastattn.models`: ``python -m fastattn train``.

A run is a configuration (see `config`), made of a data set (`data`, `datasets`), a task (`tasks`)
and options of the optimizer; `trainer` carries it out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastattn.training import config as configuration
from fastattn.training.trainer import Trainer

__all__ = ["Trainer", "run"]


def run(source: str, changes: Sequence[str], out: Path | None, resume: bool) -> int:
    """Train as the command line asks, and print what was reached.

    Args:
        source: a configuration file or a recipe's name.
        changes: of single values, ``key=value``.
        out: folder of the run; default ``fastattn-NAME``.
        resume: go on with the run in the folder.

    Returns:
        The exit status: 0; 1 if something is missing or wrong; 130 if it was interrupted.
    """
    folder = Path(f"fastattn-{Path(source).stem}") if out is None else out
    try:
        config = configuration.read(source, changes)
        trainer = Trainer(config, folder, resume)
        print(
            f"{config.task}: {type(trainer.model).__name__} of "
            f"{trainer.model.num_parameters:,} parameters on {trainer.device}, "
            f"steps {trainer.step} to {config.training.steps}"
        )
        if trainer.new:
            print(f"new beside training.init: {', '.join(trainer.new)}")
        metrics = trainer.run()
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --resume goes on, in {folder}")
        return 130
    except (OSError, ValueError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"fastattn train: {error}", file=sys.stderr)
        return 1
    _report(metrics)
    print(f"\nthe model is in {folder / 'model'}")
    return 0


def _report(metrics: dict[str, float]) -> None:
    names = [key.removeprefix("held_out_") for key in metrics if key.startswith("held_out_")]
    print(f"\n{'':<12}{'train':>12}{'held out':>12}")
    for name in names:
        train, held_out = metrics[f"train_{name}"], metrics[f"held_out_{name}"]
        share = name in ("accuracy", "exact", "f1")
        texts = [f"{value:.2%}" if share else f"{value:.4g}" for value in (train, held_out)]
        print(f"{name:<12}{texts[0]:>12}{texts[1]:>12}")
    print(
        f"\n{metrics['steps']} steps in {metrics['seconds']:.0f} s, the best after "
        f"{metrics['best_step']:.0f}"
    )
