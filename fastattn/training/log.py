"""The curves of a run: a CSV file, and TensorBoard's if asked for."""

import csv
from pathlib import Path
from typing import Any

from fastattn.models.replaced import replaced

COLUMNS = ("step", "learning_rate", "train_loss", "held_out_loss", "held_out_accuracy")


class Log:
    """A line a step that is logged, in ``log.csv``.

    Args:
        folder: of the run.
        step: the last step done: lines after it, of a run that was stopped, are dropped.
        tensorboard: write TensorBoard's events to the folder too.

    Raises:
        ModuleNotFoundError: tensorboard is missing.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._path = folder / "log.csv"
        rows = [row for row in self._rows() if int(row["step"]) <= step] if step else []
        with replaced(self._path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._file = self._path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "training.log='tensorboard' needs it: pip install tensorboard", name=error.name
                ) from error
            self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def _rows(self) -> list[dict[str, str]]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            # The last line may have been cut off.
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def write(self, step: int, **values: float) -> None:
        """A line; columns without a value stay empty."""
        self._writer.writerow({"step": step, **{k: repr(v) for k, v in values.items()}})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
