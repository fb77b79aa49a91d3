"""Softmax on sm_90, emulated: rows that the blocks of a cluster share."""

import math

import pytest
import torch
from emulation import emulated
from ops.test_softmax import check

import fastattn
from fastattn.backends.cuda import device

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason="no emulation")


@pytest.fixture(autouse=True)
def chip():
    with emulated.emulating("sm90"), fastattn.use_backend("cuda"):
        yield


def softmax_and_gradient(x, dout, **kwargs):
    x = x.detach().requires_grad_()
    out = fastattn.softmax(x, **kwargs)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


@pytest.mark.parametrize(
    ("columns", "file"),
    [(8192, "softmax.cu"), (8193, "softmax_sm90.cu"), (131072, "softmax_sm90.cu"),
     (131073, "softmax.cu")],
)  # fmt: skip
def test_which_kernel_takes_a_row(columns, file, monkeypatch):
    """Kernels that may touch the first element only say who they are."""
    monkeypatch.setattr(device, "pointer", lambda x: 0 if x is None else x.data_ptr())
    monkeypatch.setattr(
        device, "where", lambda x: device.kernels.register_global(x.data_ptr(), 4) or (0, 0)
    )
    with pytest.raises(RuntimeError, match=rf"csrc/cuda/{file}:\d+\), .* of global memory"):
        fastattn.softmax(torch.randn(1, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [8193, 16384, 40000, 131072, 131073])
def test_against_float64(columns, dtype):
    """Of one row, all blocks but the last see nothing."""
    x = torch.randn(2, columns).to(dtype) * 3
    mask = torch.rand(2, columns) < 0.5
    mask[1] = torch.arange(columns) == columns - 1
    check(x)
    check(x, scale=0.7, mask=mask, bias=torch.randn(columns).to(dtype), log=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [8193, 17000])
def test_dropout(columns, dtype):
    check(torch.randn(2, columns).to(dtype), dropout_p=0.4, seed=2**35 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [8200, 12288, 16385, 33000, 65544, 100000])
def test_every_block_has_its_part(columns, dtype):
    """Of one row, as of two alike: whatever its parts, each element is written once."""
    x, dout = torch.randn(2, 1, columns).to(dtype)
    out, dx = softmax_and_gradient(x, dout)
    wide = x.double().requires_grad_()
    exact = wide.softmax(-1)
    (exact_dx,) = torch.autograd.grad(exact, wide, dout.double())
    tolerance = dict(rtol=4e-3 if dtype == torch.float16 else 2e-5, atol=1e-7)
    torch.testing.assert_close(out.double(), exact.detach(), **tolerance)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-2, atol=1e-6)
    twice = softmax_and_gradient(x.expand(2, -1), dout.expand(2, -1))
    for one, both in zip((out, dx), twice, strict=True):
        assert torch.equal(both, one.expand(2, -1))


@pytest.mark.parametrize("columns", [9000, 70000])
def test_a_part_that_sees_nothing(columns):
    """Its maximum is -inf; of whole rows, too, of infinity and of NaN."""
    x = torch.zeros(5, columns)
    x[0, : columns // 2] = -math.inf
    x[1, columns // 2 :] = -math.inf
    x[2] = -math.inf
    x[3, -1] = math.inf
    x[4, 0] = math.nan
    mask = torch.ones(5, columns, dtype=torch.bool)
    for kwargs in ({}, dict(mask=mask)):
        out, dx = softmax_and_gradient(x, torch.ones_like(x), **kwargs)
        torch.testing.assert_close(out[:2], x[:2].softmax(-1))
        assert out[2].eq(0).all() and dx[2].eq(0).all()
        assert torch.equal(out[3].isnan(), x[3].softmax(-1).isnan())
        assert out[4].isnan().all()


def test_strides():
    """Rows apart, and elements apart, which no vectors can read."""
    whole = torch.randn(3, 2, 20000)
    for x in (whole[:, 1, :17000], whole[:, :, ::2], whole.transpose(0, 1)):
        out, _ = softmax_and_gradient(x, torch.randn(x.shape))
        torch.testing.assert_close(out, x.softmax(-1))
        out, _ = softmax_and_gradient(x, torch.randn(x.shape), causal=True)
        torch.testing.assert_close(
            out, x.masked_fill(~torch.ones(x.shape).tril().bool(), -math.inf).softmax(-1)
        )
