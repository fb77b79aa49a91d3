"""The house: an op has its namesake in every room, and arrows between rooms point one way."""

import ast
import re
from pathlib import Path

import pytest

from fastattn.backends import BACKENDS, cuda
from fastattn.backends.cpu import native
from fastattn.backends.cuda import device

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastattn"
MAX_LINES = 500
OPS = ("attention", "softmax", "ffn", "norm", "cross_entropy", "linear_cross_entropy", "rotary")
NAMESAKES = (
    "fastattn/ops/{}.py",
    "fastattn/backends/reference/{}.py",
    "fastattn/backends/cpu/{}.py",
    "fastattn/backends/triton/{}.py",
    "kernels/{}.py",
    "csrc/cpu/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/bindings/{}.cpp",
    "tests/ops/test_{}.py",
    "bench/test_{}.py",
)
# An op that lives in one of these rooms lives in all of them; the CUDA backend has some ops only.
CUDA_NAMESAKES = (
    "fastattn/backends/cuda/{}.py",
    "csrc/bindings/cuda/{}.cpp",
    "csrc/cuda/{}.h",
    "csrc/cuda/{}.cu",
)
# A room may import from the rooms below it. Rooms on one line do not know each other.
LEVELS = (
    ("kernels", "_C", "philox"),
    ("backends",),
    ("dispatch",),
    ("ops",),
    ("nn",),
    ("models", "integrations", "distributed"),
    ("training",),
    ("info", "tune"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
BACKEND_NAMES = [
    "NAME",
    "unsupported",
    *(f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")),
]
SKIPPED = ("build", "dist", "fastattn-demo", "__pycache__")


def sources(*suffixes: str) -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.suffix in suffixes
        and not any(
            part in SKIPPED or part.endswith(".egg-info") or part.startswith(".")
            for part in path.relative_to(ROOT).parts
        )
    ]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, package: str) -> set[str]:
    """The full names of what a file imports; `package` is the package that it lies in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join(base * bool(node.level) + [node.module] * bool(node.module))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room(name: str) -> str | None:
    """The room that an imported name belongs to; "" is the package itself, its public names."""
    parts = name.split(".")
    if parts[0] != "fastattn":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_namesake_in_every_room(op):
    names = [name.format(op) for name in NAMESAKES]
    on_cuda = [name.format(op) for name in CUDA_NAMESAKES]
    if any((ROOT / name).exists() for name in on_cuda):
        names += on_cuda
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_bindings_hold_ops_only():
    assert {path.stem for path in ROOT.glob("csrc/bindings/**/*.cpp")} <= set(OPS)


def test_every_room_has_its_level():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - set(LEVEL) - {"__init__", "__pycache__"} == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=shown)
def test_arrows_point_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    if own == "__init__":
        return
    wrong = []
    for name in imports(path, ".".join(("fastattn", *parts[:-1]))):
        other = room(name)
        allowed = (
            other is None
            or (LEVEL[own] >= LEVEL["info"] if other == "" else LEVEL[other] < LEVEL[own])
            or (other == own and len(parts) > 1)
        )
        if not allowed:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends").glob("*/*.py")), ids=shown)
def test_backends_do_not_import_each_other(path):
    own = f"fastattn.backends.{path.parent.name}"
    for name in imports(path, own):
        if name.startswith("fastattn.backends"):
            assert name.startswith(f"{own}.")


@pytest.mark.parametrize("module", BACKENDS, ids=lambda module: module.NAME)
def test_backends_export_the_same_names_in_the_same_order(module):
    folder = PACKAGE / "backends" / module.NAME
    missing = [op for op in OPS if not (folder / f"{op}.py").exists()]
    assert not missing or module is cuda
    public = [name for name in vars(module) if name in BACKEND_NAMES]
    assert public == [name for name in BACKEND_NAMES if name.rpartition("_")[0] not in missing]


@pytest.mark.parametrize(
    "folder, call, asked_for",
    [
        ("cpu", r"\b_C\.(\w+)", native.ENTRY_POINTS),
        ("cuda", r"\bkernels\.(\w+)", device.ENTRY_POINTS),
    ],
)
def test_the_native_module_is_asked_for_all_that_is_called(folder, call, asked_for):
    called = {
        name
        for path in (PACKAGE / "backends" / folder).glob("*.py")
        for name in re.findall(call, path.read_text())
    }
    assert called == set(asked_for)


def test_kernels_know_nothing_of_the_package():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert [
            name
            for name in imports(path, "fastattn.kernels")
            if room(name) not in (None, "kernels")
        ] == [], shown(path)


def test_kernels_hold_ops_and_what_they_share():
    files = {path.stem: imports(path, "fastattn.kernels") for path in ROOT.glob("kernels/*.py")}
    shared = {
        name.split(".")[2] for names in files.values() for name in names if "kernels." in name
    }
    of_an_op = {name for name in files if name.startswith(OPS)}
    # The interpreter's file is imported where the interpreter runs.
    assert set(files) - of_an_op - shared == {"__init__", "aot", "interpreter"}


def test_no_file_is_too_long():
    lengths = {
        shown(path): len(path.read_text().splitlines())
        for path in sources(".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".yml")
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("path", sources(".cpp", ".h", ".cu", ".cuh"), ids=shown)
def test_native_code_includes_no_torch_and_kernels_no_python(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    forbidden = ("torch/", "ATen/", "c10/")
    # Bindings, of the wheel and of the emulation.
    if "bindings" not in shown(path) and shown(path) != "tests/cuda/emulated.cpp":
        forbidden += ("pybind11/", "Python.h", "bindings/")
    assert [name for name in included if name.startswith(forbidden)] == []


@pytest.mark.parametrize("path", sources(".cpp", ".h"), ids=shown)
def test_system_headers_come_before_the_target_region(path):
    _, _, region = path.read_text().partition('#include "cpu/target_begin.h"')
    region, _, _ = region.partition('#include "cpu/target_end.h"')
    assert re.findall(r"^\s*#\s*include\s*<.*", region, re.MULTILINE) == []


def test_nothing_names_a_place_on_someones_machine():
    place = re.compile(r"(?<![\w.$}])/(?:home|root|work|Users)/\w")
    found = {}
    code = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh")
    for path in sources(*code, ".md", ".toml", ".yml", ".yaml", ".txt"):
        if match := place.search(path.read_text()):
            found[shown(path)] = match[0]
    assert found == {}
