"""Attention's forward for sm_80 and after, emulated: every tile, and keys split in any number."""

import oracle
import pytest
import torch
from emulation import emulated

import fastattn
from fastattn.backends.cuda import device

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason="no emulation")

NEAR = dict(atol=2e-3, rtol=2e-3)
FEATURES = dict(
    softcap=4.0, dropout_p=0.2, seed=5, alibi_slopes=torch.tensor([0.1, 0.02, 0.3, 0.0])
)


@pytest.fixture(params=[80, 86], ids="sm{}".format)
def chip(request):
    """Chips whose blocks may have much and little shared memory."""
    with emulated.emulating("sm80"), fastattn.use_backend("cuda"):
        emulated.module().set_capability(request.param)
        yield


class Split:
    """The kernels, which split keys into so many parts."""

    def __init__(self, kernels, splits):
        self.kernels, self.splits = kernels, splits

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def attention_splits(self, call):
        assert self.kernels.attention_splits(call) >= 1
        return self.splits


def make(seqlen_q, seqlen_k, head_dim, head_dim_v, dtype):
    q = torch.randn(2, 4, seqlen_q, head_dim, dtype=dtype)
    k = torch.randn(2, 2, seqlen_k, head_dim, dtype=dtype)
    return q, k, torch.randn(2, 2, seqlen_k, head_dim_v, dtype=dtype)


def check(q, k, v, **kwargs):
    out, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
    exact = oracle.attention(q.double(), k.double(), v.double(), **kwargs)
    rounded = oracle.attention(q, k, v, **kwargs)
    oracle.check_close("out", out, exact[0], rounded[0], q.dtype)
    oracle.check_close("lse", lse, exact[1], exact[1].float(), torch.float32)
    return out


@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "featured"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("rows", [131, 1])
def test_every_tile(chip, rows, head_dim, features):
    """Where the band and the lengths hide some blocks whole, some in part and some not at all."""
    dtype = torch.float16 if features else torch.bfloat16
    tensors = make(rows, 260, head_dim, head_dim - 8, dtype)
    lengths = torch.tensor([260, 201], dtype=torch.int32)
    band = dict(window=(100, 0), offset=lengths - rows, seqlens_k=lengths)
    check(*tensors, sinks=torch.randn(4), **band, **features)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_splits(chip, monkeypatch, head_dim, splits):
    """Of some parts no row sees anything; of one row no part."""
    monkeypatch.setattr(device, "kernels", Split(device.kernels, splits))
    q, k, v = make(5, 300, head_dim, head_dim, torch.float16)
    lengths = torch.tensor([300, 90], dtype=torch.int32)
    out = check(q, k, v, causal=True, offset=lengths - 5, seqlens_k=lengths)
    again = fastattn.attention(q, k, v, causal=True, offset=lengths - 5, seqlens_k=lengths)
    assert torch.equal(out, again)
    hidden = check(q, k, v, window=(3, 0), offset=-2, sinks=torch.randn(4), **FEATURES)
    assert (hidden[:, :, :2] == 0).all()


def test_few_queries_of_many_sequences(chip, monkeypatch):
    """Continuous batching: packed queries, a paged cache, lengths of their own."""
    starts = torch.tensor([0, 1, 1, 4, 6], dtype=torch.int32)
    lengths = torch.tensor([70, 3, 33, 0], dtype=torch.int32)
    table = torch.randperm(4 * 15).view(4, 15).int()
    q = torch.randn(6, 4, 40).half()
    k, v = torch.randn(2, 60, 5, 2, 40).half()
    offset = lengths - starts.diff()
    for splits in (1, 3):
        monkeypatch.setattr(device, "kernels", Split(emulated.module(), splits))
        out, lse = fastattn.attention(
            q, k, v, cu_seqlens_q=starts, seqlens_k=lengths, block_table=table, causal=True,
            offset=offset, return_lse=True,
        )  # fmt: skip
        for b in range(4):
            rows = slice(starts[b], starts[b + 1])
            gathered = [t[table[b]].flatten(0, 1)[None].transpose(1, 2).double() for t in (k, v)]
            exact, exact_lse = oracle.attention(
                q[rows].transpose(0, 1)[None].double(), *gathered, seqlens_k=lengths[b, None],
                causal=True, offset=offset[b, None],
            )  # fmt: skip
            torch.testing.assert_close(out[rows].transpose(0, 1)[None].double(), exact, **NEAR)
            torch.testing.assert_close(lse[None, :, rows].double(), exact_lse, **NEAR)
