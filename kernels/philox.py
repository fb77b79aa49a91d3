"""The dropout stream of ``fastattn/philox.py`` in a kernel: Philox4x32 with 7 rounds.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed, threshold, rows, first_column, high, highest, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which elements of a tile are kept: (ROWS, COLUMNS), COLUMNS a multiple of 64.

    Args:
        seed: int64. threshold: below it, a 32-bit word drops its element.
        rows: (ROWS,), the counter's word 1; `high`, `highest`: words 2 and 3, (ROWS,) or one each.
        first_column: of the tile, a multiple of 64.
    """
    # A counter's four words serve columns that lie 16 apart.
    counter = first_column // 4 + tl.arange(0, COLUMNS // 4)
    c0 = (counter[None, :] + tl.zeros((ROWS, 1), tl.int32)).to(tl.uint32)
    c1 = (rows[:, None] + tl.zeros_like(c0)).to(tl.uint32)
    zeros = tl.zeros((ROWS,), tl.int64)
    c2 = ((high + zeros)[:, None] + tl.zeros_like(c0)).to(tl.uint32)
    c3 = ((highest + zeros)[:, None] + tl.zeros_like(c0)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last dims are bits 0 and 1 of the word
    words = tl.reshape(words, (ROWS, COLUMNS // 64, 16, 2, 2))
    words = tl.reshape(tl.permute(words, (0, 1, 3, 4, 2)), (ROWS, COLUMNS))
    return words >= threshold
