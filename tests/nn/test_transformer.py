"""Encoder and decoder layers, and torch's stacks of them, against torch's own."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import TransformerDecoderLayer, TransformerEncoderLayer

BATCH, SEQLEN, SEQLEN_MEMORY, D_MODEL, HEADS, D_FF = 3, 6, 5, 16, 4, 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


def pair(kind, **options):
    torch.manual_seed(0)
    stock = getattr(nn, kind)(D_MODEL, HEADS, D_FF, **({"dropout": 0.0} | options))
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=D_MODEL**-0.5)
    ours = getattr(fastattn.nn, kind)(D_MODEL, HEADS, D_FF, **({"dropout": 0.0} | options))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def tokens(seqlen, batch_first=True, batched=True):
    if not batched:
        return torch.randn(seqlen, D_MODEL)
    return torch.randn((BATCH, seqlen, D_MODEL) if batch_first else (seqlen, BATCH, D_MODEL))


def padding(seqlen, lengths=(2, 5, 4)):
    return torch.arange(seqlen) >= torch.tensor(lengths)[:, None]


def causal(seqlen, floating=True):
    if floating:
        return nn.Transformer.generate_square_subsequent_mask(seqlen)
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


def compare(stock, ours, *args, visible=None, **kwargs):
    """Output (where `visible`) and, with gradients enabled, all gradients agree."""
    results = []
    for module in (stock, ours):
        leaves = [x.detach().clone().requires_grad_(torch.is_grad_enabled()) for x in args]
        out = module(*leaves, **kwargs)
        out = out if visible is None else out[visible]
        results.append({"out": out})
        if torch.is_grad_enabled():
            torch.manual_seed(1)
            grads = torch.autograd.grad(
                out, [*leaves, *module.parameters()], torch.randn(out.shape)
            )
            names = [*range(len(leaves)), *(name for name, _ in stock.named_parameters())]
            results[-1] |= dict(zip(names, grads, strict=True))
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


OPTIONS = [
    {},
    {"norm_first": True},
    {"activation": "gelu"},
    {"activation": F.silu},
    {"activation": torch.tanh},
    {"activation": nn.GELU(approximate="tanh")},
    {"bias": False, "layer_norm_eps": 1e-3},
]


def named(options) -> str:
    """The same in every process: functions by their names, not by their addresses."""
    return str({name: getattr(value, "__name__", value) for name, value in options.items()})


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("batch_first", [True, False], ids=["", "seq first"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encoder_layer(options, batch_first, training):
    stock, ours = pair("TransformerEncoderLayer", batch_first=batch_first, **options)
    stock.train(training), ours.train(training)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            src = tokens(SEQLEN, batch_first)
            compare(stock, ours, src)
            compare(stock, ours, src, src_key_padding_mask=padding(SEQLEN))
            compare(stock, ours, src, src_mask=causal(SEQLEN), is_causal=True)
            masks = {"src_mask": causal(SEQLEN, False), "src_key_padding_mask": padding(SEQLEN)}
            compare(stock, ours, src, **masks)
            compare(stock, ours, tokens(SEQLEN, batched=False), src_mask=causal(SEQLEN))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("batch_first", [True, False], ids=["", "seq first"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_decoder_layer(options, batch_first, training):
    stock, ours = pair("TransformerDecoderLayer", batch_first=batch_first, **options)
    stock.train(training), ours.train(training)
    tgt, memory = tokens(SEQLEN, batch_first), tokens(SEQLEN_MEMORY, batch_first)
    compare(stock, ours, tgt, memory)
    for floating in (True, False):
        compare(
            stock,
            ours,
            tgt,
            memory,
            tgt_mask=causal(SEQLEN, floating),
            memory_mask=torch.rand(SEQLEN, SEQLEN_MEMORY) < torch.tensor([0, 0.5, 0.5, 0.5, 0.5]),
            tgt_key_padding_mask=padding(SEQLEN),
            memory_key_padding_mask=padding(SEQLEN_MEMORY, (5, 4, 4)),
            tgt_is_causal=True,
        )
    tgt, memory = tokens(SEQLEN, batched=False), tokens(SEQLEN_MEMORY, batched=False)
    compare(stock, ours, tgt, memory, tgt_mask=causal(SEQLEN))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", ""])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encoder(options, nested, training):
    layers = pair("TransformerEncoderLayer", batch_first=True, **options)
    norm = nn.LayerNorm(D_MODEL)
    stock, ours = (
        nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=nested).train(training)
        for layer in layers
    )
    assert ours.use_nested_tensor == stock.use_nested_tensor
    assert all(type(layer) is TransformerEncoderLayer for layer in ours.layers)
    src = tokens(SEQLEN)
    hidden = padding(SEQLEN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compare(stock, ours, src)
            compare(stock, ours, src, mask=causal(SEQLEN))
            compare(stock, ours, src, mask=causal(SEQLEN, False), src_key_padding_mask=hidden)
            compare(stock, ours, src, src_key_padding_mask=hidden, visible=~hidden)
            compare(stock, ours, src, src_key_padding_mask=hidden.flip(1), visible=~hidden.flip(1))


def test_encoder_with_a_sequence_of_padding_is_finite():
    _, layer = pair("TransformerEncoderLayer", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    hidden = padding(SEQLEN, (2, 0, 6))
    for training in (True, False):
        out = encoder.train(training)(tokens(SEQLEN), src_key_padding_mask=hidden)
        out.sum().backward()
        assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("batch_first", [True, False], ids=["", "seq first"])
def test_decoder(batch_first):
    layers = pair("TransformerDecoderLayer", batch_first=batch_first)
    stock, ours = (nn.TransformerDecoder(layer, 2, nn.LayerNorm(D_MODEL)) for layer in layers)
    assert all(type(layer) is TransformerDecoderLayer for layer in ours.layers)
    tgt, memory = tokens(SEQLEN, batch_first), tokens(SEQLEN_MEMORY, batch_first)
    for floating in (True, False):
        compare(stock, ours, tgt, memory, tgt_mask=causal(SEQLEN, floating))


@pytest.mark.parametrize("batch_first, training", [*itertools.product([True, False], repeat=2)])
def test_accelerated_transformer(batch_first, training):
    torch.manual_seed(0)
    stock = nn.Transformer(D_MODEL, HEADS, 2, 2, D_FF, dropout=0.0, batch_first=batch_first)
    ours = copy.deepcopy(stock)
    assert len(fastattn.accelerate(ours).swapped) == 22
    stock.train(training), ours.train(training)
    src, tgt = tokens(SEQLEN, batch_first), tokens(SEQLEN, batch_first)
    hidden = padding(SEQLEN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compare(
                stock,
                ours,
                src,
                tgt,
                tgt_mask=causal(SEQLEN, False),
                src_key_padding_mask=hidden,
                memory_key_padding_mask=hidden,
                tgt_key_padding_mask=padding(SEQLEN, (6, 1, 3)),
            )


def test_training_equals_torchs():
    torch.manual_seed(0)
    stock = nn.Transformer(D_MODEL, HEADS, 1, 1, D_FF, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(stock)
    fastattn.accelerate(ours)
    src, tgt, target = tokens(SEQLEN), tokens(SEQLEN), tokens(SEQLEN)
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(model(src, tgt, tgt_mask=causal(SEQLEN), tgt_is_causal=True), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_start_values_and_state_dict_are_torchs(kind):
    torch.manual_seed(3)
    stock = getattr(nn, kind)(D_MODEL, HEADS, D_FF)
    torch.manual_seed(3)
    ours = getattr(fastattn.nn, kind)(D_MODEL, HEADS, D_FF)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_feed_forward_and_residuals_are_fused(norm_first):
    _, encoder = pair("TransformerEncoderLayer", batch_first=True, norm_first=norm_first)
    _, decoder = pair("TransformerDecoderLayer", batch_first=True, norm_first=norm_first)
    x = tokens(SEQLEN)
    for layer, args, norms in ((encoder, (x,), 2), (decoder, (x, x), 3)):
        problems = [choice.problem for choice in fastattn.explain(layer, *args)]
        ops = {problem.op for problem in problems}
        assert ops == {"attention_fwd", "ffn_fwd", "layer_norm_fwd"}
        fused = [p for p in problems if p.op == "layer_norm_fwd" and p.residual]
        assert len(fused) == norms - norm_first


def test_hooks_and_replaced_modules_are_called():
    stock, ours = pair("TransformerEncoderLayer", batch_first=True)
    stock.eval(), ours.eval()
    seen = []
    for name, module in ours.named_modules():
        if name and not name.startswith("dropout"):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        compare(stock, ours, tokens(SEQLEN))
    assert {"self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"} <= set(seen)
    ours.linear1 = nn.Sequential(ours.linear1)
    compare(stock, ours, tokens(SEQLEN))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantization():
    stock, ours = pair("TransformerEncoderLayer", batch_first=True)
    ours.eval()
    quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
    src = tokens(SEQLEN)
    with torch.no_grad():
        assert (quantized(src) - stock(src)).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    stock, ours = pair("TransformerEncoderLayer", batch_first=True)
    src = tokens(SEQLEN)
    expected = stock(src)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(ours(src).float(), expected, atol=5e-2, rtol=5e-2)
    out = ours.to(dtype)(src.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_compile(kind):
    stock, ours = pair(kind, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    args = [tokens(SEQLEN)] + ([tokens(SEQLEN_MEMORY)] if "Decoder" in kind else [])
    compare(
        stock, compiled, *args, **{"src_mask" if len(args) == 1 else "tgt_mask": causal(SEQLEN)}
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout, norm_first):
    stock, ours = pair("TransformerEncoderLayer", batch_first=True, norm_first=norm_first)
    sequences = [torch.randn(length, D_MODEL) for length in (4, 1, 6)]
    expected = torch.cat([stock(x) for x in sequences])
    nested = torch.nested.nested_tensor(sequences, layout=layout)
    with torch.no_grad():
        out = ours.eval()(nested)
        assert out.is_nested
        torch.testing.assert_close(torch.cat(out.unbind()), expected, atol=1e-4, rtol=1e-4)
    if layout == torch.jagged:
        dy = torch.randn(expected.shape)
        grads = torch.autograd.grad(expected, list(stock.parameters()), dy)
        actual = torch.autograd.grad(ours(nested).values(), list(ours.parameters()), dy)
        for one, other in zip(actual, grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
