"""fastattn.ffn and gated_ffn on every backend: values and gradients against float64."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.ops.ffn import ACTIVATIONS, SAVES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(fn, tensors, dy, **kwargs):
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = fn(*inputs, **kwargs)
    y.backward(dy.to(y.dtype))
    grads = {f"grad {i}": t.grad for i, t in enumerate(inputs) if t is not None}
    return {"y": y} | grads


def check(name, tensors, **kwargs):
    """Hold fastattn's `name` to the float64 formula on these inputs, gradients included."""
    dtype = tensors[0].dtype
    shape = (*tensors[0].shape[:-1], tensors[3].shape[0])
    dy = torch.randn(shape, dtype=torch.float64).to(dtype).double()
    got = run(getattr(fastattn, name), tensors, dy, **kwargs)
    wide = [None if t is None else t.double() for t in tensors]
    formula = getattr(oracle, name)
    exact = run(formula, wide, dy, **kwargs)
    rounded = run(formula, tensors, dy, **kwargs)
    for key, value in got.items():
        oracle.check_close(key, value, exact[key], rounded[key], dtype)


def plain(rows=(9,), d_model=16, d_ff=24, d_out=None, biases=(True, True), dtype=torch.float32):
    d_out = d_out or d_model
    x = torch.randn(*rows, d_model)
    w1, w2 = torch.randn(d_ff, d_model) * d_model**-0.5, torch.randn(d_out, d_ff) * d_ff**-0.5
    b1, b2 = (torch.randn(n) if has else None for n, has in zip((d_ff, d_out), biases))
    return [None if t is None else t.to(dtype) for t in (x, w1, b1, w2, b2)]


def gated(rows=(9,), d_model=16, d_ff=24, d_out=None, dtype=torch.float32):
    x = torch.randn(*rows, d_model)
    w_gate, w_up = (torch.randn(d_ff, d_model) * d_model**-0.5 for _ in range(2))
    w_down = torch.randn(d_out or d_model, d_ff) * d_ff**-0.5
    return [t.to(dtype) for t in (x, w_gate, w_up, w_down)]


SIZES = [
    dict(rows=(1,), d_model=1, d_ff=1),
    dict(rows=(1,), d_model=256, d_ff=512),
    dict(rows=(3,), d_model=65, d_ff=130),
    dict(rows=(2, 20), d_model=33, d_ff=70, d_out=7),
    dict(rows=(130,), d_model=96, d_ff=200),
    dict(rows=(70,), d_model=72, d_ff=136, d_out=24),
    dict(rows=(600,), d_model=40, d_ff=300),
    dict(rows=(50,), d_model=520, d_ff=1030),
    dict(rows=(2, 3, 4), d_model=8, d_ff=8),
    dict(rows=(9,), d_model=16, d_ff=4096, d_out=24),
    dict(rows=(300,), d_model=72, d_ff=520, d_out=264),
    dict(rows=(2200,), d_model=24, d_ff=64, d_out=40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s.values())))
