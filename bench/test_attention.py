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
    "packed": ((16, 8, 8, 512, 512, 64), {"packed": True}),
    "decode": ((1, 8, 8, 1, 4096, 64), {}),
    "decode, GQA, d128": ((1, 32, 8, 1, 4096, 128), {}),
    "decode, GQA, d128, batch 8": ((8, 32, 8, 1, 4096, 128), {}),
    "tiny": ((1, 1, 1, 4, 4, 8), {}),
}


def build(case, dtype, first_group_in_double=False):
    """Inputs that take a gradient, and one function of each library.

    With `first_group_in_double`: the same numbers, of the first sequence's first key/value head.
    """
    torch.manual_seed(0)
    (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim), features = CASES[case]
    features = dict(features)
    q = torch.randn(batch, heads, seqlen_q, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, heads_kv, seqlen_k, head_dim, dtype=dtype)
    if first_group_in_double:
        q, k, v = (t[:1, :n].double() for t, n in ((q, heads // heads_kv), (k, 1), (v, 1)))
    inputs = [q, k, v]
    mask = None
    causal = features.get("causal", False)
    if "window" in features:
        distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None]
        mask = (distance <= 0) & (distance >= -features["window"][0])
    if "seqlens_k" in features:
        lengths = torch.linspace(seqlen_k // batch, seqlen_k, batch).int()
        features["seqlens_k"] = lengths[:1] if first_group_in_double else lengths
        mask = (torch.arange(seqlen_k) < lengths[:, None])[:, None, None]
    if features.pop("packed", False):
        return packed(q, k, v)
    if "bias" in features:
        mask = torch.randn(1, heads, seqlen_q, seqlen_k, dtype=dtype)
        if first_group_in_double:
            mask = mask[:, : heads // heads_kv].double()
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


def packed(q, k, v):
    """Sequences of 37 to 512 tokens: packed, and for torch padded and masked."""
    batch, heads, seqlen, head_dim = q.shape
    lengths = torch.linspace(37, seqlen, batch).int()
    visible = torch.arange(seqlen) < lengths[:, None]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs = [t.transpose(1, 2)[visible].contiguous() for t in (q, k, v)]
    mask = visible[:, None, None]

    def ours():
        return fastattn.attention(
            *inputs, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=seqlen,
            max_seqlen_k=seqlen,
        )  # fmt: skip

    def theirs():
        padded = []
        for t in inputs:
            rows = t.new_zeros(batch, seqlen, heads, head_dim)
            rows[visible] = t
            padded.append(rows.transpose(1, 2))
        out = functional.scaled_dot_product_attention(*padded, mask)
        return out.transpose(1, 2)[visible]

    return inputs, {"fastattn": ours, "torch": theirs}


def work(case):
    """Flops of the forward over the visible scores, and elements of k and v."""
    (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim), features = CASES[case]
    i = torch.arange(seqlen_q, dtype=torch.float64)
    last = i if features.get("causal") else torch.full_like(i, seqlen_k - 1)
    first = (
        (i - features["window"][0]).clamp(min=0) if "window" in features else torch.zeros_like(i)
    )
    visible = float((last - first + 1).sum()) * batch
    if "seqlens_k" in features:
        visible *= float(torch.linspace(1 / batch, 1, batch).mean())
    if "packed" in features:
        visible = float(torch.linspace(37, seqlen_q, batch).square().sum())
    return 4 * heads * head_dim * visible, 2 * batch * heads_kv * seqlen_k * head_dim


def errors(case, dtype, direction):
    """The largest error of each library against float64, in the first group of heads."""
    _, features = CASES[case]
    if "dropout_p" in features or "packed" in features:
        return {"fastattn": None, "torch": None}
    inputs, functions = build(case, dtype)
    for tensor in inputs:
        tensor.requires_grad_(direction == "backward")
    outs = {name: call() for name, call in functions.items()}
    dout = torch.randn_like(outs["fastattn"])
    with fastattn.use_backend("reference"):
        exact_inputs, exact = build(case, dtype, first_group_in_double=True)
        for tensor in exact_inputs:
            tensor.requires_grad_(direction == "backward")
        outs["exact"] = exact["fastattn"]()
    group = outs["exact"].shape
    results = {}
    for name, out in outs.items():
        if direction == "forward":
            results[name] = [out]
        else:
            one = inputs if name != "exact" else exact_inputs
            cotangent = dout if name != "exact" else first(dout, group).double()
            results[name] = torch.autograd.grad(out, one, cotangent)
    return {
        name: max(
            float((first(got, want.shape).double() - want).abs().max())
            for got, want in zip(results[name], results["exact"], strict=True)
        )
        for name in ("fastattn", "torch")
    }


def first(tensor, shape):
    """The leading part of `tensor` that has this shape."""
    return tensor[tuple(slice(size) for size in shape)]


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
