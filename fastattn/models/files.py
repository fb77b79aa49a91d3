"""Reads and writes weights and their descriptions; no pickle is ever unpickled."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.replaced import replaced

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "saved models need safetensors: pip install 'fastattn[train]'", name=error.name
    ) from error

# What torch's restricted unpickler makes of damaged files.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def write_weights(path: Path, weights: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Replace the safetensors file at `path` whole; `facts` go into its header."""
    with replaced(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file({name: weight.contiguous() for name, weight in weights.items()}, part, facts)
        # The library's own mode lets nobody but the owner read.
        part.chmod(mode)


def read_facts(path: Path) -> dict[str, str]:
    """What `write_weights` put into the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of what `torch.save` wrote of a state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    try:
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a whole file of tensors only: {error}") from error
    if not isinstance(found, dict) or not all(map(_is_weight, found, found.values())):
        raise ValueError(f"{path}: expected a state dict, dense tensors by name")
    return found


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
    )


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder, in one file or several.

    Raises:
        FileNotFoundError: there are none, or a file that the index names is missing.
        ValueError: a file is damaged, or has not the weights that the index says it has.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_parts(index)
    raise FileNotFoundError(f"{folder}: no model.safetensors or pytorch_model.bin, nor an index")


def _read_parts(index: Path) -> dict[str, Tensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index}: expected a weight_map of files by weight")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        part = read_weights(index.parent / name)
        if twice := sorted(weights.keys() & part):
            raise ValueError(f"{index}: {', '.join(twice)} in {name} and in a file before it")
        weights |= part
    if missing := sorted(files.keys() - weights):
        raise ValueError(f"{index}: {', '.join(missing)} not in the file that it names")
    return weights
