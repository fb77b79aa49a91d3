"""Compile without a GPU what the kernel files' `shipped()` launch, and tell what each kernel takes.

A line a kernel, configuration and target: registers and spilled bytes of a thread, shared bytes of
a block. Exits 1 if one does not compile, needs more shared memory than the target has, or spills in
an innermost loop: what is put aside around one costs nothing. Of AMD's binaries nothing here tells
where they spill, so that any spill to memory fails; scalars put into vector registers are none.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from fastattn.kernels import __path__, tuning

# KiB of shared memory that a block may have.
SHARED = dict(sm_80=163, sm_89=99, sm_90=227, sm_100=227, sm_120=99, gfx942=64, gfx1100=64)
DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx942")
Forced = dict[tuning.Key, tuning.Config]


class Unit(NamedTuple):
    """One launch of a kernel file's `shipped()` for one target."""

    op: str
    target: str
    kernel: str
    dtype: str  # of the first tensor
    options: dict[str, Any]
    absent: list[str]  # arguments that are None
    number: int  # of the launch
    forced: Forced


class Binary(NamedTuple):
    """What a compiled kernel takes; None where nothing tells it."""

    registers: int | None  # of a thread
    spills: int | None  # bytes of a thread, in memory
    shared: int  # bytes of a block
    spills_in_loops: bool = False  # or may


class _Driver:
    """In Triton's eyes the active one, of a GPU of the target."""

    def __init__(self, target: str):
        self.arch = int(target[3:]) if target.startswith("sm_") else target
        self.backend = "cuda" if isinstance(self.arch, int) else "hip"
        self.lanes = 64 if target.startswith("gfx9") else 32
        self.number = list(SHARED).index(target)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.lanes)

    def get_current_device(self) -> int:
        return self.number  # Triton asks a device for its target only once

    def get_current_stream(self, device: int) -> int:
        return 0


