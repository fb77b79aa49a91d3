"""Which configuration a kernel runs with: the tuned one of this GPU, else the heuristic's.

`tune` measures, and keeps what it found in a JSON file of this GPU, Triton and fastattn under
``$XDG_CACHE_HOME/fastattn`` (``~/.cache/fastattn``), which `choose` reads once a device.
"""

import functools
import importlib.metadata
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = dict[str, Any]  # constexprs such as BLOCK_M, with num_warps and num_stages
Key = tuple[str, tuple]  # a kernel's launcher and a shape class

_NO_GPU = "interpreter"  # in place of a GPU's name
_DISTRIBUTIONS = {
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"),
    "fastattn": ("fastattn",),
}


class Decision(NamedTuple):
    """From what `choose` chose, and for which device."""

    candidates: Sequence[Config]
    device: int | None


class Tuned(NamedTuple):
    """The fastest configuration of one decision; seconds are those of the whole call."""

    config: Config
    seconds: float
    heuristic: float  # seconds with the first candidate


_known: dict[tuple[int | None, str, tuple], Config | None] = {}
_deciding: tuple[Mapping[Key, Config], dict[Key, Decision]] | None = None


def choose(name: str, shape_class: tuple, candidates: Sequence[Config], tensor: Tensor) -> Config:
    """The configuration of kernel `name` for calls of `shape_class` on the device of `tensor`.

    Args:
        name: of the kernel's launcher, such as "softmax_fwd".
        shape_class: what the best configuration depends on, in coarse steps (dtype, powers of two).
        candidates: from which tuning chooses; the first is the heuristic's, taken without tuning.
        tensor: an argument of the kernel.
    """
    device = tensor.device.index
    if _deciding is not None:
        forced, decisions = _deciding
        decisions.setdefault((name, shape_class), Decision(candidates, device))
        config = forced.get((name, shape_class))
    else:
        try:
            config = _known[device, name, shape_class]
        except KeyError:
            config = _known[device, name, shape_class] = _tuned(device, name, shape_class)
    # A file may hold what another version of the kernel knew.
    return candidates[0] if config is None or config not in candidates else config


@contextmanager
def deciding(forced: Mapping[Key, Config]) -> Iterator[dict[Key, Decision]]:
    """In the block, `choose` takes `forced` where it can and else the heuristic's.

    Yields the decisions as they come.
    """
    global _deciding
    decisions: dict[Key, Decision] = {}
    before, _deciding = _deciding, (forced, decisions)
    try:
        yield decisions
    finally:
        _deciding = before


def tune(call: Callable[[], Any]) -> dict[Key, Tuned]:
    """Time `call`, which launches kernels, under each of their candidates; store the fastest.

    Returns:
        What was found for each decision that has a choice, one after the other in the order in
        which the call takes them.
    """
    with deciding({}) as decisions:
        call()
    best: dict[Key, Config] = {}
    tuned: dict[Key, Tuned] = {}
    for key, (candidates, _) in decisions.items():
        if len(candidates) > 1:
            seconds = [_seconds(call, best | {key: config}) for config in candidates]
            best[key] = candidates[seconds.index(min(seconds))]
            tuned[key] = Tuned(best[key], min(seconds), seconds[0])
    for device in {decisions[key].device for key in tuned}:
        here = {text(*key): best[key] for key in tuned if decisions[key].device == device}
        store(gpu_name(device), here)
    return tuned


def _seconds(call: Callable[[], Any], forced: Mapping[Key, Config]) -> float:
    """Of one call; infinite where a configuration does not compile or fit the GPU."""
    # Triton is imported where it is needed: `fastattn info` reads the file without it.
    import triton
    from fastattn.kernels.launch import INTERPRETED
    from triton.runtime.errors import PTXASError

    with deciding(forced):
        try:
            if not INTERPRETED:
                return 1e-3 * triton.testing.do_bench(call, warmup=5, rep=40, return_mode="median")
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        except (triton.CompilationError, triton.OutOfResources, PTXASError):
            return math.inf


def _tuned(device: int | None, name: str, shape_class: tuple) -> Config | None:
    """The stored configuration; none in the interpreter and ahead of time."""
    return None if gpu_name(device) == _NO_GPU else _of_device(device).get(text(name, shape_class))


@functools.cache
def _of_device(device: int | None) -> dict[str, Config]:
    return load(gpu_name(device))


def gpu_name(device: int | None) -> str:
    """The GPU's own name; the interpreter's for tensors that are not on one."""
    from fastattn.kernels.launch import INTERPRETED

    return _NO_GPU if INTERPRETED or device is None else torch.cuda.get_device_name(device)


def text(name: str, shape_class: tuple) -> str:
    """A decision's key in the file, such as "softmax_fwd|bfloat16 1024"."""
    return f"{name}|{' '.join(str(part).removeprefix('torch.') for part in shape_class)}"


def folder() -> Path:
    """Where the tuned configurations lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def path(gpu: str) -> Path:
    """The file of a GPU, for the installed Triton and fastattn."""
    stem = "-".join((gpu, *(f"{name}-{version}" for name, version in _versions().items())))
    return folder() / (re.sub(r"[^\w.+-]+", "_", stem) + ".json")


def load(gpu: str) -> dict[str, Config]:
    """The stored configurations; none of a file that is missing, broken or made for another GPU."""
    file = path(gpu)
    try:
        contents = json.loads(file.read_text())
        if contents["made_for"] != {"gpu": gpu, **_versions()}:
            raise ValueError(f"made for {contents['made_for']}")
        configurations = contents["configurations"]
        if not all(isinstance(config, dict) for config in configurations.values()):
            raise ValueError("expected an object for each configuration")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"tuned configurations ignored: {file}: {type(error).__name__}: {error}", stacklevel=2
        )
        return {}
    return configurations


def store(gpu: str, configurations: Mapping[str, Config]) -> None:
    """Add configurations to the file, which other processes see whole, before or after."""
    contents = {
        "made_for": {"gpu": gpu, **_versions()},
        "configurations": load(gpu) | dict(configurations),
    }
    file = path(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(contents, stream, indent=1)
        os.replace(unfinished, file)
    except BaseException:
        os.unlink(unfinished)
        raise
    _known.clear()
    _of_device.cache_clear()


@functools.cache
def _versions() -> dict[str, str]:
    versions = dict.fromkeys(_DISTRIBUTIONS, "unknown")
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(distribution)
                break
    return versions
