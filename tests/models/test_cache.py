"""The key/value caches: appending, moving rows, limits, sharing of pages."""

import pytest
import torch

from fastattn.models.cache import KeyValueCache, PagedCaches


def _tokens(rows, seqlen):
    return torch.randn(rows, 2, seqlen, 4), torch.randn(rows, 2, seqlen, 3)


def test_returns_all_so_far_without_moving_it():
    cache = KeyValueCache(6)
    parts = [_tokens(3, seqlen) for seqlen in (2, 1, 3)]
    places = set()
    for count in (1, 2, 3):
        k, v, _ = cache.append(*parts[count - 1])
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
    for index, tensor in enumerate(cache.append(*after)[:2]):
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


def _gathered(where, pools):
    """Each row's keys, from its pages."""
    for pages, length in zip(where["block_table"].long(), where["seqlens_k"].tolist(), strict=True):
        yield [pool[pages].flatten(0, 1)[:length].transpose(0, 1) for pool in pools]


def _append(caches, k, v):
    caches.extend(k[:, 0, :, 0])
    found = []
    for layer in caches.layers:
        *pools, where = layer.append(k, v)
        found.append(list(_gathered(where, pools)))
    return found


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_pages_hold_what_was_appended_but_padding(page_size):
    padding = [0, 3, 1]
    caches = PagedCaches(2, page_size, torch.tensor(padding))
    parts = [_tokens(3, seqlen) for seqlen in (4, 1, 3)]
    for count in (1, 2, 3):
        whole = [torch.cat([part[i] for part in parts[:count]], 2) for i in (0, 1)]
        for layer in _append(caches, *parts[count - 1]):
            for row, got in enumerate(layer):
                for tensor, expected in zip(got, whole, strict=True):
                    assert tensor.equal(expected[row, :, padding[row] :])
    assert caches.count == sum(-(-(8 - pad) // page_size) for pad in padding)


@pytest.mark.parametrize("rows", [[2, 2, 0], [0, 0, 1, 1, 2, 2], [1]])
def test_rows_share_full_pages(rows):
    caches = PagedCaches(1, 2)
    before, after = _tokens(3, 5), _tokens(len(rows), 2)
    _append(caches, *before)
    caches.reorder(torch.tensor(rows))
    (got,) = _append(caches, *after)
    for row, tensors in enumerate(got):
        for index, tensor in enumerate(tensors):
            assert tensor.equal(torch.cat([before[index][rows[row]], after[index][row]], 1))
    # Two full pages for each row that is continued, and two more for each continuation.
    used = {page for pages in caches.block_table.tolist() for page in pages}
    assert len(used) == 2 * len(set(rows)) + 2 * len(rows)


def test_pages_of_rows_that_end_are_used_again():
    caches = PagedCaches(1, 2)
    _append(caches, *_tokens(4, 4))
    caches.reorder(torch.tensor([0]))
    for _ in range(12):
        _append(caches, *_tokens(1, 1))
    assert caches.count == 8
