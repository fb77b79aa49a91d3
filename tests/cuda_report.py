"""Compiles the CUDA kernels without a GPU and tells what each takes, by ptxas and cuobjdump.

A line a kernel and target: registers and bytes of stack and spills of a thread, static shared bytes
of a block, matrix instructions and accesses of local memory in the code. Exits 1 where a file does
not compile, where registers spill or a kernel has a stack, where a kernel of matrix products has
none of its architecture's matrix instructions, and where ptxas runs wgmma one after the other or
ignores setmaxnreg. nvcc is that of CUDA_HOME, of PATH, or of the PyPI package nvidia-cuda-nvcc;
cuobjdump is Triton's. Results are kept in build/cuda-report by the content of what was compiled.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build/cuda-report"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC}", "-Xptxas", "-v")
DEFAULT = ("sm_80", "sm_100", "sm_90a")  # sm_90 has the code of sm_80: on request
# What a kernel consists of that is left empty on a target where it never runs.
NOTHING = ("MOV", "LDC", "EXIT", "BRA", "NOP")
# The kernels that make no matrix products, by the middle of their names.
PLAIN = ("delta", "dq", "combine", "softmax", "sum_rows", "probe")
MATRIX_INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_90a": "HGMMA", "sm_100": "HMMA"}
PTXAS_FAULTS = (
    (r"C7510|wgmma\S* instructions are serialized", "wgmma is serialized"),
    (r"C7508|setmaxnreg.* ignored", "setmaxnreg is ignored"),
)


class Kernel(NamedTuple):
    """What one kernel takes on one target."""

    target: str
    file: str
    name: str
    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    shared: int
    matrix: dict[str, int]  # HMMA, HGMMA: how many
    local: int  # loads and stores of local memory
    empty: bool

    @property
    def plain(self) -> bool:
        """Whether it makes no matrix products."""
        return any(part in self.name.partition("<")[0] for part in PLAIN)


class Compiled(NamedTuple):
    """One file for one target; a fault is a sentence."""

    kernels: list[Kernel]
    faults: list[str]


def suits(source: Path, target: str) -> bool:
    """As setup.py has it: files of sm_90 for sm_90a alone, the others for all other targets."""
    return source.stem.endswith("_sm90") == (target == "sm_90a")


def gencode(target: str) -> str:
    """nvcc's option for machine code of one target."""
    return f"-gencode=arch={target.replace('sm', 'compute')},code={target}"


@functools.cache
def nvcc() -> Path | None:
    """The one of CUDA_HOME, of PATH, of its usual place or of PyPI."""
    found = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if os.environ.get("CUDA_HOME") else []
    if (on_path := shutil.which("nvcc")) is not None:
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found += sorted(Path(folder).glob("cu*/bin/nvcc"))
    return next((path for path in found if path.is_file()), None)


@functools.cache
def cuobjdump() -> str | None:
    """The one on PATH or in Triton's package."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations or () if spec else ()
    inside = (Path(folder, "backends/nvidia/bin/cuobjdump") for folder in folders)
    return shutil.which("cuobjdump") or next((str(x) for x in inside if x.is_file()), None)


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """What ``ptxas -v`` says of each kernel, by its mangled name."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.search(
            r"(?:Compiling entry function|Function properties for) '?(\w+)", line
        ):
            current = kernels.setdefault(match[1], {})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            stack, stores, loads = map(int, match.groups())
            current |= {"stack": stack, "spills": stores + loads}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            current |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return {name: facts for name, facts in kernels.items() if "registers" in facts}


