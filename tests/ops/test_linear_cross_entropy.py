"""fastattn.linear_cross_entropy on every backend: values and gradients against float64."""

import math
import subprocess
import sys

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear

import fastattn
from fastattn.backends.cpu import linear_cross_entropy as native
from fastattn.backends.triton import linear_cross_entropy as gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ours(x, weight, bias, targets, **kwargs):
    return fastattn.linear_cross_entropy(x, weight, targets, bias=bias, **kwargs)


def torchs(x, weight, bias, targets, **kwargs):
    return cross_entropy(linear(x, weight, bias), targets, **kwargs)


def run(fn, tensors, targets, dloss, **kwargs):
    """The loss, and the gradient of each tensor that there is."""
    leaves = [
        None
        if one is None
        else one.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for one in tensors
    ]
    loss = fn(*leaves, targets, **kwargs)
    (loss * dloss.to(loss.dtype)).sum().backward()
    grads = zip(("dx", "dweight", "dbias"), leaves, strict=True)
    return {"loss": loss} | {name: one.grad for name, one in grads if one is not None}


def check(x, weight, bias, targets, **kwargs):
    """Hold fastattn.linear_cross_entropy to the float64 formula on these inputs."""
    tensors = (x, weight, bias)
    reduced = kwargs.get("reduction", "mean") != "none"
    dloss = torch.randn(() if reduced else targets.shape, dtype=torch.float64)

    def formula(dtype):
        cast = [None if one is None else one.to(dtype) for one in tensors]
        return run(oracle.linear_cross_entropy, cast, targets, dloss, **kwargs)

    exact, rounded = formula(torch.float64), formula(torch.float32)
    got = run(ours, tensors, targets, dloss, **kwargs)
    assert got["loss"].dtype == torch.float32
    oracle.check_close("loss", got["loss"], exact["loss"], rounded["loss"], torch.float32)
    for name in list(exact)[1:]:
        assert got[name].dtype == x.dtype
        oracle.check_close(name, got[name], exact[name], rounded[name].to(x.dtype), x.dtype)


