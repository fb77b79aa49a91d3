"""fastattn.attention on every backend: values, lse and gradients against float64."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TENSORS = ("q", "k", "v", "bias", "sinks")


def run(fn, tensors, grads, **kwargs):
    """out, lse and the gradients of `tensors` for the cotangents `grads`."""
    inputs = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out, lse = fn(**inputs, **kwargs)
    dout, dlse = (grad.to(result.dtype) for grad, result in zip(grads, (out, lse)))
    seen = torch.isfinite(lse)
    loss = (out * dout).sum() + (lse.masked_fill(~seen, 0.0) * dlse).sum()
    loss.backward()
    return {"out": out, "lse": lse} | {f"d{name}": t.grad for name, t in inputs.items()}


def check(q, k, v, *, bias=None, sinks=None, slack=2.0, **kwargs):
    """Hold fastattn.attention to the float64 formula on these inputs, gradients included."""
    tensors = {"q": q, "k": k, "v": v}
    if bias is not None:
        tensors["bias"] = bias
    if sinks is not None:
        tensors["sinks"] = sinks
    shape = (*q.shape[:3], v.shape[-1])
    grads = torch.randn(shape, dtype=torch.float64), torch.randn(shape[:3], dtype=torch.float64)
    grads = grads[0].to(q.dtype).double(), grads[1].float().double()
    got = run(
        lambda **inputs: fastattn.attention(**inputs, return_lse=True, **kwargs), tensors, grads
    )
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(oracle.attention, wide, grads, **kwargs)
    rounded = run(oracle.attention, tensors, grads, **rounded_kwargs(kwargs, q.dtype))
    for name, value in got.items():
        # float32 tensors of a half-precision call carry the call's rounding, not only their own.
        oracle.check_close(name, value, exact[name], rounded[name], q.dtype, slack)


def rounded_kwargs(kwargs, dtype):
    """The float formula's arguments with float tensors in the call's dtype."""
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


def make(batch=2, heads=4, heads_kv=None, seqlen_q=17, seqlen_k=23, head_dim=16, head_dim_v=None,
         dtype=torch.float32):  # fmt: skip
    heads_kv = heads if heads_kv is None else heads_kv
    q = torch.randn(batch, heads, seqlen_q, head_dim, dtype=dtype)
    k = torch.randn(batch, heads_kv, seqlen_k, head_dim, dtype=dtype)
    v = torch.randn(batch, heads_kv, seqlen_k, head_dim_v or head_dim, dtype=dtype)
    return q, k, v


def tolerance(dtype, float32=1e-5):
    """Of results of size 1 in this dtype."""
    own = {torch.float32: float32, torch.float16: 8e-3, torch.bfloat16: 2e-2}[dtype]
    return dict(atol=own, rtol=own)


def skip_if_refused(backend, *args, **kwargs):
    """Skip where the forced backend says why it does not take this call (it must say so)."""
    choices = fastattn.explain(fastattn.attention, *args, **kwargs)
    if choices[0].backend is None:
        reasons = choices[0].refusals[backend]
        assert backend != "reference" and reasons
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(seqlen_q=1, seqlen_k=1),
        dict(seqlen_q=64, seqlen_k=64, head_dim=64),
        dict(seqlen_q=130, seqlen_k=300, head_dim=32),
        dict(heads=6, heads_kv=2, head_dim=40, head_dim_v=24),
        dict(heads=4, heads_kv=1, seqlen_q=1, seqlen_k=515),
        dict(batch=1, heads=1, seqlen_q=300, seqlen_k=70, head_dim=128),
        dict(head_dim=256, seqlen_q=20, seqlen_k=40),
        dict(batch=1, heads=1, head_dim=136, seqlen_q=100, seqlen_k=200),
        dict(batch=1, heads=1, head_dim=24, head_dim_v=256, seqlen_q=40, seqlen_k=130),
        dict(head_dim=1, head_dim_v=7),
        dict(head_dim=80, head_dim_v=96),
        dict(head_dim=33, head_dim_v=129, heads=2, heads_kv=1),
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_shapes(backend, shape, dtype):
    check(*make(**shape, dtype=dtype))


FEATURES = {
    "causal": dict(causal=True),
    "bottom-right": dict(causal=True, offset=83),
    "window": dict(window=(9, 5)),
    "window-left": dict(window=(20, None)),
    "window-causal": dict(window=(30, None), causal=True, offset=83),
    "band-right-of-keys": dict(window=(3, 3), offset=120),
    "negative-offset": dict(causal=True, offset=-20),
    "scale": dict(softmax_scale=0.7),
    "softcap": dict(softcap=1.5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_band_and_scale(backend, feature, dtype):
    q, k, v = make(seqlen_q=67, seqlen_k=150, heads_kv=2, head_dim=32, dtype=dtype)
    check(q, k, v, **FEATURES[feature])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 300), (1, 300), (2, 1, 1, 300), (4, 1, 300), (1, 4, 70, 1), (2, 4, 70, 300)]
)
def test_mask(backend, shape, dtype):
    q, k, v = make(seqlen_q=70, seqlen_k=300, heads_kv=2, dtype=dtype)
    mask = torch.rand(shape) < 0.6
    mask.view(-1, shape[-1])[0] = False  # fully masked rows
    check(q, k, v, mask=mask)
    check(q, k, v, mask=mask, causal=True, offset=230)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same-dtype", "float32"])
@pytest.mark.parametrize(
    "shape", [(70, 300), (1, 300), (2, 1, 1, 300), (4, 70, 1), (2, 4, 70, 300), (1, 4, 1, 1)]
)
def test_bias(backend, shape, wide, dtype):
    q, k, v = make(seqlen_q=70, seqlen_k=300, heads_kv=2, dtype=dtype)
    bias = torch.randn(shape, dtype=torch.float32 if wide else dtype)
    check(q, k, v, bias=bias, softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_padding(backend, batch, holes, dtype):
    """Keys hidden from all queries, behind the last visible one and, with holes, before it."""
    q, k, v = make(batch=3, seqlen_k=40, dtype=dtype)
    hidden = torch.arange(40) >= torch.tensor([7, 0, 33])[-batch:, None]
    if holes:
        hidden |= torch.rand(batch, 40) < 0.3
    hidden = hidden.view(batch, 1, 1, 40)
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -math.inf)
    lengths = torch.tensor([30, 20, 10], dtype=torch.int32)
    check(q, k, v, mask=~hidden)
    check(q, k, v, bias=bias)
    check(q, k, v, mask=~hidden, bias=bias.flip(-1))
    check(q, k, v, mask=~hidden, causal=True, offset=20)
    skip_if_refused(backend, q, k, v, seqlens_k=lengths)
    check(q, k, v, mask=~hidden, seqlens_k=lengths)


def test_bias_without_gradient(backend):
    q, k, v = make()
    bias = torch.randn(17, 23)
    bias[3] = -math.inf
    out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True)
    exact, exact_lse = oracle.attention(
        *(
            t.double()
            for t in (
                q,
                k,
                v,
            )
        ),
        bias=bias.double(),
    )
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    assert out[:, :, 3].eq(0).all() and lse[:, :, 3].isneginf().all()


EXTRAS = {
    "alibi": lambda: dict(alibi_slopes=torch.rand(4)),
    "alibi-batch-causal": lambda: dict(alibi_slopes=torch.rand(2, 4), causal=True, offset=33),
    "sinks": lambda: dict(sinks=torch.randn(4)),
    "sinks-masked": lambda: dict(sinks=torch.randn(4), causal=True, offset=-5),
    "seqlens_k": lambda: dict(seqlens_k=torch.tensor([90, 0], dtype=torch.int32)),
    "seqlens_k-offset": lambda: dict(
        seqlens_k=torch.tensor([90, 31], dtype=torch.int32),
        offset=torch.tensor([23, -36], dtype=torch.int32),
        causal=True,
    ),
    "dropout": lambda: dict(dropout_p=0.3, seed=2**40 + 7),
    "no-mask-or-bias": lambda: dict(
        dropout_p=0.1, seed=3, causal=True, offset=40, window=(50, None), softcap=4.0,
        alibi_slopes=torch.rand(4), sinks=torch.randn(4),
        seqlens_k=torch.tensor([100, 80], dtype=torch.int32),
    ),
    "everything": lambda: dict(
        dropout_p=0.1, seed=3, causal=True, offset=40, window=(50, None), softcap=4.0,
        alibi_slopes=torch.rand(4), sinks=torch.randn(4), bias=torch.randn(4, 67, 100),
        mask=torch.rand(2, 1, 67, 100) < 0.8,
        seqlens_k=torch.tensor([100, 80], dtype=torch.int32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_extras(backend, extra, dtype):
    q, k, v = make(seqlen_q=67, seqlen_k=100, heads_kv=2, head_dim=24, dtype=dtype)
    kwargs = EXTRAS[extra]()
    skip_if_refused(backend, q, k, v, **kwargs)
    check(q, k, v, **kwargs)


def test_float8(backend):
    """Without gradients; the GPU's matrix units take the weights, too, in 8 bits."""
    q, k, v = (t.to(torch.float8_e4m3fn) for t in make(seqlen_q=70, seqlen_k=70, head_dim=32))
    skip_if_refused(backend, q, k, v)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    exact, exact_lse = oracle.attention(*(t.double() for t in (q, k, v)), causal=True)
    assert out.dtype == torch.bfloat16
    error = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (0.004 if backend == "reference" else 0.03)
    # The matrix units of a GPU may sum products of float8 in 14 bits.
    bound = 2e-3 if q.is_cuda and backend == "triton" else 1e-5
    torch.testing.assert_close(lse.double(), exact_lse, atol=bound, rtol=bound)
    with pytest.raises(TypeError, match="q: no gradient is computed for torch.float8_e4m3fn"):
        fastattn.attention(q.requires_grad_(), k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_packed(backend, accurate, causal):
    lengths_q, lengths_k = [5, 0, 70, 13], [9, 4, 130, 1]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    q, k, v = (
        torch.randn(total, heads, 16, dtype=accurate, requires_grad=True)
        for total, heads in ((sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2))
    )
    kwargs = dict(causal=causal, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    skip_if_refused(backend, q, k, v, **kwargs)
    out, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
    grads = torch.autograd.grad(out.float().sum() * 2 + out.float().square().sum(), (q, k, v))
    exact = []
    for b in range(4):
        rows = slice(starts_q[b], starts_q[b + 1])
        columns = slice(starts_k[b], starts_k[b + 1])
        dense = (q[rows], k[columns], v[columns])
        one, one_lse = oracle.attention(
            *(t.double().transpose(0, 1)[None] for t in dense), causal=causal
        )
        exact.append(one[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows].double(), one_lse[0], atol=1e-5, rtol=1e-5)
    exact = torch.cat(exact)
    torch.testing.assert_close(out.double(), exact, **tolerance(accurate))
    wide = torch.autograd.grad(exact.sum() * 2 + exact.square().sum(), (q, k, v))
    for got, want in zip(grads, wide):
        torch.testing.assert_close(got, want, **tolerance(accurate, 1e-4))


@pytest.mark.parametrize(
    "extra",
    [
        dict(offset=torch.tensor([3, -2, 0], dtype=torch.int32)),
        dict(seqlens_k=torch.tensor([4, 0, 100], dtype=torch.int32), window=(20, 3)),
        dict(alibi_slopes=torch.rand(3, 4), sinks=torch.randn(4)),
        dict(dropout_p=0.3, seed=5),
    ],
    ids=lambda extra: "-".join(extra),
)
def test_packed_features(backend, accurate, extra):
    """Each packed sequence gets its own entry of the tensors that have one a sequence."""
    starts_q, starts_k = torch.tensor([[0, 7, 8, 40], [0, 9, 9, 130]], dtype=torch.int32)
    q, k, v = (
        torch.randn(total, 4, 16, dtype=accurate, requires_grad=True) for total in (40, 130, 130)
    )
    kwargs = dict(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True, **extra)
    skip_if_refused(backend, q, k, v, **kwargs)
    results = []
    for name in (backend, "reference"):
        with fastattn.use_backend(name):
            out, lse = fastattn.attention(q, k, v, **kwargs)
        loss = out.float().square().sum() + lse.masked_fill(lse.isneginf(), 0.0).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, **tolerance(accurate, 1e-4))


def test_paged(backend, accurate):
    block_table = torch.tensor([[2, 0, 5], [4, 1, 3]], dtype=torch.int32)
    seqlens_k = torch.tensor([41, 17], dtype=torch.int32)
    q = torch.randn(2, 4, 3, 16, dtype=accurate)
    k, v = torch.randn(2, 6, 16, 2, 16, dtype=accurate)
    kwargs = dict(block_table=block_table, seqlens_k=seqlens_k)
    skip_if_refused(backend, q, k, v, **kwargs)
    out = fastattn.attention(q, k, v, **kwargs)
    gathered = [t[block_table.long()].flatten(1, 2).transpose(1, 2).double() for t in (k, v)]
    exact, _ = oracle.attention(q.double(), *gathered, seqlens_k=seqlens_k)
    torch.testing.assert_close(out.double(), exact, **tolerance(accurate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 100, 512])
@pytest.mark.parametrize("packed", [False, True])
def test_paged_decode(backend, dtype, page_size, packed):
    """Long caches, of which a block of keys lies in several pages, or a page has several blocks."""
    batch, heads, heads_kv, head_dim = 3, 8, 2, 40
    max_pages = -(-1100 // page_size)
    pages = torch.randperm(batch * max_pages)
    block_table = pages.view(batch, max_pages).to(torch.int32)
    seqlens_k = torch.tensor([1100, 300, 1], dtype=torch.int32)
    k, v = torch.randn(2, batch * max_pages, page_size, heads_kv, head_dim, dtype=dtype)
    kwargs = dict(block_table=block_table, seqlens_k=seqlens_k, causal=True, offset=seqlens_k - 1)
    q = torch.randn(batch, heads, 1, head_dim, dtype=dtype)
    gathered = [t[block_table.long()].flatten(1, 2).transpose(1, 2).double() for t in (k, v)]
    exact, _ = oracle.attention(q.double(), *gathered, seqlens_k=seqlens_k)
    if packed:
        starts = torch.arange(batch + 1, dtype=torch.int32)
        out = fastattn.attention(q[:, :, 0], k, v, cu_seqlens_q=starts, **kwargs)[:, :, None]
    else:
        out = fastattn.attention(q, k, v, **kwargs)
    torch.testing.assert_close(out.double(), exact, **tolerance(dtype))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_calls(backend, data):
    draw = data.draw
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seqlen_q, seqlen_k = draw(st.integers(1, 160)), draw(st.integers(1, 400))
    on_cuda = backend == "cuda"
    head_dims = st.sampled_from(range(8, 73, 8)) if on_cuda else st.integers(1, 72)
    q, k, v = make(
        batch=draw(st.integers(1, 3)),
        heads=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=draw(head_dims),
        head_dim_v=draw(head_dims),
        dtype=draw(st.sampled_from(DTYPES[1:] if on_cuda else DTYPES)),
    )
    bound = st.none() | st.integers(0, 200)
    kwargs = dict(
        causal=draw(st.booleans()),
        window=(draw(bound), draw(bound)),
        offset=draw(st.integers(-50, 300)),
        softcap=draw(st.none() | st.floats(0.5, 10)),
    )
    if not on_cuda and draw(st.booleans()):
        kwargs["mask"] = torch.rand(draw(st.sampled_from([1, seqlen_q])), seqlen_k) < 0.7
    if not on_cuda and draw(st.booleans()):
        kwargs["bias"] = torch.randn(draw(st.sampled_from([1, seqlen_q])), seqlen_k).to(q.dtype)
    check(q, k, v, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, dtype):
    packed = torch.randn(2, 37, 3, 4, 24, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(q, k, v, causal=True)
    check(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1))
    check(q.mT.contiguous().mT, k[:, :, ::2], v[:, :, ::2, :16])
    check(q[:1].expand(3, -1, -1, -1), k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    "sizes", [dict(batch=0), dict(seqlen_q=0), dict(seqlen_k=0), dict(heads=0), dict(head_dim=0)]
)
def test_empty(backend, accurate, sizes):
    shape = dict(batch=2, heads=4, seqlen_q=5, seqlen_k=7, head_dim=8) | sizes
    check(*make(**shape, head_dim_v=8 if backend == "cuda" else 6, dtype=accurate))


def test_zero_rows_are_exact(backend, accurate):
    """Rows that see no key give exactly 0, -inf, and exactly 0 gradient."""
    shape = dict(seqlen_q=40, seqlen_k=30, dtype=accurate)
    q, k, v = (t.requires_grad_() for t in make(**shape))
    mask, rows = None, [0, 1, 2]
    if backend != "cuda":
        mask, rows = torch.ones(40, 30, dtype=torch.bool), [0, 1, 2, 5, 17]
        mask[5] = mask[17] = False
    out, lse = fastattn.attention(q, k, v, mask=mask, causal=True, offset=-3, return_lse=True)
    assert out[:, :, rows].eq(0).all() and lse[:, :, rows].isneginf().all()
    out.sum().backward()
    assert q.grad[:, :, rows].eq(0).all() and q.grad.isfinite().all()
    assert k.grad.isfinite().all() and v.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 30.0, 100.0])
