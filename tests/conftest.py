"""Every op's test runs over every backend of this machine and every CPU instruction set."""

import pytest
import torch
from hypothesis import settings

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


@pytest.fixture(params=_VARIANTS)
def backend(request):
    """Forces one backend, and of the CPU's one instruction set; yields the backend's name."""
    name, _, isa = request.param.partition("-")
    before = _C.isa() if isa else None
    if isa:
        _C.set_isa(isa)
    try:
        with fastattn.use_backend(name):
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
