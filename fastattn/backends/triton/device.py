"""Whether Triton's kernels can run here, and the kernels themselves, imported when first used."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

_OLDEST = (3, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


class Kernels:
    """A module of ``fastattn.kernels``, imported when first used: triton takes its time."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(f"fastattn.kernels.{self._name}"), name)
        setattr(self, name, value)
        return value


def refusals(problem) -> list[str]:
    """Why no Triton kernel can run `problem`, whatever the op."""
    reasons = []
    if problem.device not in _DEVICES:
        reasons.append(f"device={problem.device}, only cuda (and cpu under TRITON_INTERPRET=1)")
    missing = _missing()
    if missing:
        reasons.append(missing)
    float8 = problem.dtype == torch.float8_e4m3fn and problem.op == "attention_fwd"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16) and not float8:
        known = "float32, float16 and bfloat16"
        if problem.op == "attention_fwd":
            known = "float32, float16, bfloat16 and float8_e4m3fn"
        reasons.append(f"dtype={problem.dtype}, only {known}")
    if problem.device == "cuda" and not INTERPRETED:
        if float8 and torch.version.hip:
            reasons.append(f"dtype={problem.dtype}, not on AMD GPUs")
        oldest = 89 if float8 else 80
        reasons += [f"{name} < sm_{oldest}" for name in _older_than(oldest)]
    return reasons


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"triton {version} < {'.'.join(map(str, _OLDEST))}"
    return None


@functools.cache
def _older_than(capability: int) -> tuple[str, ...]:
    """The visible NVIDIA devices below a capability: a problem does not say which it runs on."""
    if torch.version.hip:
        return ()
    devices = (
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    )
    return tuple(
        f"{device.name}: sm_{device.major}{device.minor}"
        for device in devices
        if 10 * device.major + device.minor < capability
    )
