"""The build, on a miniature of csrc/ that compiles in a second."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX") or "c++")))
HAS_NVCC = bool(shutil.which("nvcc")) or Path("/usr/local/cuda/bin/nvcc").is_file()
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
ISAS = (
    ["neon"]
    if platform.machine() == "aarch64"
    else ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
)

MODULE = """
#include <Python.h>
#include "cpu/op.h"
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
KERNEL = """
#include "cpu/op.h"
#include "cpu/target_begin.h"
int op() { return kAnswer + FASTATTN_VECTOR_BYTES; }
#include "cpu/target_end.h"
"""
# Without the finder of an editable install, which would find the checkout's own module.
ALONE = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in str(each)]"""


@pytest.fixture
def tree(tmp_path):
    """A source tree with the project's own setup.py and a tiny csrc/."""
    root = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastattn", root / "fastattn", ignore=ignore)
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=ignore)
    (root / "README.md").touch()
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "csrc/bindings.cpp").write_text(MODULE)
    (root / "csrc/cpu/op.cpp").write_text(KERNEL)
    (root / "csrc/cpu/op.h").write_text("constexpr int kAnswer = 42;\n")
    for name in ("target_begin.h", "target_end.h"):
        shutil.copy(ROOT / "csrc/cpu" / name, root / "csrc/cpu" / name)
    return root


def run(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    own = {
        "TRITON_INTERPRET": "",
        "FASTATTN_CUDA": "off",
        "FASTATTN_NATIVE": "",
        "CXXFLAGS": "",
        **environment,
    }
    env = {**os.environ, **own}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=env, capture_output=True, text=True
    )


