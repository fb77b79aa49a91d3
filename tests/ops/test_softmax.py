"""fastattn.softmax on every backend: values and gradients against float64."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(fn, x, bias, dout, **kwargs):
    x = x.detach().clone().requires_grad_()
    if bias is not None:
        kwargs["bias"] = bias = bias.detach().clone().requires_grad_()
    out = fn(x, **kwargs)
    finite = torch.isfinite(out)
    (out.masked_fill(~finite, 0.0) * dout.to(out.dtype)).sum().backward()
    return {"out": out, "dx": x.grad} | ({} if bias is None else {"dbias": bias.grad})


def check(x, *, bias=None, **kwargs):
    """Hold fastattn.softmax to the float64 formula on these inputs, gradients included."""
    dout = torch.randn(x.shape, dtype=torch.float64).to(x.dtype).double()
    wide_bias = None if bias is None else bias.double()
    exact = run(oracle.softmax, x.double(), wide_bias, dout, **kwargs)
    rounded = run(oracle.softmax, x, bias, dout, **kwargs)
    got = run(fastattn.softmax, x, bias, dout, **kwargs)
    for name, value in got.items():
        oracle.check_close(name, value, exact[name], rounded[name], x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize(
    "shape",
    [(1,), (7,), (3, 1), (5, 16), (4, 128), (2, 3, 33), (3, 1000), (2, 5000), (2, 12000),
     (1, 40000), (1, 100000)],
)  # fmt: skip
def test_shapes(backend, shape, log, dtype):
    check(torch.randn(shape).to(dtype) * 3, log=log)


FEATURES = {
    "scale": lambda: dict(scale=0.3),
    "negative-scale": lambda: dict(scale=-2.0),
    "causal": lambda: dict(causal=True),
    "mask": lambda: dict(mask=torch.rand(37, 53) < 0.5),
    "mask-column": lambda: dict(mask=torch.rand(3, 1, 1, 53) < 0.5),
    "mask-rows": lambda: dict(mask=torch.rand(37, 1) < 0.5),
    "bias": lambda: dict(bias=torch.randn(2, 37, 53)),
    "bias-row": lambda: dict(bias=torch.randn(53)),
    "bias-column": lambda: dict(bias=torch.randn(3, 1, 37, 1)),
    "all": lambda: dict(
        scale=1.7, causal=True, mask=torch.rand(3, 1, 37, 53) < 0.5, bias=torch.randn(2, 1, 53)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(backend, feature, log, dtype):
    kwargs = FEATURES[feature]()
    if "bias" in kwargs:
        kwargs["bias"] = kwargs["bias"].to(dtype)
    check(torch.randn(3, 2, 37, 53).to(dtype), log=log, **kwargs)


def test_float32_bias_of_half_input(backend):
    check(torch.randn(3, 2, 37, 53).bfloat16(), bias=torch.randn(2, 1, 53))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [5, 64, 65, 200])
def test_dropout(backend, columns, dtype):
    check(torch.randn(2, 9, columns).to(dtype), dropout_p=0.4, seed=2**35 + 1)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_calls(backend, data):
    most = 9 if backend == "triton" else 40  # the interpreter takes its time
    shape = data.draw(st.lists(st.integers(1, most), min_size=2, max_size=4))
    shape[-1] = data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    kwargs = dict(scale=data.draw(st.floats(-3, 3)), causal=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        keep = [data.draw(st.booleans()) for _ in shape]
        kwargs["mask"] = torch.rand([n if k else 1 for n, k in zip(shape, keep)]) < 0.7
    if data.draw(st.booleans()):
        keep = [data.draw(st.booleans()) for _ in shape]
        kwargs["bias"] = torch.randn([n if k else 1 for n, k in zip(shape, keep)]).to(dtype)
    check(torch.randn(shape).to(dtype), log=data.draw(st.booleans()), **kwargs)


def test_strides(backend):
    x = torch.randn(6, 40, 50)
    check(x.mT)
    check(x.transpose(0, 1))
    check(x[:, ::3, 5:40])
    check(x[:1].expand(4, -1, -1))
    check(x[..., ::2])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)])
def test_empty(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    out = fastattn.softmax(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
def test_rows_that_see_nothing(backend, log):
    x = torch.randn(4, 9, requires_grad=True)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[2] = False
    out = fastattn.softmax(x, mask=mask, log=log)
    assert out[2].eq(-math.inf if log else 0).all()
    out[[0, 1, 3]].sum().backward()
    assert x.grad[2].eq(0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes(backend, dtype):
    x = torch.randn(8, 300) * 1e4
    x[1, 5:] = -math.inf
    x[2] = 1e-40
    check(x.to(dtype))
    big = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]]).to(dtype)
    out = fastattn.softmax(big)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_no_more_than_torch(backend, dtype):
    x = (torch.randn(64, 700) * 2).to(dtype)
    exact = torch.softmax(x.double(), -1)
    ours, theirs = (
        (y.double() - exact).square().mean().sqrt().item()
        for y in (fastattn.softmax(x), torch.softmax(x, -1))
    )
    assert ours <= 1.5 * theirs if dtype == torch.float32 else ours <= 1.05 * theirs


BAD = {
    "x: expected a tensor": lambda: ((3,), {}),
    "x: expected one of": lambda: ((torch.ones(3, dtype=torch.int32),), {}),
    r"x: expected \(..., rows, columns\)": lambda: ((torch.ones(3),), dict(causal=True)),
    "mask: expected torch.bool": lambda: ((torch.ones(3, 4),), dict(mask=torch.ones(4))),
    r"mask: expected a shape broadcastable to \(3, 4\), got \(3,\)": (
        lambda: ((torch.ones(3, 4),), dict(mask=torch.ones(3, dtype=torch.bool)))
    ),
    "bias: expected device": lambda: (
        (torch.ones(3, 4),), dict(bias=torch.ones(4, device="meta"))
    ),
    "dropout_p: expected 0 <=": lambda: ((torch.ones(3, 4),), dict(dropout_p=-0.1)),
    "dropout_p: expected 0 with log": lambda: (
        (torch.ones(3, 4),), dict(dropout_p=0.1, log=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message]()
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.softmax(*args, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, dict(log=True), dict(dropout_p=0.3, seed=3)], ids=str)
def test_gradcheck(kwargs):
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 7) < 0.8

    def call(x, bias):
        out = fastattn.softmax(x, scale=0.7, mask=mask, bias=bias, **kwargs)
        return out.masked_fill(torch.isinf(out), 0.0)

    assert torch.autograd.gradcheck(call, (x, bias))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_and_compile(log, dropout_p):
    if log and dropout_p:
        return
    x = torch.randn(3, 4, 5, requires_grad=True)
    bias = torch.randn(4, 1, requires_grad=True)
    seed = torch.tensor([3]) if dropout_p else None
    args = (x, torch.rand(4, 5) < 0.8, bias, seed, 0.5, False, dropout_p, log)
    torch.library.opcheck(torch.ops.fastattn.softmax_fwd, args)

    def call(x):
        return fastattn.softmax(x, log=log, dropout_p=dropout_p, seed=seed).cos()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