def test_magnitudes(backend, size, dtype):
    q, k, v = make(seqlen_q=33, seqlen_k=65, head_dim=32, dtype=torch.float32)
    q, k = q * min(size, 1e4), k * min(size, 1e4)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    with torch.no_grad():
        out = fastattn.attention(q, k, v)
        exact, _ = oracle.attention(q.double(), k.double(), v.double())
        torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    oracle.check_close("out", out, exact, torch_out, dtype)


def test_nan_stays_in_its_row(backend, accurate):
    q, k, v = make(seqlen_q=30, seqlen_k=30, dtype=accurate)
    q[0, 1, 7, 3] = math.nan
    out = fastattn.attention(q, k, v)
    assert out[0, 1, 7].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_same_call_same_bits(backend, accurate):
    shape = dict(seqlen_q=150, seqlen_k=150, head_dim=32, dtype=accurate)
    q, k, v = (t.requires_grad_() for t in make(**shape))
    results = []
    for _ in range(2):
        # The CUDA backend's dq is a sum in any order otherwise.
        out = fastattn.attention(q, k, v, causal=True, deterministic=backend == "cuda")
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_out_layout(backend, accurate):
    q, k, v = make(dtype=accurate)
    assert fastattn.attention(q, k, v).transpose(1, 2).is_contiguous()


