"""Runs every op where each size is 1, through Triton's front end for a GPU, and prints what fails.

A kernel sees an integer argument that is 1 as a constant, which has no `.to` and no dtype. The
interpreter does not, and `shipped()` has no such sizes. `test_aot.py` runs this in a process of its
own, where kernels are compiled.
"""

import json
import warnings
from functools import partial

import torch
import triton
from fastattn.kernels import aot, launch
from triton.backends.nvidia.compiler import CUDABackend

import fastattn
from fastattn.backends.triton import device

TARGET = "sm_90"


def draw(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def heads(*shape):
    return [draw(*shape) for _ in "qkv"]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


FIRST = torch.zeros(1, dtype=torch.long)
TRUE = torch.ones(1, 1, dtype=torch.bool)
ONE_WORD = 2.0**-32  # a dropout_p whose threshold is 1
PACKED = dict(cu_seqlens_q=int32(0, 1), cu_seqlens_k=int32(0, 1), max_seqlen_q=1, max_seqlen_k=1)
PAGED = dict(seqlens_k=int32(1), block_table=int32(0)[None])
attention, softmax = fastattn.attention, fastattn.softmax
cross_entropy = partial(fastattn.cross_entropy, targets=FIRST, ignore_index=1)
linear_cross_entropy = partial(fastattn.linear_cross_entropy, targets=FIRST)
SHAPES = {"ffn": [(1, 8), (8, 8), (8,), (8, 8), (8,)], "gated_ffn": [(1, 8), *[(8, 8)] * 3]}


def residual_norm(function):
    return lambda x, residual, *rest: sum(function(x, *rest, residual=residual))


def rotary(x, **options):
    return fastattn.rotary(x, draw(2, 1), draw(2, 1), **options)


CASES = {
    "attention": (attention, heads(1, 1, 1, 64)),
    "attention d1": (attention, heads(1, 1, 1, 1)),
    "attention causal": (partial(attention, causal=True, softmax_scale=1.0), heads(1, 1, 1, 64)),
    "attention window": (partial(attention, window=(1, 1), offset=1), heads(1, 1, 1, 64)),
    "attention window long": (partial(attention, window=(1, 1), offset=1), heads(1, 2, 64, 64)),
    "attention dropout": (partial(attention, dropout_p=ONE_WORD, seed=1), heads(1, 1, 1, 64)),
    "attention mask": (partial(attention, mask=TRUE), heads(1, 1, 1, 64)),
    "attention bias": (partial(attention, bias=draw(1)), heads(1, 1, 1, 64)),
    "attention alibi": (partial(attention, alibi_slopes=torch.ones(1)), heads(1, 1, 1, 64)),
    "attention softcap": (partial(attention, softcap=1.0), heads(1, 1, 1, 64)),
    "attention sinks": (partial(attention, sinks=torch.ones(1)), heads(1, 1, 1, 64)),
    "attention lengths": (partial(attention, seqlens_k=int32(1)), heads(1, 1, 1, 64)),
    "attention packed": (partial(attention, **PACKED), heads(1, 1, 64)),
    "attention grouped": (attention, [draw(1, 2, 1, 64), draw(1, 1, 1, 64), draw(1, 1, 1, 64)]),
    "attention decode": (attention, [draw(1, 1, 1, 64), *heads(1, 1, 4096, 64)[1:]]),
    "attention paged": (
        lambda q: attention(q, draw(1, 1, 1, 64), draw(1, 1, 1, 64), **PAGED),
        [draw(1, 1, 1, 64)],
    ),
    "softmax": (softmax, [draw(1, 1)]),
    "softmax long": (softmax, [draw(1, 20000)]),
    "softmax features": (
        partial(softmax, causal=True, mask=TRUE, bias=draw(1), dropout_p=ONE_WORD, seed=1),
        [draw(1, 1)],
    ),
    "layer_norm": (fastattn.layer_norm, [draw(1, 1), draw(1), draw(1)]),
    "layer_norm long": (fastattn.layer_norm, [draw(1, 40000), draw(40000), draw(40000)]),
    "layer_norm residual": (
        residual_norm(fastattn.layer_norm),
        [draw(1, 64), draw(1, 64), draw(64), draw(64)],
    ),
    "rms_norm": (fastattn.rms_norm, [draw(1, 1), draw(1)]),
    "rms_norm residual": (residual_norm(fastattn.rms_norm), [draw(1, 64), draw(1, 64), draw(64)]),
    "rotary": (rotary, [draw(1, 1, 1, 2)]),
    "rotary offset": (partial(rotary, offset=1, interleaved=True), [draw(1, 1, 1, 2)]),
    "cross_entropy": (cross_entropy, [draw(1, 1)]),
    "cross_entropy sum": (
        partial(cross_entropy, label_smoothing=0.1, reduction="sum"),
        [draw(1, 100000)],
    ),
    "linear_cross_entropy": (linear_cross_entropy, [draw(1, 1), draw(1, 1)]),
    "linear_cross_entropy none": (
        partial(linear_cross_entropy, reduction="none"),
        [draw(1, 64), draw(96, 64)],
    ),
} | {
    f"{name} {size} {options}": (
        partial(getattr(fastattn, name), **options),
        [draw(*(min(n, size) for n in shape)) for shape in SHAPES[name]],
    )
    for name, size, options in (
        ("ffn", 1, {}),
        ("ffn", 8, {"save": "input", "activation": "gelu"}),
        ("ffn", 8, {"save": "all", "dropout_p": ONE_WORD, "seed": 1}),
        ("gated_ffn", 1, {}),
        ("gated_ffn", 8, {"save": "input"}),
        ("gated_ffn", 8, {"save": "all"}),
    )
}


FORWARD_ONLY = ("attention paged",)


class Enough(Exception):
    """The front end has done its part."""


def to_the_front_end_only():
    """Stop each compilation where Triton's own language has been translated."""

    def make_ttgir(*_args):
        raise Enough

    compile_ = triton.runtime.JITFunction.warmup

    def warmup(self, *args, **options):
        try:
            return compile_(self, *args, **options)
        except Enough:
            return None

    CUDABackend.make_ttgir = staticmethod(make_ttgir)
    triton.runtime.JITFunction.warmup = warmup


def fault(function, inputs, backward):
    """What is wrong with the kernels of a call, None if nothing."""
    try:
        with torch.no_grad():
            out = function(*inputs)
        if backward:
            leaves = [tensor.requires_grad_() for tensor in inputs]
            out = function(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    except Exception as error:  # of Triton's or of ours
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        return " <- ".join(str(cause)[-300:] for cause in reversed(causes))


def main():
    warnings.simplefilter("ignore")
    device._DEVICES = ("cuda", "cpu")  # nothing runs, so that tensors may lie anywhere
    driver = aot._Driver(TARGET)
    triton.runtime.driver.set_active(driver)
    to_the_front_end_only()
    faults = {}
    target = launch.Target(driver.backend, driver.arch)
    with launch.ahead_of_time(target) as launched, fastattn.use_backend("triton"):
        for name, (function, inputs) in CASES.items():
            faults[name] = fault(function, inputs, backward=name not in FORWARD_ONLY)
    faults = {name: what for name, what in faults.items() if what}
    print(json.dumps({"faults": faults, "kernels": sorted({one.kernel for one in launched})}))


if __name__ == "__main__":
    main()
