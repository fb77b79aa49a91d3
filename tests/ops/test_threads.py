"""Calls from several Python threads at once, and from a forked process."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastattn


def everything(seed):
    """Results and gradients of each op, at sizes that take more than one task."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    q, k, v, x = (
        normal(2, 4, 200, 32),
        normal(2, 2, 300, 32),
        normal(2, 2, 300, 32),
        normal(400, 64),
    )
    w1, w2, g = normal(96, 64), normal(64, 96), normal(64)
    angles = torch.arange(200)[:, None] * 10000 ** -torch.linspace(0, 1, 16)
    targets = torch.randint(96, (400,), generator=generator)
    halves = [t.bfloat16() for t in (q, k, v, x, w1, w2)]
    outs = (
        fastattn.attention(q, k, v, causal=True, dropout_p=0.1, seed=seed),
        fastattn.attention(*halves[:3]),
        fastattn.softmax(x, dropout_p=0.2, seed=seed),
        fastattn.ffn(x, w1, None, w2, None, activation="gelu"),
        fastattn.ffn(*halves[3:5], None, halves[5], None),
        fastattn.layer_norm(x, g),
        fastattn.rms_norm(x, g),
        fastattn.rotary(q, angles.cos(), angles.sin()),
        fastattn.cross_entropy(x @ w1.T, targets),
        fastattn.linear_cross_entropy(x, w1, targets),
    )
    loss = sum(out.float().square().sum() for out in outs)
    return *outs, *torch.autograd.grad(loss, (q, k, v, x, w1, w2, g))


def test_threads_do_not_disturb_each_other(backend):
    """Each result has the bits that the same call has alone."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter rewrites its language for one thread at a time")

    def call(seed):
        with fastattn.use_backend(backend):
            return everything(seed)

    alone = [call(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(call, list(range(4)) * 6))
    for index, results in enumerate(together):
        for got, want in zip(results, alone[index % 4], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


FORK = """
import os, sys
import torch
from test_threads import everything
before = everything(3)
child = os.fork()
if not child:
    # As torch's own workers: OpenMP's threads do not survive a fork.
    torch.set_num_threads(1)
    same = all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(before, everything(3)))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_process():
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