def test_unused_out_gives_gradient_of_lse(backend, accurate):
    q, k, v = (t.requires_grad_() for t in make(dtype=accurate))
    _, lse = fastattn.attention(q, k, v, return_lse=True)
    lse.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    oracle.attention(*exact)[1].sum().backward()
    for got, want in zip((q, k), exact):
        torch.testing.assert_close(got.grad.double(), want.grad, **tolerance(accurate))
    assert v.grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_error_no_more_than_sdpa(backend, causal, dtype):
    """RMS error against float64 of out and gradients, next to PyTorch's own kernel."""
    q, k, v = make(heads=3, seqlen_q=260, seqlen_k=260, head_dim=64, dtype=dtype)
    dout = torch.randn(q.shape, dtype=torch.float64).to(dtype)

    def results(fn, cast):
        inputs = [t.to(cast).requires_grad_() for t in (q, k, v)]
        out = fn(*inputs)
        return (out, *torch.autograd.grad(out, inputs, dout.to(cast)))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = results(lambda *qkv: oracle.attention(*qkv, causal=causal)[0], torch.float64)
    got = results(lambda *qkv: fastattn.attention(*qkv, causal=causal), dtype)
    own = results(lambda *qkv: sdpa(*qkv, is_causal=causal), dtype)
    for name, g, o, e in zip(("out", "dq", "dk", "dv"), got, own, exact):
        ours, theirs = ((x.double() - e).square().mean().sqrt().item() for x in (g, o))
        assert ours <= (1.5 if dtype == torch.float32 else 1.05) * theirs, (name, ours, theirs)


def test_deterministic_across_threads_and_batch(backend, accurate):
    """242 rows leave a tail of 2: no way of cutting the work may show in the bits."""
    if backend == "reference":
        pytest.skip("torch's own products decide")
    shape = dict(batch=8, heads=2, seqlen_q=242, seqlen_k=242, head_dim=64)
    q, k, v = make(**shape, dtype=accurate)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = fastattn.attention(q, k, v, deterministic=True)
        torch.set_num_threads(2)
        again = fastattn.attention(q, k, v, deterministic=True)
        one = fastattn.attention(q[:1], k[:1], v[:1], deterministic=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    assert torch.equal(whole[:1], one)
