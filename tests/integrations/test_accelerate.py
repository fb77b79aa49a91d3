"""What accelerate swaps, keeps and reports, and that restore leaves no trace."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastattn
import fastattn.nn

D_MODEL, HEADS = 16, 4
SWAPPED = 9  # layers of Model


class OwnAttention(nn.MultiheadAttention):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True)
        self.again = self.attention
        self.head = nn.Linear(D_MODEL, 3)

    def forward(self, x):
        x = self.encoder(x)
        return self.head(self.again(x, x, x)[0])


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x():
    return torch.randn(2, 5, D_MODEL)


def test_swaps_in_place_and_restores(model, x):
    before, expected, state = types(model), model(x), dict(model.__dict__)
    objects = dict(model.named_modules()), dict(model.named_parameters())
    names = list(model.state_dict())
    model.encoder.layers[0].eval()
    model.attention.in_proj_weight.requires_grad_(False)

    report = fastattn.accelerate(model)
    assert [entry.name for entry in report.swapped] == [
        "encoder.layers.0",
        "encoder.layers.0.self_attn",
        "encoder.layers.0.norm1",
        "encoder.layers.0.norm2",
        "encoder.layers.1",
        "encoder.layers.1.self_attn",
        "encoder.layers.1.norm1",
        "encoder.layers.1.norm2",
        "attention",
    ]
    assert not report.skipped
    assert type(model.encoder.layers[0]) is fastattn.nn.TransformerEncoderLayer
    assert type(model.again) is fastattn.nn.MultiheadAttention
    assert (dict(model.named_modules()), dict(model.named_parameters())) == objects
    assert list(model.state_dict()) == names
    assert not model.encoder.layers[0].training and model.encoder.layers[1].training
    assert not model.attention.in_proj_weight.requires_grad
    torch.testing.assert_close(model(x), expected)

    assert fastattn.restore(model) == SWAPPED
    assert types(model) == before and model.__dict__ == state
    assert all("fastattn" not in key for m in model.modules() for key in m.__dict__)
    torch.testing.assert_close(model(x), expected)
    assert fastattn.restore(model) == 0


def test_twice_is_once(model):
    before = types(model)
    first, second = fastattn.accelerate(model), fastattn.accelerate(model)
    assert len(first.swapped) == SWAPPED and not second.swapped and not second.skipped
    with fastattn.accelerate(model):
        pass
    assert type(model.attention) is fastattn.nn.MultiheadAttention
    first.restore()
    first.restore()
    assert types(model) == before


def test_context_manager_restores_after_an_exception(model, x):
    before, expected = types(model), model(x)
    with pytest.raises(KeyError), fastattn.accelerate(model) as report:
        assert len(report.swapped) == SWAPPED
        torch.testing.assert_close(model(x), expected)
        raise KeyError
    assert types(model) == before


@pytest.mark.parametrize(
    "layer, kind",
    [
        (nn.MultiheadAttention(D_MODEL, HEADS), fastattn.nn.MultiheadAttention),
        (nn.TransformerEncoderLayer(D_MODEL, HEADS, 8), fastattn.nn.TransformerEncoderLayer),
        (nn.TransformerDecoderLayer(D_MODEL, HEADS, 8), fastattn.nn.TransformerDecoderLayer),
        (nn.LayerNorm(D_MODEL), fastattn.nn.LayerNorm),
        (nn.RMSNorm(D_MODEL), fastattn.nn.RMSNorm),
    ],
)
def test_model_itself(layer, kind):
    original = type(layer)
    report = fastattn.accelerate(layer)
    assert type(layer) is kind and report.swapped[0].name == ""
    assert "(the model)" in str(report)
    fastattn.restore(layer)
    assert type(layer) is original


def test_report_says_what_was_kept_and_why(model):
    model.own = OwnAttention(D_MODEL, HEADS)
    model.patched = nn.MultiheadAttention(D_MODEL, HEADS)
    model.patched.forward = lambda *args: None
    model.parametrized = nn.MultiheadAttention(D_MODEL, HEADS)
    nn.utils.parametrizations.weight_norm(model.parametrized, "in_proj_weight")
    report = fastattn.accelerate(model)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons.keys() == {"own", "patched", "parametrized"}
    assert "subclass of torch.nn.MultiheadAttention" in reasons["own"]
    assert "forward" in reasons["patched"]
    assert "parametrized" in reasons["parametrized"]
    text = str(report)
    assert f"{SWAPPED} swapped, 3 kept" in text
    assert any("encoder.layers.0.self_attn " in line for line in text.splitlines())
    assert any(line.startswith("own") and "kept" in line for line in text.splitlines())
    assert f"{SWAPPED} swapped" in repr(report)
    assert str(fastattn.accelerate(nn.Linear(2, 2))) == "no layer that fastattn knows"


def test_layers_of_fastattn_stay(model):
    model.ours = fastattn.nn.MultiheadAttention(D_MODEL, HEADS)
    report = fastattn.accelerate(model)
    assert "ours" not in [entry.name for entry in [*report.swapped, *report.skipped]]
    fastattn.restore(model)
    assert type(model.ours) is fastattn.nn.MultiheadAttention


def test_optimizer_keeps_working(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastattn.accelerate(model)
    before = model(x).square().mean()
    before.backward()
    optimizer.step()
    assert model(x).square().mean() < before


def test_hooks_stay(model, x):
    seen = []
    model.attention.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.encoder.layers[0].register_forward_hook(lambda *args: seen.append("after"))
    with fastattn.accelerate(model):
        model(x)
    assert seen == ["after", "before"]


def test_copies_and_files(model, x):
    fastattn.accelerate(model)
    expected = model(x)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, pickled, loaded):
        assert types(other) == types(model)
        assert torch.equal(other(x), expected)
        assert fastattn.restore(other) == SWAPPED
    stock = Model()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(stock(x), expected)


def test_compiled_before_and_after(model, x):
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with fastattn.accelerate(compiled) as report:
        assert len(report.swapped) == SWAPPED
        torch.testing.assert_close(compiled(x), expected)
        assert torch.compile(model, fullgraph=True, backend="aot_eager")(x).shape == expected.shape
    torch.testing.assert_close(compiled(x), expected)


def test_parametrized_after_the_swap(model, x):
    fastattn.accelerate(model)
    expected = model(x)
    nn.utils.parametrizations.weight_norm(model.attention, "in_proj_weight")
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(RuntimeError, match="ParametrizedMultiheadAttention"):
        fastattn.restore(model)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    nn.utils.parametrize.remove_parametrizations(model.attention, "in_proj_weight")
    assert fastattn.restore(model) == 1


def test_explain_names_the_backend(model, x):
    assert not fastattn.explain(model, x)
    with fastattn.accelerate(model):
        assert len(fastattn.explain(model, x)) >= 5


@pytest.mark.parametrize("function", [fastattn.accelerate, fastattn.restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="^model: expected torch.nn.Module, got int"):
        function(1)


class OwnSequential(nn.Sequential):
    pass


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_feed_forward_in_a_sequential(activation):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), activation, nn.Dropout(0.5), nn.Linear(12, 6)]
    model = nn.Sequential(nn.Flatten(1), *layers, nn.Tanh(), nn.Linear(6, 8), activation, layers[3])
    model[8] = nn.Linear(8, 6)
    model.eval()
    x = torch.randn(3, 2, 3, requires_grad=True)

    def outcome():
        out = model(x)
        return out, torch.autograd.grad(out.square().sum(), (x, *model.parameters()))

    expected = outcome()
    with fastattn.accelerate(model) as report:
        assert [entry.replacement for entry in report.swapped] == [fastattn.nn.Sequential]
        torch.testing.assert_close(outcome(), expected)
        ops = [choice.problem.op for choice in fastattn.explain(model, x)]
        assert len(ops) == 2 and all(op.startswith("ffn") for op in ops)
        seen = []
        handle = model[2].register_forward_hook(lambda *args: seen.append("hook"))
        torch.testing.assert_close(outcome(), expected)
        assert seen == ["hook"] * 2  # the activation is in both
        handle.remove()
    assert type(model) is nn.Sequential


def test_sequentials_without_a_feed_forward_are_no_concern():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), OwnSequential(nn.ReLU()))
    report = fastattn.accelerate(model)
    assert not report.swapped and not report.skipped
    own = OwnSequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert "subclass of torch.nn.Sequential" in fastattn.accelerate(own).skipped[0].reason
