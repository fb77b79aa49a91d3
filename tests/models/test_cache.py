"""The key/value cache: appending, moving rows, its limit."""

import pytest
import torch

from fastattn.models.cache import KeyValueCache


def _tokens(rows, seqlen):
    return torch.randn(rows, 2, seqlen, 4), torch.randn(rows, 2, seqlen, 3)


def test_returns_all_so_far_without_moving_it():
    cache = KeyValueCache(6)
    parts = [_tokens(3, seqlen) for seqlen in (2, 1, 3)]
    places = set()
    for count in (1, 2, 3):
        k, v = cache.append(*parts[count - 1])
        assert k.equal(torch.cat([part[0] for part in parts[:count]], 2))
        assert v.equal(torch.cat([part[1] for part in parts[:count]], 2))
        places.add((k.data_ptr(), v.data_ptr()))
    assert len(places) == 1 and cache.length == 6


@pytest.mark.parametrize("rows", [[2, 2, 0], [0, 0, 1, 1, 2, 2], [1]])
def test_rows_continue_others(rows):
    cache = KeyValueCache(4)
    before = _tokens(3, 2)
    cache.append(*before)
    cache.reorder(torch.tensor(rows))
    after = _tokens(len(rows), 1)
    for index, tensor in enumerate(cache.append(*after)):
        assert tensor.equal(torch.cat([before[index][rows], after[index]], 2))


def test_reordering_nothing_is_allowed():
    cache = KeyValueCache(4)
    cache.reorder(torch.tensor([0, 0]))
    assert cache.append(*_tokens(2, 1))[0].shape == (2, 2, 1, 4)


def test_refuses_more_than_its_capacity():
    cache = KeyValueCache(2)
    cache.append(*_tokens(1, 1))
    with pytest.raises(ValueError, match="k: expected at most 2 tokens in the cache, got 3"):
        cache.append(*_tokens(1, 2))
