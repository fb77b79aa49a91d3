"""Tune the Triton kernels on this machine's GPU: ``python -m fastattn tune``."""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from fastattn.kernels import tuning

Draw = Callable[..., Tensor]  # normal numbers of a shape


class Case(NamedTuple):
    """A call of a public function."""

    function: Callable[..., Any]
    tensors: list[Tensor]  # its first arguments, which take a gradient
    direction: str = "both"  # "forward" alone, "both", or "step": both in one call


class Sizes(NamedTuple):
    """Of the standard problems."""

    tokens: int  # batch * seqlen
    d_model: int
    seqlens: tuple[int, ...]
    caches: tuple[int, ...]  # keys that one decoded token sees
    columns: tuple[int, ...]  # of softmax and the norms
    vocabularies: tuple[int, ...]


FULL = Sizes(16384, 2048, (512, 2048, 8192), (4096, 32768), (1024, 4096, 16384), (32000, 128256))
QUICK = Sizes(16384, 2048, (2048,), (8192,), (4096,), (32000,))
INTERPRETER = Sizes(16, 128, (16,), (64,), (64,), (96,))


def _attention(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for head_dim in (64, 128):
        heads = sizes.d_model // head_dim
        for seqlen, causal in itertools.product(sizes.seqlens, (False, True)):
            shape = (sizes.tokens // seqlen, heads, seqlen, head_dim)
            yield Case(partial(fastattn.attention, causal=causal), [draw(shape) for _ in "qkv"])
        for cache in sizes.caches:
            kv = (8, max(1, heads // 4), cache, head_dim)
            decoded = [draw((8, heads, 1, head_dim)), draw(kv), draw(kv)]
            yield Case(fastattn.attention, decoded, "forward")


def _softmax(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for columns in sizes.columns:
        yield Case(fastattn.softmax, [draw(sizes.tokens, columns)])


def _layer_norm(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for columns in sizes.columns:
        yield Case(fastattn.layer_norm, [draw(sizes.tokens, columns), draw(columns), draw(columns)])


def _rms_norm(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for columns in sizes.columns:
        yield Case(fastattn.rms_norm, [draw(sizes.tokens, columns), draw(columns)])


def _rotary(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    seqlen = sizes.seqlens[-1]
    for head_dim, interleaved in itertools.product((64, 128), (False, True)):
        cos, sin = draw(2, seqlen, head_dim // 2)
        x = draw(sizes.tokens // seqlen, sizes.d_model // head_dim, seqlen, head_dim)
        yield Case(partial(fastattn.rotary, cos=cos, sin=sin, interleaved=interleaved), [x])


def _cross_entropy(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for vocabulary in sizes.vocabularies:
        logits = draw(sizes.tokens // 4, vocabulary)
        targets = torch.randint(vocabulary, logits.shape[:1], device=logits.device)
        yield Case(partial(fastattn.cross_entropy, targets=targets), [logits])


def _linear_cross_entropy(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    for vocabulary in sizes.vocabularies:
        x, weight = draw(sizes.tokens // 4, sizes.d_model), draw(vocabulary, sizes.d_model)
        targets = torch.randint(vocabulary, x.shape[:1], device=x.device)
        # Where a gradient is asked for, the forward computes it.
        yield Case(partial(fastattn.linear_cross_entropy, targets=targets), [x, weight], "step")


def _ffn(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    d_model, d_ff = sizes.d_model, 4 * sizes.d_model
    for activation in ("relu", "gelu"):
        shapes = ((sizes.tokens // 4, d_model), (d_ff, d_model), d_ff, (d_model, d_ff), d_model)
        yield Case(partial(fastattn.ffn, activation=activation), [draw(shape) for shape in shapes])


def _gated_ffn(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    d_model, d_ff = sizes.d_model, 4 * sizes.d_model
    shapes = ((sizes.tokens // 4, d_model), (d_ff, d_model), (d_ff, d_model), (d_model, d_ff))
    yield Case(fastattn.gated_ffn, [draw(shape) for shape in shapes])


OPS: dict[str, Callable[[Draw, Sizes], Iterator[Case]]] = {
    "attention": _attention,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "ffn": _ffn,
    "gated_ffn": _gated_ffn,
}
DTYPES = ("bfloat16", "float16", "float32")


def refusal() -> str | None:
    """Why nothing can be tuned here."""
    if importlib.util.find_spec("triton") is None:
        return "tuning needs triton: pip install 'fastattn[triton]'"
    if not torch.cuda.is_available() and not _interpreted():
        return (
            "tuning times kernels on a GPU, and torch sees none here; with TRITON_INTERPRET=1 it "
            "runs in Triton's interpreter, to try it out"
        )
    return None


def run(ops: Sequence[str], dtypes: Sequence[str], quick: bool) -> int:
    """Tune on the standard problems and print what was found; returns the exit status."""
    reason = refusal()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    sizes = INTERPRETER if _interpreted() else QUICK if quick else FULL
    device = torch.device("cpu" if _interpreted() else "cuda")
    done: set[tuning.Key] = set()
    print(f"{'kernel':28} {'shape class':40} {'heuristic':>12} {'tuned':>12}  configuration")
    with fastattn.use_backend("triton"):
        for op, dtype in itertools.product(ops, dtypes):
            draw = partial(torch.randn, device=device, dtype=getattr(torch, dtype))
            for case in OPS[op](draw, sizes):
                for call in _calls(case):
                    with tuning.deciding({}) as decisions:
                        call()
                    if not decisions.keys() <= done:
                        for key, tuned in tuning.tune(call).items():
                            print(_row(key, tuned), flush=True)
                    done |= decisions.keys()
    gpu = tuning.gpu_name(torch.cuda.current_device() if device.type == "cuda" else None)
    print(f"{len(tuning.load(gpu))} configurations in {tuning.path(gpu)}")
    return 0


def _calls(case: Case) -> Iterator[Callable[[], Any]]:
    """The forward as in evaluation and as in training, and the backward."""
    leaves = [tensor.requires_grad_(case.direction != "forward") for tensor in case.tensors]

    def forward() -> Tensor:
        return case.function(*leaves)

    yield torch.no_grad()(forward)
    if case.direction == "step":
        yield lambda: torch.autograd.grad(forward(), leaves)
    elif case.direction == "both":
        yield forward
        out = forward()
        dout = torch.randn_like(out)
        yield lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _row(key: tuning.Key, tuned: tuning.Tuned) -> str:
    name, _, shape_class = tuning.text(*key).partition("|")
    options = " ".join(f"{option}={value}" for option, value in tuned.config.items())
    return (
        f"{name:28} {shape_class:40} {tuned.heuristic * 1e3:9.3f} ms {tuned.seconds * 1e3:9.3f} ms"
        f"  {options}"
    )


def _interpreted() -> bool:
    from fastattn.kernels.launch import INTERPRETED

    return INTERPRETED
