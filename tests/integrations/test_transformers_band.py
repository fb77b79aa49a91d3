"""A boolean mask that is a band with key lengths is found to be one, and no other mask is."""

import pytest
import torch

pytest.importorskip("transformers")
from fastattn.integrations.transformers.attention import attention_forward
from fastattn.integrations.transformers.band import band

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(shape, causal=False, window=(None, None), offset=0, seqlens_k=None):
    """What the arguments of `fastattn.attention` make visible."""
    _, _, seqlen_q, seqlen_k = shape
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - offset
    mask = distance <= (0 if causal else seqlen_k)
    if window[0] is not None:
        mask = mask & (distance >= -window[0])
    if seqlens_k is None:
        return mask.expand(shape)
    return (mask & (torch.arange(seqlen_k) < seqlens_k.view(-1, 1, 1, 1))).expand(shape)


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, options",
    [
        (7, 7, {}),
        (7, 7, dict(causal=True)),
        (7, 7, dict(causal=True, window=(2, None))),
        (3, 9, dict(causal=True, offset=6)),
        (3, 9, dict(causal=True, offset=4, window=(1, None))),
        (1, 9, dict(window=(0, None), offset=5)),
        (7, 7, dict(seqlens_k=(7, 3, 0))),
        (7, 7, dict(causal=True, seqlens_k=(5, 7, 2))),
        (7, 7, dict(causal=True, window=(2, None), seqlens_k=(1, 7, 4))),
        (3, 9, dict(causal=True, offset=4, seqlens_k=(7, 6, 3))),
        (1, 9, dict(seqlens_k=(4, 4, 4))),
        (1, 9, dict(window=(0, None), offset=2, seqlens_k=(4, 6, 5))),
        (4, 6, dict(seqlens_k=(0, 0, 0))),
    ],
)
def test_bands_are_found(seqlen_q, seqlen_k, options):
    options = dict(options)
    if "seqlens_k" in options:
        options["seqlens_k"] = torch.tensor(options["seqlens_k"], dtype=torch.int32)
    mask = dense((3, 1, seqlen_q, seqlen_k), **options)
    for given in (mask, mask.clone(), mask.expand(3, 4, seqlen_q, seqlen_k)):
        found = band(given, seqlen_k)
        assert found is not None and dense(mask.shape, **found).equal(mask)
        assert found.keys() <= options.keys() | {"offset"}
    # Keys that no query may see add nothing that has to be said of each sequence.
    assert ("seqlens_k" in band(mask, seqlen_k)) == ("seqlens_k" in options)


def test_other_masks_are_not():
    causal = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    padding = torch.arange(7) >= torch.tensor([0, 2, 3]).view(3, 1, 1, 1)
    position = torch.arange(7)
    for mask in (
        causal & padding,
        causal & (position != 3),
        causal & (position // 3 == position[:, None] // 3),
        causal | (position < 3) & (position[:, None] < 3),
        torch.stack((causal, causal.triu(-1)), 1)[:, :, 0],
        torch.stack((causal[:2, 0], causal[:2, 0].triu(-1))).transpose(0, 1),
        torch.ones(1, 1, 0, 4, dtype=torch.bool),
    ):
        assert band(mask, mask.shape[3]) is None


def test_nothing_is_found_that_is_not_so():
    generator = torch.Generator().manual_seed(0)
    found = 0
    for seqlen_q, seqlen_k in ((1, 1), (1, 3), (2, 2), (2, 3), (3, 2)):
        for _ in range(200):
            mask = torch.rand(2, 1, seqlen_q, seqlen_k, generator=generator) < 0.7
            options = band(mask, seqlen_k)
            if options is not None:
                found += 1
                assert dense(mask.shape, **options).equal(mask)
    assert found > 100


def test_a_mask_is_looked_at_once_until_it_changes(monkeypatch):
    from fastattn.integrations.transformers import band as module

    looked = []
    look = module._look
    monkeypatch.setattr(module, "_look", lambda mask: looked.append(mask) or look(mask))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    assert band(mask, 5) == band(mask, 5) == dict(causal=True, offset=0)
    assert len(looked) == 1
    assert band(mask, 4) == band(mask, 4) == dict(causal=True, offset=0)
    assert len(looked) == 2
    mask[0, 0, 4, 0] = False
    assert band(mask, 5) is None and len(looked) == 3
    with torch.inference_mode():
        assert band(torch.ones(2, 1, 5, 5, dtype=torch.bool), 5) == {}
        mask = dense((2, 1, 5, 5), seqlens_k=torch.tensor([3, 5])).clone()
    with torch.inference_mode(False):
        mask = mask.clone()
    with torch.inference_mode():
        found = band(mask, 5)
    assert found is band(mask, 5) and not found["seqlens_k"].is_inference()


def test_attention_on_a_band_is_that_on_the_mask():
    mask = dense((2, 1, 5, 9), causal=True, offset=3, seqlens_k=torch.tensor([8, 2]))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    bias = torch.randn(1, 4, 5, 9)

    def out(mask):
        return attention_forward(torch.nn.Identity(), q, k, k, mask, position_bias=bias)[0]

    floating = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out(mask), out(floating))
    torch.testing.assert_close(out(mask[:1]), out(mask[:1].expand(2, 1, 5, 9)))
    longer = torch.nn.functional.pad(mask[1:], (0, 3))  # of a whole cache, of one row for all
    torch.testing.assert_close(out(longer), out(floating[1:]))
