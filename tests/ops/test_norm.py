"""fastattn.layer_norm and rms_norm on every backend: values and gradients against float64."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["layer_norm", "rms_norm"]


def run(fn, x, residual, weight, bias, douts, **kwargs):
    tensors = dict(x=x, residual=residual, weight=weight, bias=bias)
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in tensors.items()
        if value is not None
    }
    given = dict(leaves)
    outs = fn(given.pop("x"), given.pop("weight", None), *kwargs.pop("args", ()), **given, **kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum((out * dout.to(out.dtype)).sum() for out, dout in zip(outs, douts)).backward()
    grads = {f"d{name}": value.grad for name, value in leaves.items()}
    return dict(zip(("y", "sum"), outs)) | grads


def check(op, x, residual=None, weight=None, bias=None, **kwargs):
    """Hold an op to the float64 formula on these inputs, gradients included.

    With a residual, the formula starts from the sum as it is rounded.
    """
    douts = [torch.randn(x.shape).to(x.dtype) for _ in range(1 if residual is None else 2)]
    tensors = (x, residual, weight, bias)
    wide = [None if value is None else value.double() for value in tensors]
    if residual is not None:
        wide[0], wide[1] = (x + residual).double(), torch.zeros_like(wide[1])
    exact = run(getattr(oracle, op), *wide, douts, **kwargs)
    rounded = run(getattr(oracle, op), *tensors, douts, **kwargs)
    got = run(getattr(fastattn, op), *tensors, douts, **kwargs)
    assert got.keys() == exact.keys()
    if residual is not None:
        assert torch.equal(got.pop("sum"), x + residual)
        assert torch.equal(got["dx"], got["dresidual"])
    for name, value in got.items():
        parameter = {"dweight": weight, "dbias": bias}.get(name)
        assert value.dtype == (x if parameter is None else parameter).dtype
        oracle.check_close(name, value, exact[name], rounded[name], x.dtype)


def parameters(op, columns, dtype):
    weight = (1 + 0.5 * torch.randn(columns)).to(dtype)
    return dict(weight=weight) | (
        dict(bias=torch.randn(columns).to(dtype)) if op == "layer_norm" else {}
    )


SHAPES = [(7,), (1, 1), (3, 2), (5, 16), (64, 128), (2, 3, 33), (6, 1025), (2, 5000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, op, dtype):
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    check(op, x, **parameters(op, shape[-1], dtype))
    check(op, x, torch.randn(shape).to(dtype), **parameters(op, shape[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters(backend, dtype):
    x = torch.randn(13, 70).to(dtype)
    weight, bias = torch.randn(2, 70)
    for parameter in {dtype, torch.float32}:
        for op in OPS:
            check(op, x, weight=weight.to(parameter))
            check(op, x, x, weight=weight.to(parameter))
        check("layer_norm", x, bias=bias.to(parameter))
        check("layer_norm", x, weight=weight.to(parameter), bias=bias.to(parameter))
    for op in OPS:
        check(op, x)
        check(op, x, eps=0.3)
    strided = torch.randn(140)[::2].to(dtype)
    assert torch.equal(
        fastattn.layer_norm(x, strided, strided),
        fastattn.layer_norm(x, strided.contiguous(), strided.contiguous()),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [700, 5000])
def test_many_rows(backend, rows, op, dtype):
    check(op, torch.randn(rows, 48).to(dtype), **parameters(op, 48, dtype))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_calls(backend, data):
    most = 9 if backend == "triton" else 20  # the interpreter takes its time
    shape = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    shape.append(data.draw(st.integers(2, 300)))
    dtype = data.draw(st.sampled_from(DTYPES))
    op = data.draw(st.sampled_from(OPS))
    kwargs = parameters(op, shape[-1], data.draw(st.sampled_from([dtype, torch.float32])))
    kwargs = {name: value for name, value in kwargs.items() if data.draw(st.booleans())}
    if data.draw(st.booleans()):
        kwargs["residual"] = torch.randn(shape).to(dtype)
    check(op, torch.randn(shape).to(dtype), eps=data.draw(st.floats(1e-6, 1e-2)), **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_strides(backend, op):
    x = torch.randn(6, 40, 50)
    for view in (x.mT, x.transpose(0, 1), x[:, ::3, 5:40], x[:1].expand(4, -1, -1), x[..., ::2]):
        check(op, view, **parameters(op, view.shape[-1], torch.float32))
        check(op, view, view + 1, **parameters(op, view.shape[-1], torch.float32))
    check(op, x[0, :, 3:40], **parameters(op, 37, torch.float32))
    x = torch.randn(5, 33, requires_grad=True)
    (dx,) = torch.autograd.grad(getattr(fastattn, op)(x, None).sum(), x)
    (expected,) = torch.autograd.grad(getattr(oracle, op)(x, None).sum(), x)
    torch.testing.assert_close(dx, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)])
def test_empty(backend, shape, op):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    y, s = getattr(fastattn, op)(x, weight, residual=x)
    assert y.shape == s.shape == x.shape
    (y.sum() + s.sum()).backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("op", OPS)
def test_each_output_alone(backend, op):
    x, residual, weight = torch.randn(3, 4, 9).unbind()
    weight = weight[0]
    for used in (0, 1):
        got, expected = (
            torch.autograd.grad(
                fn(*leaves[:2], residual=leaves[2])[used].square().sum(), leaves, allow_unused=True
            )
            for fn in (getattr(fastattn, op), getattr(oracle, op))
            for leaves in [[t.clone().requires_grad_() for t in (x, weight, residual)]]
        )
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[2], expected[2], atol=1e-5, rtol=1e-5)
        assert (got[1] is None) == (expected[1] is None)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_some_need_gradients(backend, frozen):
    tensors = {"x": torch.randn(6, 20), "weight": torch.randn(20), "bias": torch.randn(20)}
    for name, value in tensors.items():
        value.requires_grad_(name != frozen)
    y, expected = (fn(**tensors) for fn in (fastattn.layer_norm, oracle.layer_norm))
    leaves = [value for name, value in tensors.items() if name != frozen]
    dy = torch.randn(6, 20)
    for got, want in zip(*(torch.autograd.grad(out, leaves, dy) for out in (y, expected))):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [100, 128, 4096])
def test_large_mean_and_small_variance(backend, columns):
    x = torch.randn(16, columns) + 1e4
    exact = F.layer_norm(x.double(), (columns,))
    error = (fastattn.layer_norm(x, None) - exact).abs().max().item()
    assert error <= 1.5 * (F.layer_norm(x, (columns,)) - exact).abs().max().item()
    # The row's first element says nothing of its mean.
    x[:, 0] = -1e4
    exact = F.layer_norm(x.double(), (columns,))
    torch.testing.assert_close(fastattn.layer_norm(x, None).double(), exact, atol=1e-4, rtol=1e-4)
    constant = fastattn.layer_norm(torch.full((2, columns), 0.1), None)
    assert constant.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_not_a_number_stays_in_its_row(backend, op, dtype):
    x = torch.randn(9, 50).to(dtype)
    x[3, 7], x[5, 49] = torch.nan, torch.inf
    y = getattr(fastattn, op)(x, None)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 6, 7, 8]].isfinite().all()
    assert torch.equal(y.isnan(), getattr(oracle, op)(x, None).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_no_more_than_torch(backend, op, dtype):
    x = (torch.randn(200, 700) * 2 + 1).to(dtype)
    weight, bias = torch.randn(2, 700).to(dtype)
    dy = torch.randn(200, 700).to(dtype)

    def torchs(x, weight, bias=None):
        if op == "rms_norm":
            return F.rms_norm(x, (700,), weight, 1e-6)
        return F.layer_norm(x, (700,), weight, bias)

    args = (x, weight, bias) if op == "layer_norm" else (x, weight)
    results = []
    for fn, wide in ((torchs, True), (torchs, False), (getattr(fastattn, op), False)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in args]
        y = fn(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for exact, theirs, ours in zip(*results, strict=True):
        theirs, ours = (
            (value.double() - exact).square().mean().sqrt().item() for value in (theirs, ours)
        )
        assert ours <= (1.5 if dtype == torch.float32 else 1.05) * theirs


def test_same_bits_at_any_thread_count():
    x, dy = torch.randn(2, 3000, 260)
    weight, bias = torch.randn(2, 260)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = fastattn.layer_norm(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, dy)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast():
    x, residual = torch.randn(2, 4, 32)
    weight = torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.layer_norm(x, weight).dtype == torch.float32
        assert fastattn.rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16
        y, s = fastattn.layer_norm(x.bfloat16(), weight, residual=residual)
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s, x.bfloat16() + residual)


x = torch.ones(3, 4)
BAD = {
    "x: expected a tensor, got int": lambda: fastattn.layer_norm(3, None),
    "x: expected one of": lambda: fastattn.rms_norm(x.int(), None),
    r"x: expected \(..., columns\)": lambda: fastattn.rms_norm(torch.tensor(1.0), None),
    r"weight: expected shape \(4,\), got \(3,\)": lambda: fastattn.rms_norm(x, x[:, 0]),
    r"bias: expected shape \(4,\), got \(3, 4\)": lambda: fastattn.layer_norm(x, None, x),
    "weight: expected torch.float32 as x": lambda: fastattn.rms_norm(x, x[0].double()),
    "bias: expected torch.float32 as weight": (
        lambda: fastattn.layer_norm(x.half(), x[0], x[0].half())
    ),
    "weight: expected device": lambda: fastattn.rms_norm(x, torch.ones(4, device="meta")),
    r"residual: expected shape \(3, 4\), got \(4,\)": (
        lambda: fastattn.layer_norm(x, None, residual=x[0])
    ),
    "residual: expected torch.float32 as x": (
        lambda: fastattn.layer_norm(x, None, residual=x.half())
    ),
    "eps: expected a float, got NoneType": lambda: fastattn.rms_norm(x, None, eps=None),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, residual):
    x, other = torch.randn(2, 2, 5, 7, dtype=torch.float64).unbind()
    weight, bias = torch.randn(2, 7, dtype=torch.float64).unbind()
    leaves = [x, weight] + [bias] * (op == "layer_norm") + [other] * residual
    for leaf in leaves:
        leaf.requires_grad_()

    def call(*args):
        args, kwargs = (args[:-1], dict(residual=args[-1])) if residual else (args, {})
        return getattr(fastattn, op)(*args, **kwargs)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_compile(op, residual):
    x, other = (t.requires_grad_() for t in torch.randn(2, 3, 4, 5).unbind())
    weight, bias = (t.requires_grad_() for t in torch.randn(2, 5).unbind())
    other = other if residual else None
    bias = bias if op == "layer_norm" else None
    args = (x, other, weight, bias, 1e-5, op == "layer_norm")
    torch.library.opcheck(torch.ops.fastattn.norm_fwd, args)

    def call(x):
        args = (x, weight, bias) if bias is not None else (x, weight)
        out = getattr(fastattn, op)(*args, residual=other)
        return out[0].cos() + out[1] if residual else out.cos()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
    for ours, theirs in zip(
        *(torch.autograd.grad(fn(x).sum(), [x, weight]) for fn in (compiled, call)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
