"""What the CUDA backend takes and refuses, and how it takes tensors."""

import re

import pytest
import torch
from emulation import emulated
from emulation.build import ROOT

import fastattn
from fastattn.backends import cuda
from fastattn.backends.cuda import attention, device, ffn

I32 = torch.int32
needs_emulation = pytest.mark.skipif(emulated.missing() is not None, reason="no emulation")


@pytest.fixture
def sm80():
    with emulated.emulating("sm80"), fastattn.use_backend("cuda"):
        yield


def qkv(head_dim=16, head_dim_v=None, dtype=torch.float16, seqlen=4):
    shape = (2, 2, seqlen)
    dims = (head_dim, head_dim, head_dim_v or head_dim)
    return [torch.randn(*shape, size, dtype=dtype) for size in dims]


def packed(head_dim=16):
    starts = torch.tensor([0, 3, 8], dtype=I32)
    tensors = [torch.randn(8, 2, head_dim).half() for _ in "qkv"]
    return tensors, dict(cu_seqlens_q=starts, cu_seqlens_k=starts)


def paged():
    k, v = torch.randn(2, 3, 4, 2, 16).half()
    table, lengths = torch.tensor([[0, 2], [1, 0]], dtype=I32), torch.tensor([7, 3], dtype=I32)
    return (qkv()[0], k, v), dict(block_table=table, seqlens_k=lengths)


TAKEN = {
    "plain": lambda: (qkv(), {}),
    "bfloat16": lambda: (qkv(dtype=torch.bfloat16), {}),
    "head_dim-256": lambda: (qkv(256, 8), {}),
    "band": lambda: (qkv(), dict(causal=True, window=(3, None), offset=2)),
    "offsets": lambda: (qkv(), dict(causal=True, offset=torch.tensor([1, -2], dtype=I32))),
    "softcap": lambda: (qkv(), dict(softcap=5.0, softmax_scale=0.3)),
    "alibi": lambda: (qkv(), dict(alibi_slopes=torch.rand(2, 2))),
    "sinks": lambda: (qkv(), dict(sinks=torch.randn(2))),
    "dropout": lambda: (qkv(), dict(dropout_p=0.2, seed=1)),
    "seqlens_k": lambda: (qkv(), dict(seqlens_k=torch.tensor([2, 0], dtype=I32))),
    "packed": packed,
    "paged": paged,
}
REFUSED = {
    "dtype=torch.float32, only float16 and bfloat16": lambda: (qkv(dtype=torch.float32), {}),
    "dtype=torch.float8_e4m3fn, only float16 and bfloat16": lambda: (
        [tensor.to(torch.float8_e4m3fn) for tensor in qkv()],
        {},
    ),
    "head_dim_v=12, only positive multiples of 8": lambda: (qkv(16, 12), {}),
    "head_dim=264 > 256": lambda: (qkv(264, 8), {}),
    "mask: no CUDA C++ kernel takes one": lambda: (qkv(), dict(mask=torch.ones(4, 4).bool())),
    "bias: no CUDA C++ kernel takes one": lambda: (qkv(), dict(bias=torch.ones(4, 4))),
    "softmax_scale=-1.0, only positive ones": lambda: (qkv(), dict(softmax_scale=-1.0)),
}


def explained(function, *args, **kwargs):
    return fastattn.explain(function, *args, **kwargs)[0]


@needs_emulation
@pytest.mark.parametrize("call", TAKEN)
def test_attention_takes(sm80, call):
    args, kwargs = TAKEN[call]()
    assert explained(fastattn.attention, *args, **kwargs).backend == "cuda"
    if call != "paged":
        args = [tensor.requires_grad_() for tensor in args]
        fastattn.attention(*args, **kwargs).float().sum().backward()


@needs_emulation
@pytest.mark.parametrize("reason", REFUSED)
def test_attention_refuses(sm80, reason):
    args, kwargs = REFUSED[reason]()
    assert explained(fastattn.attention, *args, **kwargs).refusals["cuda"] == [reason]


@needs_emulation
def test_the_gradient_of_a_paged_cache_is_refused(sm80):
    (q, k, v), kwargs = paged()
    out = fastattn.attention(q, k.requires_grad_(), v, **kwargs)
    with pytest.raises(fastattn.BackendError, match="gradient of a paged cache"):
        out.sum().backward()


@needs_emulation
def test_other_ops(sm80):
    x, w = torch.randn(4, 16).half(), torch.randn(16, 16).half()
    assert explained(fastattn.softmax, x).backend == "cuda"
    assert explained(fastattn.ffn, x, w, None, w, None).backend == "cuda"
    assert explained(fastattn.gated_ffn, x, w, w, w).backend == "cuda"
    odd = explained(fastattn.ffn, x, w[:12], None, w[:, :12], None)
    assert odd.refusals["cuda"] == ["d_ff=12, only positive multiples of 8"]
    norm = explained(fastattn.layer_norm, x, w[0])
    assert norm.refusals["cuda"] == ["no CUDA C++ kernel of this op"]


@needs_emulation
def test_attention_compiles_as_one_graph(sm80):
    q, k, v = (tensor.requires_grad_() for tensor in qkv(seqlen=20))

    def call(q, k, v):
        return fastattn.attention(q, k, v, causal=True, deterministic=True).float().sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(call(q, k, v), (q, k, v))
    traced = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced))


