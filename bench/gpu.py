"""The GPU kernels beside their rivals on a GPU; `gpu_run.sh` builds, tests and runs it.

A row is a backend, a case and a direction; the Triton backend is a rival of the CUDA one as well.
It has milliseconds, GB/s or TFLOP/s, each rival's time over fastattn's, the share of the bandwidth
of a copy (which the run measures itself), the largest error against float64 relative to the first
rival's, and whether the bars that the project sets itself are reached. Times are medians of CUDA
events, rivals by turns, the L2 cache flushed before each call. Writes everything to --out as JSON,
anew after each family: a run may be cut short.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

if "--dry-run" in sys.argv:  # before fastattn is imported
    os.environ["TRITON_INTERPRET"] = "1"

import gpu_checks
import gpu_rows
import torch
import torch._functorch.config

import fastattn
from fastattn.backends.cuda import device as cuda_device

ROOT = Path(__file__).parent.parent
DIRECTIONS = ("forward", "backward", "step")
CUDA_FAMILIES = ("attention", "decode", "softmax", "ffn")


class Clock:
    """Times calls on the GPU; without one, just makes them."""

    def __init__(self, budget=0.3):
        self.budget = budget  # seconds of a rival
        self.scratch = None
        if torch.cuda.is_available():
            self.scratch = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
            wide = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
            into = torch.empty_like(wide)
            seconds = self.medians({"copy": lambda: into.copy_(wide)})["copy"]
            self.copy = 2 * wide.nbytes / seconds

    def medians(self, rivals):
        """Median seconds of each call of `rivals`, by turns."""
        if self.scratch is None:
            return dict.fromkeys(rivals)
        for call in rivals.values():
            call()
            call()
        first = self._turn(rivals)
        rounds = int(self.budget * len(rivals) / sum(first.values()))
        turns = [self._turn(rivals) for _ in range(max(5, min(rounds, 100)))]
        return {name: statistics.median(turn[name] for turn in turns) for name in rivals}

    def _turn(self, rivals):
        events = {}
        for name, call in rivals.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.scratch.zero_()
            torch.cuda._sleep(1_000_000)  # while it sleeps, the launches below are queued
            start.record()
            call()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        return {name: 1e-3 * start.elapsed_time(end) for name, (start, end) in events.items()}


def calls(case, direction):
    """Each rival's call that returns a tuple of results, and why others cannot be called."""
    leaves = [tensor.detach().requires_grad_() for tensor in case.inputs]
    found, missing, dout = {}, {}, None
    for name, function in case.rivals.items():
        if name == "compile" and not torch.cuda.is_available():
            missing[name] = "not in a dry run"
            continue
        try:
            if direction == "forward":
                call = _forward(function, case.inputs)
            elif direction == "step":
                call = _step(function, leaves)
            else:
                out = function(*leaves)
                dout = torch.randn_like(out) if dout is None else dout
                call = _backward(out, leaves, dout)
            call()
        except RuntimeError as error:
            if name == "fastattn":
                raise
            missing[name] = str(error).strip().splitlines()[0][:200]
            continue
        found[name] = call
    return found, missing, dout


def _forward(function, inputs):
    def call():
        with torch.no_grad():
            return (function(*inputs),)

    return call


def _backward(out, leaves, dout):
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _step(function, leaves):
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def errors(case, direction, found, dout):
    """The largest error of each rival's results against float64."""
    exact = [case.part(tensor).detach().double().requires_grad_() for tensor in case.inputs]
    if direction == "forward":
        with torch.no_grad():
            wanted = (case.exact(*exact),)
    else:
        out = case.exact(*exact)
        cotangent = None if dout is None else first(dout, out.shape).double()
        wanted = torch.autograd.grad(out, exact, cotangent)
    return {
        name: max(
            float((first(got, want.shape).double() - want).abs().max())
            for got, want in zip(call(), wanted, strict=True)
        )
        for name, call in found.items()
    }


def first(tensor, shape):
    """The leading part of `tensor` that has this shape."""
    return tensor[tuple(slice(size) for size in shape)]


def peak(call):
    """Bytes that a call takes at most beyond what lay on the GPU before, its results included."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def labels(backend, case, direction):
    names = {"backend": backend, "op": case.op, "case": case.case}
    return names | {"dtype": case.dtype, "direction": direction}


def on_triton(function):
    def call(*inputs):
        with fastattn.use_backend("triton"):
            return function(*inputs)

    return call


def of_backend(case, backend):
    """The case with that backend's bars, and for the CUDA one with the Triton one as a rival."""
    if backend == "triton":
        return case
    rivals = case.rivals | {"triton": on_triton(case.rivals["fastattn"])}
    return case._replace(bars=case.cuda_bars, rivals=rivals)


