"""Keys and values of the tokens that a decoder has seen, static or in pages."""

from typing import Protocol

import torch
from torch import Tensor

CACHES = ("static", "paged", "none")
PAGE_SIZE = 16


class Cache(Protocol):
    """One layer's keys and values, as attention asks for them."""

    @property
    def length(self) -> int:
        """Tokens of a row so far, its padding included."""

    @property
    def offset(self) -> int | Tensor:
        """Position of the next token among its row's keys, which may be each row's own."""

    def keys(self, seqlen: int) -> int:
        """How many keys attention sees with the next `seqlen` tokens, those of no token too."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keeps the next tokens' k and v; all so far, and attention's arguments for them."""


class Caches(Protocol):
    """All layers' caches of one batch."""

    layers: list[Cache]

    def extend(self, tokens: Tensor) -> int:
        """Makes room for the next `tokens` ``(rows, seqlen)``; the position of the first."""

    def reorder(self, rows: Tensor) -> None:
        """Makes row i continue what row ``rows[i]`` held; `rows` may be longer or shorter."""


def check_cache(cache: str) -> str:
    """`cache`; raises ValueError unless it is one of ``CACHES``."""
    if cache not in CACHES:
        raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {cache!r}")
    return cache


def make_caches(
    cache: str, num_layers: int, capacity: int, padding: Tensor | None = None
) -> Caches:
    """New caches, static or paged.

    Args:
        cache: "static" or "paged".
        num_layers: of the model.
        capacity: the most tokens of a row.
        padding: how many tokens at the beginning of each row are padding, ``(rows,)``, which
            pages then don't hold.
    """
    if cache == "paged":
        return PagedCaches(num_layers, padding=padding)
    return StaticCaches(num_layers, capacity)


class KeyValueCache:
    """One layer's keys and values, ``(rows, heads_kv, capacity, head_dim)``, filled in order.

    Args:
        capacity: the most tokens of a row. Memory is taken for all of them at the first append,
            so that no later one allocates.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def offset(self) -> int:
        """Position of the next token."""
        return self.length

    def keys(self, seqlen: int) -> int:
        """How many keys there are with the next `seqlen` tokens."""
        return self.length + seqlen

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keeps the next tokens' k and v, ``(rows, heads_kv, seqlen, head_dim)``.

        Returns views of all keys and values so far, ``(rows, heads_kv, length, head_dim)``, which
        attention takes as they are.

        Raises:
            ValueError: more tokens than the capacity.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"k: expected at most {self.capacity} tokens in the cache, got {end}")
        if self._buffers is None:
            self._buffers = self._allocate(k), self._allocate(v)
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        k, v = (buffer[:, :, :end] for buffer in self._buffers)
        return k, v, {}

    def reorder(self, rows: Tensor) -> None:
        """Makes row i continue what row ``rows[i]`` held; `rows` may be longer or shorter."""
        if self._buffers is None:
            return
        moved = []
        for buffer in self._buffers:
            filled = buffer[:, :, : self.length].index_select(0, rows)
            if len(rows) != buffer.shape[0]:
                buffer = self._allocate(filled)
            buffer[:, :, : self.length] = filled
            moved.append(buffer)
        self._buffers = moved[0], moved[1]

    def _allocate(self, like: Tensor) -> Tensor:
        rows, heads_kv, _, head_dim = like.shape
        shape = (rows, heads_kv, self.capacity, head_dim)
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class StaticCaches:
    """A `KeyValueCache` for each layer.

    Args:
        num_layers: of the model.
        capacity: the most tokens of a row.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self._caches = [KeyValueCache(capacity) for _ in range(num_layers)]
        self.layers: list[Cache] = [*self._caches]

    def extend(self, tokens: Tensor) -> int:
        """The position of the first of `tokens`: there is room already."""
        return self._caches[0].length

    def reorder(self, rows: Tensor) -> None:
        """As `KeyValueCache.reorder`, of every layer."""
        for cache in self._caches:
            cache.reorder(rows)


