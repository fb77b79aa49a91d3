"""Reads and writes weights and their descriptions; no pickle is ever unpickled."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "saved models need safetensors: pip install 'fastattn[train]'", name=error.name
    ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Replace the safetensors file at `path` whole."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, part)
    os.replace(part, path)


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
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole file of tensors only: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path}: expected a state dict, tensors by name")
    return found


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder, in one file or several.

    Raises:
        FileNotFoundError: there are none, or a file that the index names is missing.
        ValueError: a file is damaged, or lacks a weight that the index says it has.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_parts(index)
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise FileNotFoundError(f"{folder}: no model.safetensors or pytorch_model.bin, nor an index")


def _read_parts(index: Path) -> dict[str, Tensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: expected a weight_map")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        weights |= read_weights(index.parent / name)
    if missing := sorted(files.keys() - weights):
        raise ValueError(f"{index}: {', '.join(missing)} not in the file that it names")
    return weights
