"""LayerNorm and RMSNorm, the modules, and the add before them, against torch's."""

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.nn.norm import add_norm


def compare(stock, ours, x):
    """Values and gradients agree."""
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    dy = torch.randn(x.shape)
    results = []
    for module in (stock, ours):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [7, (5, 7), (4, 5, 7)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}], ids=str
)
def test_layer_norm(shape, options):
    stock, ours = (module(shape, **options) for module in (nn.LayerNorm, fastattn.nn.LayerNorm))
    compare(stock, ours, torch.randn(3, 4, 5, 7))
    compare(stock, ours, torch.randn(7, 5, 4, 3).permute(3, 2, 1, 0))


@pytest.mark.parametrize("shape", [7, (5, 7)], ids=str)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_rms_norm(shape, options):
    stock, ours = (module(shape, **options) for module in (nn.RMSNorm, fastattn.nn.RMSNorm))
    compare(stock, ours, torch.randn(3, 5, 7))
    compare(stock, ours, torch.randn(3, 5, 7) * 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_half_precision(kind, dtype):
    stock, ours = getattr(nn, kind)(16), getattr(fastattn.nn, kind)(16)
    x = (torch.randn(3, 16) * 1e-2).to(dtype)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours.to(dtype)(x), stock.to(dtype)(x))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_wrong_shapes(kind):
    for affine in (True, False):
        module = getattr(fastattn.nn, kind)((2, 3), elementwise_affine=affine)
        for shape in ((3, 2), (3,), (2, 1, 3)):
            with pytest.raises(ValueError, match=r"^input: expected shape \(..., 2, 3\), got"):
                module(torch.randn(shape))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    sequences = [torch.randn(length, 8) for length in (3, 1, 5)]
    y = fastattn.nn.LayerNorm(8)(torch.nested.nested_tensor(sequences, layout=layout))
    torch.testing.assert_close(torch.cat(y.unbind()), nn.LayerNorm(8)(torch.cat(sequences)))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_compile(kind):
    module = getattr(fastattn.nn, kind)((4, 6))
    x = torch.randn(3, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


class Doubling(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda module, args, y: y + 1)
    return norm


@pytest.mark.parametrize(
    "make, fused",
    [
        (lambda: nn.LayerNorm(8), True),
        (lambda: fastattn.nn.LayerNorm(8, eps=0.1), True),
        (lambda: nn.LayerNorm(8, bias=False), True),
        (lambda: nn.LayerNorm((4, 8)), False),
        (lambda: Doubling(8), False),
        (lambda: nn.RMSNorm(8), True),
        (hooked, False),
    ],
)
def test_add_norm(make, fused):
    norm = make()
    x, residual = torch.randn(2, 3, 4, 8)
    y, s = add_norm(x, residual, norm)
    assert torch.equal(s, x + residual)
    torch.testing.assert_close(y, norm(s))
    problems = [choice.problem for choice in fastattn.explain(add_norm, x, residual, norm)]
    assert any(problem.residual for problem in problems) == fused


def test_add_norm_broadcasts_and_promotes_as_an_addition():
    norm = nn.LayerNorm(8)
    x = torch.randn(3, 4, 8)
    y, s = add_norm(x, x[0], norm)
    torch.testing.assert_close(y, norm(x + x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        y, s = add_norm(x.bfloat16(), x, norm)
    assert y.dtype == s.dtype == torch.float32
