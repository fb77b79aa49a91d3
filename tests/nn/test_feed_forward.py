"""FeedForward and GatedFeedForward against plain modules, and when they are fused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import FeedForward, GatedFeedForward
from fastattn.nn.feed_forward import activation_name

D_MODEL, D_FF = 12, 20
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def ffn_calls(module, *args):
    """How many fused feed-forward calls one forward makes."""
    choices = fastattn.explain(module, *args)
    return sum(choice.problem.op.endswith("ffn_fwd") for choice in choices)


def check_gradients(module, expected, x):
    x = x.requires_grad_()
    leaves = [x, *module.parameters()]
    dy = torch.randn(expected(x).shape)
    actual = torch.autograd.grad(module(x), leaves, dy)
    for one, other in zip(actual, torch.autograd.grad(expected(x), leaves, dy), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward(activation, bias):
    module = FeedForward(D_MODEL, D_FF, activation=activation, bias=bias)
    x = torch.randn(2, 3, D_MODEL)
    check_gradients(module, lambda x: module.linear2(ACTIVATIONS[activation](module.linear1(x))), x)
    assert ffn_calls(module, x) == 1
    layer = nn.TransformerEncoderLayer(D_MODEL, 2, D_FF, bias=bias)
    module.load_state_dict({n: p for n, p in layer.state_dict().items() if n.startswith("linear")})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_feed_forward(activation):
    module = GatedFeedForward(D_MODEL, D_FF, activation)

    def expected(x):
        gate = ACTIVATIONS[activation](module.gate_proj(x))
        return module.down_proj(gate * module.up_proj(x))

    x = torch.randn(2, 3, D_MODEL)
    check_gradients(module, expected, x)
    assert ffn_calls(module, x) == 1
    module.up_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(x), expected(x))
    assert ffn_calls(module, x) == 0


def test_dropout():
    module = FeedForward(D_MODEL, D_FF, dropout=0.5)
    x = torch.randn(4, D_MODEL)
    torch.manual_seed(0)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(0)
    assert torch.equal(first, module(x))
    module.dropout.p = 1.0
    torch.testing.assert_close(module(x), module.linear2.bias.expand(4, D_MODEL))
    module.eval()
    torch.testing.assert_close(module(x), module.linear2(F.relu(module.linear1(x))))


def test_any_callable_activation():
    module = FeedForward(D_MODEL, D_FF, activation=torch.tanh)
    x = torch.randn(4, D_MODEL)
    torch.testing.assert_close(module(x), module.linear2(torch.tanh(module.linear1(x))))
    assert ffn_calls(module, x) == 0


@pytest.mark.parametrize(
    "activation, name",
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), None),
        (nn.LeakyReLU(), None),
        (lambda x: x, None),
    ],
)
def test_activation_names(activation, name):
    assert activation_name(activation) == name


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.linear1.register_forward_hook(lambda *_: None),
        lambda m: m.linear2.register_forward_pre_hook(lambda *_: None),
        lambda m: m.linear2.register_full_backward_hook(lambda *_: None),
        lambda m: m.dropout.register_forward_hook(lambda *_: None),
        lambda m: m.activation.register_forward_hook(lambda *_: None),
        lambda m: nn.utils.parametrizations.weight_norm(m.linear1),
        lambda m: setattr(m, "linear1", nn.Sequential(m.linear1)),
        lambda m: setattr(m.linear1, "forward", lambda x: F.linear(x, m.linear1.weight) + 1),
    ],
)
def test_changed_modules_are_called(change):
    module = FeedForward(D_MODEL, D_FF)
    change(module)
    x = torch.randn(4, D_MODEL)
    expected = module.linear2(module.dropout(module.activation(module.linear1(x))))
    torch.testing.assert_close(module(x), expected)
    assert ffn_calls(module, x) == 0


def test_global_hooks_fire():
    module = FeedForward(D_MODEL, D_FF)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        module(torch.randn(4, D_MODEL))
    finally:
        handle.remove()
    assert module.linear1 in seen and module.linear2 in seen


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_unknown_activation(kind):
    with pytest.raises(ValueError, match="^activation: .*'softplus'"):
        kind(D_MODEL, D_FF, activation="softplus")
