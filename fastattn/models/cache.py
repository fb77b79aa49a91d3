"""Preallocated keys and values of the tokens that a decoder has seen."""

import torch
from torch import Tensor


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

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the next tokens' k and v, ``(rows, heads_kv, seqlen, head_dim)``.

        Returns views of all keys and values so far, ``(rows, heads_kv, length, head_dim)``.

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
        return k, v

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
