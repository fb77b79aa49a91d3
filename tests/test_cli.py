"""The command line: info in both forms, and errors in one line."""

import builtins
import json
import os
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.backends import BACKENDS


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
