"""Every model's outputs and gradients are those of oracle_models.py: plain PyTorch in float64."""

import oracle_models as oracle
import pytest
import torch

from fastattn.models import (
    Decoder,
    Encoder,
    MaskedLanguageModel,
    RopeScaling,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
    Transformer,
    VisionTransformer,
)

SIZES = dict(d_model=16, num_layers=2, num_heads=4, d_ff=24, dropout=0.0)
GPT2 = dict(**SIZES, vocab_size=23, max_positions=64)
LLAMA = dict(
    **GPT2,
    num_heads_kv=2,
    positions="rotary",
    norm="rms",
    activation="silu",
    gated=True,
    bias=False,
    tie_embeddings=False,
)
DECODERS = {
    "gpt2": GPT2,
    "gpt2 untied": {**GPT2, "tie_embeddings": False, "activation": "relu", "head_dim": 6},
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_embeddings": True, "rope_theta": 500.0, "head_dim": 6},
    "llama 3": {
        **LLAMA,
        "num_heads_kv": 1,
        "head_dim": 16,
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32),
    },
    "window": {**LLAMA, "window": 3, "qkv_bias": True},
    "softcap": {**LLAMA, "softcap": 2.0, "activation": "gelu_tanh"},
}
ENCODER = dict(**SIZES, vocab_size=23, max_positions=16, num_labels=5)
VISION = dict(**SIZES, num_labels=5, image_size=12, patch_size=4, channels=2)
T5 = dict(
    **SIZES,
    input_vocab_size=23,
    target_vocab_size=23,
    max_positions=64,
    positions="relative",
    relative_buckets=8,
    relative_max_distance=10,
    norm="rms",
    norm_first=True,
    bias=False,
    head_dim=6,
    softmax_scale=1.0,
    embedding_scale=1.0,
    tie_embeddings="all",
    output_scale=0.25,
)
TRANSFORMERS = {
    "t5": T5,
    "t5 1.1": {
        **T5,
        "gated": True,
        "activation": "gelu_tanh",
        "tie_embeddings": "inputs",
        "output_scale": 1.0,
        "num_decoder_layers": 3,
    },
    "relative post-norm": {
        **T5,
        "norm": "layer",
        "norm_first": False,
        "bias": True,
        "embedding_scale": None,
        "tie_embeddings": "none",
    },
}


def make(model_class, options):
    """A model in float64, none of whose weights is special."""
    torch.manual_seed(5)
    model = model_class(**options).double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm.weight" in name), 0.3)
    return model


def check(model, got, expected, *arguments):
    """Output and all gradients of `got(*arguments)` beside those of the oracle `expected`."""
    state = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    out, want = got(*arguments), expected(alias(model, state))
    seed = torch.randn(want.shape, dtype=want.dtype)
    # The rotary tables were made in float32.
    tolerance = 1e-5 if getattr(model.config, "positions", "") == "rotary" else 1e-11

    def close(name, found, wanted):
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=atol, msg=lambda text: f"{name}: {text}"
        )

    close("output", out, want)
    (out * seed).sum().backward()
    (want * seed).sum().backward()
    for name, parameter in model.named_parameters():
        close(name, parameter.grad, state[name].grad)
        assert parameter.grad.any(), name


