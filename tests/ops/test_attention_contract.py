"""fastattn.attention in the company of torch: errors, gradcheck, opcheck, compile, autocast."""

import pytest
import torch

import fastattn
from fastattn import philox


def tensors(dtype=torch.float32, heads_kv=2, requires_grad=False):
    options = dict(dtype=dtype, requires_grad=requires_grad)
    q = torch.randn(2, 4, 5, 8, **options)
    k, v = (torch.randn(2, heads_kv, 7, 8, **options) for _ in range(2))
    return q, k, v


I32 = torch.int32
BAD = {
    "q: expected a tensor": lambda q, k, v: ((1, k, v), {}),
    r"q: expected \(batch, heads, seqlen_q, head_dim\), got shape \(5, 8\)": (
        lambda q, k, v: ((q[0, 0], k, v), {})
    ),
    "q: expected one of .*, got torch.int64": lambda q, k, v: ((q.long(), k, v), {}),
    "k: expected torch.float32 as in q, got torch.float16": lambda q, k, v: ((q, k.half(), v), {}),
    "k: expected batch 2 as in q, got 1": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "k: expected head_dim 8 as in q, got 7": lambda q, k, v: ((q, k[..., :7], v), {}),
    "k: expected heads_kv to divide the 4 heads of q, got 3": (
        lambda q, k, v: ((q, k[:, :1].expand(2, 3, 7, 8), v[:, :1].expand(2, 3, 7, 8)), {})
    ),
    r"v: expected \(2, 2, 7\) before head_dim_v as in k, got \(2, 2, 6\)": (
        lambda q, k, v: ((q, k, v[:, :, :6]), {})
    ),
    "k: expected device cpu as q, got meta": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "mask: expected torch.bool": lambda q, k, v: ((q, k, v), dict(mask=torch.ones(5, 7))),
    r"mask: expected a shape broadcastable to \(2, 4, 5, 7\), got \(5, 6\)": (
        lambda q, k, v: ((q, k, v), dict(mask=torch.ones(5, 6, dtype=torch.bool)))
    ),
    "bias: expected a shape broadcastable": (
        lambda q, k, v: ((q, k, v), dict(bias=torch.ones(1, 1, 1, 5, 7)))
    ),
    "alibi_slopes: expected torch.float32": (
        lambda q, k, v: ((q, k, v), dict(alibi_slopes=torch.ones(4).double()))
    ),
    "alibi_slopes: no gradient": (
        lambda q, k, v: ((q, k, v), dict(alibi_slopes=torch.ones(4, requires_grad=True)))
    ),
    r"sinks: expected shape \(4,\)": lambda q, k, v: ((q, k, v), dict(sinks=torch.ones(3))),
    "dropout_p: expected 0 <= dropout_p < 1, got 1.0": (
        lambda q, k, v: ((q, k, v), dict(dropout_p=1.0))
    ),
    "seed: expected": lambda q, k, v: ((q, k, v), dict(dropout_p=0.5, seed=-1)),
    "softcap: expected a positive": lambda q, k, v: ((q, k, v), dict(softcap=-1.0)),
    "window: expected int": lambda q, k, v: ((q, k, v), dict(window=(1.5, None))),
    "seqlens_k: expected torch.int32": (
        lambda q, k, v: ((q, k, v), dict(seqlens_k=torch.tensor([1, 2])))
    ),
    r"seqlens_k: expected shape \(2,\)": (
        lambda q, k, v: ((q, k, v), dict(seqlens_k=torch.tensor([1], dtype=I32)))
    ),
    "seqlens_k: expected a tensor beside block_table": (
        lambda q, k, v: ((q, k, v), dict(block_table=torch.zeros(2, 2, dtype=I32)))
    ),
    "cu_seqlens_k: expected a tensor beside": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens_q=torch.tensor([0, 5], dtype=I32)))
    ),
    "cu_seqlens_q: expected a tensor beside": (
        lambda q, k, v: ((q, k, v), dict(cu_seqlens_k=torch.tensor([0, 5], dtype=I32)))
    ),
    "cu_seqlens_q: expected to rise from 0 to at most 5": lambda q, k, v: packed(q, k, v, [0, 6]),
    "cu_seqlens_q: expected to rise": lambda q, k, v: packed(q, k, v, [0, 4, 2], [0, 1, 2]),
    "cu_seqlens_k: expected to rise": lambda q, k, v: packed(q, k, v, [0, 5], [1, 7]),
    "max_seqlen_q: expected at least 5, got 4": (
        lambda q, k, v: packed(q, k, v, [0, 5], max_seqlen_q=4)
    ),
    "block_table: expected pages from 0 to 1 up to seqlens_k, got 0 to 2": (
        lambda q, k, v: paged(q, k, v, [[0, 1], [2, 0]])
    ),
}


