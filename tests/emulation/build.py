"""Builds CUDA kernels for the host, the emulation in place of the GPU's instructions.

``build(name, sources, flags)`` compiles each source, and the emulation's own, with the C++
compiler (CXX, otherwise the first of g++, clang++ and c++) and links a shared library::

    from emulation.build import ROOT, build

    path = build("softmax", [ROOT / "csrc/cuda/softmax.cu", ROOT / "tests/cuda/driver.cpp"])
    library = ctypes.CDLL(path)

Objects are kept in build/emulation (or FASTATTN_EMULATION_CACHE) and compiled again when the
command or the content of any file that they include changes. Several processes may call it at
once: one builds, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CACHE = Path(os.environ.get("FASTATTN_EMULATION_CACHE") or ROOT / "build/emulation")
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DFASTATTN_EMULATION"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler, if there is one."""
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return tuple(command)
    return None


def build(name: str, sources: Iterable[Path | str], flags: Sequence[str] = ()) -> Path:
    """The shared library `name` of `sources` (.cu or .cpp) and the emulation; raises BuildError.

    `flags` are added to each source's command, such as ``-I`` folders or ``-D`` macros.
    """
    command = compiler()
    if command is None:
        raise BuildError("the emulation needs a C++ compiler; install g++ or clang++, or set CXX")
    own = sorted(Path(__file__).parent.glob("*.cpp"))
    everything = [(path, ("-O3", "-Wno-restrict")) for path in own] + [
        (Path(path), tuple(flags)) for path in sources
    ]
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / "lock"):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            steps = [pool.submit(compiled, command, path, extra) for path, extra in everything]
            objects = [step.result() for step in steps]
        stamp = digest(*(path.name.encode() + path.read_bytes() for path in objects))
        library = CACHE / f"{name}-{stamp}.so"
        if not library.exists():
            for old in CACHE.glob(f"{name}-{'?' * len(stamp)}.so"):
                old.unlink()
            run(*command, "-shared", *map(str, objects), "-o", str(library))
    return library


class BuildError(RuntimeError):
    """The compiler is missing, or refused; its messages are the error's text."""


def compiled(command: tuple[str, ...], source: Path, flags: tuple[str, ...]) -> Path:
    """The object of one source, compiled unless it is there and its inputs are what they were."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    line = [*command, *FLAGS, *include, *flags, "-x", "c++", "-c", str(source)]
    key = digest(version(command).encode(), *(word.encode() for word in line))
    target = CACHE / f"{source.stem}-{key}.o"
    depends, stamp = target.with_suffix(".d"), target.with_suffix(".inputs")
    if not (target.exists() and stamp.exists() and stamp.read_text() == inputs(depends)):
        run(*line, "-MMD", "-MF", str(depends), "-o", str(target))
        stamp.write_text(inputs(depends))
    return target


def inputs(depends: Path) -> str:
    """A digest of the files that a make rule names, as they are now."""
    if not depends.exists():
        return ""
    _, _, names = depends.read_text().replace("\\\n", " ").partition(": ")
    found = [Path(name) for name in shlex.split(names)]
    return digest(*(path.read_bytes() if path.exists() else b"" for path in found))


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """What the compiler says of itself."""
    return run(*command, "--version")


def run(*command: str) -> str:
    """Run it and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def digest(*parts: bytes) -> str:
    """Sixteen hexadecimal digits that stand for the parts."""
    sums = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(sums).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
