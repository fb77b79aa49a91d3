"""fastattn.rotary on every backend: values and gradients against float64."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(rows, rotary_dim, batch=None, dtype=torch.float32):
    """cos and sin of random angles."""
    angles = torch.rand(*([] if batch is None else [batch]), rows, rotary_dim // 2) * 2 * math.pi
    return angles.cos().to(dtype), angles.sin().to(dtype)


def run(fn, x, cos, sin, dout, **kwargs):
    x = x.detach().requires_grad_()
    out = fn(x, cos, sin, **kwargs)
    return {"out": out, "dx": torch.autograd.grad(out, x, dout.to(out.dtype))[0]}


def check(x, cos, sin, **kwargs):
    """Hold fastattn.rotary to the float64 formula on these inputs, gradient and layout included."""
    dout = torch.randn_like(x)
    exact = run(oracle.rotary, x.double(), cos.double(), sin.double(), dout, **kwargs)
    rounded = run(oracle.rotary, x, cos, sin, dout, **kwargs)
    got = run(fastattn.rotary, x, cos, sin, dout, **kwargs)
    for name, value in got.items():
        assert value.dtype == x.dtype
        oracle.check_close(name, value, exact[name], rounded[name], x.dtype)
    rotary_dim = 2 * cos.shape[-1]
    assert torch.equal(got["out"][..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(got["dx"][..., rotary_dim:], dout[..., rotary_dim:])
    like = torch.empty_like(x)
    expected = like.stride() if like.stride(-1) == 1 else torch.empty(x.shape).stride()
    assert got["out"].stride() == expected


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2), (2, 3, 5, 8), (1, 2, 7, 30), (2, 2, 9, 64), (1, 3, 4, 66), (1, 2, 3, 256)],
    ids=str,
)
def test_shapes(backend, shape, dtype, interleaved):
    x = torch.randn(shape).to(dtype)
    for table in {dtype, torch.float32}:
        cos, sin = tables(shape[2] + 2, shape[3], dtype=table)
        check(x, cos, sin, interleaved=interleaved)
        check(x, cos, sin, interleaved=interleaved, offset=2)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 16), (80, 32), (7, 6), (5, 2), (40, 0)])
def test_part_of_head_dim(backend, head_dim, rotary_dim, dtype, interleaved):
    x = torch.randn(2, 3, 6, head_dim).to(dtype)
    check(x, *tables(6, rotary_dim), interleaved=interleaved)
    check(x.transpose(1, 2), *tables(6, rotary_dim, dtype=dtype), interleaved=interleaved)


@FORMS
@pytest.mark.parametrize("batch", [None, 3], ids=["shared", "own"])
def test_offsets(backend, batch, interleaved):
    cos, sin = tables(20, 16, batch)
    for seqlen in (1, 5):
        x = torch.randn(3, 4, seqlen, 24)
        for offset in (0, 7, 20 - seqlen, torch.tensor([0, 20 - seqlen, 3])):
            check(x, cos, sin, interleaved=interleaved, offset=offset)
        strided = torch.tensor([4, -1, 0, 99, 9, 99])[::2]
        check(x, cos, sin, interleaved=interleaved, offset=strided)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(backend, dtype, interleaved):
    """More than one task, along each dim and in both layouts."""
    many = 70 if backend == "triton" else 300  # to the interpreter one block either way
    for shape in ((2, 3, many, 64), (2, many, 3, 64), (many, 2, 1, 64), (1, 2, 3, 20000)):
        cos, sin = tables(shape[2], min(shape[3], 64))
        check(torch.randn(shape).to(dtype), cos, sin, interleaved=interleaved)
        x = torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype)
        check(x.transpose(1, 2), cos, sin, interleaved=interleaved)


@FORMS
def test_strides(backend, interleaved):
    cos, sin = tables(50, 32)
    projected = torch.randn(2, 6, 3, 4, 32)
    for view in projected.transpose(1, 3).unbind(2):
        check(view, cos, sin, interleaved=interleaved)
    x = torch.randn(2, 3, 8, 40)
    for view in (
        x[..., ::2, 8:],
        x[..., 3:35].permute(2, 1, 0, 3),
        x.mT,
        x.mT.transpose(1, 2),
        x[..., ::2],
        x[:1, :1].expand(3, 2, -1, -1),
        torch.randn(80).as_strided((2, 2, 5, 32), (0, 3, 2, 1)),
        torch.randn(80).as_strided((1, 2, 5, 32), (1, 9, 1, 1)),
    ):
        rotary_dim = min(view.shape[-1], 32)
        c, s = (table[:, : rotary_dim // 2] for table in (cos, sin))
        check(view, c, s, interleaved=interleaved, offset=4)
        check(view, c.mT.contiguous().mT, s, interleaved=interleaved)
        check(view, c.expand(len(view), -1, -1), s[1:].repeat(len(view), 2, 1)[:, :50])
    x = torch.randn(2, 3, 8, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(fastattn.rotary(x, cos[:, :16], sin[:, :16]).sum(), x)
    (expected,) = torch.autograd.grad(oracle.rotary(x, cos[:, :16], sin[:, :16]).sum(), x)
    torch.testing.assert_close(dx, expected)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(backend, data):
    batch, heads, seqlen = (data.draw(st.integers(1, 6)) for _ in range(3))
    head_dim = data.draw(st.integers(1, 150))
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (batch, heads, seqlen, head_dim)
    order = data.draw(st.permutations(range(3)))
    x = torch.randn(*(shape[dim] for dim in order), head_dim).to(dtype)
    x = x.permute(*(order.index(dim) for dim in range(3)), 3)
    cos, sin = tables(
        seqlen + data.draw(st.integers(0, 9)),
        2 * data.draw(st.integers(0, head_dim // 2)),
        data.draw(st.sampled_from([None, batch])),
        data.draw(st.sampled_from([dtype, torch.float32])),
    )
    last = cos.shape[-2] - seqlen
    offset = data.draw(st.integers(0, last))
    if data.draw(st.booleans()):
        offset = torch.randint(last + 1, (batch,))
    check(x, cos, sin, offset=offset, interleaved=data.draw(st.booleans()))


@FORMS
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 0, 0, 0)], ids=str
)
def test_empty(backend, shape, interleaved):
    x = torch.randn(shape, requires_grad=True)
    cos, sin = tables(shape[2], shape[3])
    for offset in (0, torch.zeros(shape[0], dtype=torch.int64)):
        out = fastattn.rotary(x, cos, sin, interleaved=interleaved, offset=offset)
        assert out.shape == shape
        out.sum().backward()
        assert x.grad.shape == shape


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_stays_in_its_pair(backend, dtype, interleaved):
    x = torch.randn(1, 2, 5, 40).to(dtype)
    x[0, 1, 2, 3], x[0, 0, 4, 39] = torch.nan, torch.inf
    cos, sin = tables(5, 40)
    out = fastattn.rotary(x, cos, sin, interleaved=interleaved)
    expected = oracle.rotary(x.double(), cos, sin, interleaved=interleaved)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert (~out.isfinite()).sum() == 4


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_once(backend, dtype, interleaved):
    x = torch.randn(2, 4, 50, 64).to(dtype)
    cos, sin = tables(50, 64)
    exact = oracle.rotary(x.double(), cos, sin, interleaved=interleaved)
    got = fastattn.rotary(x, cos, sin, interleaved=interleaved).double()
    if dtype == torch.float32:
        ours = (got - exact).square().mean().sqrt()
        theirs = oracle.rotary(x, cos, sin, interleaved=interleaved) - exact
        assert ours <= 1.05 * theirs.square().mean().sqrt()
    else:
        # Half a unit in the last place, and the float32 products' own error.
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        assert ((got - exact).abs() <= bound).all()


@FORMS
def test_inverse_is_the_gradient(backend, interleaved):
    x = torch.randn(2, 3, 10, 32, requires_grad=True)
    cos, sin = tables(10, 32)
    out = fastattn.rotary(x, cos, sin, interleaved=interleaved)
    (back,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(back, x.detach())
    again = fastattn.rotary(out, cos, -sin, interleaved=interleaved)
    assert torch.equal(again, back)


def test_second_gradient(backend):
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    cos, sin = tables(4, 8)

    def penalty(fn):
        out = fn(x, cos, sin)
        (dx,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    torch.testing.assert_close(penalty(fastattn.rotary), penalty(oracle.rotary))


def test_same_bits_at_any_thread_count():
    x = torch.randn(2, 5, 500, 64)
    cos, sin = tables(500, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastattn.rotary(x, cos, sin))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_autocast(backend):
    x = torch.randn(1, 2, 3, 4)
    cos, sin = tables(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastattn.rotary(x, cos, sin), fastattn.rotary(x, cos, sin))
        assert fastattn.rotary(x, cos, sin).dtype == torch.float32
        assert fastattn.rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([0, -1, -2], "offset: expected 0 <= offset, got -1 of sequence 1"),
        ([5, 0, 6], r"cos: expected offset \+ seqlen = 6 \+ 3 rows at least of sequence 2, got 8"),
        ([2**62, 0, 0], "cos: expected offset .* of sequence 0, got 8"),
    ],
)
def test_wrong_offset_of_a_sequence(backend, offsets, message):
    x, (cos, sin) = torch.randn(3, 2, 3, 4), tables(8, 4)
    offset = torch.tensor(offsets)
    if x.is_cuda:  # values are read on the CPU only
        out = fastattn.rotary(x, cos, sin, offset=offset)
        assert torch.equal(out.isnan(), outside(offset, 3, 8).expand_as(x))
        return
    with pytest.raises(ValueError, match=message):
        fastattn.rotary(x, cos, sin, offset=offset)


def outside(offset, seqlen, rows):
    """Which tokens have no row in tables of so many: (batch, 1, seqlen, 1)."""
    row = offset[:, None] + torch.arange(seqlen, device=offset.device)
    return ((row < 0) | (row >= rows))[:, None, :, None]


@FORMS
@pytest.mark.parametrize("batch", [None, 6], ids=["shared", "own"])
def test_triton_kernel_gives_nan_outside_of_the_table(batch, interleaved):
    """On a GPU, where nothing reads the offsets beforehand."""
    pytest.importorskip("triton")
    from fastattn.kernels import rotary

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        x, (cos, sin) = torch.randn(6, 3, 4, 7), tables(8, 6, batch)
        offset = torch.tensor([1, -2, 6, 2**62, -(2**63), 2**63 - 1])
    out, inside = torch.empty_like(x), ~outside(offset, 4, 8)
    rotary.rotary(x, cos, sin, offset, out, offset=0, interleaved=interleaved, inverse=False)
    assert torch.equal(out[..., :6].isfinite(), inside.expand(6, 3, 4, 6))
    assert torch.equal(out[..., 6:], x[..., 6:])
    valid = torch.where(inside.all(2).flatten(), offset, 0)
    expected = fastattn.rotary(x, cos, sin, interleaved=interleaved, offset=valid)
    torch.testing.assert_close(out[0], expected[0])


X, COS = torch.ones(2, 3, 4, 8), torch.ones(6, 4)
OFFSETS = torch.zeros(2, dtype=torch.int64)
BAD = {
    "x: expected a tensor, got int": ((3, COS, COS), {}),
    "cos: expected a tensor, got list": ((X, [1.0], COS), {}),
    "sin: expected a tensor, got NoneType": ((X, COS, None), {}),
    "x: expected one of": ((X.int(), COS, COS), {}),
    r"x: expected \(batch, heads, seqlen, head_dim\), got shape \(3, 4, 8\)": (
        (X[0], COS, COS),
        {},
    ),
    r"cos: expected \(seqlen_max, rotary_dim / 2\) or .* got shape \(4,\)": ((X, COS[0], COS), {}),
    r"cos: expected shape \(2, seqlen_max, rotary_dim / 2\) .* got \(3, 6, 4\)": (
        (X, COS.expand(3, -1, -1), COS),
        {},
    ),
    "cos: expected at most 4 columns, half of the head_dim 8 of x, got 5": (
        (X, torch.ones(6, 5), torch.ones(6, 5)),
        {},
    ),
    "cos: expected at most 3 columns, half of the head_dim 7 of x, got 4": (
        (X[..., 1:], COS, COS),
        {},
    ),
    "cos: expected torch.float16 as x or float32, got torch.bfloat16": (
        (X.half(), COS.bfloat16(), COS.bfloat16()),
        {},
    ),
    r"sin: expected shape \(6, 4\) as cos, got \(5, 4\)": ((X, COS, COS[1:]), {}),
    "sin: expected torch.float16 as cos, got torch.float32": ((X.half(), COS.half(), COS), {}),
    "cos: expected device cpu as x, got meta": ((X, COS.to("meta"), COS), {}),
    "sin: expected device cpu as x, got meta": ((X, COS, COS.to("meta")), {}),
    "offset: expected device cpu as x, got meta": ((X, COS, COS), dict(offset=OFFSETS.to("meta"))),
    "cos: no gradient is computed": ((X, COS.clone().requires_grad_(), COS), {}),
    "sin: no gradient is computed": ((X, COS, COS.clone().requires_grad_()), {}),
    r"cos: expected offset \+ seqlen = 3 \+ 4 rows at least, got 6": (
        (X, COS, COS),
        dict(offset=3),
    ),
    r"cos: expected offset \+ seqlen = 0 \+ 4 rows at least, got 3": ((X, COS[:3], COS[:3]), {}),
    "offset: expected 0 <= offset, got -1": ((X, COS, COS), dict(offset=-1)),
    "offset: expected an int or a tensor, got float": ((X, COS, COS), dict(offset=1.0)),
    "offset: expected torch.int64, got torch.int32": ((X, COS, COS), dict(offset=OFFSETS.int())),
    r"offset: expected shape \(2,\) for the batch of x, got \(1,\)": (
        (X, COS, COS),
        dict(offset=OFFSETS[:1]),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.rotary(*args, **kwargs)


@FORMS
@pytest.mark.parametrize("offset", [1, torch.tensor([2, 0])], ids=["int", "tensor"])
def test_gradcheck(offset, interleaved):
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = (table.double() for table in tables(6, 6, 2))

    def call(x):
        return fastattn.rotary(x, cos, sin, interleaved=interleaved, offset=offset)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


@FORMS
@pytest.mark.parametrize("offset", [1, torch.tensor([2, 0])], ids=["int", "tensor"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_opcheck_and_compile(transposed, offset, interleaved):
    x = torch.randn(2, 4, 3, 8)
    x = (x.transpose(1, 2) if transposed else x).requires_grad_()
    cos, sin = tables(7, 6)
    offsets = offset if isinstance(offset, torch.Tensor) else None
    args = (x, cos, sin, offsets, interleaved, 0 if offsets is not None else offset)
    for op in (torch.ops.fastattn.rotary_fwd, torch.ops.fastattn.rotary_bwd):
        torch.library.opcheck(op, args)

    def call(x, offset):
        return fastattn.rotary(x * 2, cos, sin, interleaved=interleaved, offset=offset).cos()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for step in range(3):
        out, expected = compiled(x, offset + step % 2), call(x, offset + step % 2)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()
        (ours,), (theirs,) = (torch.autograd.grad(y.sum(), x) for y in (out, expected))
        torch.testing.assert_close(ours, theirs)


def test_compile_does_not_specialize_the_offset():
    x, (cos, sin) = torch.randn(2, 4, 1, 8), tables(64, 8)
    compiles = 0

    def counting(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    @torch.compile(fullgraph=True, backend=counting)
    def step(x, offset):
        return fastattn.rotary(x, cos, sin, offset=offset)

    for offset in range(2, 30):
        torch.testing.assert_close(step(x, offset), fastattn.rotary(x, cos, sin, offset=offset))
    assert compiles <= 2