class PagedCache:
    """One layer's pages, ``(num_pages, page_size, heads_kv, head_dim)`` (Kwon et al. 2023).

    Args:
        pages: which page holds what, the same for all layers.
    """

    def __init__(self, pages: "PagedCaches") -> None:
        self._pages = pages
        self._pools: list[Tensor] = []

    @property
    def length(self) -> int:
        """Tokens of a row before those being appended, its padding included."""
        return self._pages.start

    @property
    def offset(self) -> int | Tensor:
        """Position of the next token among its row's keys."""
        return self._pages.offset

    def keys(self, seqlen: int) -> int:
        """Keys that the pages of the longest row have room for."""
        return self._pages.block_table.shape[1] * self._pages.page_size

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keeps the tokens' k and v that the last `PagedCaches.extend` made room for."""
        pages = self._pages
        if not self._pools:
            self._pools = [
                x.new_zeros((0, pages.page_size, x.shape[1], x.shape[3])) for x in (k, v)
            ]
        self._grow()
        for pool, x in zip(self._pools, (k, v), strict=True):
            pool.flatten(0, 1)[pages.slots] = x.transpose(1, 2)[pages.real]
        where = {"block_table": pages.block_table, "seqlens_k": pages.seqlens_k}
        return self._pools[0], self._pools[1], where

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages."""
        self._grow()
        for pool in self._pools:
            pool[targets] = pool[sources]

    def _grow(self) -> None:
        for index, pool in enumerate(self._pools):
            if len(pool) < self._pages.count:
                # Twice as many at least, so that a long row is not copied at every page.
                more = max(self._pages.count, 2 * len(pool)) - len(pool)
                self._pools[index] = torch.cat([pool, pool.new_zeros((more, *pool.shape[1:]))])


class PagedCaches:
    """A `PagedCache` for each layer, and which page holds which tokens of which row.

    Rows take pages as they grow, hold no padding, and share the full pages of what they have in
    common.

    Args:
        num_layers: of the model.
        page_size: tokens of a page.
        padding: how many tokens at the beginning of each row are padding, ``(rows,)``.
    """

    block_table: Tensor  # (rows, pages of the longest row), int32
    seqlens_k: Tensor  # (rows,), int32
    offset: int | Tensor
    real: Tensor  # (rows, seqlen), which of the tokens being appended are not padding
    slots: Tensor  # where these go in the pools

    def __init__(
        self, num_layers: int, page_size: int = PAGE_SIZE, padding: Tensor | None = None
    ) -> None:
        self.page_size = page_size
        self.start = self.count = 0
        self._end = 0
        self._padding = None if padding is None else padding.tolist()
        self._rows: list[list[int]] = []  # the pages of each row
        self._users: list[int] = []  # the number of rows that use each page
        self._free: list[int] = []
        self._caches = [PagedCache(self) for _ in range(num_layers)]
        self.layers: list[Cache] = [*self._caches]

    def extend(self, tokens: Tensor) -> int:
        """Makes room for the next `tokens` ``(rows, seqlen)``; the position of the first."""
        rows, seqlen = tokens.shape
        if not self._rows:
            self._rows = [[] for _ in range(rows)]
        padding = self._padding or [0] * rows
        self.start, self._end = self._end, self._end + seqlen
        copies: tuple[list[int], list[int]] = [], []
        for pages, pad in zip(self._rows, padding, strict=True):
            first, last = max(self.start - pad, 0), max(self._end - pad, 0)
            if first % self.page_size and self._users[pages[-1]] > 1:
                self._users[pages[-1]] -= 1
                copies[0].append(pages[-1])
                pages[-1] = self._take()
                copies[1].append(pages[-1])
            while len(pages) * self.page_size < last:
                pages.append(self._take())
        if copies[0]:
            for cache in self._caches:
                cache.copy(*copies)
        self._describe(padding, tokens.device)
        return self.start

    def reorder(self, rows: Tensor) -> None:
        """Makes row i continue what row ``rows[i]`` held; `rows` may be longer or shorter."""
        chosen = rows.tolist()
        old, self._rows = self._rows, [self._rows[row].copy() for row in chosen]
        if self._padding is not None:
            self._padding = [self._padding[row] for row in chosen]
        for pages, change in [(pages, 1) for pages in self._rows] + [(pages, -1) for pages in old]:
            for page in pages:
                self._users[page] += change
        self._free = [page for page, users in enumerate(self._users) if not users]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = len(self._users)
            self._users.append(0)
        self._users[page] = 1
        self.count = len(self._users)
        return page

    def _describe(self, padding: list[int], device: torch.device) -> None:
        """What attention and `append` ask for, of the tokens from `start` to `_end`."""
        longest = max(map(len, self._rows), default=0)
        table = [pages + [0] * (longest - len(pages)) for pages in self._rows]
        self.block_table = torch.tensor(table, dtype=torch.int32, device=device)
        self.block_table = self.block_table.view(len(table), longest)
        pads = torch.tensor(padding, dtype=torch.int32, device=device)
        self.seqlens_k = (self._end - pads).clamp(min=0).int()
        self.offset = self.start if not any(padding) else self.start - pads
        positions = torch.arange(self.start, self._end, device=device) - pads[:, None]
        self.real = positions >= 0
        pages = self.block_table.long().gather(1, positions.clamp(min=0) // self.page_size)
        self.slots = (pages * self.page_size + positions % self.page_size)[self.real]
