"""Attention beside F.scaled_dot_product_attention; as a script, interleaved in one table."""

import pytest
import torch
from interleave import medians
from torch.nn import functional

import fastattn

# (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim), and the features.
CASES = {
    "full": ((1, 8, 8, 2048, 2048, 64), {}),
    "full, d128": ((1, 8, 8, 2048, 2048, 128), {}),
    "causal": ((1, 8, 8, 2048, 2048, 64), {"causal": True}),
    "causal, GQA, d128": ((1, 32, 8, 1024, 1024, 128), {"causal": True}),
    "short": ((8, 12, 12, 128, 128, 64), {}),
    "medium": ((1, 8, 8, 512, 512, 64), {}),
    "window": ((1, 8, 8, 4096, 4096, 64), {"causal": True, "window": (255, None)}),
    "lengths": ((8, 8, 8, 256, 256, 64), {"seqlens_k": True}),
    "bias": ((1, 8, 8, 512, 512, 64), {"bias": True}),
    "dropout": ((1, 8, 8, 512, 512, 64), {"dropout_p": 0.1}),
    "d80": ((1, 8, 8, 512, 512, 80), {}),
    "d96": ((1, 8, 8, 512, 512, 96), {}),
    "cross": ((1, 8, 8, 128, 1024, 64), {}),
    "decode": ((1, 8, 8, 1, 4096, 64), {}),
    "decode, GQA, d128": ((1, 32, 8, 1, 4096, 128), {}),
    "decode, GQA, d128, batch 8": ((8, 32, 8, 1, 4096, 128), {}),
    "tiny": ((1, 1, 1, 4, 4, 8), {}),
}


def build(case, dtype):
    """Inputs that take a gradient, and one function of each library."""
    torch.manual_seed(0)
    (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim), features = CASES[case]
    features = dict(features)
    q = torch.randn(batch, heads, seqlen_q, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, heads_kv, seqlen_k, head_dim, dtype=dtype)
    inputs = [q, k, v]
    mask = None
    causal = features.get("causal", False)
    if "window" in features:
        distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None]
        mask = (distance <= 0) & (distance >= -features["window"][0])
    if "seqlens_k" in features:
        lengths = torch.linspace(seqlen_k // batch, seqlen_k, batch).int()
        features["seqlens_k"] = lengths
        mask = (torch.arange(seqlen_k) < lengths[:, None])[:, None, None]
    if "bias" in features:
        mask = torch.randn(1, heads, seqlen_q, seqlen_k, dtype=dtype)
        features["bias"] = mask
        inputs.append(mask)

    def ours():
        return fastattn.attention(q, k, v, **features)

    def theirs():
        return functional.scaled_dot_product_attention(
            q, k, v, mask, features.get("dropout_p", 0.0), causal and mask is None,
            enable_gqa=heads != heads_kv,
        )  # fmt: skip

    return inputs, {"fastattn": ours, "torch": theirs}


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_attention(benchmark, case, direction, dtype, library):
    benchmark.group = f"attention, {case}, {direction}, {dtype}"
    inputs, functions = build(case, dtype)
    call = functions[library]
    if direction == "forward":
        with torch.no_grad():
            benchmark.pedantic(call, rounds=5, warmup_rounds=1)
        return
    for tensor in inputs:
        tensor.requires_grad_()
    out = call()
    dout = torch.randn_like(out)
    benchmark.pedantic(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
        rounds=5,
        warmup_rounds=1,
    )


def main():
    """Print torch's time over fastattn's for each case, forward, in turns."""
    print(f"attention forward, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            with torch.no_grad():
                seconds = medians(build(case, dtype)[1], rounds=7)
            ours, theirs = seconds["fastattn"] * 1e3, seconds["torch"] * 1e3
            print(
                f"{str(dtype)[6:]:9} {case:28} fastattn {ours:8.3f} ms   torch {theirs:8.3f} ms   "
                f"{theirs / ours:6.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
