"""What the emulation makes of sm_90's instructions: results, and the faults that it must report."""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch
from emulation.build import ROOT, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

HERE = ROOT / "tests/cuda"
FLOAT16, BFLOAT16, FLOAT32 = range(3)


RACE = r"with no barrier in between: a race"
LOADING = r"may still be writing: a wait, or a barrier after it, is missing"
READING = r"may still be reading: a wait, or a barrier after it, is missing"
UNFENCED = r"without fence_proxy_async before the barrier"
NOT_BEGUN = r"of the cluster may not have begun: no barrier of the cluster comes before"

# What is said of each fault, behind "kernel of report_of (...), block (0, 0, 0)".
FAULTS_OF_COPIES = {
    "mbarrier_without_init": r"mbarrier_arrive: the mbarrier at byte 16 has not been initialised",
    "mbarrier_init_without_barrier": rf"mbarrier_arrive reads byte 0 .* of thread 0 .* {LOADING}",
    "mbarrier_init_without_fence": r"thread 32: tma_load_4d: no fence_mbarrier_init and barrier "
    r"between the mbarrier_init of the mbarrier at byte 0 and this",
    "mbarrier_fence_after_barrier": r"thread 32: tma_load_4d: no fence_mbarrier_init and barrier",
    "mbarrier_init_twice": r"mbarrier_init: the mbarrier at byte 0 is initialised already",
    "too_many_arrivals": r"mbarrier_arrive: more arrivals than the phase has at the mbarrier at "
    r"byte 0 \(phase 0: 0 of 1 arrivals and 16 bytes missing\)",
    "too_few_arrivals": r"deadlock; at mbarrier_wait of parity 0 at the mbarrier at byte 16 "
    r"\(phase 0: 8 of 256 arrivals and 0 bytes missing\) \(.*\): threads 0-255",
    "wrong_byte_count": r"deadlock; at mbarrier_wait of parity 0 at the mbarrier at byte 0 "
    r"\(phase 0: 0 of 1 arrivals and 8192 bytes missing\)",
    "bytes_not_announced": r"the phase ends without the bytes of tma_load_4d \(.*\), which nobody "
    r"announced",
    "wrong_parity": r"ld_shared reads byte \d+ of shared memory, which",
    "phase_missed": r"thread 0: mbarrier_wait: the phase after the awaited one has ended too",
    "read_without_wait": r"ld_shared reads byte \d+ of shared memory, which",
    "read_before_landing": rf"ld_shared .* the mbarrier at byte 0 counts .* {LOADING}",
    "wait_for_another_copy": rf"ld_shared .* the mbarrier at byte 0 counts .* {LOADING}",
    "load_over_what_is_read": rf"tma_load_4d writes .* {RACE}|ld_shared reads .* {LOADING}",
    "two_loads_to_one_place": rf"tma_load_4d writes byte 1024 .* {LOADING}",
    "load_over_stores_without_fence": rf"tma_load_4d writes byte 1024 .* {UNFENCED}",
    "load_in_flight_at_the_end": r"tma_load_4d: still in flight when the block ends, nobody has "
    r"waited for the mbarrier at byte 0",
    "load_within_a_pattern": r"tma_load_4d of 8192 bytes at byte 1152 of shared memory is "
    r"misaligned: it wants a multiple of 1024",
    "load_beyond_shared_memory": r"tma_load_4d of 8192 bytes at byte 33792 of shared memory is out "
    r"of bounds",
    "load_beyond_the_buffer": r"tma_load_4d of \d+ bytes of global memory is out of bounds",
    "map_of_nothing": r"prefetch_tensor_map: no make_tensor_map has made this tensor map",
    "bulk_load_of_some_bytes": r"bulk_load: the bytes must be a multiple of 16",
    "store_without_fence": rf"tma_store_4d reads byte 1024 .* {UNFENCED}",
    "store_fenced_by_one": rf"tma_store_4d reads byte 1028 .* thread 1 wrote .* {UNFENCED}",
    "store_without_barrier": r"tma_store_4d reads byte 1028 of shared memory, which",
    "overwrite_before_wait_read": rf"st_shared writes .* a bulk copy of thread 0 {READING}",
    "wait_read_by_another": rf"st_shared writes .* a bulk copy of thread 0 {READING}",
    "wait_read_for_an_older_store": rf"st_shared writes .* a bulk copy of thread 0 {READING}",
    "store_not_waited_for": r"tma_store_4d: may still read shared memory when the block ends",
    "store_not_committed": r"tma_store_4d: not committed when the block ends",
    "store_of_nothing_written": r"tma_store_4d reads byte 1024 .* nothing has written yet",
    "reduce_beyond_the_buffer": r"bulk_reduce_add of 8208 bytes of global memory is out of bounds",
}
FAULTS_OF_WGMMA = {
    "wgmma_without_fence": r"wgmma: no wgmma_fence since the last wgmma_commit",
    "wgmma_fence_of_an_older_group": r"wgmma: no wgmma_fence since the last wgmma_commit",
    "wgmma_not_committed": r"wgmma: not committed when the block ends",
    "wgmma_not_waited_for": r"wgmma: not waited for when the block ends",
    "accumulator_written_too_early": r"an accumulator was written before wgmma_wait",
    "accumulator_read_too_early": r"the result is not a number",
    "accumulator_landed_too_early": r"wgmma_landed: of an accumulator that no wgmma_wait",
    "a_registers_written_too_early": r"registers of A were written before wgmma_wait",
    "part_of_an_accumulator": r"wgmma: its accumulator is part of one of another shape",
    "descriptors_differ": r"thread 96: wgmma: its descriptors are not those of thread 0",
    "flags_differ": r"thread 32: wgmma: its type, shape or flags are not those of thread 0",
    "wgmma_of_three_warps": r"deadlock; at wgmma_fence \(.*\): threads 0-63, 96-127; exited",
    "wgmma_of_half_a_warpgroup": r"wgmma_fence: the block ends within the warpgroup",
    "wgmma_of_divergent_warps": r"divergence: it is at wgmma_\w+, others that should be there at",
    "wgmma_without_swizzle": r"a swizzle mode other than 128 bytes is not emulated",
    "wgmma_within_a_pattern": r"descriptor of \d+: it begins within the rows of a swizzle",
    "wgmma_without_leading": r"the leading dimension's offset must be a multiple of 1024",
    "wgmma_before_landing": rf"wgmma reads .* the mbarrier at byte 8 counts .* {LOADING}",
    "released_before_the_wait": rf"tma_load_4d writes .* a wgmma of warpgroup 1 {READING}",
    "released_by_one_of_two": rf"tma_load_4d writes .* {READING}|wgmma reads .* {LOADING}",
    "store_over_what_wgmma_reads": rf"st_shared writes .* a wgmma of warpgroup \d {READING}",
    "own_rows_without_fence": rf"wgmma reads .* {UNFENCED}",
    "wgmma_of_cp_async_without_fence": rf"cp_async_16 of thread 0 wrote .* {UNFENCED}",
    "rows_of_other_warps": rf"wgmma reads byte \d+ .* {RACE}",
    "more_registers_than_there_are": r"deadlock; at registers_up to 240, while 8192 registers",
    "registers_of_three_warps": r"deadlock; at registers_down \(.*\): threads 0-31, 64-127; exited",
    "registers_up_to_fewer": r"registers_up: to 56 from 64",
}
FAULTS_OF_CLUSTERS = {
    "multicast_before_others_read": rf"tma_multicast_4d writes .* {RACE}|{LOADING}",
    "multicast_of_others_not_announced": r"deadlock; .*at mbarrier_wait of parity 0 at the "
    r"mbarrier at byte 0 \(phase 0: 0 of 1 arrivals and -8192 bytes missing\)",
    "arrival_at_what_is_not_there": rf"mbarrier_arrive_at: block 1 {NOT_BEGUN}",
    "arrival_at_an_exited_block": r"mbarrier_arrive_at: block 1 of the cluster has exited",
    "arrival_beyond_the_cluster": r"mbarrier_arrive_at: the cluster has no block 2",
    "cluster_barrier_of_one_block": r"deadlock; at cluster_barrier, where 256 of 512 came "
    r"\(.*\): threads 0-255; exited: threads 256-511",
    "arrival_at_a_block_that_may_not_have_begun": rf"mbarrier_arrive_at: block 1 {NOT_BEGUN}",
    "arrival_at_a_block_that_may_have_exited": r"block \(0, 0, 0\), thread 0: mbarrier_arrive_at: "
    r"block 1 of the cluster may have exited: it waits for no barrier that comes after this",
    "store_beyond_the_cluster": r"st_async_at: the cluster has no block 2",
    "store_beyond_the_shared_memory_of_another": r"st_async_at of 4 bytes at byte 33792 of shared "
    r"memory is out of bounds",
    "store_misaligned_to_another": r"st_async_at of 8 bytes at byte 1028 .* is misaligned",
    "store_to_a_block_that_may_not_have_begun": rf"st_async_at: block 1 {NOT_BEGUN}",
    "mbarrier_init_not_fenced_before_the_arrival": r"mbarrier_wait reads byte 0 of shared memory, "
    rf"which mbarrier_init of thread \d+ \(.*\) {LOADING}",
    "store_not_told_by_a_relaxed_arrival": rf"ld_shared reads byte 1024 .* thread 0 .* {RACE}",
    "store_to_a_block_that_waits_for_none": r"thread 0: st_async_at: still in flight when the "
    r"block ends, nobody has waited for the mbarrier at byte 0",
    "store_to_an_exited_block": r"thread 256: st_async_at: block 0 of the cluster has exited",
    "store_of_another_read_without_wait": rf"ld_shared reads byte 1024 .* {LOADING}",
    "store_over_what_another_reads": rf"st_async_at writes byte 1184 .* thread 296 reads {RACE}",
    "stores_of_two_blocks_to_one_word": rf"st_async_at writes byte 1024 .* {LOADING}",
    "store_of_another_not_announced": r"deadlock; at mbarrier_wait of parity 0 at the mbarrier at "
    r"byte 0 \(phase 0: 0 of 1 arrivals and -4 bytes missing\)",
    "cluster_wait_without_arrival": r"thread 40: cluster_wait: this thread has not arrived",
    "cluster_arrival_twice": r"thread 40: cluster_arrive: no cluster_wait since this thread's",
}


