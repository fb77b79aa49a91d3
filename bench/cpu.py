"""The CPU kernels beside torch, with the machine's limits and the error; `make bench-cpu`.

Each row is one case: milliseconds, torch's time over fastattn's, the share of the machine's peak
(which the run measures itself, on the same threads), the largest error against float64 relative to
torch's, and the bar that the project sets itself. Writes everything to results/ as JSON.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import test_attention
import test_ffn
import test_norm
import test_softmax
import torch
from interleave import medians

import fastattn
from fastattn import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# case: (forward, backward) bars, torch's time over fastattn's, by dtype; None where there is none.
ATTENTION = {
    "full": {"fp32": (1.4, 1.5), "bf16": (2.6, 2.0), "fp16": (1.8, 10)},
    "full, d128": {"fp32": (1.4, 1.5), "bf16": (2.6, 2.0)},
    "causal": {"fp32": (1.7, 1.7), "bf16": (3.0, 2.5)},
    "causal, GQA, d128": {"fp32": (1.7, 1.7), "bf16": (3.0, 2.5)},
    "short": {"fp32": (1.5, 1.6), "bf16": (3.0, 2.5)},
    "medium": {"fp32": (1.5, 1.6), "fp16": (3.0, 10)},
    "window": {"fp32": (20, 20), "bf16": (20, 20)},
    "lengths": {"fp32": (2.0, 2.0), "bf16": (3.5, 2.0)},
    "bias": {"fp32": (1.4, 1.4), "bf16": (2.2, 1.4)},
    "dropout": {"fp32": (8, 3)},
    "d80": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "d96": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "cross": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "packed": {"fp32": (2.0, 2.0)},
    "decode": {"fp32": (1.0, None), "bf16": (1.0, None), "fp16": (1.0, None)},
    "decode, GQA, d128": {"fp32": (1.0, None), "bf16": (1.0, None), "fp16": (1.0, None)},
    "decode, GQA, d128, batch 8": {"fp32": (1.0, None), "bf16": (1.0, None)},
}
SOFTMAX_BAR = 1.3
NORM_BAR = 1.3
FFN_BARS = {"fp32": 1.2, "bf16": 1.1}


def attention_rows():
    for case, by_dtype in ATTENTION.items():
        for dtype, bars in by_dtype.items():
            for direction, bar in zip(("forward", "backward"), bars, strict=True):
                if bar is not None:
                    yield attention_row(case, dtype, direction, bar)


def attention_row(case, dtype, direction, bar):
    inputs, functions = test_attention.build(case, DTYPES[dtype])
    flops, kv_bytes = test_attention.work(case)
    row = {"op": "attention", "case": case, "dtype": dtype, "direction": direction, "bar": bar}
    if direction == "forward":
        with torch.no_grad():
            row |= compare(functions)
    else:
        for tensor in inputs:
            tensor.requires_grad_()
        outs = {name: call() for name, call in functions.items()}
        dout = torch.randn_like(outs["fastattn"])
        row |= compare(
            {
                name: lambda out=out: torch.autograd.grad(out, inputs, dout, retain_graph=True)
                for name, out in outs.items()
            }
        )
        flops *= 2.5
    if case.startswith("decode"):
        row["bytes_per_second"] = kv_bytes * DTYPES[dtype].itemsize / row["fastattn"]
    else:
        row["flops_per_second"] = flops / row["fastattn"]
    errors = test_attention.errors(case, DTYPES[dtype], direction)
    return row | {"error": errors["fastattn"], "error_torch": errors["torch"]}


def softmax_rows():
    for dtype in ("fp32", "bf16"):
        for shape in test_softmax.SHAPES:
            x = torch.randn(shape).to(DTYPES[dtype])
            for direction, tensors in ((test_softmax.forward, 2), (test_softmax.backward, 3)):
                row = {
                    "op": "softmax",
                    "case": "x".join(map(str, shape)),
                    "dtype": dtype,
                    "direction": direction.__name__,
                    "bar": SOFTMAX_BAR,
                }
                row |= compare({name: direction(name, x) for name in test_softmax.LIBRARIES})
                row["bytes_per_second"] = tensors * x.numel() * x.element_size() / row["fastattn"]
                yield row


def norm_rows():
    for dtype in ("fp32", "bf16"):
        for op, (torchs, ours, tensors) in test_norm.OPS.items():
            for shape in test_norm.SHAPES:
                args = test_norm.inputs(shape, DTYPES[dtype])
                directions = (test_norm.forward, test_norm.backward)
                for direction, touched in zip(directions, tensors, strict=True):
                    row = {
                        "op": op,
                        "case": "x".join(map(str, shape)),
                        "dtype": dtype,
                        "direction": direction.__name__,
                        "bar": NORM_BAR,
                    }
                    row |= compare(
                        {"torch": direction(torchs, args), "fastattn": direction(ours, args)}
                    )
                    size = args[0].numel() * args[0].element_size()
                    row["bytes_per_second"] = touched * size / row["fastattn"]
                    yield row


def ffn_rows():
    for dtype, bar in FFN_BARS.items():
        for form, libraries in test_ffn.LIBRARIES.items():
            for size in test_ffn.SIZES:
                for direction, passes in ((test_ffn.forward, 1), (test_ffn.training, 3)):
                    args = test_ffn.tensors(form, size, DTYPES[dtype])
                    row = {
                        "op": "ffn" if form == "plain" else "gated_ffn",
                        "case": "x".join(map(str, size)),
                        "dtype": dtype,
                        "direction": direction.__name__,
                        "bar": bar,
                    }
                    row |= compare({n: direction(call, args) for n, call in libraries.items()})
                    rows, d_model, d_ff = size
                    weights = (2 if form == "plain" else 3) * d_model * d_ff
                    row["flops_per_second"] = 2 * passes * rows * weights / row["fastattn"]
                    yield row


def compare(rivals):
    """Seconds of each, and torch's over fastattn's."""
    seconds = medians(rivals, rounds=7)
    return seconds | {"ratio": seconds["torch"] / seconds["fastattn"]}


def machine():
    """The machine's limits on the threads of this run."""
    large = torch.randn(1 << 26)
    into = torch.empty_like(large)
    copy = medians({"copy": lambda: into.copy_(large)}, rounds=5)["copy"]
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return {
        "cpu": cpu,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "flops": {name: _C.peak_flops(_C.DTYPES[str(t)[6:]]) for name, t in DTYPES.items()},
        "read": _C.read_bandwidth(large.data_ptr(), large.numel()),
        "copy": 2 * large.numel() * 4 / copy,
    }


