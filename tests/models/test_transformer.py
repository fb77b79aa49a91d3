"""fastattn.models.Transformer against torch.nn.Transformer, and its own promises."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.models import Transformer, TransformerConfig, load_torch

close = torch.testing.assert_close


def _pad(src):
    """Pads the second row at its end and the third at its beginning."""
    src[1, -3:] = 0
    src[2, :2] = 0
    return src


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_stock_torch(small, stock, tokens, norm_first, bias, activation):
    model = small(norm_first=norm_first, bias=bias, activation=activation).double().train()
    twin = stock(model)
    src, tgt = _pad(tokens(3, 9)), tokens(3, 7)
    close(model(src, tgt), twin(src, tgt))
    weight = torch.randn(3, 7, 19, dtype=torch.float64)
    (model(src, tgt) * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    loaded = copy.deepcopy(model)
    model.zero_grad()
    (twin(src, tgt) * weight).sum().backward()
    # The stock layers' gradients, under our names.
    with torch.no_grad():
        for parameter in twin.layers.parameters():
            parameter.copy_(parameter.grad)
    load_torch(loaded, twin.layers)
    expected = dict(loaded.named_parameters())
    for name, grad in grads.items():
        if name.startswith(("encoder", "decoder")):
            close(grad, expected[name].detach(), msg=lambda m, name=name: f"{name}: {m}")
        else:
            close(grad, model.get_parameter(name).grad)


def test_equals_stock_torch_on_every_backend(preferred, small, stock, tokens):
    model = small(norm_first=True).train()
    twin = stock(model)
    src, tgt = _pad(tokens(3, 9)), tokens(3, 7)
    logits, expected = model(src, tgt), twin(src, tgt)
    close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    (grad,) = torch.autograd.grad(logits.square().mean(), [model.input_embedding.tokens.weight])
    (want,) = torch.autograd.grad(expected.square().mean(), [model.input_embedding.tokens.weight])
    close(grad, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(small, tokens, dtype):
    model = small().to(dtype)
    src, tgt = _pad(tokens(3, 9)), tokens(3, 7)
    logits = model(src, tgt)
    assert logits.dtype == dtype and logits.shape == (3, 7, 19)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    close(logits.double(), copy.deepcopy(model).double()(src, tgt), rtol=0, atol=tolerance)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.generate(src, bos_id=1, eos_id=2, max_new_tokens=4).dtype == src.dtype


def test_autocast(small, tokens):
    model = small()
    src, tgt = tokens(2, 6), tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(src, tgt)
        model.generate(src, bos_id=1, eos_id=2, max_new_tokens=4, num_beams=2)
    close(logits.float(), model(src, tgt), rtol=0, atol=0.1)


def test_the_future_does_not_matter(small, tokens):
    model = small().double()
    src, tgt = tokens(2, 6), tokens(2, 8)
    changed = tgt.clone()
    changed[:, 5:] = tokens(2, 3)
    close(model(src, tgt)[:, :5], model(src, changed)[:, :5], rtol=0, atol=1e-12)
    assert (model(src, tgt)[:, 5:] - model(src, changed)[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_does_not_matter(small, tokens, norm_first):
    model = small(norm_first=norm_first).double()
    src, tgt = tokens(2, 6), tokens(2, 5)
    padded = F.pad(src, (0, 4))
    close(model(padded, tgt), model(src, tgt), rtol=0, atol=1e-12)
    close(model(src, F.pad(tgt, (0, 3)))[:, :5], model(src, tgt), rtol=0, atol=1e-12)


def test_a_source_of_padding_only_is_finite(small, tokens):
    model = small()
    src = tokens(2, 6)
    src[0] = 0
    logits = model(src, tokens(2, 5))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_pad_id_every_token_counts(small, tokens):
    model = small(pad_id=None).double()
    src, tgt = tokens(2, 6), tokens(2, 5)
    assert (model(F.pad(src, (0, 1)), tgt) - model(src, tgt)).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions(small, tokens, positions):
    model = small(positions=positions)
    learned = "input_embedding.positions" in dict(model.named_parameters())
    assert learned == (positions == "learned")
    table = model.input_embedding.positions
    assert table.shape == (24, 32)
    close(table[5, 4].item(), torch.sin(torch.tensor(5 / 10000 ** (4 / 32))).item())
    close(table[5, 7].item(), torch.cos(torch.tensor(5 / 10000 ** (6 / 32))).item())
    src = tokens(1, 4)
    assert (model.encode(src).flip(1) - model.encode(src.flip(1))).abs().max() > 1e-3


def test_odd_d_model(tokens):
    model = Transformer(
        input_vocab_size=19, target_vocab_size=19, d_model=15, num_layers=1, num_heads=3, d_ff=16
    )
    assert model(tokens(2, 4), tokens(2, 4)).shape == (2, 4, 19)


@pytest.mark.parametrize("tie", ["none", "target", "all"])
def test_tied_embeddings(small, tokens, tie):
    model = small(input_vocab_size=19, tie_embeddings=tie)
    source, target = model.input_embedding.tokens.weight, model.target_embedding.tokens.weight
    assert (model.output.weight.data_ptr() == target.data_ptr()) == (tie != "none")
    assert (source.data_ptr() == target.data_ptr()) == (tie == "all")
    untied = small(input_vocab_size=19).num_parameters
    assert untied - model.num_parameters == 19 * 32 * ("none", "target", "all").index(tie)
    other = small(input_vocab_size=19, tie_embeddings=tie)
    other.load_state_dict(model.state_dict())
    src, tgt = tokens(2, 5), tokens(2, 4)
    close(other(src, tgt), model(src, tgt), rtol=0, atol=0)
    moved = copy.deepcopy(model).double()
    tied = moved.output.weight is moved.target_embedding.tokens.weight
    assert tied == (tie != "none")


def test_attention_weights(small, tokens):
    model = small().double()
    src, tgt = _pad(tokens(3, 9)), tokens(3, 7)
    weights = model.attention_weights(src, tgt)
    assert [len(maps) for maps in weights] == [2, 2, 2]
    assert [maps[0].shape[1:] for maps in weights] == [(4, 9, 9), (4, 7, 7), (4, 7, 9)]
    for maps in weights:
        for one in maps:
            close(one.sum(-1), torch.ones_like(one[..., 0]))
    assert weights.cross[1][1, :, :, -3:].eq(0).all()
    assert weights.encoder[0][2, :, :, :2].eq(0).all()
    assert weights.decoder[0].triu(1).eq(0).all()
    # They are the weights that the fused attention used.
    layer = model.encoder.layers[0].self_attn
    x = model.input_embedding(src)
    v = layer.in_proj(x)[..., 64:].view(3, 9, 4, 8).transpose(1, 2)
    out = layer.out_proj((weights.encoder[0] @ v).transpose(1, 2).flatten(2))
    close(out, layer(x, mask=model.padding_mask(src)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_empty_batch(small):
    model = small()
    none = torch.empty(0, 5, dtype=torch.long)
    assert model(none, none).shape == (0, 5, 19)
    assert model(torch.empty(2, 0, dtype=torch.long), torch.ones(2, 3).long()).shape == (2, 3, 19)
    assert model(torch.ones(2, 3).long(), torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 19)


def test_same_seed_same_dropout(small, tokens):
    model = small(dropout=0.3).train()
    src, tgt = tokens(2, 6), tokens(2, 5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(src, tgt))
    assert results[0].equal(results[1]) and not results[0].equal(results[2])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_whole(small, tokens, dropout):
    model = small(dropout=dropout).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    src, tgt = _pad(tokens(3, 9)), tokens(3, 7)
    logits = compiled(src, tgt)
    logits.sum().backward()
    assert logits.shape == (3, 7, 19)
    if not dropout:
        close(logits, model(src, tgt))


@pytest.mark.parametrize("norm_first", [False, True])
def test_learns_to_reverse(norm_first):
    model = Transformer(
        input_vocab_size=12, target_vocab_size=12, d_model=32, num_layers=1, num_heads=2, d_ff=64,
        dropout=0.0, norm_first=norm_first, tie_embeddings="all",
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    src = torch.randint(3, 12, (16, 6))
    src[:4, 4:] = 0
    labels = torch.zeros(16, 8, dtype=torch.long)
    for row, tokens in zip(labels, src, strict=True):
        reversed_ = tokens[tokens != 0].flip(0)
        row[: len(reversed_) + 1] = torch.cat([reversed_, torch.tensor([2])])
    tgt = F.pad(labels[:, :-1], (1, 0), value=1)
    for _ in range(120):
        loss = F.cross_entropy(model(src, tgt).transpose(1, 2), labels, ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.eval()
    out = model.generate(src, bos_id=1, eos_id=2, max_new_tokens=8)
    assert out.equal(labels[:, :7])
    out = model.generate(src, bos_id=1, eos_id=2, max_new_tokens=8, num_beams=3)
    assert out.equal(labels[:, :7])


def test_wrong_inputs_are_refused(small, tokens):
    model = small()
    with pytest.raises(ValueError, match="src: expected at most max_positions=24 .* got 25"):
        model(tokens(1, 25), tokens(1, 3))
    with pytest.raises(ValueError, match="tgt: expected at most max_positions=24 .* got 25"):
        model(tokens(1, 3), tokens(1, 25))
    with pytest.raises(TypeError, match="src: expected tokens .* got torch.float32"):
        model(tokens(1, 5).float(), tokens(1, 3))
    with pytest.raises(ValueError, match="tgt: expected .batch, seqlen., got shape .3,."):
        model(tokens(1, 5), tokens(1, 3)[0])
    with pytest.raises(ValueError, match="tgt: expected a multiple of 2 rows as in src, got 3"):
        model(tokens(2, 5), tokens(3, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_vocab_size": 0},
        {"num_layers": 0},
        {"num_heads": 5},
        {"dropout": 1.0},
        {"attention_dropout": -0.1},
        {"positions": "rotary"},
        {"activation": "tanh"},
        {"tie_embeddings": "some"},
        {"tie_embeddings": "all"},
        {"pad_id": 19},
        {"norm_eps": 0.0},
        {"d_model": 32.0},
        {"max_positions": True},
    ],
)
def test_wrong_configurations_are_refused(small, wrong):
    ((name, value),) = wrong.items()
    error = TypeError if (isinstance(value, float) and name == "d_model") or value is True else None
    with pytest.raises(error or ValueError, match=f"^{name}: expected .* got "):
        small(**wrong)


def test_configuration_is_frozen_and_overridable():
    config = TransformerConfig(input_vocab_size=5, target_vocab_size=6, num_layers=1, d_ff=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    model = Transformer(config, d_model=8, num_heads=2)
    assert (model.config.d_model, model.config.target_vocab_size) == (8, 6)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_load_torch_refuses_another_shape_of_model(small):
    def stock(**options):
        return nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True, **options)

    with pytest.raises(ValueError, match="decoder.norm.weight"):
        load_torch(small(), stock())
    with pytest.raises(ValueError, match="norm_first=True as in model, got False"):
        load_torch(small(norm_first=True), stock())
    with pytest.raises(ValueError, match="num_heads=2 as in model, got 4"):
        load_torch(small(num_heads=2), stock())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_torch(small(norm_first=True, d_ff=49), stock(norm_first=True))


def test_every_attention_and_ffn_is_the_ops(small, tokens):
    model = small()
    explanation = fastattn.explain(model, tokens(2, 6), tokens(2, 5))
    ops = [choice.problem.op for choice in explanation]
    assert ops.count("attention_fwd") == 6 and ops.count("ffn_fwd") == 4
    causal = [choice for choice in explanation if getattr(choice.problem, "window_right", 1) == 0]
    assert len(causal) == 2 and not any(choice.problem.mask for choice in causal)