@pytest.fixture(scope="module")
def faults() -> ctypes.CDLL:
    sources = [HERE / f"faults_{what}.cpp" for what in ("copies", "wgmma", "clusters")]
    return ctypes.CDLL(str(build("faults_sm90", sources)))


def report(function, *arguments) -> str:
    buffer = ctypes.create_string_buffer(4096)
    function(*arguments, buffer, ctypes.c_size_t(len(buffer)))
    return buffer.value.decode()


@pytest.mark.parametrize("name", FAULTS_OF_COPIES)
def test_a_fault_of_copies_is_reported(faults, name):
    assert report(faults.fault_of_copies, name.encode(), False) == ""
    assert re.search(FAULTS_OF_COPIES[name], report(faults.fault_of_copies, name.encode(), True))


@pytest.mark.parametrize("name", FAULTS_OF_WGMMA)
def test_a_fault_of_wgmma_is_reported(faults, name):
    assert report(faults.fault_of_wgmma, name.encode(), False) == ""
    assert re.search(FAULTS_OF_WGMMA[name], report(faults.fault_of_wgmma, name.encode(), True))


@pytest.mark.parametrize("name", FAULTS_OF_CLUSTERS)
def test_a_fault_of_clusters_is_reported(faults, name):
    assert report(faults.fault_of_clusters, name.encode(), False) == ""
    assert re.search(
        FAULTS_OF_CLUSTERS[name], report(faults.fault_of_clusters, name.encode(), True)
    )


