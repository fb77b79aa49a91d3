"""Tuned configurations: found, kept in a file, and taken only where they still fit."""

import json
import timeit

import pytest
import torch
import triton
from fastattn.kernels import tuning
from fastattn.kernels.launch import INTERPRETED

import fastattn

GPU = "Imaginary GPU 80GB"
A, B, C = ({"BLOCK": block, "num_warps": 4} for block in (16, 32, 64))
CLASS = (torch.bfloat16, 1024)
DEVICE = "cpu" if INTERPRETED else "cuda"


class OnGPU:
    """Stands for a tensor on a GPU: `choose` asks for its device alone."""

    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the tuned configurations, empty, with nothing remembered of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "fastattn"
    forget()


def forget():
    tuning._known.clear()
    tuning._of_device.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU."""
    monkeypatch.setattr(tuning, "gpu_name", lambda device: GPU)


def choose(*candidates):
    return tuning.choose("softmax_fwd", CLASS, candidates, OnGPU())


def test_without_a_file_the_heuristic_decides(gpu, cache):
    assert choose(A, B) is A
    assert not cache.exists()


def test_what_is_stored_is_chosen(gpu, cache):
    assert choose(A, B) is A
    tuning.store(GPU, {"softmax_fwd|bfloat16 1024": B})
    assert choose(A, B) == B
    forget()
    assert choose(A, B) == B
    assert tuning.choose("softmax_fwd", (torch.float16, 1024), [A, B], OnGPU()) is A
    assert tuning.choose("softmax_bwd", CLASS, [A, B], OnGPU()) is A


def test_files_name_the_gpu_and_both_versions(gpu, cache):
    tuning.store(GPU, {"a|1": A})
    (file,) = cache.iterdir()
    assert file == tuning.path(GPU)
    installed = (triton.__version__.partition("+")[0], fastattn.__version__)
    assert file.name == "Imaginary_GPU_80GB-triton-{}-fastattn-{}.json".format(*installed)
    assert tuning.path(GPU + "/x").parent == cache


def test_the_home_folder_holds_the_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / ".cache/fastattn"


def test_storing_keeps_what_is_there(gpu):
    tuning.store(GPU, {"a|1": A, "b|1": A})
    tuning.store(GPU, {"b|1": B, "c|1": C})
    assert tuning.load(GPU) == {"a|1": A, "b|1": B, "c|1": C}


def test_a_configuration_that_is_no_candidate_any_more_is_ignored(gpu):
    tuning.store(GPU, {"softmax_fwd|bfloat16 1024": C})
    assert choose(A, B) is A
    assert choose(A, C) == C


BROKEN = {
    "not JSON": "{",
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "a number": "3",
    "no versions": '{"configurations": {}}',
    "another GPU": '{"made_for": {"gpu": "another"}, "configurations": {}}',
}


@pytest.mark.parametrize("contents", BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_file_is_ignored_with_a_warning(gpu, cache, contents):
    cache.mkdir()
    file = tuning.path(GPU)
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.warns(UserWarning, match="tuned configurations ignored: .*Imaginary"):
        assert choose(A, B) is A
    assert choose(A, B) is A  # and no second warning
    with pytest.warns(UserWarning, match="ignored"):
        tuning.store(GPU, {"softmax_fwd|bfloat16 1024": B})
    assert choose(A, B) == B


@pytest.mark.parametrize("configurations", ['["a"]', '{"softmax_fwd|bfloat16 1024": 3}', "null"])
def test_a_file_of_another_form_is_ignored(gpu, configurations):
    tuning.store(GPU, {"softmax_fwd|bfloat16 1024": B})
    file = tuning.path(GPU)
    contents = json.loads(file.read_text())
    file.write_text(json.dumps(contents | {"configurations": json.loads(configurations)}))
    with pytest.warns(UserWarning, match="ignored"):
        assert choose(A, B) is A


def test_a_file_that_cannot_be_written_leaves_the_old_one(gpu, cache, monkeypatch):
    tuning.store(GPU, {"a|1": A})
    with pytest.raises(TypeError):
        tuning.store(GPU, {"a|1": {"BLOCK": object()}})
    monkeypatch.setattr(tuning.os, "replace", lambda *_: pytest.fail("replaced"))
    with pytest.raises(TypeError):
        tuning.store(GPU, {"a|1": {"BLOCK": object()}})
    assert tuning.load(GPU) == {"a|1": A}
    assert list(cache.iterdir()) == [tuning.path(GPU)]


def test_a_choice_costs_a_microsecond(gpu):
    tuning.store(GPU, {"softmax_fwd|bfloat16 1024": C})
    candidates, tensor = [A, B, C], OnGPU()
    assert tuning.choose("softmax_fwd", CLASS, candidates, tensor) == C
    seconds = min(
        timeit.repeat(
            lambda: tuning.choose("softmax_fwd", CLASS, candidates, tensor), number=2000, repeat=9
        )
    )
    # Ten times what it should take: machines differ, and a file read each time takes far more.
    assert seconds / 2000 < 10e-6


def test_a_forced_choice_is_taken_where_it_is_a_candidate():
    tensor = torch.empty(1)
    with tuning.deciding({("softmax_fwd", CLASS): B}) as decisions:
        assert tuning.choose("softmax_fwd", CLASS, [A, B], tensor) is B
        assert tuning.choose("softmax_bwd", CLASS, [A, B], tensor) is A
        assert tuning.choose("softmax_fwd", CLASS, [A, C], tensor) is A
    assert decisions == {
        ("softmax_fwd", CLASS): ([A, B], None),
        ("softmax_bwd", CLASS): ([A, B], None),
    }
    assert tuning.choose("softmax_fwd", CLASS, [A, B], tensor) is A


def softmax_call():
    x = torch.randn(8, 64, device=DEVICE, requires_grad=True)

    def call():
        with fastattn.use_backend("triton"):
            fastattn.softmax(x).sum().backward()

    return call


def test_tuning_a_call_stores_the_fastest_of_each_decision():
    tuned = tuning.tune(softmax_call())
    assert [name for name, _ in tuned] == ["softmax_fwd", "softmax_bwd"]
    for name, shape_class in tuned:
        assert shape_class == (torch.float32, 64)
        found = tuned[name, shape_class]
        assert 0 < found.seconds <= found.heuristic
    stored = tuning.load(tuning.gpu_name(None if INTERPRETED else 0))
    assert stored == {tuning.text(*key): found.config for key, found in tuned.items()}


@pytest.mark.parametrize(
    "error",
    [
        triton.OutOfResources(300_000, 232_448, "shared memory"),
        triton.CompilationError("source", None, "no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_configuration_that_does_not_fit_is_never_the_fastest(error):
    tried = []

    def call():
        config = tuning.choose("softmax_fwd", CLASS, [A, B, C], torch.empty(1, device=DEVICE))
        tried.append(config["BLOCK"])
        if config is not A:
            raise error

    ((key, found),) = tuning.tune(call).items()
    assert {16, 32, 64} == set(tried)
    assert key == ("softmax_fwd", CLASS) and found.config is A
    assert found.seconds == found.heuristic


def test_errors_of_the_call_itself_are_raised():
    def call():
        if tuning.choose("a", (), [A, B], torch.empty(1, device=DEVICE)) is B:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tuning.tune(call)
    assert tuning.choose("a", (), [A, B], torch.empty(1, device=DEVICE)) is A


def test_a_decision_without_a_choice_is_not_timed(cache):
    assert tuning.tune(lambda: tuning.choose("a", (), [A], torch.empty(1, device=DEVICE))) == {}
    assert not cache.exists()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes what is tuned")
def test_the_interpreter_takes_the_heuristics():
    tuning.store("interpreter", {"softmax_fwd|bfloat16 1024": B})
    assert tuning.choose("softmax_fwd", CLASS, [A, B], torch.empty(1)) is A
    assert tuning.choose("softmax_fwd", CLASS, [A, B], OnGPU()) is A
