"""Softmax, the module, against torch's."""

import math

import pytest
import torch

from fastattn.nn import Softmax


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_softmax(dim):
    x = torch.randn(3, 4, 5, requires_grad=True)
    dy = torch.randn(3, 4, 5)
    expected = torch.nn.Softmax(dim)(x)
    actual = Softmax(dim)(x)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        *(torch.autograd.grad(y, x, dy) for y in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_row_of_minus_infinity():
    assert torch.equal(Softmax(-1)(torch.full((2, 3), -math.inf)), torch.zeros(2, 3))
