"""What a run needs to go on where it was stopped, in one file that is replaced whole."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastattn.models.replaced import replaced


def write(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file whole."""
    with replaced(path) as part, part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; only tensors and plain values are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; start without --resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a whole state of a run: {error}") from error


def random_states() -> dict[str, torch.Tensor]:
    """The states of torch's generators, from which dropout draws."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Sets what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
