"""fastattn.cross_entropy on every backend: values and gradients against float64."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.backends.triton import cross_entropy as gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(fn, logits, targets, dloss, **kwargs):
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = fn(x, targets, **kwargs)
    finite = torch.isfinite(loss)
    (loss.masked_fill(~finite, 0.0) * dloss.to(loss.dtype)).sum().backward()
    return {"loss": loss, "dlogits": x.grad}


def check(logits, targets, **kwargs):
    """Hold fastattn.cross_entropy to the float64 formula on these inputs, gradients included."""
    reduced = kwargs.get("reduction", "mean") != "none"
    dloss = torch.randn(() if reduced else targets.shape, dtype=torch.float64)
    exact = run(oracle.cross_entropy, logits.double(), targets, dloss, **kwargs)
    rounded = run(oracle.cross_entropy, logits.float(), targets, dloss, **kwargs)
    rounded["dlogits"] = rounded["dlogits"].to(logits.dtype)
    got = run(fastattn.cross_entropy, logits, targets, dloss, **kwargs)
    assert got["loss"].dtype == torch.float32
    oracle.check_close("loss", got["loss"], exact["loss"], rounded["loss"], torch.float32)
    oracle.check_close(
        "dlogits", got["dlogits"], exact["dlogits"], rounded["dlogits"], logits.dtype
    )


def draw(*shape, ignored=0.2):
    """Logits, and targets of which some are ignored."""
    targets = torch.randint(shape[-1], shape[:-1])
    return torch.randn(shape) * 3, targets.masked_fill(torch.rand(shape[:-1]) < ignored, -100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(7,), (3, 1), (5, 16), (4, 128), (2, 3, 33), (2, 2, 3, 65), (3, 1000), (300, 70)]
)
def test_shapes(backend, shape, label_smoothing, reduction, dtype):
    logits, targets = draw(*shape)
    check(logits.to(dtype), targets, label_smoothing=label_smoothing, reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_vocabulary(backend, label_smoothing):
    logits, targets = draw(3, 40001)
    check(logits, targets, label_smoothing=label_smoothing)
    check(logits.sort(-1).values, targets, label_smoothing=label_smoothing)
    check(logits.bfloat16(), targets, label_smoothing=label_smoothing)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(backend, data):
    most = 4 if backend == "triton" else 9  # the interpreter takes its time
    rows = data.draw(st.lists(st.integers(1, most), min_size=0, max_size=4))
    logits, targets = draw(*rows, data.draw(st.integers(1, 300)))
    targets = targets.masked_fill(targets == -100, -1)
    check(
        logits.to(data.draw(st.sampled_from(DTYPES))),
        targets,
        ignore_index=data.draw(st.sampled_from([-1, -1, 0])) if (targets >= 0).all() else -1,
        label_smoothing=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        reduction=data.draw(st.sampled_from(["none", "mean", "sum"])),
    )


def test_strides(backend):
    logits, targets = draw(6, 40, 50)
    check(logits[:, :-1], targets[:, 1:])
    check(logits.transpose(0, 1), targets.T)
    check(logits[:, ::3, 5:45], targets[:, ::3].clamp(max=39))
    check(logits[:1].expand(6, -1, -1), targets)
    check(logits[..., ::2], targets.clamp(max=24))
    check(logits.mT, targets[:, :1].expand(-1, 50).clamp(max=39))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4), (0, 0)])
def test_empty(backend, shape, reduction):
    logits = torch.randn(shape, requires_grad=True)
    loss = fastattn.cross_entropy(
        logits, torch.zeros(shape[:-1], dtype=torch.long), reduction=reduction
    )
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.eq(0).all()
    loss.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored(backend, reduction, label_smoothing):
    logits = torch.full((3, 9), math.nan, requires_grad=True)
    targets = torch.full((3,), -100)
    loss = fastattn.cross_entropy(
        logits, targets, reduction=reduction, label_smoothing=label_smoothing
    )
    loss.sum().backward()
    assert loss.eq(0).all() and logits.grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logits(backend, dtype):
    logits, targets = draw(6, 5000, ignored=0)
    logits[0, 1000:] = -math.inf
    logits[1, :4999] = -math.inf
    logits[2] = -math.inf
    targets[0], targets[1] = 3, 4999
    targets[5], logits[5, targets[5]] = 7, -math.inf
    logits = logits.to(dtype)
    check(logits, targets, reduction="none")
    x = logits.clone().requires_grad_()
    loss = fastattn.cross_entropy(x, targets, reduction="none")
    loss.sum().backward()
    assert loss[2] == math.inf and x.grad[2].eq(0).all() and x.grad.isfinite().all()
    smoothed = fastattn.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert smoothed[:3].eq(math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_magnitudes(backend, dtype, label_smoothing):
    logits, targets = draw(8, 3000)
    check((logits * 1e3).to(dtype), targets, label_smoothing=label_smoothing)
    check((logits + 1e4).to(dtype), targets, label_smoothing=label_smoothing)


@pytest.mark.parametrize("columns", [5, 5000])
@pytest.mark.parametrize("at", [0, 3, -1, slice(None)])
def test_nan_stays_in_its_row(backend, columns, at):
    logits, targets = draw(3, columns, ignored=0)
    logits[1, at] = math.nan
    logits.requires_grad_()
    loss = fastattn.cross_entropy(logits, targets, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_no_more_than_torch(backend, dtype):
    logits, targets = draw(64, 3000)
    logits = (logits + 20).to(dtype)

    def error(fn, reference):
        x = logits.detach().requires_grad_()
        loss = fn(x, targets, reduction="none")
        loss.double().sum().backward()
        pairs = ((loss, reference[0]), (x.grad, reference[1]))
        return [(y.double() - exact).square().mean().sqrt().item() for y, exact in pairs]

    x = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    exact.sum().backward()
    exact = (exact.detach(), x.grad)
    ours = error(fastattn.cross_entropy, exact)
    theirs = error(torch.nn.functional.cross_entropy, exact)
    slack = 1.5 if dtype == torch.float32 else 1.05
    assert all(own <= slack * other for own, other in zip(ours, theirs))


@pytest.mark.parametrize("target", [-1, 10, 2**40])
def test_target_out_of_range(backend, target, monkeypatch):
    targets = torch.tensor([[1, 2], [-100, target]])
    logits = torch.randn(2, 2, 10, requires_grad=True)
    message = f"targets: expected 0 <= target < 10 .* got {target} at"
    if not targets.is_cuda:
        with pytest.raises(ValueError, match=message):
            fastattn.cross_entropy(logits, targets)
    if backend == "triton":
        # As on a GPU, from which nothing is read back: this row alone is NaN.
        monkeypatch.setattr(gpu, "first_invalid", lambda *_: -1)
        loss = fastattn.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
        loss.sum().backward()
        for one in (loss.isnan(), logits.grad.isnan().all(-1), logits.grad.isnan().any(-1)):
            assert one.tolist() == [[False, False], [False, True]]


LOGITS, TARGETS = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
BAD = {
    "logits: expected a tensor": ((3, TARGETS), {}),
    "targets: expected a tensor": ((LOGITS, [1, 2, 3]), {}),
    "logits: expected one of": ((LOGITS.int(), TARGETS), {}),
    r"logits: expected \(..., vocabulary\)": ((torch.ones(()), TARGETS), {}),
    "targets: expected torch.int64": ((LOGITS, TARGETS.int()), {}),
    r"targets: expected shape \(3,\), got \(2,\)": ((LOGITS, TARGETS[:2]), {}),
    "targets: expected device": ((LOGITS, TARGETS.to("meta")), {}),
    "label_smoothing: expected 0 <=": ((LOGITS, TARGETS), dict(label_smoothing=1.5)),
    "reduction: expected one of none, mean, sum": ((LOGITS, TARGETS), dict(reduction="avg")),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(label_smoothing, reduction):
    logits, targets = draw(2, 5, 7)
    kwargs = dict(label_smoothing=label_smoothing, reduction=reduction)
    assert torch.autograd.gradcheck(
        lambda x: fastattn.cross_entropy(x, targets, **kwargs),
        (logits.double().requires_grad_(),),
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck_and_compile(reduction):
    logits, targets = draw(3, 4, 5)
    logits.requires_grad_()
    args = (logits, targets, -100, 0.1, reduction)
    torch.library.opcheck(torch.ops.fastattn.cross_entropy_fwd, args)

    def call(x):
        return fastattn.cross_entropy(x * 2, targets, reduction=reduction).cos()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), call(logits))
    compiled(logits).sum().backward()
    ours = logits.grad
    (expected,) = torch.autograd.grad(call(logits).sum(), logits)
    torch.testing.assert_close(ours, expected)
