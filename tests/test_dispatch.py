"""The choice of a backend: forcing, refusing, explaining."""

import os
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import BACKENDS


def call(dtype=torch.float32):
    q = torch.randn(1, 2, 4, 8, dtype=dtype)
    return fastattn.attention(q, q, q)


def test_backends_share_one_shape():
    names = [backend.NAME for backend in BACKENDS]
    assert names[-1] == "reference" and len(set(names)) == len(names)
    for backend in BACKENDS:
        for op in ("attention", "softmax", "ffn"):
            assert callable(getattr(backend, f"{op}_fwd")), backend.NAME
            assert callable(getattr(backend, f"{op}_bwd")), backend.NAME


def test_forced_backend_runs_and_is_restored():
    with fastattn.use_backend("reference"):
        assert fastattn.explain(call)[0].backend == "reference"
        with fastattn.use_backend(None):
            assert dispatch.forced_backend() is None
        assert dispatch.forced_backend() == "reference"
    with pytest.raises(ZeroDivisionError), fastattn.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.forced_backend() == os.environ.get("FASTATTN_BACKEND")


def test_forced_backend_never_falls_back():
    with (
        fastattn.use_backend("cpu"),
        pytest.raises(fastattn.BackendError, match="attention_fwd cannot run on cpu:\n  cpu: "),
    ):
        call(torch.float64)


def test_unknown_backend():
    with pytest.raises(ValueError, match="name: expected one of .*reference, got 'tpu'"):
        fastattn.use_backend("tpu").__enter__()


def test_backward_runs_where_the_forward_ran():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with fastattn.use_backend("reference"):
        out = fastattn.attention(q, q, q)
    choices = fastattn.explain(out.sum().backward)
    assert [(c.problem.op, c.backend) for c in choices] == [("attention_bwd", "reference")]


def test_explain_names_backend_and_refusals():
    text = str(fastattn.explain(call, torch.float64))
    assert text.startswith("attention_fwd: reference")
    assert "not cpu: " in text and "float64" in text
    twice = str(fastattn.explain(lambda: (call(), call())))
    assert "attention_fwd (2 calls):" in twice
    assert str(fastattn.explain(lambda: None)) == "no fastattn call was made"


def test_explain_reports_a_refused_call():
    with fastattn.use_backend("cpu"):
        (choice,) = fastattn.explain(call, torch.float64)
    assert choice.backend is None and choice.refusals["cpu"]


def test_bad_arguments_are_no_refusals():
    with pytest.raises(ValueError, match="k: expected head_dim"):
        fastattn.explain(fastattn.attention, *(torch.randn(1, 1, 2, d) for d in (3, 4, 4)))


@pytest.mark.parametrize("name", ["reference", "nonsense"])
def test_environment_variable(name):
    code = "import fastattn.dispatch as d; print(d.forced_backend())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FASTATTN_BACKEND": name},
        capture_output=True,
        text=True,
    )
    if name == "reference":
        assert done.stdout.strip() == "reference"
    else:
        assert done.returncode and "FASTATTN_BACKEND: expected one of" in done.stderr
