"""The emulation: it reports each planted fault, and its instructions compute what PTX says."""

import ctypes
import re

import numpy as np
import pytest
import torch
from emulation.build import ROOT, build, compiler

from fastattn import philox

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

# What is said of each fault, behind "kernel of report_of (...), block (0, 0, 0), ".
FAULTS = {
    "shared_out_of_bounds": r"thread 63: st_shared of 4 bytes at byte 1024 of shared memory is "
    r"out of bounds: the block has 1024 bytes",
    "shared_misaligned": r"thread 0: st_shared of 16 bytes at byte 8 of shared memory is "
    r"misaligned: it wants a multiple of 16",
    "global_out_of_bounds": r"thread 63: st_global of 4 bytes of global memory is out of bounds: "
    r"it begins 1024 bytes into a buffer of 1024",
    "global_misaligned": r"thread 0: ld_global of 8 bytes of global memory at 0x\w+ is "
    r"misaligned: it wants a multiple of 8",
    "global_copy_out_of_bounds": r"thread 63: cp_async_16 of 16 bytes of global memory is out of "
    r"bounds",
    "uninitialised_read": r"thread 0: ld_shared reads byte 256 of shared memory, which nothing "
    r"has written yet",
    "uninitialised_ldmatrix": r"thread 0: ldmatrix_x4 reads byte 12 of shared memory, which "
    r"nothing has written yet",
    "read_without_barrier": r"thread 32: ld_shared reads byte 0 of shared memory, which thread 0 "
    r"wrote \(faults.cpp:\d+\) with no barrier in between: a race",
    "overwrite_without_barrier": r"thread 0: st_shared writes byte 0 of shared memory, which "
    r"thread 32 reads with no barrier in between: a race",
    "read_without_warp_sync": r"thread \d+: ld_shared reads byte \d+ of shared memory, which "
    r"thread \d+ wrote \(.*\) with no barrier in between: a race",
    "same_word_twice": r"thread 1: st_shared writes byte 0 of shared memory, which thread 0 wrote "
    r"\(.*\) with no barrier in between: a race",
    "read_before_wait": r"thread 0: ld_shared reads byte 0 of shared memory, which cp_async_16 of "
    r"thread 0 \(faults.cpp:\d+\) may still be writing: a wait, or a barrier "
    r"after it, is missing",
    "wait_for_an_older_group": r"cp_async_16 of thread \d+ \(.*\) may still be writing",
    "wait_without_commit": r"cp_async_16 of thread 0 \(.*\) may still be writing",
    "barrier_before_wait": r"cp_async_16 of thread \d+ \(.*\) may still be writing",
    "copy_over_what_is_read": r"cp_async_16 writes byte \d+ of shared memory, which thread \d+ "
    r"reads with no barrier in between: a race",
    "barrier_after_exit": r"deadlock; at barrier 0, where 63 of 64 came \(faults.cpp:\d+\): "
    r"threads 0-39, 41-63; exited: threads 40",
    "barrier_of_too_many": r"deadlock; at barrier_sync 2, where 32 of 64 came \(.*\): threads 0-31",
    "barriers_of_different_sizes": r"barrier 1 is met with 32 threads, but others met it with 64",
    "barrier_of_half_warps": r"barrier_sync: of warp 0 only some lanes came, but whole warps meet",
    "barrier_of_others": r"ld_shared reads byte 0 of shared memory, which thread 0 wrote",
    "divergent_shuffle": r"thread 8: divergence: it is at shuffle_xor, others that should be "
    r"there at shuffle \(faults.cpp:\d+\)",
    "shuffle_of_some": r"deadlock; at shuffle \(.*\): threads 0-4, 6-31; exited: threads 5, 32-63",
    "poll_without_end": r"polling without end; at ld_acquire \(.*\): threads 1; exited",
}


@pytest.fixture(scope="module")
def library():
    sources = [ROOT / "tests/cuda/faults.cpp", ROOT / "tests/cuda/instructions.cpp"]
    return ctypes.CDLL(str(build("emulation", sources)))


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def report(function, *arguments) -> str:
    buffer = ctypes.create_string_buffer(4096)
    function(*arguments, buffer, ctypes.c_size_t(len(buffer)))
    return buffer.value.decode()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(library, name):
    assert report(library.fault, name.encode(), False) == ""
    said = report(library.fault, name.encode(), True)
    assert re.match(r"kernel of report_of \(faults.cpp:\d+\), block \([01], 0, 0\)", said)
    assert re.search(FAULTS[name], said)