@pytest.mark.parametrize(
    "what, expected",
    [
        ("copies", FAULTS_OF_COPIES),
        ("wgmma", FAULTS_OF_WGMMA),
        ("clusters", FAULTS_OF_CLUSTERS),
    ],
)
def test_every_planted_fault_is_asked_for(what, expected):
    text = (HERE / f"faults_{what}.cpp").read_text()
    assert re.findall(r"\{FASTATTN_CASE\((\w+)\)", text) == list(expected)


class Tiled(ctypes.Structure):
    """csrc/cuda/tensor_map.h"""

    _fields_ = [
        ("element", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("box", ctypes.c_int * 4),
        ("swizzle", ctypes.c_bool),
    ]


def tiled(x: torch.Tensor, box: tuple[int, ...], swizzle: bool) -> Tiled:
    """A map of all of x, whose last dim is the innermost."""
    element = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}[x.dtype]
    sizes, strides = x.shape[::-1], x.stride()[::-1]
    return Tiled(
        element,
        x.data_ptr(),
        (ctypes.c_int64 * 4)(*sizes),
        (ctypes.c_int64 * 4)(*strides),
        (ctypes.c_int * 4)(*box[::-1]),
        swizzle,
    )


@pytest.fixture(scope="module")
def instructions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("instructions_sm90", [HERE / "instructions_sm90.cpp"])))
    for name in ("product", "pipeline", "load", "store", "bulk", "stmatrix", "clusters"):
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    library.operand_chunk.argtypes = [ctypes.c_uint64, ctypes.c_bool, *[ctypes.c_int] * 3]
    library.operand_chunk.restype = ctypes.c_uint32
    library.operand_descriptor.restype = ctypes.c_uint64
    return library


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["tn", "nn", "tt", "nt", "rn", "rt"])
@pytest.mark.parametrize("n", [16, 32, 64, 80, 96, 128, 176, 192, 256])
def test_product(instructions, n, form, dtype):
    """Tiles that TMA loaded: a K-major (t), M-major (n) or in registers (r), b K- or N-major."""
    a, b = random(64, 128, dtype=dtype), random(128, n, dtype=dtype, seed=1)
    d = torch.empty(64, n)
    a_stored = a.mT.contiguous() if form[0] == "n" else a
    b_stored = b if form[1] == "t" else b.mT.contiguous()
    number = (form[0] == "n") + 2 * (form[1] == "t") + 4 * (form[0] == "r")
    said = instructions.run_product(
        pointer(a_stored), pointer(b_stored), pointer(d), n, dtype == torch.bfloat16, number
    )
    assert said == b""
    torch.testing.assert_close(d.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)


