"""Triton's interpreter, as patched, computes bfloat16 as a GPU does."""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds by itself")


@triton.jit
def _convert_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.float32) + tl.load(y_ptr + at).to(tl.float32))


def convert(x, dtype):
    out = torch.empty_like(x, dtype=dtype)
    launch(_convert_kernel, (1,), x, out, N=x.numel())
    return out


def test_float32_rounds_to_nearest_even():
    halfway = torch.arange(0x3F80_0000, 0x3F80_0000 + 16 * 0x8000, 0x8000, dtype=torch.int32)
    x = torch.cat([halfway - 1, halfway, halfway + 1, -halfway]).view(torch.float32)
    assert convert(x, torch.bfloat16).equal(x.bfloat16())


def test_random_float32_round_as_in_torch():
    x = torch.randn(1024) * 10.0 ** torch.randint(-30, 30, (1024,))
    assert convert(x, torch.bfloat16).equal(x.bfloat16())


SPECIAL = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4028234e38, 1e-45, -1e-40, 9.2e-41,
    1.1754942e-38, 1.1754944e-38, 65504.0, 1.0, -1.0, 2.0**-133,
]  # fmt: skip


def test_special_values():
    x = torch.tensor(SPECIAL)
    x[4].view(torch.int32).fill_(0x7F80_0001)  # a NaN whose upper half is infinity's
    got, want = convert(x, torch.bfloat16), x.bfloat16()
    assert got.isnan().equal(want.isnan()) and got.isnan().sum() == 1
    finite = ~want.isnan()
    assert got[finite].view(torch.int16).equal(want[finite].view(torch.int16))


def test_bfloat16_widens_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for part in x.split(4096):
        torch.testing.assert_close(
            convert(part, torch.float32), part.float(), rtol=0, atol=0, equal_nan=True
        )


def test_float16_passes_through_float32():
    x = torch.randn(256)
    assert convert(x.half(), torch.bfloat16).equal(x.half().bfloat16())
    assert convert(x.bfloat16(), torch.float16).equal(x.bfloat16().half())


def test_products_of_bfloat16_are_summed_in_float32():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    launch(_dot_kernel, (1,), a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


def test_a_sum_is_rounded_once():
    x, y = torch.randn(2, 512).bfloat16()
    out = torch.empty(512, dtype=torch.bfloat16)
    launch(_add_kernel, (1,), x, y, out, N=512)
    assert out.equal(x + y)