def test_sizes(backend, size, dtype):
    check("ffn", plain(**size, dtype=dtype))
    check("gated_ffn", gated(**size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_saves(backend, activation, save, dtype):
    size = dict(rows=(37,), d_model=48, d_ff=80, dtype=dtype)
    check("ffn", plain(**size), activation=activation, save=save)
    check("gated_ffn", gated(**size), activation=activation, save=save)


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_biases(backend, accurate, biases):
    check("ffn", plain(biases=biases, dtype=accurate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", SAVES)
def test_dropout(backend, save, dtype):
    tensors = plain(rows=(3, 41), d_ff=152, dtype=dtype)
    check("ffn", tensors, dropout_p=0.3, seed=2**33 + 5, save=save, activation="gelu")


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_calls(backend, data):
    draw, on_cuda = data.draw, backend == "cuda"

    def features(most):
        return draw(st.sampled_from(range(8, most, 8)) if on_cuda else st.integers(1, most))

    size = dict(
        rows=(draw(st.integers(1, 150)),),
        d_model=features(150),
        d_ff=features(300),
        d_out=features(150),
        dtype=draw(st.sampled_from(DTYPES[1:] if on_cuda else DTYPES)),
    )
    kwargs = dict(activation=draw(st.sampled_from(ACTIVATIONS)), save=draw(st.sampled_from(SAVES)))
    if draw(st.booleans()):
        check("ffn", plain(**size), **kwargs)
    else:
        check("gated_ffn", gated(**size), **kwargs)


def test_strides(backend, accurate):
    x, w1, b1, w2, b2 = plain(rows=(12,), d_model=16, d_ff=24, dtype=accurate)
    check("ffn", [x.T.contiguous().T, w1.T.contiguous().T, b1, w2.T.contiguous().T, b2])
    wide = torch.randn(12, 40).to(accurate)
    check("ffn", [wide[:, 3:19], w1, b1, w2, b2])
    check("ffn", [x[:1].expand(7, -1), w1, b1, w2, b2])
    check("ffn", [x, w1, b1[:1].expand(24), w2, b2])


def test_frozen_weights_and_frozen_input(backend, accurate):
    x, w1, b1, w2, b2 = plain(dtype=accurate)
    fastattn.ffn(x.requires_grad_(), w1, b1, w2, b2).sum().backward()
    whole = x.grad
    assert w1.grad is None
    x.grad = None
    weights = [t.requires_grad_() for t in (w1, b1, w2, b2)]
    fastattn.ffn(x.detach(), *weights).sum().backward()
    assert x.grad is None and all(t.grad is not None for t in weights)
    fastattn.ffn(x, *weights).sum().backward()
    torch.testing.assert_close(x.grad, whole)


@pytest.mark.parametrize("rows", [(0,), (0, 3), (3, 0)])
def test_empty(backend, accurate, rows):
    tensors = plain(rows=rows, dtype=accurate)
    inputs = [t.requires_grad_() for t in tensors]
    y = fastattn.ffn(*inputs)
    assert y.shape == (*rows, 16)
    y.sum().backward()
    assert inputs[1].grad.eq(0).all()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", ["ffn", "gated_ffn"])
def test_bytes_saved(backend, accurate, name, save):
    """`save` decides what autograd keeps besides the arguments."""
    make = plain if name == "ffn" else gated
    size = dict(rows=(64,), d_model=32, d_ff=128, dtype=accurate)
    tensors = [t.requires_grad_() for t in make(**size)]
    arguments = {t.data_ptr() for t in tensors}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in arguments:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        getattr(fastattn, name)(*tensors, save=save)
    preacts = 1 if name == "ffn" else 2
    matrices = {"all": preacts + 1, "preact": preacts, "input": 0}[save]
    assert sum(kept) == matrices * 64 * 128 * accurate.itemsize


def test_same_call_same_bits(backend, accurate):
    size = dict(rows=(300,), d_model=64, d_ff=256, dtype=accurate)
    tensors = [t.requires_grad_() for t in plain(**size)]
    runs = []
    for _ in range(2):
        y = fastattn.ffn(*tensors)
        runs.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


BAD = {
    "x: expected a tensor": lambda a: (((3, *a[1:])), {}),
    "x: expected one of": lambda a: ((a[0].long(), *a[1:]), {}),
    "w1: expected torch.float32 as x, got torch.float64": (
        lambda a: ((a[0], a[1].double(), *a[2:]), {})
    ),
    r"w1: expected shape \(24, 16\), got \(24, 15\)": (lambda a: ((a[0], a[1][:, 1:], *a[2:]), {})),
    r"b1: expected shape \(24,\)": lambda a: ((*a[:2], a[2][1:], *a[3:]), {}),
    r"w2: expected shape \(16, 24\)": lambda a: ((*a[:3], a[3][:, 1:], a[4]), {}),
    "activation: expected one of relu, gelu": lambda a: (a, dict(activation="selu")),
    "save: expected one of all": lambda a: (a, dict(save="some")),
    "dropout_p: expected": lambda a: (a, dict(dropout_p=2)),
    "b2: expected device": lambda a: ((*a[:4], a[4].to("meta")), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message](plain())
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.ffn(*args, **kwargs)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, save):
    kwargs = dict(activation=activation, save=save)
    size = dict(rows=(4,), d_model=3, d_ff=5, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in plain(**size)]
    assert torch.autograd.gradcheck(
        lambda *a: fastattn.ffn(*a, dropout_p=0.2, seed=1, **kwargs), tensors
    )
    tensors = [t.requires_grad_() for t in gated(**size)]
    assert torch.autograd.gradcheck(lambda *a: fastattn.gated_ffn(*a, **kwargs), tensors)


@pytest.mark.parametrize("save", SAVES)
def test_opcheck_and_compile(save):
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in plain())
    ffn_fwd = torch.ops.fastattn.ffn_fwd
    torch.library.opcheck(ffn_fwd, (x, w1, b1, None, w2, b2, None, "gelu", 0.0, save))
    gx, gate, up, down = (t.requires_grad_() for t in gated())
    torch.library.opcheck(ffn_fwd, (gx, gate, None, up, down, None, None, "silu", 0.0, save))

    def call(x):
        return fastattn.ffn(x, w1, b1, w2, b2, save=save).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


def test_autocast():
    x, w1, b1, w2, b2 = plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastattn.ffn(x, w1, b1, w2, b2)
    assert y.dtype == torch.bfloat16
    low = fastattn.ffn(*(t.bfloat16() for t in (x, w1, b1, w2, b2)))
    assert torch.equal(y, low)
