"""Attention's kernels over many small blocks: skipped, whole and boundary ones."""

import pytest
import torch
from fastattn.kernels import attention, attention_backward
from ops import test_attention as op

BLOCKS = {
    "forward": dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    "backward": dict(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1),
}
BANDS = {
    "none": dict(),
    "causal": dict(causal=True),
    "bottom-right": dict(causal=True, offset=30),
    "window": dict(window=(9, 5)),
    "wide-window": dict(window=(30, 20), offset=-7),
    "left": dict(window=(20, None)),
    "window-causal": dict(window=(30, None), causal=True, offset=40),
    "right-of-keys": dict(window=(3, 3), offset=60),
    "left-of-keys": dict(window=(3, 3), offset=-60),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, triton):
    monkeypatch.setattr(attention, "configurations", lambda *_: [BLOCKS["forward"]])
    monkeypatch.setattr(attention_backward, "configurations", lambda *_: [BLOCKS["backward"]])
    monkeypatch.setattr(attention, "PACKED_ROWS", 8)


@pytest.mark.parametrize("band", BANDS)
def test_bands(band):
    q, k, v = op.make(batch=1, heads=2, heads_kv=1, seqlen_q=53, seqlen_k=75)
    op.check(q, k, v, **BANDS[band])


def test_features():
    q, k, v = op.make(batch=2, heads=2, seqlen_q=35, seqlen_k=50)
    op.check(
        q, k, v, dropout_p=0.2, seed=2**33 + 5, window=(25, 4), offset=3, softcap=2.0,
        mask=torch.rand(2, 1, 35, 50) < 0.8, bias=torch.randn(2, 1, 1, 50),
        sinks=torch.randn(2), seqlens_k=torch.tensor([47, 20], dtype=torch.int32),
    )  # fmt: skip


def test_packed_rows_of_several_blocks(monkeypatch):
    """45 rows: blocks of 16 start within a row's 3 heads."""
    monkeypatch.setattr(attention, "PACKED_ROWS", 64)
    q, k, v = op.make(batch=2, heads=6, heads_kv=2, seqlen_q=15, seqlen_k=50)
    op.check(q, k, v, window=(25, 4), offset=9, mask=torch.rand(2, 6, 15, 50) < 0.8)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("window", [(None, None), (40, 3)])
def test_parts(monkeypatch, parts, window):
    """Keys split over more parts than have any; PACKED_ROWS of 6 = 2 rows of 3 heads."""
    monkeypatch.setattr(attention, "_parts", lambda *_: parts)
    q, k, v = op.make(batch=1, heads=3, heads_kv=1, seqlen_q=2, seqlen_k=70)
    lengths = torch.tensor([50], dtype=torch.int32)
    op.check(q, k, v, window=window, offset=30, sinks=torch.randn(3), seqlens_k=lengths)
