"""Attention's forward for sm_90, emulated: every tile, every order of tiles, what copies read."""

import math

import oracle
import pytest
import torch
from emulation import emulated

import fastattn

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason="no emulation")

FEATURES = dict(softcap=4.0, alibi_slopes=torch.tensor([0.1, 0.02, 0.3, 0.0]))


@pytest.fixture(autouse=True)
def chip():
    """A chip of 4 multiprocessors."""
    with emulated.emulating("sm90"), fastattn.use_backend("cuda"):
        yield


def make(heads, seqlen_q, seqlen_k, head_dim, head_dim_v=None, dtype=torch.float16):
    q = torch.randn(2, heads, seqlen_q, head_dim, dtype=dtype)
    k = torch.randn(2, heads // 2, seqlen_k, head_dim, dtype=dtype)
    return q, k, torch.randn(2, heads // 2, seqlen_k, head_dim_v or head_dim, dtype=dtype)


def check(q, k, v, **kwargs):
    out, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
    exact = oracle.attention(q.double(), k.double(), v.double(), **kwargs)
    rounded = oracle.attention(q, k, v, **kwargs)
    oracle.check_close("out", out, exact[0], rounded[0], q.dtype)
    oracle.check_close("lse", lse, exact[1], exact[1].float(), torch.float32)
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "featured"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(64, 64), (40, 96), (96, 80), (128, 128), (192, 128), (136, 192), (256, 256), (8, 224)],
)
def test_every_tile(head_dim, head_dim_v, features, dtype):
    """Under a band that hides some blocks whole, some in part and some not at all, and without."""
    tensors = make(4, 201, 330, head_dim, head_dim_v, dtype)
    check(*tensors, window=(130, 3), offset=17, sinks=torch.randn(4), **features)
    check(*tensors, **features)


def test_dropout():
    check(*make(4, 70, 200, 128), causal=True, offset=100, dropout_p=0.2, seed=5)


def test_wide_tile():
    """Of 176 keys, where there are many."""
    check(*make(2, 130, 1100, 128))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [64, 500, 700])
@pytest.mark.parametrize("heads", [2, 10])
def test_every_row_is_written_once(heads, seqlen, causal):
    """However many rounds the tiles take; memory that no tile writes is not what it should be."""
    check(*make(heads, seqlen, seqlen, 64), causal=causal)


def test_lengths_hide_what_lies_beyond():
    """Which may be memory that nobody has written, or another sequence's NaN."""
    q, k, v = make(4, 100, 300, 64)
    lengths = torch.tensor([300, 131], dtype=torch.int32)
    expected = check(q, k, v, seqlens_k=lengths, causal=True, offset=lengths - 100)
    k[1, :, 131:], v[1, :, 131:] = math.nan, math.nan
    out = fastattn.attention(q, k, v, seqlens_k=lengths, causal=True, offset=lengths - 100)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_packed_sequences(head_dim):
    """One is empty, one has no keys, one is NaN and must not reach the others."""
    starts_q, starts_k = [0, 70, 70, 190, 200, 400], [0, 150, 160, 160, 300, 441]
    q = torch.randn(400, 4, head_dim).bfloat16()
    k, v = torch.randn(2, 441, 2, head_dim).bfloat16()
    k[160:300], v[160:300] = math.nan, math.nan
    out = fastattn.attention(
        q, k, v, causal=True,
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(starts_k, dtype=torch.int32),
    )  # fmt: skip
    assert out[70:190].eq(0).all() and out[190:200].isnan().all()
    for rows, keys in ((slice(0, 70), slice(0, 150)), (slice(200, 400), slice(300, 441))):
        one = [t[None].transpose(1, 2).double() for t in (q[rows], k[keys], v[keys])]
        exact, _ = oracle.attention(*one, causal=True)
        torch.testing.assert_close(
            out[rows][None].transpose(1, 2).double(), exact, atol=1e-2, rtol=1e-2
        )


def test_strides():
    """Of keys and values in one tensor, rows before heads, and of a dim of size 1, are copied."""
    q = torch.randn(1, 130, 4, 64).half().transpose(1, 2)
    k, v = torch.randn(1, 200, 2, 2, 64).half().transpose(1, 3).unbind(2)
    check(q, k, v, causal=True)
    check(q, k.as_strided(k.shape, (7, *k.stride()[1:])), v)
