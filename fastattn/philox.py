"""The dropout stream that every backend draws from: counter-based Philox4x32 with 7 rounds.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). An element
depends on its position and the seed alone, so that no mask is stored and every backend, block
size and thread count drops the same elements. The counter layout suits vectors of 16 columns and
the register fragments of matrix units: element (i, j) of matrix (batch, head) takes word
``(j // 16) % 4`` of the block with counter ``(16 * (j // 64) + j % 16, i, head, batch)``.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 7


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's own generator: int64, one element, reproducible by ``manual_seed``."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """An element is kept if its 32-bit word is at least this."""
    return min(round(dropout_p * 2**32), _MASK)


def keep_mask(
    seed: Tensor, dropout_p: float, rows: Tensor, columns: int, high: Tensor, highest: Tensor
) -> Tensor:
    """True where an element is kept, of shape ``broadcast(rows, high, highest) + (columns,)``.

    `rows`, `high` and `highest` are the counter's words 1, 2 and 3: integer tensors below 2^32.
    """
    device = rows.device
    j = torch.arange(columns, device=device, dtype=torch.int64)
    counter = (16 * (j // 64) + j % 16, rows[..., None], high[..., None], highest[..., None])
    key = int(seed)
    words = _philox(counter, (key & _MASK, (key >> 32) & _MASK))
    stacked = torch.stack(torch.broadcast_tensors(*words))
    chosen = ((j // 16) % 4).expand(stacked.shape[1:])[None]
    return stacked.gather(0, chosen)[0] >= threshold(dropout_p)


def _philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
