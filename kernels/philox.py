"""The dropout stream of ``fastattn/philox.py`` in a kernel: Philox4x32 with 7 rounds.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed, threshold, rows, first_column, high, highest, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which elements of a tile are kept: (ROWS, COLUMNS).

    Args:
        seed: int64. threshold: below it, a 32-bit word drops its element.
        rows: (ROWS,), the counter's word 1; `high`, `highest`: words 2 and 3, (ROWS,) or one each.
        first_column: of the tile, a multiple of COLUMNS.
    """
    zeros = tl.zeros((ROWS, 1), tl.int64)
    c1 = (rows[:, None] + zeros).to(tl.uint32)
    c2 = (high + tl.zeros((ROWS,), tl.int64))[:, None].to(tl.uint32)
    c3 = (highest + tl.zeros((ROWS,), tl.int64))[:, None].to(tl.uint32)
    if COLUMNS % 64 == 0:
        # A counter's four words serve columns that lie 16 apart.
        counter = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
        w0, w1, w2, w3 = _words(seed, counter, c1, c2, c3)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last dims: bits 0, 1 of the word
        words = tl.reshape(words, (ROWS, COLUMNS // 64, 16, 2, 2))
        words = tl.reshape(tl.permute(words, (0, 1, 3, 4, 2)), (ROWS, COLUMNS))
    else:
        column = first_column + tl.arange(0, COLUMNS)
        w0, w1, w2, w3 = _words(seed, (16 * (column // 64) + column % 16).to(tl.uint32), c1, c2, c3)
        word = (column // 16 % 4)[None, :]
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def _words(seed, counter, c1, c2, c3):
    """The four words of each counter, of shape (ROWS, counters)."""
    c0 = counter[None, :] + tl.zeros_like(c1)
    return tl.philox(seed, c0, c1 + tl.zeros_like(c0), c2 + tl.zeros_like(c0),
                     c3 + tl.zeros_like(c0), n_rounds=7)  # fmt: skip
