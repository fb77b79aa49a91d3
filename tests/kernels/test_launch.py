"""A launch finds the device of its tensors; products are in TF32 only where torch's may be."""

import contextlib

import pytest
import torch
from fastattn.kernels import launch
from fastattn.kernels.attention_scores import Rows


class Kernel:
    """Stands for a jitted function; remembers its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Rows(x, 1, 1, 1), lambda x: ((x, 2), 3)])
def test_the_first_argument_says_where(monkeypatch, wrap):
    entered = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext()
    )
    kernel, x = Kernel(), torch.empty(2, device="meta")
    launch.launch(kernel, (3,), wrap(x), None, 5, BLOCK=16, num_warps=4)
    assert entered == [x.device]
    assert kernel.launches == [
        ((3,), (wrap(x), None, 5), dict(BLOCK=16, num_warps=4, enable_fp_fusion=True))
    ]
    launch.launch(kernel, (3, 0), wrap(x))
    assert len(kernel.launches) == 1


def test_tf32_follows_torch():
    assert launch.precision(torch.float32) == launch.precision(torch.bfloat16) == "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        matmul.allow_tf32 = True
        assert launch.precision(torch.float32) == "tf32"
        assert launch.precision(torch.float16) == "ieee"
    finally:
        matmul.allow_tf32 = False


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one switch only"
)
def test_tf32_by_the_newer_switch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert launch.precision(torch.float32) == "tf32"
    finally:
        matmul.fp32_precision = before
    assert launch.precision(torch.float32) == "ieee"