def packed(q, k, v, starts_q, starts_k=(0, 7), **kwargs):
    """The first sequence of the batch, packed."""
    starts = {
        "cu_seqlens_q": torch.tensor(starts_q, dtype=I32),
        "cu_seqlens_k": torch.tensor(starts_k, dtype=I32),
    }
    return tuple(x[0].transpose(0, 1) for x in (q, k, v)), starts | kwargs


def paged(q, k, v, pages):
    """k and v as two pages of seven keys."""
    table = torch.tensor(pages, dtype=I32)
    lengths = torch.full((2,), 14, dtype=I32)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return (q, k, v), dict(block_table=table, seqlens_k=lengths)


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    args, kwargs = BAD[message](*tensors())
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.attention(*args, **kwargs)


def test_gradcheck():
    q, k, v = tensors(torch.float64, requires_grad=True)
    bias = torch.randn(4, 1, 7, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks):
        return fastattn.attention(
            q, k, v, bias=bias, sinks=sinks, causal=True, offset=1, window=(3, None),
            softcap=2.0, dropout_p=0.3, seed=5, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v = tensors(dtype, requires_grad=True)
    bias = torch.randn(4, 1, 7, dtype=dtype, requires_grad=True)
    mask = torch.rand(5, 7) < 0.8
    rest = (None,) * 8 + (0.3, None, 0, 1, 2.0, 0.0, 0, 0, False)
    torch.library.opcheck(torch.ops.fastattn.attention_fwd, (q, k, v, mask, bias, *rest))


@pytest.mark.parametrize("seqlen", [1, 40])
def test_compile(seqlen):
    q, k, v = (torch.randn(2, 4, seqlen, 16, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        out, lse = fastattn.attention(q * 2, k, v, causal=True, return_lse=True)
        return out.sin().sum() + lse.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(call(q, k, v), (q, k, v))
    traced = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(eager, traced):
        torch.testing.assert_close(a, b)


def test_compile_dynamic_and_dropout():
    def call(q, k, v):
        return fastattn.attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (3, 9):
        q = torch.randn(1, 2, seqlen, 8)
        assert compiled(q, q, q).shape == q.shape


def test_autocast():
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    low = fastattn.attention(*(t.bfloat16() for t in (q, k, v)))
    assert torch.equal(out, low)


def test_meta_and_fake_tensors_give_shapes():
    q, k, v = (t.to("meta") for t in tensors())
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 5, 8) and lse.shape == (2, 4, 5)
    assert out.transpose(1, 2).is_contiguous()


def test_double_backward_is_refused():
    q, k, v = tensors(requires_grad=True)
    (dq,) = torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_philox_known_answers():
    """Random123's known answers for philox4x32 with 7 rounds."""
    zero = torch.zeros(1, dtype=torch.int64)
    ones = zero + 0xFFFFFFFF
    words = philox._philox((zero,) * 4, (0, 0))
    assert [int(w) for w in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    words = philox._philox((ones,) * 4, (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in words] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def test_dropout_rate_and_reproducibility():
    q = torch.zeros(2, 4, 64, 8)
    v = torch.eye(64).expand(2, 4, 64, 64)
    torch.manual_seed(1)
    first = fastattn.attention(q, q, v, dropout_p=0.25)
    second = fastattn.attention(q, q, v, dropout_p=0.25)
    torch.manual_seed(1)
    assert torch.equal(first, fastattn.attention(q, q, v, dropout_p=0.25))
    assert not torch.equal(first, second)
    dropped = first.eq(0).double().mean().item()
    assert abs(dropped - 0.25) < 0.01
    torch.testing.assert_close(first[first != 0], torch.full(((first != 0).sum(),), 1 / 64 / 0.75))
