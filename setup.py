"""Builds fastattn._C with ninja; everything declarative is in pyproject.toml.

Environment: CXX (compiler), FASTATTN_NATIVE=on|off, FASTATTN_CUDA=auto|on|off, MAX_JOBS.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ISAS = {"x86_64": ("baseline", "avx2", "avx512", "avx512_bf16"), "aarch64": ("neon",)}
MIN_COMPILER = {"gcc": 11, "clang": 14}
CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=fast "
    "-fno-trapping-math -Wall -Wextra"
)
NVCC_FLAGS = (
    "-std=c++20 -O3 --threads 0 -cudart static -Xcompiler -fPIC,-fvisibility=hidden "
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a"
)
NO_NATIVE = "or set FASTATTN_NATIVE=off to install without native kernels"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"fastattn: {message}.")


def flag(name: str, *values: str) -> str:
    """The environment variable's value; the first of `values` when it is unset or empty."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        fail(f"{name} must be one of {', '.join(values)}, got {value!r}")
    return value


class Compiler(NamedTuple):
    command: list[str]
    kind: str
    version: tuple[int, int]
    machine: str

    @property
    def problem(self) -> str | None:
        if self.version[0] < MIN_COMPILER[self.kind]:
            found = ".".join(map(str, self.version))
            return f"{self.kind} {found} is too old, {MIN_COMPILER[self.kind]} is the oldest"
        if self.machine not in ISAS:
            return f"it compiles for {self.machine}, not for {' or '.join(ISAS)}"
        return None


def examine(command: list[str]) -> Compiler | str:
    """The compiler behind a command, or why it is not one."""
    try:
        done = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
        )
    except OSError as error:
        return f"it does not start ({error.strerror})"
    if done.returncode != 0:
        return "it does not preprocess an empty file"
    macros = {}
    for line in done.stdout.splitlines():
        _, name, *value = line.split(maxsplit=2)
        macros[name] = value[0] if value else ""
    kind = "clang" if "__clang__" in macros else "gcc"
    names = ("__clang_major__", "__clang_minor__") if kind == "clang" else ("__GNUC__", "__GNUC_MINOR__")
    try:
        major, minor = (int(macros[name]) for name in names)
    except (KeyError, ValueError):
        return "it is neither gcc nor clang"
    machine = next((m for m in ISAS if f"__{m}__" in macros), platform.machine())
    return Compiler(command, kind, (major, minor), machine)


def find_compiler() -> Compiler:
    wanted = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    refusals = []
    for command in candidates:
        if shutil.which(command[0]) is None:
            if wanted:
                refusals.append(f"CXX={wanted} is not found")
            continue
        found = examine(command)
        problem = found if isinstance(found, str) else found.problem
        if problem is None:
            assert isinstance(found, Compiler)
            return found
        refusals.append(f"{shlex.join(command)}: {problem}")
    what = "; ".join(refusals) or "none is installed"
    fail(f"a C++20 compiler is needed (gcc >= 11 or clang >= 14), but {what}; install one, {NO_NATIVE}")


def check_compiles(compiler: Compiler, python_include: str) -> None:
    """Python's headers and OpenMP, which a bare compiler may lack."""
    if not Path(python_include, "Python.h").is_file():
        fail(
            f"Python.h is not in {python_include}; install Python's development headers "
            f"(python3-dev), {NO_NATIVE}"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <span>\nint f() { return omp_get_max_threads(); }\n")
        command = [*compiler.command, "-std=c++20", "-fopenmp", "-fPIC", "-shared"]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".so")), str(source)],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        reason = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr.strip())
        fail(
            f"{shlex.join(compiler.command)} cannot build C++20 with OpenMP ({reason.strip()}); install "
            f"its standard library and OpenMP (libgomp, or libomp-dev for clang), {NO_NATIVE}"
        )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and Path(home, "bin", "nvcc").is_file():
        return str(Path(home, "bin", "nvcc"))
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def choose_nvcc() -> str | None:
    """nvcc when CUDA kernels are to be built, otherwise None."""
    wanted = flag("FASTATTN_CUDA", "auto", "on", "off")
    nvcc = find_nvcc()
    if wanted == "on" and nvcc is None:
        fail("FASTATTN_CUDA=on needs nvcc, which is neither on PATH nor under CUDA_HOME")
    if wanted == "off" or (wanted == "auto" and not has_driver()):
        return None
    return nvcc


def escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja under build/ and runs it: parallel, incremental, headers tracked."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "linux" or platform.machine() not in ISAS:
            fail(
                f"native kernels need Linux on {' or '.join(ISAS)}, this is {sys.platform} on "
                f"{platform.machine()}; set FASTATTN_NATIVE=off to install without them"
            )
        compiler = find_compiler()
        python_include = sysconfig.get_path("include")
        check_compiles(compiler, python_include)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        text = self.ninja_file(compiler, choose_nvcc(), python_include)
        ninja_file = folder / "build.ninja"
        if not ninja_file.is_file() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        self.run_ninja(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename, because a process may have the old file mapped.
        shutil.copy2(folder / "_C.so", target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)

    def ninja_file(self, compiler: Compiler, nvcc: str | None, python_include: str) -> str:
        import pybind11

        version = self.distribution.get_version()
        cxx = shlex.join(compiler.command)
        flags = f"{CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}".rstrip()
        cuda_define = " -DFASTATTN_CUDA" if nvcc else ""
        lines = [
            "ninja_required_version = 1.8",
            f"cxx = {cxx}",
            f"flags = {flags} -I{shlex.quote(str(CSRC))}",
            f"bindings_flags = -isystem {shlex.quote(python_include)}"
            f" -isystem {shlex.quote(pybind11.get_include())}"
            f""" -DFASTATTN_VERSION='"{version}"'{cuda_define}""",
            "rule cxx",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $cxx $out",
        ]
        if nvcc:
            lines += [
                f"nvcc = {shlex.quote(nvcc)} -ccbin {shlex.quote(compiler.command[0])}",
                "rule nvcc",
                f"  command = $nvcc {NVCC_FLAGS} -I{shlex.quote(str(CSRC))} -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = nvcc $out",
            ]
        # libcudart_static.a needs these; everything else it resolves by dlopen.
        link_flags = os.environ.get("LDFLAGS", "")
        if nvcc:
            link_flags += f" -L{shlex.quote(str(cuda_library_folder(nvcc)))} -lcudart_static -ldl -lrt -lpthread"
        lines += [
            "rule link",
            f"  command = $cxx -shared -fopenmp -Wl,--as-needed -o $out $in {link_flags}".rstrip(),
            "  description = link $out",
        ]
        objects = []

        def compile_file(rule: str, source: Path, target: str, extra: str = "") -> None:
            lines.append(f"build {escape(target)}: {rule} {escape(str(source))}")
            if extra:
                lines.append(f"  extra = {extra}")
            objects.append(escape(target))

        for source in sorted(CSRC.glob("*.cpp")):
            extra = "$bindings_flags" if source.name == "bindings.cpp" else ""
            compile_file("cxx", source, f"{source.stem}.o", extra)
        for source in sorted(CSRC.glob("bindings/*.cpp")):
            compile_file("cxx", source, f"bindings/{source.stem}.o", "$bindings_flags")
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            for isa in ISAS[compiler.machine]:
                compile_file("cxx", source, f"cpu/{isa}/{source.stem}.o", f"-DFASTATTN_ISA={isa}")
        if nvcc:
            for source in sorted(CSRC.glob("cuda/*.cu")):
                compile_file("nvcc", source, f"cuda/{source.stem}.o")
        lines.append(f"build _C.so: link {' '.join(objects)}")
        lines.append("default _C.so")
        return "\n".join(lines) + "\n"

    def run_ninja(self, folder: Path) -> None:
        import ninja

        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if not jobs.isdecimal() or int(jobs) < 1:
            fail(f"MAX_JOBS must be a positive number, got {jobs!r}")
        if subprocess.run([*command, "-j", jobs]).returncode != 0:
            fail("compilation failed; the compiler's own messages are above")


def cuda_library_folder(nvcc: str) -> Path:
    home = Path(nvcc).resolve().parent.parent
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / name / "libcudart_static.a").is_file():
            return home / name
    fail(f"libcudart_static.a is not under {home}, where nvcc is")


native = flag("FASTATTN_NATIVE", "on", "off") == "on"
flag("FASTATTN_CUDA", "auto", "on", "off")
setup(
    packages=[*find_packages(include=["fastattn*"]), "fastattn.kernels"],
    package_dir={"fastattn.kernels": "kernels"},
    ext_modules=[Extension("fastattn._C", sources=[])] if native else [],
    cmdclass={"build_ext": NinjaBuild},
)