def build(root: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(root, "setup.py", "-q", "build_ext", "--inplace", **environment)


def assert_one_sentence(done: subprocess.CompletedProcess, *parts: str) -> None:
    """It failed, and its last line says why, without a traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("fastattn: ") and message.endswith(".")
    for part in parts:
        assert part in message


def fake_compiler(folder: Path, name: str, *macros: str) -> str:
    script = folder / name
    lines = "\n".join(f"#define {macro}" for macro in macros)
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_each_kernel_is_compiled_once_per_instruction_set(tree):
    done = build(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = sorted(path.parent.name for path in tree.glob("build/temp*/cpu/*/op.o"))
    assert objects == sorted(ISAS)
    assert list(tree.glob("fastattn/_C.*.so"))


@needs_compiler
def test_a_rebuild_compiles_only_what_changed(tree):
    def changed() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in tree.glob("build/temp*/**/*.o")}
        assert build(tree).returncode == 0
        after = {path: path.stat().st_mtime_ns for path in tree.glob("build/temp*/**/*.o")}
        return {path.stem for path in after if after[path] != before.get(path)}

    (tree / "csrc/other.cpp").write_text("int other() { return 1; }\n")
    assert changed() == {"bindings", "op", "other"}
    assert changed() == set()
    (tree / "csrc/other.cpp").write_text("int other() { return 2; }\n")
    assert changed() == {"other"}
    (tree / "csrc/cpu/op.h").write_text("constexpr int kAnswer = 43;\n")
    assert changed() == {"bindings", "op"}
    (tree / "csrc/other.cpp").unlink()
    assert changed() == set()


@needs_compiler
def test_a_compile_error_ends_without_a_traceback(tree):
    (tree / "csrc/cpu/op.h").write_text("constexpr int kAnswer = ;\n")
    done = build(tree)
    assert_one_sentence(done, "compilation failed")
    assert "op.h" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["FASTATTN_CUDA", "FASTATTN_NATIVE"])
def test_an_unknown_flag_value_is_refused(tree, name):
    assert_one_sentence(build(tree, **{name: "maybe"}), name, "on", "off", "'maybe'")


@needs_compiler
def test_a_wrong_number_of_jobs_is_refused(tree):
    assert_one_sentence(build(tree, MAX_JOBS="many"), "MAX_JOBS", "'many'")


def test_a_missing_compiler_is_named(tree):
    done = build(tree, CXX="/nonexistent/c++")
    assert_one_sentence(done, "CXX=/nonexistent/c++ is not found", "FASTATTN_NATIVE=off")


def test_no_compiler_at_all(tree, tmp_path):
    done = build(tree, CXX="", PATH=str(tmp_path))
    assert_one_sentence(done, "none is installed", "FASTATTN_NATIVE=off")


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        (("__GNUC__ 10", "__GNUC_MINOR__ 2", "__x86_64__ 1"), "gcc 10.2 is too old"),
        (
            ("__clang__ 1", "__clang_major__ 13", "__clang_minor__ 0", "__GNUC__ 4"),
            "clang 13.0 is too old",
        ),
        (("__GNUC__ 13", "__GNUC_MINOR__ 1", "__riscv 1"), "it compiles for neither x86_64"),
        (("_MSC_VER 1940",), "it is neither gcc nor clang"),
    ],
)
def test_an_unsuitable_compiler_is_named(tree, tmp_path, macros, reason):
    compiler = fake_compiler(tmp_path, "c++", *macros)
    assert_one_sentence(build(tree, CXX=compiler), reason, compiler, "FASTATTN_NATIVE=off")


def test_a_compiler_without_openmp_is_named(tree, tmp_path):
    compiler = fake_compiler(tmp_path, "c++", "__GNUC__ 13", f"__{platform.machine()}__ 1")
    with open(compiler, "a") as script:
        script.write('case "$*" in *-fopenmp*) echo "error: no omp.h" >&2; exit 1;; esac\n')
    assert_one_sentence(build(tree, CXX=compiler), "OpenMP", "error: no omp.h")


def test_an_unsupported_platform_is_named(tree):
    code = (
        "import platform, runpy, sys\n"
        "platform.machine = lambda: 'riscv64'\n"
        "sys.argv = ['setup.py', '-q', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = run(tree, "-c", code)
    assert_one_sentence(done, "linux on riscv64", "FASTATTN_NATIVE=off")


@needs_compiler
def test_cuda_on_without_nvcc_is_refused(tree, tmp_path):
    done = build(tree, FASTATTN_CUDA="on", CUDA_HOME=str(tmp_path))
    assert_one_sentence(done, "FASTATTN_CUDA=on needs nvcc", "CUDA_HOME")


@needs_compiler
def test_cuda_on_with_an_old_nvcc_is_refused(tree, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    done = build(tree, FASTATTN_CUDA="on", CUDA_HOME=str(tmp_path))
    assert_one_sentence(done, "need nvcc >= 12")


@needs_compiler
@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
def test_cuda_kernels_are_built_and_the_module_loads_without_a_driver(tree):
    (tree / "csrc/cuda").mkdir()
    for name in ("op", "op_sm90"):
        (tree / f"csrc/cuda/{name}.cu").write_text(
            "#include <cuda_runtime.h>\n"
            f"__global__ void {name}_kernel(float* x) {{ x[threadIdx.x] += 1; }}\n"
            f"void {name}_launch(float* x) {{ {name}_kernel<<<1, 32>>>(x); }}\n"
        )
    done = build(tree, FASTATTN_CUDA="on")
    assert done.returncode == 0, done.stdout + done.stderr
    (module,) = tree.glob("fastattn/_C.*.so")
    data = module.read_bytes()
    assert {f"sm_{n}".encode() for n in ("80", "90", "90a")} <= set(re.findall(rb"sm_\w+", data))
    (rules,) = tree.glob("build/temp*/build.ninja")
    for name, targets in (("op", ["sm_80", "compute_80", "sm_90"]), ("op_sm90", ["sm_90a"])):
        step = re.search(rf"build cuda/{name}\.o: .*\n  extra = (.*)", rules.read_text())
        assert re.findall(r"code=(\w+)", step[1]) == targets
    assert b"libcudart.so" not in data and b"libcuda.so.1" in data
    assert run(module.parent, "-c", "import _C").returncode == 0


def test_without_native_kernels_it_installs_and_says_so(tree, tmp_path):
    target = tmp_path / "site"
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = run(tree, *pip, "--target", str(target), ".", FASTATTN_NATIVE="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (target / "fastattn/kernels/__init__.py").is_file()
    assert (target / "fastattn/py.typed").is_file()
    assert not list(target.rglob("*.so"))
    info = f"{ALONE}\nfrom fastattn.cli import main\nmain(['info'])"
    done = run(tmp_path, "-c", info, PYTHONPATH=str(target))
    assert "missing: installed with FASTATTN_NATIVE=off" in done.stdout
    assert done.returncode == 0


IMPORT = f"""{ALONE}
import fastattn, torch
from fastattn.backends.cpu import native
assert native.MISSING is not None
(choice,) = fastattn.explain(fastattn.softmax, torch.ones(2, 2))
assert choice.backend == "reference" and native.MISSING in choice.refusals["cpu"]
"""


@pytest.mark.parametrize("suffix", [EXTENSION_SUFFIXES[0], ".cpython-38-x86_64-linux-gnu.so"])
def test_a_module_that_does_not_load_is_warned_of_once(tree, suffix):
    (tree / f"fastattn/_C{suffix}").write_bytes(b"not a library")
    done = run(tree, "-c", IMPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: fastattn runs on its slow reference backend") == 1
    assert f"_C{suffix} is there: native module not available: " in done.stderr
    assert "Install it again or, in a checkout, run " in done.stderr


@needs_compiler
def test_an_old_module_is_warned_of_once(tree):
    assert build(tree).returncode == 0
    done = run(tree, "-c", IMPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: fastattn runs on its slow reference backend") == 1
    assert "native module older than the Python files, without DTYPES, " in done.stderr


def test_an_install_without_native_kernels_is_silent(tree):
    done = run(tree, "-W", "error", "-c", IMPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_pip_shows_the_sentence(tree):
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "."]
    done = run(tree, *pip, CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "fastattn: building needs gcc >= 11 or clang >= 14" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_sdist_is_complete(tree):
    done = run(tree, "setup.py", "-q", "sdist", "--formats", "tar", "-d", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tree.glob("*.tar")
    listing = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True, check=True)
    names = {name.partition("/")[2] for name in listing.stdout.split()}
    sources = {
        path.relative_to(tree).as_posix()
        for folder in ("csrc", "kernels", "fastattn")
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