def operations() -> list[str]:
    """The kernel files that ship something."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(_module(name), "shipped")]


def _module(name: str) -> Any:
    return importlib.import_module(f"fastattn.kernels.{name}")


def units(op: str, target: str, candidates: bool = False) -> list[Unit]:
    """The launches of a kernel file that compile differently.

    With `candidates` also in every configuration that tuning may choose.
    """
    _, _, decisions = _launch(op, target, {})
    forced: list[Forced] = [{}]
    if candidates:
        forced += [
            {key: config} for key, choice in decisions.items() for config in choice.candidates[1:]
        ]
    found: dict[tuple[str, str], Unit] = {}
    for configs in forced:
        launches, calls, _ = _launch(op, target, configs)
        for number, (one, call) in enumerate(zip(launches, calls, strict=True)):
            types, constants = call["compile"]["signature"], call["compile"]["constants"]
            dtype = re.findall(r"\*(\w+)", str(types))[0]
            absent = [list(types)[path[0]] for path, value in constants.items() if value is None]
            unit = Unit(op, target, one.kernel, dtype, one.options, absent, number, configs)
            found.setdefault((one.kernel, call["key"]), unit)
    return list(found.values())


def _launch(
    op: str, target: str, forced: Forced, skip: Callable[[int], bool] = lambda number: True
) -> tuple[list[Any], list[dict[str, Any]], dict[tuning.Key, tuning.Decision]]:
    """Run `shipped()`; a launch whose number is to be skipped is not compiled.

    Returns the launches, what Triton says of those that it has not compiled yet, and how their
    configurations were chosen.
    """
    import triton
    from fastattn.kernels import launch

    driver = _Driver(target)
    launches, calls = list[Any](), list[dict[str, Any]]()

    def before_compiling(**call: Any) -> bool:
        calls.append(call)
        return skip(len(launches))

    triton.runtime.driver.set_active(driver)
    with triton.knobs.runtime.scope(), tuning.deciding(forced) as decisions:
        triton.knobs.runtime.jit_cache_hook = before_compiling
        with launch.ahead_of_time(launch.Target(driver.backend, driver.arch)) as launches:
            _module(op).shipped()
    return launches, calls, decisions


def compiled(todo: list[Unit], jobs: int) -> Iterator[tuple[Unit, Binary | str]]:
    """Compile in parallel processes; in the order of `todo`."""
    fork = multiprocessing.get_context("fork")  # with everything imported
    with ProcessPoolExecutor(jobs, fork) as pool:
        results = [pool.submit(build, unit) for unit in todo]
        for unit, result in zip(todo, results, strict=True):
            try:
                yield unit, result.result()
            except BrokenProcessPool:  # takes all that waits with it: was it this one?
                alone = len(todo) == 1
                yield (unit, "the compiler crashed") if alone else next(compiled([unit], 1))


def build(unit: Unit) -> Binary | str:
    """Compile one launch; a string says why that failed."""
    try:
        launches, *_ = _launch(unit.op, unit.target, unit.forced, skip=unit.number.__ne__)
        return inspect(launches[unit.number].result)
    except Exception as error:  # whatever a compiler throws belongs in the table
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def inspect(result: Any) -> Binary:
    """What one of Triton's compiled kernels takes."""
    shared = result.metadata.shared
    if "amdgcn" in result.asm:
        fields = re.findall(r"^ *\.(\w+): +(\d+)$", result.asm["amdgcn"], re.MULTILINE)
        count = {name: int(value) for name, value in fields}
        scratch = count["private_segment_fixed_size"]
        return Binary(count["vgpr_count"], scratch, shared, scratch > 0)
    tool = _cuobjdump()
    if tool is None:
        return Binary(None, None, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        count = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        spills, inside = count["STACK"] + count["LOCAL"], False
        if spills:
            command[1] = "-sass"
            code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            inside = spills_in_loops(code)
    return Binary(count["REG"], spills, shared, inside)


def spills_in_loops(sass: str) -> bool:
    """Whether local memory is read or written between a backward branch and its target.

    Of nested loops the innermost count. `sass` is what cuobjdump prints of a kernel.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))
    innermost = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    local = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return any(first <= at <= last for at in local for first, last in innermost)


@functools.cache
def _cuobjdump() -> str | None:
    """The one in Triton's package; those for AMD alone may have none."""
    import triton

    try:
        return triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None


def faults(target: str, binary: Binary | str) -> list[str]:
    """What is wrong with a kernel, if anything."""
    if isinstance(binary, str):
        return [f"does not compile: {binary}"]
    limit = SHARED[target] * 1024
    spills = [f"spills {binary.spills} bytes"] if binary.spills_in_loops else []
    return spills + [f"shared memory {binary.shared} > {limit}"] * (binary.shared > limit)


def row(unit: Unit, binary: Binary | str) -> str:
    """A line of the table."""
    numbers = binary[:3] if isinstance(binary, Binary) else ("-",) * 3
    registers, spills, shared = ("?" if number is None else number for number in numbers)
    options = " ".join(f"{name}={value}" for name, value in unit.options.items())
    without = f"; without {', '.join(unit.absent)}" if unit.absent else ""
    return (
        f"{unit.target:8} {unit.kernel.lstrip('_'):34} {registers:>9} {spills:>6} {shared:>7}  "
        f"{unit.dtype:5} {options}{without}"
        + "".join(f"  FAILED: {fault}" for fault in faults(unit.target, binary))
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.kernels.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=SHARED, default=DEFAULT, metavar="TARGET")
    parser.add_argument("--ops", nargs="+", metavar="FILE", help="kernel files; default: all")
    parser.add_argument("--all", action="store_true", help="also what only tuning would choose")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.exit(2, "aot: triton is not installed: pip install 'fastattn[triton]'\n")
    if _module("launch").INTERPRETED:
        parser.exit(2, "aot: TRITON_INTERPRET is set: unset it, the interpreter compiles nothing\n")
    known = operations()
    ops = options.ops or known
    if not set(ops) <= set(known):
        parser.error(f"--ops: expected some of {', '.join(known)}, got {', '.join(ops)}")
    start = time.perf_counter()
    files = [(op, target) for op in ops for target in options.targets]
    todo = [unit for op, target in files for unit in units(op, target, options.all)]
    print(f"{'target':8} {'kernel':34} registers spills  shared  configuration")
    table: list[dict[str, Any]] = []
    for unit, binary in compiled(todo, options.jobs):
        print(row(unit, binary), flush=True)
        facts = dict(zip(Unit._fields[:-2], unit)) | {"faults": faults(unit.target, binary)}
        table.append(facts | (binary._asdict() if isinstance(binary, Binary) else {}))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    for target in options.targets:
        here = [one for one in table if one["target"] == target]
        most = (max((x.get(name) or 0 for x in here), default=0) for name in Binary._fields[:3])
        print("{:8} {:34} {:>9} {:>6} {:>7}".format(target, "at most", *most))
    if _cuobjdump() is None:
        print("NVIDIA's registers and spills are unknown: this triton comes without cuobjdump")
    failed = sum(bool(one["faults"]) for one in table)
    print(f"{len(table)} kernels in {time.perf_counter() - start:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