@needs_emulation
def test_what_a_kernel_was_not_given_it_may_not_touch(sm80):
    kernels, x = device.kernels, torch.randn(4, 64)
    where, rows = device.where(x), (x.data_ptr(), (0, 0, 64, 1))
    device.pointer(x[:2])
    out = torch.empty(4, 64)
    shape, dropout = (1, 1, 4, 64), (0, 0, 1.0)
    call = (where, 0, shape, 1.0, False, dropout, rows, None, None, 0, 0, device.pointer(out), 0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernels.softmax_fwd(*call)
    device.pointer(x)
    kernels.softmax_fwd(*call)
    torch.testing.assert_close(out, x.softmax(-1))


def problem(device_type="cuda", dtype=torch.float16):
    q = torch.empty(1, 1, 8, 64, dtype=dtype, device="meta")
    scalars = fastattn.ops.attention_problem.AttentionScalars(
        1.0, None, None, 0, 0.0, 0.0, 0, 0, False
    )
    tensors = fastattn.ops.attention_problem.AttentionTensors(q, q, q, *(None,) * 10)
    checked = fastattn.ops.attention_problem.check("attention_fwd", tensors, scalars)
    return checked._replace(device=device_type)


class Machine:
    """Stands for a machine with GPUs, and for kernels built for some of them."""

    def __init__(self, monkeypatch, capabilities, built_for=((8, 0), (9, 0)), current=0):
        self.asked = []
        self.capabilities, self.built_for = capabilities, built_for
        monkeypatch.setattr(device, "MISSING", None)
        monkeypatch.setattr(device, "_driver", lambda: True)
        monkeypatch.setattr(device, "kernels", self)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        device.unsuitable_devices.cache_clear()
        for name, value in (
            ("device_count", lambda: len(capabilities)),
            ("current_device", lambda: current),
            ("get_device_capability", capabilities.__getitem__),
            ("get_device_name", "GPU {}".format),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def device_refusal(self, index):
        self.asked.append(index)
        major, minor = self.capabilities[index]
        if any(major == one and minor >= least for one, least in self.built_for):
            return ""
        return f"not built for compute capability {major}.{minor}"


@pytest.fixture
def machine(monkeypatch):
    yield lambda *args, **kwargs: Machine(monkeypatch, *args, **kwargs)
    device.unsuitable_devices.cache_clear()


def test_a_suitable_machine(machine):
    gpus = machine([(9, 0), (9, 0)])
    assert cuda.unsupported(problem()) == []
    assert cuda.unsupported(problem("cpu")) == ["device=cpu, only cuda"]
    assert gpus.asked == [0]


def test_a_build_for_hopper_refuses_ada(machine):
    gpus = machine([(9, 0), (8, 9), (8, 9)], built_for=[(9, 0)], current=2)
    why = "not built for compute capability 8.9"
    assert cuda.unsupported(problem()) == [f"GPU 1: {why}", f"GPU 2: {why}"]
    assert gpus.asked == [2, 0], "one device a capability, the current one first"


def test_a_call_on_the_cpu_opens_no_device(machine):
    gpus = machine([(9, 0)])
    cuda.unsupported(problem("cpu"))
    assert gpus.asked == []


def test_an_idle_backend_names_every_reason(monkeypatch):
    monkeypatch.setattr(device, "MISSING", "not built with CUDA")
    monkeypatch.setattr(device, "_driver", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unsupported(problem("cpu")) == [
        "not built with CUDA",
        "no NVIDIA driver",
        f"torch {torch.__version__} is built without CUDA",
        "device=cpu, only cuda",
    ]


def test_rows_that_do_not_begin_at_16_bytes_are_copied():
    wide = torch.randn(8, 40).half()
    for tensor in (wide, wide[:, :16], wide[::2, 8:24], wide[:1], wide[:, None], wide[0]):
        assert device.aligned(tensor) is tensor
    for tensor in (
        wide[:, 1:17],
        wide.T,
        wide[:, :32:2],
        torch.randn(6, 36).half()[:, :8],
        wide[0, 1:9],
    ):
        copy = device.aligned(tensor)
        assert copy is not tensor and torch.equal(copy, tensor) and copy.is_contiguous()
        assert device.aligned(copy) is copy
    assert device.aligned(None) is None
    one_row = torch.randn(3, 9).half()[:1, :8]
    assert device.address(device.aligned(one_row)) == (one_row.data_ptr(), (0, 1))


def test_numbers_that_python_and_c_share():
    names = re.search(r"enum class DType.*\{(.*)\}", (ROOT / "csrc/dtype.h").read_text())[1]
    assert [str(dtype).removeprefix("torch.") for dtype in device.DTYPES] == names.strip().split(
        ", "
    )
    assert list(device.DTYPES.values()) == [0, 1, 2]
    names = re.search(r"enum class Activation.*\{(.*)\}", (ROOT / "csrc/activation.h").read_text())
    assert list(ffn._ACTIVATIONS) == names[1].strip().split(", ")
    assert list(ffn._ACTIVATIONS.values()) == [0, 1, 2, 3]
    header = (ROOT / "csrc/cuda/attention.h").read_text()
    assert f"kUnbounded = 1 << {attention.UNBOUNDED.bit_length() - 1};" in header
