"""Builds fastattn._C with ninja; everything declarative is in pyproject.toml.

Environment: FASTATTN_NATIVE=on|off, FASTATTN_CUDA=auto|on|off, CXX, CXXFLAGS, LDFLAGS, CUDA_HOME,
MAX_JOBS.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ISAS = {"x86_64": ("baseline", "avx2", "avx512", "avx512_bf16", "amx"), "aarch64": ("neon",)}
OLDEST = {"gcc": 11, "clang": 14, "nvcc": 12}
CXX_FLAGS = (
    "-std=c++20 -O3 -DNDEBUG -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=fast "
    "-fno-trapping-math -Wall -Wextra"
)
NVCC_FLAGS = (
    "-std=c++20 -O3 -DNDEBUG --threads 4 -cudart static -Xcompiler -fPIC,-fvisibility=hidden"
)
# A file's kernels run on compute capability 9.0 alone, or on 8.0 and up: compiled for 8.x and 9.0,
# and as PTX, which the driver compiles for what came later.
SM90 = "-gencode arch=compute_90a,code=sm_90a"
SM80 = (
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80 "
    "-gencode arch=compute_90,code=sm_90"
)
NVCC_LINK = ("-cudart", "static", "--no-device-link", "--forward-unknown-to-host-compiler")
OR_OFF = "or set FASTATTN_NATIVE=off to install without native kernels"


def fail(message: str) -> NoReturn:
    """End the build with one sentence."""
    raise SystemExit(f"fastattn: {message}.")


def flag(name: str, *values: str) -> str:
    """The environment variable's value; the first of `values` when it is unset or empty."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        fail(f"{name} must be one of {', '.join(values)}, got {value!r}")
    return value


def build_tool(name: str) -> ModuleType:
    """A module of build-system.requires, which may be missing without build isolation."""
    try:
        return importlib.import_module(name)
    except ImportError:
        fail(f"the build needs the Python package {name}; install it, or use build isolation")


class Compiler(NamedTuple):
    """A C++ compiler, its family and version, and the machine that it compiles for."""

    command: list[str]
    kind: str
    version: str
    machine: str

    @property
    def problem(self) -> str | None:
        """Why it cannot build the kernels, if so."""
        if int(self.version.split(".")[0]) < OLDEST[self.kind]:
            return f"{self.kind} {self.version} is too old"
        if self.machine not in ISAS:
            return f"it compiles for neither {' nor '.join(ISAS)}"
        return None

    @property
    def driver(self) -> str:
        """The compiler itself, behind a cache or a distributor."""
        caches = ("ccache", "sccache", "distcc")
        return next(x for x in self.command if os.path.basename(x) not in caches)


def examine(command: list[str]) -> Compiler | str:
    """The compiler behind a command, or why it is not one."""
    command_line = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        done = subprocess.run(command_line, capture_output=True, text=True)
    except OSError as error:
        return f"it does not start ({error.strerror})"
    macros = dict(re.findall(r"^#define (\w+) (\d+)$", done.stdout, re.MULTILINE))
    for kind, prefix in (("clang", "__clang_{}__"), ("gcc", "__GNUC{}__")):
        major = macros.get(prefix.format("major" if kind == "clang" else ""))
        minor = macros.get(prefix.format("minor" if kind == "clang" else "_MINOR"), "0")
        if done.returncode == 0 and major is not None:
            machine = next((m for m in ISAS if f"__{m}__" in macros), "")
            return Compiler(command, kind, f"{major}.{minor}", machine)
    return "it is neither gcc nor clang"


def find_compiler() -> Compiler:
    """CXX, otherwise the first of the usual ones that will do."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    refusals = []
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]) is None:
            if wanted:
                refusals.append(f"CXX={shlex.join(command)} is not found")
            continue
        found = examine(command)
        problem = found if isinstance(found, str) else found.problem
        if isinstance(found, Compiler) and problem is None:
            return found
        refusals.append(f"{shlex.join(command)}: {problem}")
    why = "; ".join(refusals) or "none is installed"
    fail(f"building needs gcc >= 11 or clang >= 14, but {why}; install one, {OR_OFF}")


def check_environment(compiler: Compiler, python_include: str) -> None:
    """Python's headers, the C++20 library and OpenMP, which a bare compiler may lack."""
    if not Path(python_include, "Python.h").is_file():
        fail(f"Python.h is not in {python_include}; install the python3-dev package, {OR_OFF}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <omp.h>\n#include <span>\nint n() { return omp_get_level(); }\n"
        )
        command = [*compiler.command, "-std=c++20", "-fopenmp", "-fPIC", "-shared", str(source)]
        done = subprocess.run(
            [*command, "-o", f"{folder}/probe.so"], capture_output=True, text=True
        )
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        reason = (errors or done.stderr.splitlines() or ["no message"])[0].strip().rstrip(".")
        fail(
            f"{shlex.join(compiler.command)} cannot build C++20 with OpenMP ({reason}); install "
            f"its standard library and OpenMP (for clang, libomp-dev), {OR_OFF}"
        )


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, or in its usual place."""
    home = os.environ.get("CUDA_HOME")
    found = None if home else shutil.which("nvcc")
    nvcc = Path(found) if found else Path(home or "/usr/local/cuda", "bin", "nvcc")
    return nvcc if nvcc.is_file() else None


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def choose_nvcc() -> Path | None:
    """nvcc if CUDA kernels are to be built, otherwise None."""
    wanted = flag("FASTATTN_CUDA", "auto", "on", "off")
    if wanted == "off" or (wanted == "auto" and not has_driver()):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        problem = "FASTATTN_CUDA=on needs nvcc, which is neither in CUDA_HOME nor on PATH"
    else:
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
        version = re.search(r"release (\d+)", done.stdout)
        if version and int(version[1]) >= OLDEST["nvcc"]:
            return nvcc
        problem = f"CUDA kernels need nvcc >= {OLDEST['nvcc']}, {nvcc} is not"
    if wanted == "on":
        fail(problem)
    return None


def shell(*words: object) -> str:
    """A command line in a ninja file: quoted for the shell, then for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def path(name: object) -> str:
    """A path in a ninja file's build line."""
    return re.sub(r"([$ :])", r"$\1", str(name))