def show(row, limits):
    """One line, with the share of the limit; `short` where the row does not reach its bar."""
    if "flops_per_second" in row:
        # Measured anew: a noisy machine's peak is not that of a minute ago.
        now = _C.peak_flops(_C.DTYPES[str(DTYPES[row["dtype"]])[6:]])
        share = row["flops_per_second"] / max(now, limits["flops"][row["dtype"]])
    else:
        share = row["bytes_per_second"] / limits["read" if row["op"] == "attention" else "copy"]
    error = f"{row['error'] / row['error_torch']:5.2f}" if row.get("error_torch") else "    -"
    row["of_peak"] = share
    verdict = "" if row["ratio"] >= row["bar"] else "short"
    name = f"{row['op']} {row['case']} {row['dtype']} {row['direction']}"
    print(
        f"{name:52} {row['fastattn'] * 1e3:9.3f} ms {row['ratio']:6.2f}x  bar {row['bar']:5.2f} "
        f"{share:6.0%} {error}  {verdict}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", nargs="*", default=["attention", "softmax", "ffn", "norm"])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits = machine()
    gflops = {name: f"{flops / 1e9:.0f}" for name, flops in limits["flops"].items()}
    print(
        f"{limits['cpu']}, {limits['isa']}, {limits['threads']} threads, torch {limits['torch']}; "
        f"peak fp32 {gflops['fp32']} and bf16 {gflops['bf16']} GFLOP/s, "
        f"read {limits['read'] / 1e9:.0f}, copy {limits['copy'] / 1e9:.0f} GB/s"
    )
    print(f"{'':52} {'fastattn':>12} {'torch/':>7} {'':>10} {'of peak':>6} error/torch's")
    rows = []
    makers = {
        "attention": attention_rows,
        "softmax": softmax_rows,
        "ffn": ffn_rows,
        "norm": norm_rows,
    }
    for op in options.ops:
        for row in makers[op]():
            show(row, limits)
            rows.append(row)
    reached = sum(row["ratio"] >= row["bar"] for row in rows)
    print(f"{reached} of {len(rows)} rows reach their bar")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    out.write_text(json.dumps({"date": date, "machine": limits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