def test_pipeline(instructions):
    """A producer warpgroup, two consumers, a ring of places, results by TMA."""
    steps = 7
    a = random(128, 64 * steps, dtype=torch.bfloat16)
    b = random(64, 64 * steps, dtype=torch.bfloat16, seed=1)
    d = torch.full((128, 64), float("nan"))
    assert instructions.run_pipeline(pointer(a), pointer(b), pointer(d), steps) == b""
    torch.testing.assert_close(d.double(), a.double() @ b.double().mT, atol=1e-3, rtol=1e-5)


def swizzled(address: int) -> int:
    """CuTe's Swizzle<3, 4, 3>."""
    return address ^ (address >> 7 & 7) << 4


def offset(index: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """A mode of a CuTe layout: the index is spread over the shape, the first fastest."""
    total = 0
    for size, step in zip(shape, stride, strict=True):
        total += index % size * step
        index //= size
    return total


@pytest.mark.parametrize("leading", [1024, 9 * 1024])
@pytest.mark.parametrize("mn_major", [False, True])
def test_operand_is_canonical(instructions, mn_major, leading):
    """PTX ISA, "Canonical Layouts", 128B swizzling, in bytes; of the descriptor's tile at 3072."""
    start, stride, extent = 3072, 1024, 192
    descriptor = instructions.operand_descriptor(start, leading)
    for mn, k in itertools.product(range(0, extent, 8), range(0, 16, 8)):
        if mn_major:  # ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), T = 8 elements of 2 bytes
            at = offset(mn, (8, 8, 3), (2, 16, leading)) + offset(k, (8, 2), (128, stride))
        else:  # ((8,m),(T,2k)):((8T,SBO),(1,T))
            at = offset(mn, (8, 24), (128, stride)) + offset(k, (8, 2), (2, 16))
        found = instructions.operand_chunk(descriptor, mn_major, extent, mn, k)
        assert found == swizzled(start + at)


def box_of(x: torch.Tensor, at: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """What lies in the box that begins at `at`, zeros beyond the edges."""
    result = torch.zeros(box, dtype=x.dtype)
    inside = [
        [(i, first + i) for i in range(size) if 0 <= first + i < limit]
        for first, size, limit in zip(at, box, x.shape, strict=True)
    ]
    for index in itertools.product(*inside):
        result[tuple(i for i, _ in index)] = x[tuple(j for _, j in index)]
    return result


def in_shared_memory(box: torch.Tensor, swizzle: bool) -> torch.Tensor:
    """The box's bytes as they lie in shared memory, at a multiple of 1024."""
    raw = box.contiguous().view(torch.uint8).flatten()
    if not swizzle:
        return raw
    return raw[torch.tensor([swizzled(i) for i in range(raw.numel())])]


# of (3, 2, 9, 72) and of 32-bit (3, 2, 9, 36): inside, over each edge, before the begin, outside
CORNERS = [
    (0, 0, 0, 0),
    (1, 1, 4, 16),
    (2, 0, 7, 24),
    (-1, -1, -3, -8),
    (2, 1, 8, 35),
    (0, 5, 0, 0),
]
BOXES = {"swizzled": (2, 2, 5, 128), "plain": (2, 1, 4, 48), "rows": (1, 1, 9, 16)}


@pytest.fixture(params=[(d, b) for d in (torch.bfloat16, torch.float32) for b in BOXES], ids=str)
def boxed(request):
    dtype, name = request.param
    *outer, row_bytes = BOXES[name]
    x = random(3, 2, 9, 144 // dtype.itemsize, dtype=dtype)
    return x, (*outer, row_bytes // dtype.itemsize), name == "swizzled"


@pytest.mark.parametrize("at", CORNERS, ids=str)
def test_load(instructions, boxed, at):
    x, box, swizzle = boxed
    want = in_shared_memory(box_of(x, at, box), swizzle)
    found = torch.empty_like(want)
    said = instructions.run_load(
        ctypes.byref(tiled(x, box, swizzle)),
        (ctypes.c_int * 4)(*at[::-1]),
        pointer(found),
        found.numel() // 4,
    )
    assert said == b""
    assert torch.equal(found, want)


@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
@pytest.mark.parametrize("at", CORNERS, ids=str)
def test_store(instructions, boxed, at, add):
    x, box, swizzle = boxed
    add = add and x.dtype == torch.float32  # what is added
    new = random(*box, dtype=x.dtype, seed=1)
    source = in_shared_memory(new, swizzle)
    # Where x's elements lie in the box, if they do.
    numbers = torch.arange(1, x.numel() + 1).view(x.shape)
    reached = box_of(numbers, at, box)
    want = x.clone()
    for number, value in zip(reached.flatten().tolist(), new.flatten(), strict=True):
        if number:
            want.view(-1)[number - 1] = want.view(-1)[number - 1] + value if add else value
    said = instructions.run_store(
        ctypes.byref(tiled(x, box, swizzle)),
        (ctypes.c_int * 4)(*at[::-1]),
        pointer(source),
        source.numel() // 4,
        add,
    )
    assert said == b""
    assert torch.equal(x, want)


def test_strided_tensor(instructions):
    """Strides in any order, as of (batch, seqlen, heads, head_dim) seen as (batch, heads, ...)."""
    x = random(2, 5, 3, 16, dtype=torch.float16).transpose(1, 2)
    box, at = (1, 1, 4, 16), (1, 2, 3, 0)
    found = torch.empty(box, dtype=x.dtype)
    said = instructions.run_load(
        ctypes.byref(tiled(x, box, False)),
        (ctypes.c_int * 4)(*at[::-1]),
        pointer(found),
        found.numel() // 2,
    )
    assert said == b""
    assert torch.equal(found, box_of(x, at, box))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("address", 8, "the address must be a multiple of 16"),
        ("sizes", (64, 0, 1, 1), "the size of dim 1 must be 1 to 2^32, not 0"),
        ("strides", (2, 64, 512, 512), "the innermost stride must be 1, not 2"),
        ("strides", (1, 68, 512, 512), "the stride in bytes of dim 1 must be a multiple of 16"),
        ("strides", (1, 64, -512, 512), "the stride in bytes of dim 2 must be 0 to 2^40"),
        ("strides", (1, 64, 512, 1 << 39), "the stride in bytes of dim 3 must be 0 to 2^40"),
        ("box", (64, 257, 1, 1), "the box of dim 1 must be 1 to 256, not 257"),
        ("box", (64, 8, 1, 0), "the box of dim 3 must be 1 to 256, not 0"),
        ("box", (4, 8, 1, 1), "the box's rows must be multiples of 16 bytes, not 8"),
        ("box", (128, 8, 1, 1), "the box's rows must be 128 bytes to be swizzled, not 256"),
    ],
)
def test_refused_tensor_map(instructions, field, value, why):
    x = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    wrong = tiled(x, (1, 1, 8, 64), True)
    of_ints = isinstance(value, tuple)
    setattr(wrong, field, type(getattr(wrong, field))(*value) if of_ints else value)
    at = (ctypes.c_int * 4)()
    assert f"tensor map: {why}" in instructions.run_load(ctypes.byref(wrong), at, None, 0).decode()


def test_bulk(instructions):
    x, sums = random(128, dtype=torch.float32), random(128, dtype=torch.float32, seed=1)
    want = sums + x + x
    assert instructions.run_bulk(pointer(x), pointer(sums)) == b""
    assert torch.equal(sums, want)


def test_stmatrix(instructions):
    """Lane l gives elements (l / 4, 2 (l % 4)) and the next of each matrix."""
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    d = matrices.view(4, 32, 2).transpose(0, 1).contiguous()
    found = torch.empty_like(matrices)
    assert instructions.run_stmatrix(pointer(d), pointer(found)) == b""
    assert torch.equal(found, matrices)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_clusters(instructions, blocks):
    """Each block is told the others' ranks by a word, and what they count of blocks by two."""
    clusters = 2
    words = torch.empty(clusters, blocks, blocks, dtype=torch.int32)
    pairs = torch.empty(clusters, blocks, blocks, 2, dtype=torch.int32)
    assert instructions.run_clusters(blocks, clusters, pointer(words), pointer(pairs)) == b""
    ranks = torch.arange(blocks, dtype=torch.int32)
    assert torch.equal(words, ranks.expand_as(words))
    assert torch.equal(pairs[..., 0], ranks.expand_as(words))
    assert pairs[..., 1].eq(blocks).all()
