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

from emulation import emulated

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda as cuda_backend

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
# On the device if there is one, otherwise on each emulated architecture.
_CUDA_VARIANTS = []
if torch.cuda.is_available() and not cuda_backend.device.idle():
    _CUDA_VARIANTS = ["cuda"]
elif emulated.missing() is None:
    _CUDA_VARIANTS = [f"cuda-{architecture}" for architecture in emulated.CAPABILITIES]


def pytest_generate_tests(metafunc):
    """The CUDA backend's variants where it has kernels of the op."""
    if "backend" in metafunc.fixturenames:
        op = metafunc.definition.path.stem.removeprefix("test_")
        variants = _VARIANTS + _CUDA_VARIANTS * hasattr(cuda_backend, f"{op}_fwd")
        metafunc.parametrize("backend", variants, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """What the CUDA backend refuses is no test of it: it has fewer arguments than the contract."""
    try:
        return (yield)
    except fastattn.BackendError as error:
        if pyfuncitem.funcargs.get("backend") != "cuda":
            raise
        pytest.skip(str(error))


@pytest.fixture
def backend(request):
    """Forces one backend, and one instruction set or architecture; yields the backend's name.

    With a GPU, new tensors lie on it where the backend is one for GPUs.
    """
    name, _, variant = request.param.partition("-")
    with contextlib.ExitStack() as stack:
        if name == "cpu":
            stack.callback(_C.set_isa, _C.isa())
            _C.set_isa(variant)
        elif name == "cuda" and variant:
            stack.enter_context(emulated.emulating(variant))
        elif name in ("cuda", "triton") and torch.cuda.is_available():
            stack.enter_context(torch.device("cuda"))
        stack.enter_context(fastattn.use_backend(name))
        yield name


@pytest.fixture
def accurate(backend):
    """The dtype of what is tested in one only: float32 where the backend takes it."""
    return torch.float16 if backend == "cuda" else torch.float32


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_report_header():
    """Say what the suite runs over."""
    return (
        f"fastattn {fastattn.__version__}: {', '.join(_VARIANTS + _CUDA_VARIANTS)}; forced: "
        + str(dispatch.forced_backend())
    )
