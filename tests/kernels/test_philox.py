"""keep_tile draws the stream of fastattn.philox, whatever the tile."""

import pytest
import torch
import triton
import triton.language as tl
from fastattn.kernels.launch import INTERPRETED, launch
from fastattn.kernels.philox import keep_tile

from fastattn import philox

DEVICE = "cpu" if INTERPRETED else "cuda"


@triton.jit
def _keep_kernel(
    seed_ptr, out_ptr, threshold, first_row, first_column, high, highest,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.arange(0, ROWS).to(tl.int64)
    seed = tl.load(seed_ptr)
    keep = keep_tile(seed, threshold, rows, first_column, high, highest, ROWS, COLUMNS)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, keep)


def tile(seed, dropout_p, first_row, first_column, high=0, highest=0, shape=(4, 64)):
    out = torch.empty(shape, dtype=torch.bool, device=DEVICE)
    launch(
        _keep_kernel, (1,), torch.tensor([seed], device=DEVICE), out, philox.threshold(dropout_p),
        first_row, first_column, high, highest, ROWS=shape[0], COLUMNS=shape[1],
    )  # fmt: skip
    return out.cpu()


def expected(seed, dropout_p, first_row, first_column, high=0, highest=0, shape=(4, 64)):
    rows = (first_row + torch.arange(shape[0])) % 2**32
    words = torch.tensor(high % 2**32), torch.tensor(highest)
    columns = first_column + shape[1]
    keep = philox.keep_mask(torch.tensor([seed]), dropout_p, rows, columns, *words)
    return keep[:, first_column:]


@pytest.mark.parametrize("shape", [(1, 64), (4, 64), (2, 128), (8, 16), (4, 32)], ids=str)
@pytest.mark.parametrize("first_column", [0, 128, 640])
@pytest.mark.parametrize("first_row", [0, 7, 1000])
def test_tiles_anywhere(first_row, first_column, shape):
    arguments = (12345, 0.4, first_row, first_column)
    assert tile(*arguments, shape=shape).equal(expected(*arguments, shape=shape))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**35 + 1, 2**62 + 2**31 + 3])
def test_seeds(seed):
    assert tile(seed, 0.5, 3, 64).equal(expected(seed, 0.5, 3, 64))


@pytest.mark.parametrize("first_row", [2**31 - 2, 2**32 - 2, 2**33 + 5])
@pytest.mark.parametrize("high, highest", [(0, 1), (5, 0), (2**31 + 3, 2**32 - 1)])
def test_high_words(first_row, high, highest):
    arguments = (99, 0.5, first_row, 64, high, highest)
    assert tile(*arguments).equal(expected(*arguments))


# The thresholds are 0, 1, 2^31, above it, and 2^32 - 1.
@pytest.mark.parametrize("dropout_p", [0.0, 2.0**-32, 0.5, 0.75, 1.0 - 2.0**-33])
def test_thresholds(dropout_p):
    kept = tile(7, dropout_p, 0, 0, shape=(16, 128))
    assert kept.equal(expected(7, dropout_p, 0, 0, shape=(16, 128)))
    assert abs(kept.double().mean() - (1 - dropout_p)) < 0.05
