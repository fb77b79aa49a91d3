"""bench/gpu.py runs where there is no GPU only if it is told to, and then times nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent.parent / "bench"


def run(*arguments):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "gpu.py", *arguments], cwd=BENCH, env=env, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run("--ops", "softmax")
    assert done.returncode == 2
    assert done.stderr == "gpu.py measures on a GPU, and torch sees none: try --dry-run\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_makes_every_call(tmp_path):
    file = tmp_path / "gpu.json"
    done = run("--dry-run", "--ops", "decode", "softmax", "ffn", "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    contents = json.loads(file.read_text())
    assert contents["machine"]["versions"]["torch"] == torch.__version__
    assert {row["op"] for row in contents["rows"]} == {"attention", "softmax", "ffn", "gated_ffn"}
    for row in contents["rows"]:
        assert "failed" not in row and row["errors"]["fastattn"] < 0.05
