"""The blocks on their own, in the ways that no single model uses them."""

import pytest
import torch

from fastattn.models.blocks import CrossAttention, SelfAttention, Stack
from fastattn.models.cache import KeyValueCache

close = torch.testing.assert_close


@pytest.mark.parametrize("parts", [(7,), (3, 4), (1, 1, 5), (4, 2, 1)])
def test_a_cached_sequence_in_parts_is_the_whole(parts):
    layer = SelfAttention(16, 2).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    cache = KeyValueCache(8)
    out = [layer(part, causal=True, cache=cache) for part in x.split(parts, 1)]
    close(torch.cat(out, 1), layer(x, causal=True))


def test_projections_are_not_copied():
    layer = SelfAttention(16, 2)
    q, k, v = layer._project(torch.randn(3, 7, 16))
    base = q._base
    assert base is not None and k._base is base and v._base is base
    k, v = CrossAttention(16, 2).keys_values(torch.randn(3, 7, 16))
    assert k._base is v._base is not None


def test_rows_in_succession_share_a_memory():
    layer = CrossAttention(16, 2).double()
    memory = layer.keys_values(torch.randn(2, 5, 16, dtype=torch.float64))
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 1, 5)
    x = torch.randn(6, 3, 16, dtype=torch.float64)
    repeated = type(memory)(*(tensor.repeat_interleave(3, 0) for tensor in memory))
    expected = layer(x, repeated, mask=mask.repeat(3, 1, 1, 1))
    close(layer(x, memory, mask=mask), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_stack_without_cross_attention_is_an_encoder_or_a_decoder(norm_first):
    stack = Stack(2, 16, 2, 24, norm_first=norm_first, bias=False).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    close(stack(x, causal=True)[:, :4], stack(x[:, :4], causal=True))
    assert not any("cross" in name or "bias" in name for name, _ in stack.named_parameters())
    assert any(name.startswith("norm") for name, _ in stack.named_parameters()) == norm_first
