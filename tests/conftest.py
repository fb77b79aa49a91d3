"""Every op's test runs over every backend of this machine and every CPU instruction set."""

import contextlib
import importlib.util
import os

# Of numpy's small products in Triton's interpreter; torch and the CPU kernels have other threads,
# which must not spin while they wait: pytest's other workers need the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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


def _cuda_variants(op):
    """The device if there is one, otherwise each emulated architecture with kernels of its own."""
    if not hasattr(cuda_backend, f"{op}_fwd"):
        return []
    if torch.cuda.is_available() and not cuda_backend.device.idle():
        return ["cuda"]
    if emulated.missing() is not None:
        return []
    return [f"cuda-{architecture}" for architecture in emulated.architectures(op)]


def pytest_generate_tests(metafunc):
    """Every backend, and the CUDA one where it has kernels of the op that a file tests."""
    if "backend" in metafunc.fixturenames:
        variants = _VARIANTS + _cuda_variants(metafunc.definition.path.stem.removeprefix("test_"))
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
def one_thread():
    """Tiny tensors on a busy machine wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    variants = ", ".join(_VARIANTS + _cuda_variants("attention"))
    return f"fastattn {fastattn.__version__}: {variants}; forced: {dispatch.forced_backend()}"
