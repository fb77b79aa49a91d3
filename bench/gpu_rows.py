"""The cases of `gpu.py`: inputs, fastattn's call and its rivals', the work, and the bars."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """What is compared, in each direction that `work` names.

    A direction is "forward", "backward" or "step", both in one call. Bars are the least values of
    measures: a rival's time over fastattn's, or "of_copy", the share of the bandwidth of a copy;
    `bars` are the Triton backend's.
    """

    op: str
    case: str
    dtype: str
    inputs: list[Tensor]  # which take a gradient
    rivals: dict[str, Callable[..., Tensor]]  # functions of the inputs
    exact: Callable[..., Tensor]  # of inputs in float64
    work: dict[str, tuple[str, float]]  # "flops" or "bytes", and how many
    bars: dict[str, dict[str, float]] = {}  # noqa: RUF012
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor  # of an input, that `exact` sees
    cuda_bars: dict[str, dict[str, float]] = {}  # noqa: RUF012


class Sizes(NamedTuple):
    """Of all cases."""

    tokens: int  # batch * seqlen
    hidden: int  # heads * head_dim
    seqlens: tuple[int, ...]
    caches: tuple[int, ...]
    features: int  # seqlen of grouped, windowed and packed attention
    softmax: tuple[tuple[int, int], ...]
    norm: tuple[tuple[int, int], ...]
    logits: tuple[tuple[int, int], ...]
    ffn: tuple[int, int, int]  # rows, d_model, d_ff
    vocabulary: tuple[int, int, int]  # rows, d_model, vocabulary


FULL = Sizes(
    tokens=16384,
    hidden=2048,
    seqlens=(512, 1024, 2048, 4096, 8192, 16384),
    caches=(4096, 8192, 16384, 32768),
    features=4096,
    # Rows of a warp, of a block, on sm_90 of clusters of 2, 4, 8 and 8 larger blocks; beyond them.
    softmax=(
        (32768, 1024),
        (16384, 4096),
        (8192, 16384),
        (4096, 32768),
        (2048, 65536),
        (1024, 131072),
        (512, 262144),
    ),
    norm=((32768, 1024), (16384, 4096), (16384, 8192)),
    logits=((8192, 32000), (4096, 128256)),
    ffn=(4096, 4096, 16384),
    vocabulary=(8192, 4096, 128256),
)
TINY = Sizes(
    tokens=64,
    hidden=128,
    seqlens=(64,),
    caches=(64,),
    features=64,
    softmax=((8, 64),),
    norm=((8, 64),),
    logits=((8, 96),),
    ffn=(16, 64, 128),
    vocabulary=(16, 64, 96),
)
ATTENTION_BARS = {"flash": 1.0, "cudnn": 0.75}
DECODE_BARS = {"of_copy": 0.85}
ROWS_BARS = {"of_copy": 0.9, "compile": 1.0}
FFN_BARS = {"eager": 0.95}
CUDA_ATTENTION_BARS = {"forward": {"cudnn": 0.9}, "backward": {"cudnn": 0.85}}
CUDA_ATTENTION_SEQLENS = (1024, 4096, 16384)
CUDA_DECODE_BARS = {"of_copy": 0.9}
CUDA_ROWS_BARS = {"of_copy": 0.92}
CUDA_FFN_BARS = {"cublaslt": 1.0}
LINEAR_CROSS_ENTROPY_BARS = {"eager": 1.0, "memory": 1.5}  # of the eager pair's
WINDOW = 1023


def attention(device: str, sizes: Sizes) -> Iterator[Case]:
    """As in the charts of flash-attention: always as many tokens."""
    for dtype, head_dim, causal in itertools.product(
        ("bf16", "fp16"), (64, 128, 256), (False, True)
    ):
        heads = max(1, sizes.hidden // head_dim)
        for seqlen in sizes.seqlens:
            batch = sizes.tokens // seqlen
            flops = 4 * batch * heads * head_dim * visible(seqlen, causal)
            yield Case(
                "attention",
                f"d{head_dim} {seqlen}{' causal' * causal}",
                dtype,
                [heads_inside(device, dtype, batch, seqlen, heads, head_dim) for _ in "qkv"],
                {
                    "fastattn": partial(fastattn.attention, causal=causal),
                    "flash": sdpa(SDPBackend.FLASH_ATTENTION, causal),
                    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, causal),
                },
                exact_attention(causal=causal),
                {"forward": ("flops", flops), "backward": ("flops", 2.5 * flops)},
                dict.fromkeys(("forward", "backward"), ATTENTION_BARS) if head_dim == 128 else {},
                lambda tensor: tensor[:1, :1],
                CUDA_ATTENTION_BARS if seqlen in CUDA_ATTENTION_SEQLENS else {},
            )


def grouped(device: str, sizes: Sizes) -> Iterator[Case]:
    """Four query heads to a key/value head."""
    head_dim, heads, seqlen = 128, max(4, sizes.hidden // 128), sizes.features
    batch = sizes.tokens // seqlen
    flops = 4 * batch * heads * head_dim * visible(seqlen, True)
    make = partial(heads_inside, device, "bf16", batch, seqlen)
    yield Case(
        "attention",
        f"GQA d128 {seqlen} causal",
        "bf16",
        [make(heads, head_dim), *(make(heads // 4, head_dim) for _ in "kv")],
        {
            "fastattn": partial(fastattn.attention, causal=True),
            "flash": sdpa(SDPBackend.FLASH_ATTENTION, True, enable_gqa=True),
            "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, True, enable_gqa=True),
        },
        exact_attention(causal=True),
        {"forward": ("flops", flops), "backward": ("flops", 2.5 * flops)},
        part=lambda tensor: tensor[:1, : 4 * tensor.shape[1] // heads],
    )


def window(device: str, sizes: Sizes) -> Iterator[Case]:
    """A sliding window; the rival is flash-attention as torch holds it inside."""
    head_dim, heads, seqlen = 128, sizes.hidden // 128, 2 * sizes.features
    left = min(WINDOW, seqlen // 4)
    batch = max(1, sizes.tokens // seqlen)

    def flash(q, k, v):
        inside = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        out = torch.ops.aten._flash_attention_forward(
            *inside, None, None, seqlen, seqlen, 0.0, True, False,
            window_size_left=left, window_size_right=0,
        )  # fmt: skip
        return out[0].transpose(1, 2)

    pairs = visible(left + 1, True) + (seqlen - left - 1) * (left + 1)
    flops = 4 * batch * heads * head_dim * pairs
    features = {"causal": True, "window": (left, None)}
    yield Case(
        "attention",
        f"d128 {seqlen} causal window {left + 1}",
        "bf16",
        [heads_inside(device, "bf16", batch, seqlen, heads, head_dim) for _ in "qkv"],
        {"fastattn": partial(fastattn.attention, **features), "flash": flash},
        exact_attention(**features),
        {"forward": ("flops", flops), "backward": ("flops", 2.5 * flops)},
        part=lambda tensor: tensor[:1, :1],
    )


def packed(device: str, sizes: Sizes) -> Iterator[Case]:
    """Sequences of all lengths up to the longest, one after the other."""
    head_dim, heads, longest = 128, sizes.hidden // 128, sizes.features
    lengths = torch.linspace(longest // 8, longest, max(2, 2 * sizes.tokens // longest)).int()
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)

    def flash(q, k, v):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )[0]

    flops = 4 * heads * head_dim * sum(visible(length, True) for length in lengths.tolist())
    features = {"causal": True, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    features |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    shape = (int(lengths.sum()), heads, head_dim)
    yield Case(
        "attention",
        f"d128 packed {len(lengths)} to {longest} causal",
        "bf16",
        [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "qkv"],
        {"fastattn": partial(fastattn.attention, **features), "flash": flash},
        exact_attention(**features),
        {"forward": ("flops", flops), "backward": ("flops", 2.5 * flops)},
        part=lambda tensor: tensor[:, :1],
    )


def decode(device: str, sizes: Sizes) -> Iterator[Case]:
    """One query against a cache of grouped keys and values, which must be read once."""
    head_dim, heads = 128, max(4, 2 * sizes.hidden // 128)
    for batch, cache in itertools.product((1, 16), sizes.caches):
        make = partial(heads_inside, device, "bf16", batch)
        inputs = [make(1, heads, head_dim), *(make(cache, heads // 4, head_dim) for _ in "kv")]
        yield Case(
            "attention",
            f"decode d128 GQA batch {batch} of {cache}",
            "bf16",
            inputs,
            {
                "fastattn": fastattn.attention,
                "flash": sdpa(SDPBackend.FLASH_ATTENTION, False, enable_gqa=True),
            },
            exact_attention(),
            {"forward": ("bytes", sum(tensor.nbytes for tensor in inputs))},
            {"forward": DECODE_BARS},
            lambda tensor: tensor[:1],
            {"forward": CUDA_DECODE_BARS},
        )


def softmax(device: str, sizes: Sizes) -> Iterator[Case]:
    for dtype, shape in itertools.product(("bf16", "fp32"), sizes.softmax):
        x = torch.randn(shape, device=device, dtype=DTYPES[dtype])
        eager = partial(torch.softmax, dim=-1)
        case = rows_case("softmax", dtype, [x], fastattn.softmax, eager, (2, 3), ROWS_BARS)
        yield case._replace(cuda_bars=dict.fromkeys(case.work, CUDA_ROWS_BARS))


def norm(device: str, sizes: Sizes) -> Iterator[Case]:
    for shape in sizes.norm:
        x, weight, bias = (
            torch.randn(size, device=device, dtype=torch.bfloat16)
            for size in (shape, shape[-1:], shape[-1:])
        )

        def layer_norm(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight, bias)

        def rms_norm(x, weight):
            return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

        inputs = [x, weight, bias]
        yield rows_case(
            "layer_norm", "bf16", inputs, fastattn.layer_norm, layer_norm, (2, 3), ROWS_BARS
        )
        inputs = [x.detach(), weight.detach()]
        yield rows_case("rms_norm", "bf16", inputs, fastattn.rms_norm, rms_norm, (2, 3), ROWS_BARS)


def rotary(device: str, sizes: Sizes) -> Iterator[Case]:
    seqlen, head_dim = sizes.features, 128
    x = heads_inside(
        device, "bf16", sizes.tokens // seqlen, seqlen, sizes.hidden // head_dim, head_dim
    )
    angles = torch.randn(seqlen, head_dim // 2, device=device)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def eager(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def ours(x):
        return fastattn.rotary(x, cos, sin)

    yield rows_case("rotary", "bf16", [x], ours, eager, (2, 2))


def cross_entropy(device: str, sizes: Sizes) -> Iterator[Case]:
    for shape in sizes.logits:
        logits = torch.randn(shape, device=device, dtype=torch.bfloat16)
        targets = torch.randint(shape[-1], shape[:1], device=device)
        ours, eager = (
            partial(function, **{name: targets})
            for function, name in (
                (fastattn.cross_entropy, "targets"),
                (F.cross_entropy, "target"),
            )
        )
        yield rows_case("cross_entropy", "bf16", [logits], ours, eager, (1, 2))


def ffn(device: str, sizes: Sizes) -> Iterator[Case]:
    rows, d_model, d_ff = sizes.ffn

    def plain(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    def cublaslt(x, w1, b1, w2, b2):
        """Bias and activation in the product's epilogue."""
        return F.linear(torch._addmm_activation(b1, x, w1.T, use_gelu=True), w2, b2)

    def gated(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    forms = {
        "ffn": (
            partial(fastattn.ffn, activation="gelu_tanh"),
            {"eager": plain, "cublaslt": cublaslt},
            [(rows, d_model), (d_ff, d_model), (d_ff,), (d_model, d_ff), (d_model,)],
        ),
        "gated_ffn": (
            fastattn.gated_ffn,
            {"eager": gated},
            [(rows, d_model), (d_ff, d_model), (d_ff, d_model), (d_model, d_ff)],
        ),
    }
    for dtype, (op, (ours, rivals, shapes)) in itertools.product(("bf16", "fp16"), forms.items()):
        inputs = [
            (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(DTYPES[dtype])
            for shape in shapes
        ]
        flops = 2 * rows * d_model * d_ff * sum(len(shape) == 2 for shape in shapes[1:])
        yield Case(
            op,
            f"{rows} x {d_model} x {d_ff}",
            dtype,
            inputs,
            {"fastattn": ours, **rivals},
            rivals["eager"],
            {"forward": ("flops", flops), "backward": ("flops", 2 * flops)},
            dict.fromkeys(("forward", "backward"), FFN_BARS),
            cuda_bars={"forward": CUDA_FFN_BARS} if "cublaslt" in rivals else {},
        )


def linear_cross_entropy(device: str, sizes: Sizes) -> Iterator[Case]:
    rows, d_model, vocabulary = sizes.vocabulary
    x = torch.randn(rows, d_model, device=device, dtype=torch.bfloat16)
    weight = (torch.randn(vocabulary, d_model, device=device) * d_model**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def ours(x, weight):
        return fastattn.linear_cross_entropy(x, weight, targets)

    def eager(x, weight):
        return F.cross_entropy(F.linear(x, weight), targets)

    flops = 2 * rows * d_model * vocabulary
    yield Case(
        "linear_cross_entropy",
        f"{rows} x {d_model} x {vocabulary}",
        "bf16",
        [x, weight],
        {"fastattn": ours, "eager": eager},
        eager,
        {"forward": ("flops", flops), "step": ("flops", 3 * flops)},
        dict.fromkeys(("forward", "step"), LINEAR_CROSS_ENTROPY_BARS),
    )


def rows_case(op, dtype, inputs, ours, eager, tensors, bars=None) -> Case:
    """An op that memory bounds: `tensors` of the first input's size are touched each way."""
    work = {
        direction: ("bytes", count * inputs[0].nbytes)
        for direction, count in zip(("forward", "backward"), tensors, strict=True)
    }
    return Case(
        op,
        " x ".join(map(str, inputs[0].shape)),
        dtype,
        inputs,
        {"fastattn": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)},
        eager,
        work,
        dict.fromkeys(work, bars) if bars else {},
    )


def heads_inside(device, dtype, batch, seqlen, heads, head_dim) -> Tensor:
    """(batch, heads, seqlen, head_dim), stored as a projection leaves it: heads inside seqlen."""
    shape = (batch, seqlen, heads, head_dim)
    return torch.randn(shape, device=device, dtype=DTYPES[dtype]).transpose(1, 2)


def sdpa(backend: SDPBackend, causal: bool, **options) -> Callable[..., Tensor]:
    """torch's own attention, on one backend."""

    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)

    return call


def exact_attention(**features) -> Callable[..., Tensor]:
    """The plain formula."""

    def call(q, k, v):
        with fastattn.use_backend("reference"):
            return fastattn.attention(q, k, v, **features)

    return call


def visible(seqlen: int, causal: bool) -> float:
    """Pairs of a query and a key that it sees."""
    return seqlen * (seqlen + 1) / 2 if causal else float(seqlen) ** 2


FAMILIES: dict[str, tuple[Callable[[str, Sizes], Iterator[Case]], ...]] = {
    "attention": (attention, grouped, window, packed),
    "decode": (decode,),
    "softmax": (softmax,),
    "norm": (norm,),
    "rotary": (rotary,),
    "cross_entropy": (cross_entropy,),
    "ffn": (ffn,),
    "linear_cross_entropy": (linear_cross_entropy,),
}
