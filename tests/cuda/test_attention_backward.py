"""Attention's backward, emulated: every tile, what is hidden, any order of sums."""

import math

import oracle
import pytest
import torch
from emulation import emulated

import fastattn

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason="no emulation")

FEATURES = dict(
    softcap=4.0, dropout_p=0.2, seed=5, alibi_slopes=torch.tensor([0.1, 0.02, 0.3, 0.0])
)


@pytest.fixture(params=[80, 86, 90], ids="sm{}".format)
def chip(request):
    """Chips with much and with little shared memory, and one that has kernels of its own."""
    with emulated.emulating("sm80"), fastattn.use_backend("cuda"):
        emulated.module().set_capability(request.param)
        yield


def make(seqlen_q, seqlen_k, head_dim, head_dim_v=None, dtype=torch.float16):
    q = torch.randn(2, 4, seqlen_q, head_dim, dtype=dtype)
    k = torch.randn(2, 2, seqlen_k, head_dim, dtype=dtype)
    return q, k, torch.randn(2, 2, seqlen_k, head_dim_v or head_dim, dtype=dtype)


def gradients(fn, tensors, **kwargs):
    """Of q, k and v, for the same cotangents of out and lse in every dtype."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = fn(*tensors, **kwargs)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).half().to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    loss = (out * dout).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * dlse).sum()
    return torch.autograd.grad(loss, tensors)


def run(*tensors, **kwargs):
    return gradients(fastattn.attention, tensors, return_lse=True, **kwargs)


def check(*tensors, **kwargs):
    got = run(*tensors, **kwargs)
    kwargs.pop("deterministic", None)
    exact = gradients(oracle.attention, [t.double() for t in tensors], **kwargs)
    rounded = gradients(oracle.attention, tensors, **kwargs)
    for name, *one in zip(("dq", "dk", "dv"), got, exact, rounded, strict=True):
        oracle.check_close(name, *one, tensors[0].dtype)
    return got


@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "featured"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_every_tile(chip, head_dim, features):
    """Where the band and the lengths hide some blocks whole, some in part and some not at all."""
    dtype = torch.float16 if features else torch.bfloat16
    lengths = torch.tensor([260, 201], dtype=torch.int32)
    tensors = make(150, 260, head_dim, head_dim - 8, dtype)
    check(*tensors, window=(100, 0), offset=lengths - 150, seqlens_k=lengths, **features)


@pytest.mark.parametrize("head_dim, head_dim_v", [(208, 72), (40, 200)])
def test_wide_keys_or_values(chip, head_dim, head_dim_v):
    check(*make(70, 130, head_dim, head_dim_v), causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_is_hidden_gets_zeros(chip, head_dim):
    """Of queries and of keys, though the keys behind a length are NaN."""
    q, k, v = make(130, 300, head_dim)
    lengths = torch.tensor([300, 131], dtype=torch.int32)
    band = dict(window=(20, 3), offset=torch.tensor([-10, 60], dtype=torch.int32))
    expected = check(q, k, v, seqlens_k=lengths, **band)
    dq, dk, dv = expected
    assert dq[0, :, :7].eq(0).all() and dq[1, :, 92:].eq(0).all()
    assert dk[0, :, 123:].eq(0).all() and dv[0, :, 123:].eq(0).all()
    assert dk[1, :, 131:].eq(0).all() and dv[1, :, 131:].eq(0).all()
    k[1, :, 131:], v[1, :, 131:] = math.nan, math.nan
    for one, other in zip(run(q, k, v, seqlens_k=lengths, **band), expected, strict=True):
        assert torch.equal(one, other)


def test_low_scores(chip):
    """exp(0 - lse) of what lies outside the matrix overflows, and must not reach a product."""
    q, k, v = make(70, 70, 64)
    q, k = q.abs() + 8, -k.abs() - 8
    assert all(grad.isfinite().all() for grad in check(q, k, v))
    assert all(grad.isfinite().all() for grad in check(q, k, v, causal=True, softcap=600.0))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_sequences(chip, deterministic, head_dim):
    """One is empty, one has no keys, one is NaN and must not reach the others."""
    starts_q, starts_k = [0, 70, 70, 190, 200, 400], [0, 150, 160, 160, 300, 441]
    q, k, v = (
        torch.randn(n, heads, head_dim).half() for n, heads in ((400, 4), (441, 2), (441, 2))
    )
    k[160:300], v[160:300] = math.nan, math.nan
    offset = torch.tensor([80, 0, 0, 0, -90], dtype=torch.int32)
    dq, dk, dv = gradients(
        fastattn.attention, (q, k, v), causal=True, offset=offset, deterministic=deterministic,
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32), return_lse=True,
    )  # fmt: skip
    assert dq[70:190].eq(0).all() and dq[190:200].isnan().all()
    assert dk[150:160].eq(0).all() and dv[150:160].eq(0).all()

    def others(q, k, v):
        """Each alone, in place in what the packed call returns."""
        out, lse = torch.zeros_like(q), q.new_full((4, 400), -math.inf)
        for b in (0, 4):
            rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
            one = [t[None].transpose(1, 2) for t in (q[rows], k[keys], v[keys])]
            own_out, own_lse = oracle.attention(*one, causal=True, offset=offset[b, None])
            out[rows], lse[:, rows] = own_out[0].transpose(0, 1), own_lse[0]
        return out, lse

    exact = gradients(others, (q.double(), k.double(), v.double()))
    sound_q, sound_k = ([*range(70), *range(200, 400)], [*range(150), *range(300, 441)])
    for got, want, sound in zip((dq, dk, dv), exact, (sound_q, sound_k, sound_k), strict=True):
        torch.testing.assert_close(got[sound].double(), want[sound], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_deterministic(chip, head_dim):
    """In any batch: what is summed of a row of queries is summed in the order of the keys."""
    q, k, v = (t.requires_grad_() for t in make(100, 530, head_dim))
    results = []
    for batch in (2, 1):
        some = q[:batch], k[:batch], v[:batch]
        out = fastattn.attention(*some, window=(300, 0), offset=400, deterministic=True)
        results.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for both, first in zip(*results, strict=True):
        assert torch.equal(both[0], first[0]) and first[0].any()


def test_strides(chip):
    """Of queries, keys and values in one tensor, rows before heads; of one key for all heads."""
    q, k, v = torch.randn(2, 90, 3, 4, 64).half().permute(2, 0, 3, 1, 4)
    check(q, k, v, causal=True)
    check(q, k[:, :1], v[:, :1])
    check(q[:1].expand(3, -1, -1, -1), k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