def draw(*shape, vocabulary, dtype=torch.float32, ignored=0.2):
    """x, weight, bias, and targets of which some are ignored."""
    d_model = shape[-1]
    targets = torch.randint(vocabulary, shape[:-1])
    tensors = (
        torch.randn(shape),
        torch.randn(vocabulary, d_model) * 3 / max(d_model, 1) ** 0.5,
        torch.randn(vocabulary),
    )
    ignore = torch.rand(shape[:-1]) < ignored
    return *(one.to(dtype) for one in tensors), targets.masked_fill(ignore, -100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape, vocabulary",
    [((7,), 5), ((3, 1), 1), ((5, 16), 128), ((2, 3, 33), 65), ((300, 20), 70), ((40, 24), 1000)],
)
def test_shapes(backend, shape, vocabulary, label_smoothing, reduction, dtype):
    x, weight, bias, targets = draw(*shape, vocabulary=vocabulary, dtype=dtype)
    kwargs = dict(label_smoothing=label_smoothing, reduction=reduction)
    check(x, weight, bias, targets, **kwargs)
    check(x, weight, None, targets, **kwargs)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_several_chunks(backend, reduction, monkeypatch):
    """More rows than the logits are kept for at a time, in parts of unequal size."""
    monkeypatch.setattr(native, "_CHUNK_BYTES", 1)
    for rows, dtype in ((1, torch.float32), (100, torch.float32), (288, torch.bfloat16)):
        for module in (native, gpu):
            monkeypatch.setattr(module, "_CHUNK_ROWS", rows)
        tensors = draw(min(631, 40 * rows), 16, vocabulary=1100, dtype=dtype)
        check(*tensors, reduction=reduction, label_smoothing=0.1)
    x, weight, bias, targets = draw(2000, 8, vocabulary=300)
    check(x, weight, bias, targets.masked_fill(torch.arange(2000) > 900, -100), reduction=reduction)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(backend, data):
    most = 5 if backend == "triton" else 9  # the interpreter takes its time
    rows = data.draw(st.lists(st.integers(1, most), min_size=0, max_size=3))
    vocabulary = data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    d_model = data.draw(st.integers(1, 90))
    x, weight, bias, targets = draw(*rows, d_model, vocabulary=vocabulary, dtype=dtype)
    check(
        x,
        weight,
        bias if data.draw(st.booleans()) else None,
        targets.masked_fill(targets == -100, -1),
        ignore_index=-1,
        label_smoothing=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        reduction=data.draw(st.sampled_from(["none", "mean", "sum"])),
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_strides(backend, reduction):
    def hold(*args):
        check(*args, reduction=reduction)

    x, weight, bias, targets = draw(6, 40, 50, vocabulary=70)
    hold(x[:, :-1], weight, bias, targets[:, 1:])
    hold(x.transpose(0, 1), weight, bias, targets.T)
    hold(x[..., ::2], weight[:, 25:], bias, targets)
    hold(x[:1, :, :1].expand(6, -1, 50), weight, bias, targets)
    hold(x, weight.T.contiguous().T, bias, targets)
    hold(x, weight[::2], bias[1::2], targets.clamp(max=34))
    hold(x.mT[..., :20], weight[:, 5:45:2], bias, targets[:, :1].expand(-1, 50))
    hold(x[..., 3:4], weight[:, 7:8], bias[:1].expand(70), targets)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_on_their_own(backend, reduction, needed):
    *tensors, targets = draw(30, 16, vocabulary=90)
    dloss = torch.tensor(-0.7)
    whole = run(ours, tensors, targets, dloss, reduction=reduction)
    leaves = [one.requires_grad_(need) for one, need in zip(tensors, needed, strict=True)]
    (ours(*leaves, targets, reduction=reduction) * dloss).sum().backward()
    for one, name in zip(leaves, ("dx", "dweight", "dbias"), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, whole[name], rtol=0, atol=0)
        else:
            assert one.grad is None


def test_no_gradient_gives_the_same_loss(backend):
    *tensors, targets = draw(1000, 16, vocabulary=300)
    loss = ours(*tensors, targets)
    with_gradient = run(ours, tensors, targets, torch.tensor(1.0))["loss"]
    torch.testing.assert_close(loss, with_gradient.detach())


def test_second_backward(backend):
    *tensors, targets = draw(30, 16, vocabulary=90)
    leaves = [one.requires_grad_() for one in tensors]
    loss = ours(*leaves, targets)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_loss_scale_meets_all_digits(backend):
    """A float16 gradient that is too small before it is scaled."""
    *tensors, targets = draw(64, 16, vocabulary=90, dtype=torch.float16)
    scale = torch.tensor(2.0**12)
    got = run(lambda *args: ours(*args) * 2.0**-20, tensors, targets, scale * 2.0**20)
    exact = run(
        oracle.linear_cross_entropy, [one.double() for one in tensors], targets, scale.double()
    )
    for name in ("dx", "dweight", "dbias"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4)])
