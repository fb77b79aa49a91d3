"""The encoder-only models and the vision model; that they agree with others' see
test_huggingface.py."""

import pytest
import torch

from fastattn.models import (
    Encoder,
    MaskedLanguageModel,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
    VisionTransformer,
)

SMALL = dict(vocab_size=23, d_model=32, num_layers=2, num_heads=4, d_ff=48, max_positions=16)
VISION = dict(
    num_labels=5, image_size=12, patch_size=4, channels=2, d_model=32, num_layers=2, num_heads=4,
    d_ff=48,
)  # fmt: skip
HEADS = {
    MaskedLanguageModel: (3, 9, 23),
    SequenceClassifier: (3, 7),
    TokenClassifier: (3, 9, 7),
}
close = torch.testing.assert_close


@pytest.fixture
def tokens():
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return torch.randint(1, 23, (3, 9)).masked_fill(~mask, 0)


@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_gradients(head, tokens):
    model = head(**SMALL, num_labels=7)
    logits = model(tokens)
    assert logits.shape == HEADS[head]
    logits.square().mean().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == set()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_span_has_a_first_and_a_last_token(tokens):
    start, end = SpanClassifier(**SMALL).eval()(tokens)
    assert start.shape == end.shape == (3, 9) and not start.equal(end)


def test_padding_does_not_matter(tokens):
    model = Encoder(**SMALL).double().eval()
    out = model(tokens)
    for row, states in zip(tokens, out, strict=True):
        length = int((row != 0).sum())
        close(model(row[None, :length])[0], states[:length])
    free = Encoder(model.config, pad_id=None).double().eval()
    free.load_state_dict(model.state_dict())
    close(free(tokens, mask=tokens != 0)[tokens != 0], out[tokens != 0])
    assert not torch.allclose(free(tokens)[1, 0], out[1, 0])


def test_tied_output(tokens):
    model = MaskedLanguageModel(**SMALL)
    assert model.output.weight is model.encoder.embedding.tokens.weight


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_images(pooling):
    model = VisionTransformer(**VISION, pooling=pooling)
    images = torch.randn(3, 2, 12, 12)
    logits = model(images)
    assert logits.shape == (3, 5) and model.hidden(images).shape == (3, 10, 32)
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    shuffled = images.clone()
    shuffled[:, :, :4, :4], shuffled[:, :, :4, 4:8] = images[:, :, :4, 4:8], images[:, :, :4, :4]
    assert not torch.allclose(model(shuffled), model(images))


def test_patches_are_a_convolution():
    model = VisionTransformer(**VISION).double()
    embedding, images = model.embedding, torch.randn(2, 2, 12, 12, dtype=torch.float64)
    weight = embedding.patches.weight.view(32, 2, 4, 4)
    expected = torch.conv2d(images, weight, embedding.patches.bias, stride=4).flatten(2).mT
    close(model.eval().embedding(images)[:, 1:] - embedding.positions[1:], expected)


@pytest.mark.parametrize("shape", [(3, 1, 12, 12), (3, 2, 8, 12), (2, 12, 12)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images: expected \(batch, 2, 12, 12\), got"):
        VisionTransformer(**VISION)(torch.zeros(shape))


def test_wrong_inputs_are_refused(tokens):
    model = Encoder(**SMALL)
    for options, message in (
        ({"mask": tokens}, "mask: expected torch.bool"),
        ({"types": tokens[:, :3]}, "types: expected shape"),
        ({"types": tokens.float()}, "types: expected torch.int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model(tokens, **options)
    with pytest.raises(ValueError, match="max_positions=16"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="types: expected None"):
        Encoder(**SMALL, types=0)(tokens, types=tokens)


@pytest.mark.parametrize(
    "model, options, name",
    [
        (Encoder, {**SMALL, "types": -1}, "types"),
        (Encoder, {**SMALL, "activation": "mish"}, "activation"),
        (VisionTransformer, {**VISION, "patch_size": 5}, "patch_size"),
        (VisionTransformer, {**VISION, "pooling": "max"}, "pooling"),
        (VisionTransformer, {**VISION, "num_labels": -1}, "num_labels"),
    ],
)
def test_wrong_configurations_are_refused(model, options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        model(**options)