def parse_sass(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """How often each counted instruction stands in each kernel's code."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in lines:
        if match := re.search(r"\bFunction : (\w+)", line):
            names = ("HMMA", "HGMMA", "local", "other")
            current = kernels.setdefault(match[1], dict.fromkeys(names, 0))
        elif current.get("other") and not any(word in line for word in ("MMA", "LDL", "STL")):
            continue  # most lines
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", line):
            if match[1] in ("HMMA", "HGMMA"):
                current[match[1]] += 1
            elif match[1] in ("LDL", "STL"):
                current["local"] += 1
            elif match[1] not in NOTHING:
                current["other"] += 1
    return kernels


def shortened(mangled: list[str]) -> list[str]:
    """The names as they stand in the source, template arguments included, parameters not."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return mangled
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    names = []
    for name in done.stdout.splitlines():
        name = re.sub(
            r"^void |fastattn::(cuda::)?|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name
        )
        names.append(re.sub(r"\)::(?=\w)", ")", name).partition(">(")[0] + ">" * (">(" in name))
    return names


def ptxas_faults(text: str) -> list[str]:
    """What ptxas warns of that the kernels count on."""
    return [fault for pattern, fault in PTXAS_FAULTS if re.search(pattern, text)]


def faults(kernel: Kernel) -> list[str]:
    """What is wrong with a kernel, if anything."""
    wrong = [f"spills {kernel.spills} bytes"] if kernel.spills else []
    if kernel.stack:
        wrong.append(f"stack of {kernel.stack} bytes")
    if kernel.local:
        wrong.append(f"{kernel.local} accesses of local memory")
    wanted = MATRIX_INSTRUCTION[kernel.target]
    if not kernel.plain and not kernel.empty and not kernel.matrix[wanted]:
        wrong.append(f"no {wanted}")
    return wrong


def compile_file(source: Path, target: str) -> Compiled:
    """One file for one target: as remembered, if nothing that it includes has changed."""
    name = f"{source.stem}-{target}"
    command = [str(nvcc()), *FLAGS, gencode(target), "-cubin", str(source)]
    command_digest = digest(" ".join(command), version(), Path(__file__).read_text())
    file = CACHE / f"{name}.json"
    if file.exists():
        known = json.loads(file.read_text())
        if known["command"] == command_digest and known["inputs"] == inputs(known["inputs"]):
            kernels = [Kernel(**facts) for facts in known["kernels"]]
            return Compiled(kernels, known["faults"])
    with tempfile.TemporaryDirectory() as folder:
        cubin, depends = f"{folder}/{name}.cubin", f"{folder}/{name}.d"
        done = subprocess.run(
            [*command, "-o", cubin, "-MD", "-MF", depends], capture_output=True, text=True
        )
        if done.returncode != 0:
            return Compiled([], [f"does not compile: {done.stderr.strip()[-2000:]}"])
        code = subprocess.run(
            [str(cuobjdump()), "-sass", cubin], capture_output=True, text=True, check=True
        )
        _, _, names = Path(depends).read_text().replace("\\\n", " ").partition(": ")
    read = [name for name in shlex.split(names) if Path(name).resolve().is_relative_to(ROOT)]
    found = Compiled(
        table(source, target, done.stderr, code.stdout.splitlines()), ptxas_faults(done.stderr)
    )
    known = {"command": command_digest, "inputs": inputs(read), "faults": found.faults}
    known["kernels"] = [kernel._asdict() for kernel in found.kernels]
    CACHE.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known))
    return found


def table(source: Path, target: str, ptxas: str, sass: Iterable[str]) -> list[Kernel]:
    """The kernels of a file, from what the tools print."""
    usage, code = parse_ptxas(ptxas), parse_sass(sass)
    rows = []
    for mangled, name in zip(usage, shortened(list(usage)), strict=True):
        counts = code[mangled]
        matrix = {key: counts[key] for key in ("HMMA", "HGMMA")}
        rest = {"local": counts["local"], "empty": not any(counts.values())}
        rows.append(Kernel(target, source.name, name, **usage[mangled], matrix=matrix, **rest))
    return rows


def inputs(names: Iterable[str]) -> dict[str, str]:
    """A digest of each file's content."""
    return {name: digest(Path(name).read_text()) if Path(name).exists() else "" for name in names}


@functools.cache
def version() -> str:
    """What nvcc says of itself."""
    return subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout


def digest(*parts: str) -> str:
    """Sixteen hexadecimal digits that stand for the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def row(kernel: Kernel) -> str:
    """A line of the table."""
    numbers = (kernel.registers, kernel.stack, kernel.spills, kernel.shared)
    matrix = " ".join(f"{count} {name}" for name, count in kernel.matrix.items() if count) or "-"
    matrix = "empty" if kernel.empty else matrix
    text = f"{kernel.target:7}" + "".join(f" {number:>6}" for number in numbers)
    text += f" {kernel.local:>6} {matrix:>12}  {kernel.name}"
    return text + "".join(f"  FAILED: {fault}" for fault in faults(kernel))


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="stems of csrc/cuda/*.cu; default: all")
    parser.add_argument("--targets", nargs="+", choices=MATRIX_INSTRUCTION, default=DEFAULT)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)
    for tool, name in ((nvcc(), "nvcc: set CUDA_HOME, or pip install nvidia-cuda-nvcc"),
                       (cuobjdump(), "cuobjdump: pip install triton")):  # fmt: skip
        if tool is None:
            print(f"report: there is no {name}", file=sys.stderr)
            return 2
    sources = sorted(CSRC.glob("cuda/*.cu"))
    unknown = set(options.files) - {source.stem for source in sources}
    if unknown:
        parser.error(f"no csrc/cuda/{unknown.pop()}.cu")
    todo = [
        (source, target)
        for source in sources
        for target in options.targets
        if suits(source, target) and source.stem in (options.files or (source.stem,))
    ]
    start, count, failed = time.perf_counter(), 0, 0
    print(f"{'target':7} {'regs':>6} {'stack':>6} {'spills':>6} {'shared':>6} {'local':>6} "
          f"{'matrix':>12}  kernel")  # fmt: skip
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda one: compile_file(*one), todo)
        for (source, target), compiled in zip(todo, results, strict=True):
            for kernel in compiled.kernels:
                print(row(kernel), flush=True)
            for fault in compiled.faults:
                print(f"{target:7} {source.name} FAILED: {fault}", flush=True)
            count += len(compiled.kernels)
            failed += len(compiled.faults) + sum(bool(faults(x)) for x in compiled.kernels)
    print(f"{count} kernels in {time.perf_counter() - start:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
