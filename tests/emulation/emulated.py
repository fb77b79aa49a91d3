"""The CUDA backend over the emulation: its kernels run on the host, on tensors of the CPU."""

import contextlib
import functools
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulation.build import ROOT, build, compiler

from fastattn import dispatch
from fastattn.backends.cuda import device

CAPABILITIES = {"sm80": 80, "sm90": 90}
HOST_ONLY = ("device", "tensor_map")  # emulated.cpp and tests/emulation have their own


def missing() -> str | None:
    """Why the emulation cannot be built, if so."""
    if compiler() is None:
        return "no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h"
    return None


def architectures(op: str) -> list[str]:
    """Those that run an op on kernels of their own: what came after sm_80 has sm_80's."""
    return ["sm80"] + ["sm90"] * any(ROOT.glob(f"csrc/cuda/{op}*_sm90.cu"))


@functools.cache
def module() -> ModuleType:
    """The bindings and kernels, compiled for the host unless that has been done."""
    import pybind11

    includes = (sysconfig.get_path("include"), pybind11.get_include())
    sources = [path for path in ROOT.glob("csrc/cuda/*.cu") if path.stem not in HOST_ONLY]
    sources += ROOT.glob("csrc/bindings/cuda/*.cpp")
    sources += [ROOT / "tests/cuda/emulated.cpp"]
    flags = [word for folder in includes for word in ("-isystem", folder)]
    path = build("emulated", sorted(sources), flags)
    spec = importlib.util.spec_from_file_location("emulated", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def emulating(architecture: str) -> Iterator[None]:
    """The CUDA backend takes tensors of the CPU and runs on an emulated GPU of "sm80" or "sm90".

    What a call does not name, its kernels must not touch.
    """
    kernels = module()
    kernels.set_capability(CAPABILITIES[architecture])

    def where(tensor: torch.Tensor) -> tuple[int, int]:
        kernels.clear_global()  # a call begins
        return 0, 0

    def pointer(tensor: torch.Tensor | None) -> int:
        if tensor is None or not tensor.numel():
            return 0
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
        kernels.register_global(tensor.data_ptr(), (last + 1) * tensor.element_size())
        return tensor.data_ptr()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "kernels", kernels)
        patch.setattr(device, "DEVICE", "cpu")
        patch.setattr(device, "idle", list)
        patch.setattr(device, "unsuitable_devices", tuple)
        patch.setattr(device, "where", where)
        patch.setattr(device, "pointer", pointer)
        patch.setattr(dispatch, "_selected", {})
        yield