def test_every_case_is_expected_here():
    text = (ROOT / "tests/cuda/faults.cpp").read_text()
    assert set(re.findall(r"FASTATTN_CASE\((\w+)\),", text)) == set(FAULTS)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "why"),
    [
        (1, 48, 0, "a block of 48 threads; it must have whole warps"),
        (1, 1056, 0, "a block of 1056 threads"),
        (1, 32, 164 << 10, "167936 bytes of shared memory; a block has 166912 at most"),
        (0, 32, 0, "a grid of (0, 1, 1) blocks"),
    ],
)
def test_a_launch_that_the_driver_would_refuse(library, blocks, threads, shared, why):
    assert why in report(library.fault_of_launch, blocks, threads, shared)
    assert report(library.fault_of_launch, 1, 1024, 163 << 10) == ""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library, transposed):
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    found = torch.empty(32, 4, 2, dtype=torch.int16)
    library.run_ldmatrix(pointer(matrices), pointer(found), transposed)
    want = matrices.mT if transposed else matrices
    # Rows 16 bytes apart share no banks.
    assert library.take_ldmatrix_conflicts() == 0
    # Lane l holds elements (l / 4, 2 * (l % 4)) and the next of each matrix.
    torch.testing.assert_close(found, want.reshape(4, 32, 2).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(library, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c, d = torch.randn(16, 8), torch.empty(16, 8)
    library.run_mma(pointer(a), pointer(b), pointer(c), pointer(d), dtype == torch.bfloat16)
    torch.testing.assert_close(d, (c.double() + a.double() @ b.double()).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_is_widened(library, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = torch.empty(2**16)
    library.run_widen(pointer(x), pointer(wide), len(x), dtype == torch.bfloat16)
    torch.testing.assert_close(wide, x.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(library, dtype):
    # Every 16-bit float, the midpoints between neighbours, and the floats beside both.
    exact = torch.arange(2**15).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()].double()
    middle = (exact[1:] + exact[:-1]) / 2
    x = torch.cat([exact, middle, torch.tensor([65519.9, 65520.0, 3.4e38, torch.inf])]).float()
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(0.0))])
    x = torch.cat([x, -x, torch.tensor([torch.nan])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 256))
    rounded = torch.empty(len(x), dtype=torch.int16)
    library.run_round(pointer(x), pointer(rounded), len(x), dtype == torch.bfloat16)
    want = x.to(dtype)
    assert torch.equal(rounded[~x.isnan()], want[~x.isnan()].view(torch.int16))
    assert (rounded[x.isnan()] == 0x7FFF).all()


def test_approximations(library):
    inf, nan, tiny = torch.inf, torch.nan, 1e-40
    x = torch.tensor([0.0, -0.0, 1.0, 0.5, -3.25, 127.0, -126.0, -127.0, inf, -inf, nan, tiny])
    x = torch.nn.functional.pad(x, (0, 32 - len(x)), value=2.0)
    found = torch.empty(3, 32)
    library.run_approximations(pointer(x), pointer(found), 32)
    flush = torch.where(x.abs() < 2.0**-126, torch.zeros(()).copysign(x), x)
    want = torch.stack([flush.exp2(), flush.log2(), flush.reciprocal()])
    want[want.abs() < 2.0**-126] *= 0.0
    torch.testing.assert_close(found, want, equal_nan=True)
    assert found[2, 1] == -inf and found[0, 7] == 0.0


def test_shuffles(library):
    found = torch.empty(6, 64)
    library.run_shuffles(pointer(found))
    thread = torch.arange(64)
    warp = thread // 32 * 32
    want = [thread ^ 1, thread ^ 16, warp + 3, warp + thread // 4 % 32, thread // 32, warp + 7]
    assert torch.equal(found, torch.stack(want).float())


def test_named_barriers_hand_over(library):
    sums = torch.empty(32, dtype=torch.int32)
    library.run_handshake(pointer(sums), 5)
    want = 100 * sum(range(5)) + 5 * (torch.arange(32) ^ 1)
    assert torch.equal(sums, want.int())


def test_blocks_take_turns(library):
    turn, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    library.run_turns(pointer(turn), pointer(total), 5)
    assert (turn.item(), total.item()) == (5, 26)


def test_philox(library):
    rows, columns, batch, head, seed = 3, 192, 5, 2, 0x123456789ABCDEF
    words = torch.empty(rows, columns, dtype=torch.int32)
    library.run_philox(pointer(words), rows, columns, ctypes.c_uint64(seed), head, batch)
    words = torch.from_numpy(words.numpy().view(np.uint32).astype(np.int64))
    for dropout_p in (0.1, 0.5):
        kept = philox.keep_mask(
            torch.tensor([seed]),
            dropout_p,
            torch.arange(rows),
            columns,
            torch.tensor(head),
            torch.tensor(batch),
        )
        assert torch.equal(words >= philox.threshold(dropout_p), kept)


@pytest.mark.parametrize(
    ("form", "shape", "transposed"),
    [
        (0, (64, 32, 64), (False, False)),
        (1, (64, 64, 128), (True, True)),
        (2, (32, 128, 32), (False, True)),
        (3, (64, 64, 32), (True, False)),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 1000), (27, 24), (1, 8)])
def test_tiles_and_fragments(library, form, shape, transposed, rows, columns):
    m, n, k = shape
    a = torch.randn((k, m) if transposed[0] else (m, k)).half()
    b = torch.randn((k, n) if transposed[1] else (n, k)).half()
    found = torch.empty(m, n)
    library.take_ldmatrix_conflicts()
    library.run_tile(pointer(a), pointer(b), pointer(found), rows, columns, form)
    assert library.take_ldmatrix_conflicts() == 0
    # What lies beyond the matrix counts as zeros.
    for x in (a, b):
        x[rows:] = 0
        x[:, columns:] = 0
    want = (a.mT if transposed[0] else a).double() @ (b if transposed[1] else b.mT).double()
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)
