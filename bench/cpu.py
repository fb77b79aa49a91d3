"""The CPU kernels beside torch, with the machine's limits and the error; `make bench-cpu`.

Each row is one case: milliseconds (or megabytes), torch's over fastattn's, the share of the
machine's peak (which the run measures itself, on the same threads), the largest error against
float64 relative to torch's, and the bar that the project sets itself: of the ratio or, with a
percent sign, of the share. Writes everything to results/ as JSON.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import rows_models
import rows_ops
import torch
from interleave import medians
from rows_ops import DTYPES

import fastattn
from fastattn.backends.cpu import native

FAMILIES = {
    "attention": rows_ops.attention,
    "softmax": rows_ops.softmax,
    "ffn": rows_ops.ffn,
    "norm": rows_ops.norm,
    "rotary": rows_ops.rotary,
    "cross_entropy": rows_ops.cross_entropy,
    "linear_cross_entropy": rows_ops.linear_cross_entropy,
    "models": rows_models.models,
}


class Compare:
    """Times rivals by turns; first, once a case, sees that fastattn's runs on the CPU backend."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.seen = set()

    def __call__(self, row, rivals):
        case = row["op"], row["case"]
        if case not in self.seen:
            backends = {choice.backend for choice in fastattn.explain(rivals["fastattn"])}
            if backends != {"cpu"}:
                ran = ", ".join(map(str, backends)) or "no backend"
                raise SystemExit(f"{row['op']} {row['case']} ran on {ran}, not on cpu")
            self.seen.add(case)
        seconds = medians(rivals, self.rounds)
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
        "isa": native._C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "flops": {name: native._C.peak_flops(native.DTYPES[t]) for name, t in DTYPES.items()},
        "read": native._C.read_bandwidth(large.data_ptr(), large.numel()),
        "copy": 2 * large.numel() * 4 / copy,
    }


def share(row, limits):
    """Of the limit of what the row does most; None where there is no such limit."""
    if "of_peak" in row:
        return row["of_peak"]
    if "flops_per_second" in row:
        # Measured anew: a noisy machine's peak is not that of a minute ago.
        now = native._C.peak_flops(native.DTYPES[DTYPES[row["dtype"]]])
        return row["flops_per_second"] / max(now, limits["flops"][row["dtype"]])
    if "read_per_second" in row:
        return row["read_per_second"] / limits["read"]
    return row["bytes_per_second"] / limits["copy"] if "bytes_per_second" in row else None


def reaches_bar(row):
    return row[row.get("bar_of", "ratio")] >= row["bar"]


def show(row):
    """One line; `short` where the row does not reach its bar."""
    name = f"{row['op']} {row['case']} {row['dtype']} {row['direction']}"
    if "left_out" in row:
        print(f"{name:54} left out: {row['left_out']}", flush=True)
        return
    ours = row["fastattn"]
    amount = f"{ours / 1e6:9.1f} MB" if row.get("unit") == "bytes" else f"{ours * 1e3:9.3f} ms"
    bar = f"{row['bar']:5.0%}" if row.get("bar_of") == "of_peak" else f"{row['bar']:5.2f}"
    of_peak = "-" if row["of_peak"] is None else f"{row['of_peak']:.0%}"
    error = f"{row['error'] / row['error_torch']:5.2f}" if row.get("error_torch") else "    -"
    print(
        f"{name:54} {amount} {row['ratio']:6.2f}x  bar {bar} {of_peak:>6} {error}  "
        f"{'' if reaches_bar(row) else 'short'}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=7, help="of each comparison, at most")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cpu.json"))
    options = parser.parse_args()
    if native.MISSING is not None:
        print(f"cpu.py measures the native kernels: {native.MISSING}", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    limits = machine()
    gflops = {name: f"{flops / 1e9:.0f}" for name, flops in limits["flops"].items()}
    print(
        f"{limits['cpu']}, {limits['isa']}, {limits['threads']} threads, torch {limits['torch']}; "
        f"peak fp32 {gflops['fp32']} and bf16 {gflops['bf16']} GFLOP/s, "
        f"read {limits['read'] / 1e9:.0f}, copy {limits['copy'] / 1e9:.0f} GB/s"
    )
    print(f"{'':54} {'fastattn':>12} {'torch/':>7} {'':>10} {'of peak':>6} error/torch's")
    compare = Compare(options.rounds)
    rows = []
    for op in options.ops:
        for row in FAMILIES[op](compare):
            if "left_out" not in row:
                row["of_peak"] = share(row, limits)
            show(row)
            rows.append(row)
    measured = [row for row in rows if "left_out" not in row]
    print(f"{sum(map(reaches_bar, measured))} of {len(measured)} rows reach their bar")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    out.write_text(json.dumps({"date": date, "machine": limits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
