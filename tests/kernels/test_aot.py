"""The ahead-of-time table: every kernel is in it, and it fails what spills or does not fit."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastattn.kernels import aot

KERNELS = Path(__file__).parent.parent.parent / "kernels"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python where kernels are compiled, which is not the case in the tests' own process."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=env | environment, capture_output=True, text=True
    )


def kernels() -> dict[str, str]:
    """The file of each jitted function that is launched rather than called."""
    return {
        node.name: path.stem
        for path in sorted(KERNELS.glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def test_every_kernel_is_shipped():
    code = """
import json
from fastattn.kernels import aot
files = [(op, target) for op in aot.operations() for target in aot.DEFAULT]
print(json.dumps([unit.kernel for op, target in files for unit in aot.units(op, target)]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    shipped = json.loads(done.stdout)
    assert {name: file for name, file in kernels().items() if name not in shipped} == {}


def test_sizes_of_one_compile():
    done = run(str(Path(__file__).with_name("sizes_of_one.py")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == {}
    assert set(kernels()) - set(found["kernels"]) <= {"_attention_dbias_kernel"}


def test_softmax_compiles_for_sm_90(tmp_path):
    file = tmp_path / "table.json"
    command = ("-m", "fastattn.kernels.aot", "--ops", "softmax", "--targets", "sm_90")
    done = run(*command, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(file.read_text())
    assert {row["kernel"] for row in table} == {"_softmax_fwd_kernel", "_softmax_bwd_kernel"}
    for row in table:
        assert row["target"] == "sm_90" and row["spills"] == 0 and 16 <= row["registers"] <= 255
    header, *lines = done.stdout.splitlines()
    assert header.split()[:5] == ["target", "kernel", "registers", "spills", "shared"]
    assert lines[0].split()[:5] == [
        "sm_90", "softmax_fwd_kernel", *(str(table[0][name]) for name in aot.Binary._fields[:3])
    ]  # fmt: skip
    assert lines[-1].startswith(f"{len(table)} kernels in ") and lines[-1].endswith(", 0 failed")


def test_the_interpreter_is_refused():
    done = run("-m", "fastattn.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("aot: TRITON_INTERPRET is set") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "target, binary, faults",
    [
        ("sm_90", aot.Binary(255, 0, 227 * 1024), []),
        ("sm_90", aot.Binary(None, None, 0), []),
        ("sm_90", aot.Binary(255, 8, 0, True), ["spills 8 bytes"]),
        ("sm_90", aot.Binary(255, 8, 0, False), []),
        ("sm_80", aot.Binary(64, 0, 164 * 1024), ["shared memory 167936 > 166912"]),
        ("gfx942", aot.Binary(64, 4, 65536, True), ["spills 4 bytes"]),
        ("gfx942", aot.Binary(64, 0, 65537), ["shared memory 65537 > 65536"]),
        ("sm_100", "PTXASError: no", ["does not compile: PTXASError: no"]),
    ],
)
def test_faults(target, binary, faults):
    assert aot.faults(target, binary) == faults
    unit = aot.Unit("softmax", target, "_softmax_fwd_kernel", "bf16", {}, [], 0, {})
    assert aot.row(unit, binary).count("FAILED") == len(faults)


class Compiled:
    """Stands for Triton's compiled kernel."""

    class metadata:
        shared = 1024

    def __init__(self, **asm):
        self.asm = asm


@pytest.mark.parametrize("scratch", [0, 12])
def test_what_amd_binaries_tell(scratch):
    text = f"""
    .private_segment_fixed_size: {scratch}
    .sgpr_spill_count: 1
    .vgpr_count:     96
    .vgpr_spill_count: {scratch // 4}
"""
    assert aot.inspect(Compiled(amdgcn=text)) == aot.Binary(96, scratch, 1024, scratch > 0)


LOOPS = """
        /*0010*/                   STL [R1], R4 ;                     /* 0x0000000000000000 */
        /*0020*/                   MOV R5, R6 ;
        /*0030*/                   {inner} ;
        /*0040*/               @P0 BRA 0x30 ;
        /*0050*/                   {outer} ;
        /*0060*/              @!P4 BRA 0x20 ;
        /*0070*/                   LDL R4, [R1] ;
        /*0080*/                   BRA 0x90 ;
        /*0090*/                   BRA 0x90;
"""


@pytest.mark.parametrize("usage, spills", [("STACK:0 LOCAL:0", 0), ("STACK:24 LOCAL:8", 32)])
@pytest.mark.parametrize("inner", ["FFMA R1, R2, R3, R4", "LDL.LU R4, [R1+0x4]"])
def test_what_cuobjdump_tells(tmp_path, monkeypatch, usage, spills, inner):
    tool = tmp_path / "cuobjdump"
    code = LOOPS.format(inner=inner, outer="LDL R7, [R1+0x8]")
    tool.write_text(
        "#!/bin/sh\n"
        f"[ $1 = -sass ] && cat << END || echo ' Function f: REG:77 {usage} '\n{code}END\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(aot, "_cuobjdump", lambda: str(tool))
    inside = bool(spills) and inner.startswith("LDL")
    assert aot.inspect(Compiled(cubin=b"")) == aot.Binary(77, spills, 1024, inside)


def test_without_cuobjdump_registers_are_unknown(monkeypatch):
    monkeypatch.setattr(aot, "_cuobjdump", lambda: None)
    binary = aot.inspect(Compiled(cubin=b""))
    assert binary == aot.Binary(None, None, 1024)
    unit = aot.Unit("softmax", "sm_90", "_softmax_fwd_kernel", "bf16", {}, [], 0, {})
    assert aot.row(unit, binary).split()[2:5] == ["?", "?", "1024"]


def build_or_crash(unit):
    if unit.kernel == "crashes":
        os._exit(1)
    return aot.Binary(1, 0, 0)


def test_a_crash_of_the_compiler_costs_one_launch(monkeypatch):
    monkeypatch.setattr(aot, "build", build_or_crash)
    names = ("fine", "crashes", "waits")
    units = [aot.Unit("softmax", "sm_90", name, "bf16", {}, [], 0, {}) for name in names]
    binaries = {unit.kernel: binary for unit, binary in aot.compiled(units, 2)}
    assert binaries == {
        "fine": aot.Binary(1, 0, 0),
        "crashes": "the compiler crashed",
        "waits": aot.Binary(1, 0, 0),
    }