def alias(model, state):
    """`state` with what is shared under all of its names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: state[first[id(parameter)]] for name, parameter in named}


@pytest.fixture
def tokens():
    """Tokens ``(3, 9)`` and their mask, padded on the right."""
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return torch.randint(1, 23, (3, 9)).masked_fill(~mask, 0), mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", DECODERS)
def test_decoder(which, side, tokens):
    x, mask = tokens if side == "right" else (part.flip(1) for part in tokens)
    model = make(Decoder, DECODERS[which])
    check(
        model,
        lambda: model(x, mask=mask)[mask],
        lambda state: oracle.decoder(state, model.config, x, mask)[mask],
    )


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_encoder(activation, tokens):
    x, mask = tokens
    model = make(Encoder, {**ENCODER, "activation": activation})
    types = (torch.arange(9) > 3).long().expand(3, 9)
    check(
        model,
        lambda: model(x, types=types)[mask],
        lambda state: oracle.encoder(state, model.config, x, mask, types)[mask],
    )


def masked_language(w, states):
    x = oracle.ACTIVATIONS[w.config.activation](oracle.linear(w.transform, states))
    return oracle.linear(w.output, oracle.norm(w.transform_norm, x))


def sequence(w, states):
    return oracle.linear(w.classifier, torch.tanh(oracle.linear(w.pooler, states[:, 0])))


def each_token(w, states):
    return oracle.linear(w.classifier, states)


@pytest.mark.parametrize(
    "head, expected",
    [
        (MaskedLanguageModel, masked_language),
        (SequenceClassifier, sequence),
        (TokenClassifier, each_token),
        (SpanClassifier, each_token),
    ],
)
def test_heads(head, expected, tokens):
    x, mask = tokens
    model = make(head, {**ENCODER, "types": 1})

    def got():
        out = model(x)
        out = torch.stack(out, -1) if head is SpanClassifier else out
        return out[mask] if out.dim() == 3 else out

    def want(state):
        of_encoder = {name.removeprefix("encoder."): value for name, value in state.items()}
        states = oracle.encoder(of_encoder, model.config, x, mask, torch.zeros_like(x))
        out = expected(oracle.Weights(state, model.config), states)
        return out[mask] if out.dim() == 3 else out

    check(model, got, want)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_vision(pooling):
    model = make(VisionTransformer, {**VISION, "pooling": pooling})
    images = torch.randn(3, 2, 12, 12, dtype=torch.float64)
    check(model, lambda: model(images), lambda state: oracle.vision(state, model.config, images))


@pytest.mark.parametrize("which", TRANSFORMERS)
def test_transformer_with_relative_positions(which, tokens):
    x, _ = tokens
    model = make(Transformer, TRANSFORMERS[which])
    tgt = torch.randint(1, 23, (3, 14))
    check(
        model,
        lambda: model(x, tgt),
        lambda state: oracle.transformer(state, model.config, x, tgt),
    )


SMALL = {
    Decoder: LLAMA,
    MaskedLanguageModel: ENCODER,
    VisionTransformer: VISION,
    Transformer: T5,
}


def arguments(model, tokens):
    if isinstance(model, VisionTransformer):
        return (torch.randn(3, 2, 12, 12, dtype=model.classifier.weight.dtype),)
    return (tokens[0], tokens[0]) if isinstance(model, Transformer) else (tokens[0],)


@pytest.mark.parametrize("model_class", SMALL)
def test_bfloat16(model_class, tokens):
    model = make(model_class, SMALL[model_class])
    x = arguments(model, tokens)
    expected = model(*x).detach()
    half = model.bfloat16()
    out = half(*(part.bfloat16() if part.is_floating_point() else part for part in x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
    )
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize("model_class", [MaskedLanguageModel, VisionTransformer, Transformer])
def test_compiles_whole(model_class, tokens):
    model = make(model_class, SMALL[model_class]).float()
    x = arguments(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), model(*x))


@pytest.mark.parametrize("model_class", SMALL)
def test_checkpointed_activations_change_nothing(model_class, tokens):
    """With the same seed they drop the same elements."""
    options = {**SMALL[model_class], "dropout": 0.3}
    gradients = []
    for checkpointed in (False, True):
        model = make(model_class, {**options, "checkpoint_activations": checkpointed})
        x = arguments(model, tokens)
        torch.manual_seed(2)
        model(*x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("model_class", SMALL)
def test_dropout_is_of_training_only(model_class, tokens):
    model = make(model_class, {**SMALL[model_class], "dropout": 0.5})
    x = arguments(model, tokens)
    assert not torch.allclose(model(*x), model(*x))
    model.eval()
    assert model(*x).equal(model(*x))