def measure(backend, case, direction, clock):
    """One row."""
    found, missing, dout = calls(case, direction)
    seconds = clock.medians(found)
    row = labels(backend, case, direction)
    row |= {"seconds": seconds, "missing": missing, "errors": errors(case, direction, found, dout)}
    if case.op == "linear_cross_entropy":
        row["memory"] = {name: peak(call) for name, call in found.items()}
    row["bars"] = case.bars.get(direction, {})
    if clock.scratch is None:
        return row | {"measures": {}, "reached": None}
    unit, amount = case.work[direction]
    row |= {unit: amount, "per_second": amount / seconds["fastattn"]}
    measures = {
        name: theirs / seconds["fastattn"] for name, theirs in seconds.items() if name != "fastattn"
    }
    if unit == "bytes":
        measures["of_copy"] = row["per_second"] / clock.copy
    if "memory" in row:
        measures["memory"] = row["memory"]["eager"] / max(row["memory"]["fastattn"], 1)
    known = [measures[name] >= bar for name, bar in row["bars"].items() if name in measures]
    complete = known and len(known) == len(row["bars"])
    return row | {
        "measures": measures,
        "reached": False if False in known else True if complete else None,
    }


def show(row):
    """One line of the table."""
    name = " ".join(row[label] for label in ("backend", "op", "case", "dtype", "direction"))
    if "failed" in row:
        print(f"{name:73} FAILED {row['failed']}", flush=True)
        return
    if row["measures"]:
        rate = row["per_second"] / (1e12 if "flops" in row else 1e9)
        unit = "TFLOP/s" if "flops" in row else "GB/s"
        numbers = f"{row['seconds']['fastattn'] * 1e3:9.3f} ms {rate:8.1f} {unit:7}"
    else:
        numbers = "no times"
    bars = row["bars"]
    measures = " ".join(
        f"{measure} {value:.2f}{f'/{bars[measure]}' if measure in bars else ''}"
        for measure, value in row["measures"].items()
    )
    ours, *others = row["errors"].values()
    error = f"error {ours / others[0]:.2f}" if others and others[0] else f"error {ours:.1e}"
    verdict = {True: "", False: "short", None: "" if not bars else "not judged"}[row["reached"]]
    absent = "".join(f" no {name}: {why}" for name, why in row["missing"].items())
    print(f"{name:73} {numbers} {measures} {error} {verdict}{absent[:120]}", flush=True)


def machine(clock):
    """Where and on what this runs."""
    versions = {"fastattn": fastattn.__version__, "torch": torch.__version__}
    import triton

    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": sys.version.split()[0],
        "versions": versions | {"triton": triton.__version__, "cuda": torch.version.cuda},
    }
    if clock.scratch is None:
        return facts | {"device": "cpu, Triton's interpreter"}
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "copy_bytes_per_second": clock.copy,
    }


def commit():
    """The commit of this checkout; FASTATTN_COMMIT tells it where git does not."""
    if "FASTATTN_COMMIT" in os.environ:
        return os.environ["FASTATTN_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    families = (*gpu_rows.FAMILIES, "checks")
    parser.add_argument("--ops", nargs="*", choices=families, default=families)
    parser.add_argument("--backends", nargs="*", choices=("triton", "cuda"), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu.json")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of a rival of a row")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU, no times")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("gpu.py measures on a GPU, and torch sees none: try --dry-run", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    torch._functorch.config.donated_buffer = False  # a compiled backward is run again and again
    torch.manual_seed(0)
    clock = Clock(options.budget)
    facts = machine(clock)
    print(json.dumps(facts))
    device, sizes = ("cpu", gpu_rows.TINY) if options.dry_run else ("cuda", gpu_rows.FULL)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows, checks = [], []
    backends = options.backends or ["triton"] + ["cuda"] * (not cuda_device.idle())
    for family, backend in itertools.product(options.ops, backends):
        with fastattn.use_backend(backend):
            if family == "checks":
                checks += gpu_checks.run(backend, device, sizes)
            elif backend == "triton" or family in CUDA_FAMILIES:
                rows += measured(backend, family, device, sizes, clock)
        contents = {"machine": facts, "rows": rows, "checks": checks}
        options.out.write_text(json.dumps(contents, indent=1) + "\n")
    failed = sum("failed" in row for row in rows) + sum(row["ok"] is False for row in checks)
    judged = [row["reached"] for row in rows if row["reached"] is not None]
    print(
        f"{sum(judged)} of {len(judged)} judged rows reach their bars; {failed} rows, checks failed"
    )
    return 1 if failed else 0


def measured(backend, family, device, sizes, clock):
    for cases in gpu_rows.FAMILIES[family]:
        for case in cases(device, sizes):
            case = of_backend(case, backend)
            torch._dynamo.reset()
            for direction in DIRECTIONS:
                if direction in case.work:
                    try:
                        row = measure(backend, case, direction, clock)
                    except Exception as error:  # the rows that follow are worth their time
                        row = labels(backend, case, direction) | {"reached": None}
                        row["failed"] = f"{type(error).__name__}: {error}"[:300]
                    show(row)
                    yield row


if __name__ == "__main__":
    sys.exit(main())