def test_empty(backend, shape, reduction):
    leaves = [torch.randn(size, requires_grad=True) for size in (shape, (7, shape[-1]), (7,))]
    targets = torch.zeros(shape[:-1], dtype=torch.long)
    loss = ours(*leaves, targets, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert loss.eq(0).all()
    loss.sum().backward()
    assert all(one.grad.shape == one.shape and one.grad.eq(0).all() for one in leaves)


@pytest.mark.parametrize("sizes", [(3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_no_columns(sizes):
    rows, d_model, vocabulary = sizes
    x, weight = torch.ones(rows, d_model, requires_grad=True), torch.ones(vocabulary, d_model)
    targets = torch.full((rows,), 0 if vocabulary else -100)
    loss = fastattn.linear_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(math.log(max(vocabulary, 1)))
    loss.backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows(backend, reduction, label_smoothing):
    kwargs = dict(reduction=reduction, label_smoothing=label_smoothing)
    x, weight, bias, targets = draw(40, 9, vocabulary=80)
    x[targets == -100] = math.nan
    got = run(ours, (x, weight, bias), targets, torch.tensor(1.0), **kwargs)
    assert all(one.isfinite().all() for one in got.values())
    assert got["dx"][targets == -100].eq(0).all()
    check(x, weight, bias, targets, **kwargs)
    nothing = torch.full_like(targets, -100)
    got = run(ours, (x, weight, bias), nothing, torch.tensor(1.0), **kwargs)
    assert all(one.eq(0).all() for one in got.values())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shift", [0.0, -1000.0])
def test_hidden_classes(backend, shift, reduction):
    """A bias of -inf hides classes, whole blocks of them too, wherever the other logits are."""
    x, weight, bias, targets = draw(20, 16, vocabulary=1000)
    bias += shift
    bias[100:700] = -math.inf
    check(x, weight, bias, targets.where(targets < 0, targets % 100), reduction=reduction)
    got = run(ours, (x, weight, bias), targets * 0 + 3, torch.tensor(1.0), reduction=reduction)
    assert all(one.isfinite().all() for one in got.values())
    assert got["dbias"][100:700].eq(0).all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_class_left(backend, reduction):
    x, weight, bias, targets = draw(5, 16, vocabulary=100, ignored=0)
    bias = torch.full_like(bias, -math.inf)
    got = run(ours, (x, weight, bias), targets, torch.tensor(1.0), reduction=reduction)
    assert got["loss"].eq(math.inf).all()
    assert all(got[name].eq(0).all() for name in ("dx", "dweight", "dbias"))
    smoothed = ours(x, weight, bias, targets, reduction=reduction, label_smoothing=0.1)
    assert smoothed.eq(math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_magnitudes(backend, dtype, label_smoothing):
    x, weight, bias, targets = draw(8, 32, vocabulary=2000, dtype=dtype)
    check(x * 300, weight, bias, targets, label_smoothing=label_smoothing)
    check(x, weight, bias + 1e4, targets, label_smoothing=label_smoothing)


@pytest.mark.parametrize("at", [0, 3, -1])
def test_nan_stays_in_its_row(backend, at):
    x, weight, _, targets = draw(3, 40, vocabulary=500, ignored=0)
    x[1, at] = math.nan
    x.requires_grad_()
    loss = fastattn.linear_cross_entropy(x, weight, targets, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert x.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_error_no_more_than_torch(backend, dtype, reduction):
    *tensors, targets = draw(700, 96, vocabulary=1500, dtype=dtype)
    dloss = torch.tensor(1.0) if reduction == "mean" else torch.ones(700)
    exact = run(torchs, [one.double() for one in tensors], targets, dloss, reduction=reduction)

    def errors(fn):
        got = run(fn, tensors, targets, dloss, reduction=reduction)
        return {
            name: (one.double() - exact[name]).square().mean().sqrt().item()
            for name, one in got.items()
        }

    slack = 1.5 if dtype == torch.float32 else 1.05
    own, theirs = errors(ours), errors(torchs)
    # The mean is one number, which may happen to be exact.
    floor = {"loss": 1e-6 if reduction == "mean" else 0.0}
    assert {
        name: (own[name], theirs[name])
        for name in own
        if own[name] > slack * theirs[name] + floor.get(name, 0.0)
    } == {}


def test_same_bits_at_any_number_of_threads(backend):
    *tensors, targets = draw(700, 40, vocabulary=2000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(ours, tensors, targets, torch.tensor(1.0)))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        for other in results[1:]:
            assert all(torch.equal(other[name], one) for name, one in results[0].items())


PEAK = """
import sys
from pathlib import Path
import torch
import fastattn
def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024
def step(rows, d_model, vocabulary):
    x, weight = torch.randn(rows, d_model), torch.randn(vocabulary, d_model) / 16
    targets = torch.randint(vocabulary, (rows,))
    x.requires_grad_(), weight.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    fastattn.linear_cross_entropy(x, weight, targets).backward()
    return memory("VmHWM") - before - x.grad.nbytes - weight.grad.nbytes
step(8, 16, 32)
print(step(*map(int, sys.argv[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(native.native._C is None, reason="of the native kernels")
def test_logits_are_never_whole_in_memory():
    """The process grows by less than a tenth of what torch's pair needs."""
    rows, d_model, vocabulary = 4096, 512, 32000
    sizes = [str(size) for size in (rows, d_model, vocabulary)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *sizes], capture_output=True, text=True, check=True
    )
    # The logits, and the log-softmax that torch keeps for its backward.
    pair = 2 * rows * vocabulary * 4
    assert int(done.stdout) < pair / 10


@pytest.mark.parametrize("target", [-1, 10, 2**40])
def test_target_out_of_range(backend, target, monkeypatch):
    targets = torch.tensor([[1, 2], [-100, target]])
    x, weight = torch.randn(2, 2, 4, requires_grad=True), torch.randn(10, 4)
    message = f"targets: expected 0 <= target < 10 .* got {target} at row 3"
    if not targets.is_cuda:
        with pytest.raises(ValueError, match=message):
            fastattn.linear_cross_entropy(x, weight, targets)
    if backend == "triton":
        # As on a GPU, from which nothing is read back: this row alone is NaN.
        monkeypatch.setattr(gpu, "first_invalid", lambda *_: -1)
        loss = fastattn.linear_cross_entropy(x, weight, targets, reduction="none")
        loss.sum().backward()
        for one in (loss.isnan(), x.grad.isnan().all(-1), x.grad.isnan().any(-1)):
            assert one.tolist() == [[False, False], [False, True]]
        assert fastattn.linear_cross_entropy(x, weight, targets).isnan()


X, W, TARGETS = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.long)
BAD = {
    "x: expected a tensor": ((3, W, TARGETS), {}),
    "weight: expected a tensor": ((X, None, TARGETS), {}),
    "targets: expected a tensor": ((X, W, [1, 2, 3]), {}),
    "x: expected one of": ((X.int(), W, TARGETS), {}),
    r"x: expected \(..., d_model\)": ((torch.ones(()), W, TARGETS), {}),
    "weight: expected torch.float32 as x": ((X, W.double(), TARGETS), {}),
    r"weight: expected shape \(5, 4\), got \(5, 3\)": ((X, W[:, :3], TARGETS), {}),
    r"weight: expected shape \(4, 4\), got \(4,\)": ((X, W[0], TARGETS), {}),
    "weight: expected device": ((X, W.to("meta"), TARGETS), {}),
    r"bias: expected shape \(5,\), got \(4,\)": ((X, W, TARGETS), dict(bias=torch.ones(4))),
    "bias: expected torch.float32 as x": ((X, W, TARGETS), dict(bias=torch.ones(5).half())),
    "targets: expected torch.int64": ((X, W, TARGETS.int()), {}),
    r"targets: expected shape \(3,\), got \(2,\)": ((X, W, TARGETS[:2]), {}),
    "targets: expected device": ((X, W, TARGETS.to("meta")), {}),
    "label_smoothing: expected 0 <=": ((X, W, TARGETS), dict(label_smoothing=1.5)),
    "reduction: expected one of none, mean, sum": ((X, W, TARGETS), dict(reduction="avg")),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.linear_cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(label_smoothing, reduction):
    *tensors, targets = draw(2, 3, 4, vocabulary=7, dtype=torch.float64)
    kwargs = dict(label_smoothing=label_smoothing, reduction=reduction)
    assert torch.autograd.gradcheck(
        lambda *leaves: ours(*leaves, targets, **kwargs),
        [one.requires_grad_() for one in tensors],
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(reduction):
    *tensors, targets = draw(12, 16, vocabulary=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(ours, tensors, targets, torch.tensor(1.0), reduction=reduction)
    low = run(
        ours, [one.bfloat16() for one in tensors], targets, torch.tensor(1.0), reduction=reduction
    )
    for name, one in got.items():
        assert one.dtype == torch.float32
        assert torch.equal(one, low[name].float())


@pytest.mark.parametrize("grads", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction, grads):
    x, weight, bias, targets = draw(12, 4, vocabulary=5)
    tensors = [one.requires_grad_() for one in (x, weight, bias)]
    flags = (False,) * 3 if reduction == "none" else grads
    args = (*tensors, targets, -100, 0.1, reduction, *flags)
    torch.library.opcheck(torch.ops.fastattn.linear_cross_entropy_fwd, args)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(dtype, reduction):
    *tensors, targets = draw(3, 4, 5, vocabulary=6, dtype=dtype)
    leaves = [one.requires_grad_() for one in tensors]

    def call(x, weight, bias):
        return ours(x * 2, weight, bias, targets, reduction=reduction).cos()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), call(*leaves))
    loss, expected = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )
