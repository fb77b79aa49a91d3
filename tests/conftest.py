"""Every op's test runs over every backend of this machine and every CPU instruction set."""

import contextlib
import importlib.util
import os

import pytest
import torch
from hypothesis import settings

# Before the kernels are imported: without a GPU, Triton's interpreter runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastattn
from fastattn import dispatch

# The same examples in every run: a bound on rounding is a bound for these.
settings.register_profile("fastattn", derandomize=True, deadline=None)
settings.load_profile("fastattn")

try:
    from fastattn import _C
except ImportError:
    _C = None

_VARIANTS = ["reference"] + ([f"cpu-{isa}" for isa in _C.isas_available()] if _C else [])
if importlib.util.find_spec("triton"):
    _VARIANTS.append("triton")


@pytest.fixture(params=_VARIANTS)
def backend(request):
    """Forces one backend, and of the CPU's one instruction set; yields the backend's name.

    With a GPU, new tensors lie on it where the backend is one for GPUs.
    """
    name, _, isa = request.param.partition("-")
    before = _C.isa() if isa else None
    if isa:
        _C.set_isa(isa)
    try:
        on_gpu = name == "triton" and torch.cuda.is_available()
        device = torch.device("cuda") if on_gpu else contextlib.nullcontext()
        with device, fastattn.use_backend(name):
            yield name
    finally:
        if isa:
            _C.set_isa(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_report_header():
    """Say what the suite runs over."""
    return f"fastattn {fastattn.__version__}: {', '.join(_VARIANTS)}; forced: " + str(
        dispatch.forced_backend()
    )
