"""The command line: info in both forms, tune, and errors in one line."""

import builtins
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import cli, info
from fastattn.backends import BACKENDS

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def info_json(capsys) -> dict:
    assert cli.main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_names_versions_and_threads(capsys):
    facts = info_json(capsys)
    assert facts["fastattn"] == fastattn.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["threads"] == torch.get_num_threads()


def test_info_describes_the_native_module(capsys):
    native = info_json(capsys)["native"]
    try:
        from fastattn import _C
    except ImportError:
        assert not native["built"] and native["reason"]
        return
    assert native["built"] and native["compiler"] == _C.compiler
    assert native["isa"] in native["isas_available"]
    assert set(native["isas_available"]) <= set(native["isas"])


def test_info_lists_every_backend_with_its_reasons(capsys):
    backends = info_json(capsys)["backends"]
    assert list(backends) == [backend.NAME for backend in BACKENDS]
    for facts in backends.values():
        assert facts["runs"] or all(facts["refusals"].values())
    assert backends["reference"]["runs"] == [
        "attention",
        "softmax",
        "ffn",
        "gated_ffn",
        "layer_norm",
        "rms_norm",
        "cross_entropy",
        "linear_cross_entropy",
        "rotary",
    ]


def test_info_text_has_a_line_for_each_backend(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for backend in BACKENDS:
        assert any(line.startswith(f"{backend.NAME} ") for line in lines)


def test_info_says_why_cuda_kernels_are_idle():
    facts = info.collect()
    facts["native"]["cuda"], facts["cuda"]["idle"] = True, ["no NVIDIA driver", "no CUDA in torch"]
    line = re.search(r"^CUDA kernels +(.*)$", info.render(facts), re.M)[1]
    assert line == "built, idle: no NVIDIA driver; no CUDA in torch"
    facts["cuda"]["idle"] = []
    assert re.search(r"^CUDA kernels +built$", info.render(facts), re.M)


def test_info_says_where_tuned_configurations_lie(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = info_json(capsys)["tuned"]
    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    assert tuned == {
        "folder": str(tmp_path / "fastattn"),
        "configurations": dict.fromkeys(gpus, 0),
    }


def test_info_counts_the_tuned_configurations(capsys, monkeypatch, tmp_path):
    from fastattn.kernels import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Imaginary GPU")
    tuning.store("Imaginary GPU", {"softmax_fwd|bfloat16 64": {"num_warps": 4}})
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^tuned kernels +1 for Imaginary GPU, in {tmp_path}/fastattn$", text, re.M)


def test_info_shows_the_environment_in_force():
    code = "from fastattn.cli import main; main(['info', '--json'])"
    done = run_python(code, FASTATTN_BACKEND="reference")
    facts = json.loads(done.stdout)
    assert facts["environment"]["FASTATTN_BACKEND"] == "reference"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == fastattn.__version__


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_exit_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: fastattn" in capsys.readouterr().err


def test_demo_names_the_package_that_is_missing(monkeypatch, capsys):
    original = builtins.__import__

    def without_demo(name, *args, **kwargs):
        if name == "fastattn.demo":
            raise ModuleNotFoundError("No module named 'babel'", name="babel")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_demo)
    assert cli.main(["demo", "--quick"]) == 1
    assert "pip install 'fastattn[demo]'" in capsys.readouterr().err


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes for the GPU's sake")
def test_tune_prints_and_stores_what_it_finds(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["tune", "--ops", "softmax", "--dtype", "float32", "--quick"]) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["kernel", "shape", "class", "heuristic", "tuned", "configuration"]
    row = r"softmax_(fwd|bwd) +float32 64 +\d+\.\d{3} ms +\d+\.\d{3} ms  BLOCK_ROWS=\d+ .*"
    assert [re.fullmatch(row, line)[1] for line in rows] == ["fwd", "bwd"]
    (file,) = (tmp_path / "fastattn").iterdir()
    assert last == f"2 configurations in {file}"


@pytest.mark.parametrize("argv", [["--ops", "nonsense"], ["--dtype", "float64"]])
def test_tune_refuses_what_it_does_not_know(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", *argv])
    assert exit_.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_tune_refuses_to_time_what_is_not_there():
    code = "from fastattn.cli import main; raise SystemExit(main(['tune', '--quick']))"
    done = run_python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith("tuning ") and done.stderr.count("\n") == 1


def test_info_and_tune_import_no_triton():
    code = """
import sys
from fastattn import info, tune
assert "triton" not in sys.modules
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_forced_instruction_set_is_used():
    from fastattn import _C

    for name in {_C.isas_available()[0], _C.isas_available()[-1]}:
        done = run_python("from fastattn import _C; print(_C.isa())", FASTATTN_ISA=name)
        assert done.stdout.strip() == name


def test_an_unknown_instruction_set_fails_the_first_call_and_shows_in_info():
    softmax = "import torch, fastattn; fastattn.softmax(torch.ones(2, 3))"
    done = run_python(softmax, FASTATTN_ISA="sse9")
    assert done.returncode != 0
    assert "ValueError: FASTATTN_ISA must be one of" in done.stderr
    done = run_python("from fastattn.cli import main; main(['info'])", FASTATTN_ISA="sse9")
    assert done.returncode == 0
    assert "FASTATTN_ISA must be one of" in done.stdout


def test_repeated_changes_all_count(monkeypatch):
    pytest.importorskip("tokenizers")
    from fastattn import training

    given = []
    monkeypatch.setattr(training, "run", lambda source, changes, *rest: given.extend(changes) or 0)
    cli.main(["train", "translation", "--set", "a=1", "b=2", "--set", "c=3"])
    assert given == ["a=1", "b=2", "c=3"]


def test_a_checkout_in_the_way_of_the_installed_package_is_named():
    code = (
        "import runpy, sys; sys.modules['fastattn.kernels'] = None; "
        "runpy.run_module('fastattn', run_name='__main__')"
    )
    done = run_python(code)
    assert done.returncode == 1
    assert done.stderr.startswith("fastattn: the sources of a checkout are in the way")