RULES = """\
rule cxx
  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $cxx $out
rule nvcc
  command = $nvcc $nvcc_flags $extra -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = $link -shared -fopenmp -o $out $in
  description = link $out
"""


class NinjaBuild(build_ext):
    """Writes a ninja file below build/ and runs it: parallel, incremental, headers tracked."""

    def finalize_options(self) -> None:
        """Keep the objects of editable installs, too, whose default is a temporary folder."""
        super().finalize_options()
        if self.editable_mode:
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

    def build_extension(self, ext: Extension) -> None:
        """Build the module and put it where setuptools expects it."""
        if sys.platform != "linux" or platform.machine() not in ISAS:
            fail(
                f"native kernels need Linux on {' or '.join(ISAS)}, this is {sys.platform} on "
                f"{platform.machine()}; set FASTATTN_NATIVE=off to install without them"
            )
        compiler = find_compiler()
        python_include = sysconfig.get_path("include")
        check_environment(compiler, python_include)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(compiler, python_include))
        self.run_ninja(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process may have the old file mapped.
        shutil.copy2(folder / "_C.so", f"{target}.new")
        os.replace(f"{target}.new", target)

    def ninja_file(self, compiler: Compiler, python_include: str) -> str:
        """The build's every step: one object per source and instruction set, then the module."""
        steps = [("cxx", self.all_bindings(), "bindings", "$bindings_flags")]
        steps += [("cxx", x, x.stem, "") for x in CSRC.glob("*.cpp") if x.stem != "bindings"]
        for isa in ISAS[compiler.machine]:
            define = f"-DFASTATTN_ISA={isa}"
            steps += [("cxx", x, f"cpu/{isa}/{x.stem}", define) for x in CSRC.glob("cpu/*.cpp")]
        link = compiler.command
        bindings_flags = ["-O1", f'-DFASTATTN_VERSION="{self.distribution.get_version()}"']
        for folder in (python_include, build_tool("pybind11").get_include()):
            bindings_flags += ["-isystem", folder]
        nvcc = choose_nvcc()
        cuda_sources = sorted(CSRC.glob("cuda/*.cu")) if nvcc else []
        if nvcc and cuda_sources:
            for source in cuda_sources:
                targets = SM90 if source.stem.endswith("_sm90") else SM80
                steps.append(("nvcc", source, f"cuda/{source.stem}", targets))
            for source in CSRC.glob("bindings/cuda/*.cpp"):
                name = f"bindings/cuda/{source.stem}"
                steps.append(("cxx", source, name, "$bindings_flags"))
            bindings_flags.append("-DFASTATTN_CUDA")
            # nvcc looks for its libraries in lib64; PyPI's has them in lib.
            link = [str(nvcc), "-ccbin", compiler.driver, *NVCC_LINK]
            link.append(f"-L{nvcc.resolve().parent.parent / 'lib'}")

        include = f"-I{CSRC}"
        flags = [*shlex.split(CXX_FLAGS), include]
        if compiler.kind == "gcc":
            # Its intrinsics leave registers undefined on purpose, by hundreds of warnings.
            flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        text = [
            "ninja_required_version = 1.8",
            f"cxx = {shell(*compiler.command)}",
            f"flags = {shell(*flags)}",
            f"bindings_flags = {shell(*bindings_flags)}",
            f"nvcc = {shell(nvcc, '-ccbin', compiler.driver)}",
            f"nvcc_flags = {shell(*shlex.split(NVCC_FLAGS), include)}",
            f"link = {shell(*link, *shlex.split(os.environ.get('LDFLAGS', '')))}",
            RULES,
        ]
        for rule, source, name, extra in sorted(steps):
            text.append(f"build {name}.o: {rule} {path(source)}")
            text.append(f"  extra = {extra}")
        text.append(f"build _C.so: link {' '.join(f'{name}.o' for _, _, name, _ in sorted(steps))}")
        return "\n".join(text) + "\n"

    def all_bindings(self) -> Path:
        """A file that includes all bindings: pybind11's headers cost more time than they do."""
        target = Path(self.build_temp).resolve() / "bindings.cpp"
        names = ["bindings.cpp", *sorted(f"bindings/{x.name}" for x in CSRC.glob("bindings/*.cpp"))]
        text = "".join(f'#include "{CSRC / name}"\n' for name in names)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
        return target

    def run_ninja(self, folder: Path) -> None:
        """Run it on MAX_JOBS cores, or on all that this process may use."""
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if not jobs.isdecimal() or int(jobs) < 1:
            fail(f"MAX_JOBS must be a positive number, got {jobs!r}")
        ninja = Path(build_tool("ninja").BIN_DIR, "ninja")
        if subprocess.run([ninja, "-C", folder, "-j", jobs]).returncode != 0:
            fail("compilation failed; the compiler's messages are above")


native = flag("FASTATTN_NATIVE", "on", "off") == "on"
flag("FASTATTN_CUDA", "auto", "on", "off")
setup(
    packages=[*find_packages(include=["fastattn*"]), "fastattn.kernels"],
    package_dir={"fastattn.kernels": "kernels"},
    ext_modules=[Extension("fastattn._C", sources=[])] if native else [],
    cmdclass={"build_ext": NinjaBuild},
)
