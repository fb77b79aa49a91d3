"""The report of the CUDA kernels: what it reads from ptxas and cuobjdump, and what it fails."""

import re

import cuda_report as report
import pytest

NAME = "_ZN8fastattn4cuda43_GLOBAL__N__3841cd75_10_a_cu_5c44b76320attention_fwd_kernelILi64EEEvi"
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes smem, 584 bytes cmem[0]
ptxas info    : Compile time = 22.876 ms
"""
SASS = """\
                Function : {name}
        /*0040*/               @!P0 EXIT ;
        /*0050*/                   LDL R4, [R1+0x4] ;
        /*0060*/              @P1  STL.64 [R1], R2 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
"""


def kernel(**facts):
    given = dict(
        target="sm_80", file="attention.cu", name="attention_fwd_kernel<64>", registers=168,
        stack=0, spills=0, shared=0, matrix={"HMMA": 64, "HGMMA": 0}, local=0, empty=False,
    )  # fmt: skip
    return report.Kernel(**given | facts)


def test_what_the_tools_print_is_read():
    ptxas = PTXAS.format(name=NAME, stack=8, stores=4)
    (one,) = report.table(
        report.CSRC / "cuda/attention_sm90.cu", "sm_90a", ptxas, SASS.format(name=NAME).splitlines()
    )
    assert one == kernel(
        target="sm_90a", file="attention_sm90.cu", name=one.name, stack=8, spills=16, shared=16,
        matrix={"HMMA": 1, "HGMMA": 2}, local=2,
    )  # fmt: skip
    assert "attention_fwd_kernel" in one.name
    line = report.row(one)
    assert re.match(r"sm_90a +168 +8 +16 +16 +2 1 HMMA 2 HGMMA  .*attention_fwd_kernel", line)
    assert line.count("FAILED") == 3


@pytest.mark.parametrize(
    "facts, faults",
    [
        ({}, []),
        (dict(spills=8), ["spills 8 bytes"]),
        (dict(stack=24), ["stack of 24 bytes"]),
        (dict(local=3), ["3 accesses of local memory"]),
        (dict(matrix={"HMMA": 0, "HGMMA": 0}), ["no HMMA"]),
        (dict(matrix={"HMMA": 0, "HGMMA": 0}, empty=True), []),
        (dict(target="sm_90a"), ["no HGMMA"]),
        (dict(target="sm_90a", matrix={"HMMA": 0, "HGMMA": 8}), []),
        (dict(name="attention_delta_kernel<64>", matrix={"HMMA": 0, "HGMMA": 0}), []),
        (dict(name="softmax_fwd_kernel<float16>", matrix={"HMMA": 0, "HGMMA": 0}), []),
    ],
)
def test_faults(facts, faults):
    assert report.faults(kernel(**facts)) == faults


@pytest.mark.parametrize(
    "line, faults",
    [
        ("ptxas info    : Compile time = 22.876 ms", []),
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
            "serialized due to insufficient register resources for the wgmma pipeline",
            ["wgmma is serialized"],
        ),
        (
            "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain "
            "minimum register requirements.",
            ["setmaxnreg is ignored"],
        ),
    ],
)
def test_what_ptxas_warns_of(line, faults):
    assert report.ptxas_faults(line) == faults


def test_every_file_has_its_targets():
    for source in report.CSRC.glob("cuda/*.cu"):
        of_sm90 = re.search(r"(wgmma|_sm90)\.cuh", source.read_text())
        assert bool(of_sm90) == source.stem.endswith("_sm90"), source.stem
        suitable = [target for target in report.DEFAULT if report.suits(source, target)]
        assert suitable == (["sm_90a"] if of_sm90 else ["sm_80", "sm_100"]), source.stem
        assert report.suits(source, "sm_90") == (not of_sm90), "on request"


def test_a_kernel_that_never_runs_is_empty():
    sass = "\t\tFunction : f\n  /*0000*/   LDC R1, c[0x0][0x28] ;\n  /*0010*/   @P0 EXIT ;\n"
    counted = report.parse_sass((sass + "  /*0020*/   BRA 0x20 ;").splitlines())
    assert not any(counted["f"].values())
    counted = report.parse_sass((sass + "  /*0020*/   STG.E [R2], R3 ;").splitlines())
    assert counted["f"]["other"] == 1


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for nvcc and cuobjdump, a source, and how often it was compiled."""
    source, header, calls = (tmp_path / name for name in ("a.cu", "a.cuh", "calls"))
    source.touch(), header.touch(), calls.touch()
    (tmp_path / "ptxas").write_text(PTXAS.format(name=NAME, stack=0, stores=0))
    (tmp_path / "sass").write_text(SASS.format(name=NAME))
    nvcc, cuobjdump = tmp_path / "nvcc", tmp_path / "cuobjdump"
    nvcc.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
echo >> {calls}
while [ $# -gt 1 ]; do [ "$1" = -MF ] && echo "a.o: {source} {header}" > "$2"; shift; done
cat {tmp_path}/ptxas >&2
exit $(cat {tmp_path}/status 2> /dev/null || echo 0)
""")
    cuobjdump.write_text(f"#!/bin/sh\ncat {tmp_path}/sass\n")
    for tool in (nvcc, cuobjdump):
        tool.chmod(0o755)
    monkeypatch.setattr(report, "nvcc", lambda: nvcc)
    monkeypatch.setattr(report, "cuobjdump", lambda: cuobjdump)
    monkeypatch.setattr(report, "version", str)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "CACHE", tmp_path / "cache")
    return source, header, lambda: len(calls.read_text().splitlines())


def test_a_file_is_compiled_again_when_a_header_changes(tools):
    source, header, compilations = tools
    first = report.compile_file(source, "sm_90a")
    assert first.faults == [] and first.kernels[0].matrix["HGMMA"] == 2
    assert report.compile_file(source, "sm_90a") == first and compilations() == 1
    header.write_text("// changed\n")
    assert report.compile_file(source, "sm_90a") == first and compilations() == 2
    assert report.compile_file(source, "sm_80") != first and compilations() == 3


def test_what_does_not_compile_fails_and_is_not_remembered(tools, tmp_path):
    source, _, compilations = tools
    (tmp_path / "status").write_text("1")
    for count in (1, 2):
        assert report.compile_file(source, "sm_80").faults[0].startswith("does not compile: ")
        assert compilations() == count
