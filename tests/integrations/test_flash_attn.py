"""flash-attn's functions against a plain float64 softmax, and the module in sys.modules."""

import importlib.util
import inspect
import sys

import pytest
import torch

from fastattn.integrations import flash_attn as door

BATCH, HEADS, HEADS_KV, HEAD_DIM = 2, 4, 2, 16
close = torch.testing.assert_close
installed = importlib.util.find_spec("flash_attn") is not None


def expected(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """Output and log-sum-exp in float64 of (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_k = scores.shape[-2:]
    left, right = window
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance.abs()
    if causal:
        right = 0
    if right >= 0:
        scores = scores.masked_fill(distance > right, -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num() @ v
    return out.transpose(1, 2), scores.logsumexp(-1)


def qkv(seqlen_q, seqlen_k, batch=BATCH):
    torch.manual_seed(0)
    shapes = (batch, seqlen_q, HEADS), (batch, seqlen_k, HEADS_KV), (batch, seqlen_k, HEADS_KV)
    return [torch.randn(*shape, HEAD_DIM, requires_grad=True) for shape in shapes]


OPTIONS = [
    {},
    {"causal": True},
    {"softmax_scale": 0.3, "softcap": 2.0},
    {"window_size": (3, 1)},
    {"window_size": (4, -1), "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "causal": True},
]
REFERENCE_NAMES = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes"}


def reference(q, k, v, options):
    return expected(q, k, v, **{REFERENCE_NAMES.get(n, n): x for n, x in options.items()})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)], ids=str)
def test_values_and_gradients(lengths, options):
    q, k, v = qkv(*lengths)
    out, lse, probs = door.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    want, want_lse = reference(q, k, v, options)
    close(out.double(), want, rtol=1e-4, atol=1e-5)
    close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)
    assert probs is None
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    wanted = torch.autograd.grad(want, (q, k, v), dout.double())
    for grad, want_grad in zip(grads, wanted, strict=True):
        close(grad, want_grad.nan_to_num(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_packed_tensors(options):
    q, k, v = qkv(7, 7)
    q = q[:, :, :HEADS_KV]
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": options["alibi_slopes"][:HEADS_KV]}
    want, _ = reference(q, k, v, options)
    packed = torch.stack((q, k, v), 2)
    close(door.flash_attn_qkvpacked_func(packed, **options).double(), want, rtol=1e-4, atol=1e-5)
    found = door.flash_attn_kvpacked_func(q, packed[:, :, 1:], **options)
    close(found.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_varlen(options):
    lengths_q, lengths_k = [3, 1, 6], [5, 4, 6]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    sequences = [qkv(a, b, 1) for a, b in zip(lengths_q, lengths_k, strict=True)]
    q, k, v = (torch.cat([s[i][0] for s in sequences]) for i in range(3))
    want = [reference(*s, options) for s in sequences]
    want_out = torch.cat([out[0] for out, _ in want])
    want_lse = torch.cat([lse[0] for _, lse in want], 1)
    call = (cu_q, cu_k, 6, 6)
    out, lse, _ = door.flash_attn_varlen_func(q, k, v, *call, **options, return_attn_probs=True)
    close(out.double(), want_out, rtol=1e-4, atol=1e-5)
    close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)
    kv = torch.stack((k, v), 1)
    out = door.flash_attn_varlen_kvpacked_func(q, kv, *call, **options)
    close(out.double(), want_out, rtol=1e-4, atol=1e-5)


def test_varlen_of_one_tensor():
    q, k, v = qkv(7, 7, 1)
    packed = torch.stack((q[0, :, :HEADS_KV], k[0], v[0]), 1)
    cu_seqlens = torch.tensor([0, 3, 7]).int()
    out = door.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, 4, causal=True)
    for a, b in ((0, 3), (3, 7)):
        want, _ = expected(*packed[None, a:b].unbind(2), causal=True)
        close(out[a:b].double(), want[0], rtol=1e-4, atol=1e-5)


def turned(x, cos, sin, positions, interleaved):
    """`x` (seqlen, heads, head_dim) with its first dims turned, in float64."""
    x, c, s = x.double(), cos[positions].double()[:, None], sin[positions].double()[:, None]
    half = cos.shape[1]
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        ends = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        ends = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((ends, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["rows", "chosen rows", "pages"])
def test_cache(layout, causal, interleaved):
    """Two new tokens behind caches of 3 and 5."""
    filled, new = torch.tensor([3, 5]).int(), 2
    q, k, v = (x.detach() for x in qkv(new, new))
    torch.manual_seed(1)
    where = {}
    if layout == "pages":
        k_cache, v_cache = torch.randn(2, 5, 4, HEADS_KV, HEAD_DIM).unbind()
        table = torch.tensor([[3, 0], [1, 4]]).int()
        where = {"block_table": table}

        def rows(cache):
            return cache[table.long()].flatten(1, 2)
    else:
        k_cache, v_cache = torch.randn(2, 3, 8, HEADS_KV, HEAD_DIM).unbind()
        chosen = torch.tensor([2, 0] if layout == "chosen rows" else [0, 1])
        if layout == "chosen rows":
            where = {"cache_batch_idx": chosen.int()}

        def rows(cache):
            return cache[chosen]

    before = rows(k_cache), rows(v_cache)
    angles = torch.rand(16, 4)
    cos, sin = angles.cos(), angles.sin()
    if interleaved is not None:
        where |= dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
    out, lse = door.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=filled, causal=causal,
        return_softmax_lse=True, **where,
    )  # fmt: skip
    for i, length in enumerate(filled.tolist()):
        q_i, k_i = q[i], k[i]
        if interleaved is not None:
            positions = torch.arange(length, length + new)
            k_i = turned(k_i, cos, sin, positions, interleaved)
            q_at = positions if causal else torch.full((new,), length)
            q_i = turned(q_i, cos, sin, q_at, interleaved)
        keys = torch.cat((before[0][i, :length].double(), k_i.double()))
        values = torch.cat((before[1][i, :length], v[i]))
        want, want_lse = expected(q_i[None], keys[None], values[None], causal=causal)
        close(out[i].double(), want[0], rtol=1e-4, atol=1e-5)
        close(lse[i].double(), want_lse[0], rtol=1e-4, atol=1e-5)
        close(rows(k_cache)[i, : length + new].double(), keys, rtol=1e-5, atol=1e-6)
        assert torch.equal(rows(v_cache)[i, : length + new], values)
        assert torch.equal(rows(v_cache)[i, length + new :], before[1][i, length + new :])


def test_cache_is_only_read():
    q, k, v = (x.detach() for x in qkv(1, 6))
    want, _ = expected(q, k[:, :4], v[:, :4])
    out = door.flash_attn_with_kvcache(q, k, v, cache_seqlens=4)
    close(out.double(), want, rtol=1e-4, atol=1e-5)
    close(
        door.flash_attn_with_kvcache(q, k, v).double(), expected(q, k, v)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"cache_leftpad": torch.tensor([0, 1])}, "^cache_leftpad: "),
        ({"k": torch.zeros(2, 1, HEADS_KV, HEAD_DIM)}, "^v: "),
        ({"rotary_cos": torch.ones(8, 4)}, "^rotary_cos: "),
        (
            {
                "k": torch.zeros(2, 3, HEADS_KV, HEAD_DIM),
                "v": torch.zeros(2, 3, HEADS_KV, HEAD_DIM),
                "cache_seqlens": 4,
            },
            "^k: expected at most 6 tokens",
        ),
    ],
)
def test_cache_refuses(arguments, error):
    q, k, v = (x.detach() for x in qkv(1, 6))
    with pytest.raises(ValueError, match=error):
        door.flash_attn_with_kvcache(q, k, v, **arguments)


def test_the_fourth_argument_by_position():
    q, k, v = qkv(5, 5)
    want, _ = expected(q, k, v, causal=True)
    out = door.flash_attn_func(q, k, v, 0.0, None, True)
    close(out.double(), want, rtol=1e-4, atol=1e-5)
    for value in (0.125, None):
        with pytest.raises(TypeError, match="dropout_p in flash-attn 2 and softmax_scale in 3"):
            door.flash_attn_func(q, k, v, value)
    torch.manual_seed(0)
    dropped = door.flash_attn_func(q, k, v, dropout_p=0.5)
    assert not torch.allclose(dropped, door.flash_attn_func(q, k, v))


def test_wrong_dims():
    q, k, v = qkv(5, 5)
    with pytest.raises(ValueError, match="^k: expected 4 dims"):
        door.flash_attn_func(q, k[0], v)
    with pytest.raises(TypeError, match="^v: expected torch.Tensor, got int"):
        door.flash_attn_func(q, k, 1)


def test_signatures_are_seen_through_the_check():
    parameters = list(inspect.signature(door.flash_attn_func).parameters)
    assert parameters[3:6] == ["dropout_p", "softmax_scale", "causal"]


@pytest.mark.skipif(installed, reason="flash-attn is installed")
def test_code_that_imports_flash_attn():
    q, k, v = qkv(5, 5)
    with pytest.raises(KeyError), door.install_as_flash_attn():
        import flash_attn
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        assert flash_attn_func is door.flash_attn_func
        assert flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
        assert importlib.util.find_spec("flash_attn").name == "flash_attn"
        assert flash_attn.__version__.startswith("2.")
        with door.install_as_flash_attn():
            pass
        assert sys.modules["flash_attn"] is flash_attn
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        packed = [unpad_input(x, mask) for x in (q, k, v)]
        _, indices, cu_seqlens, longest, used = packed[0]
        assert cu_seqlens.tolist() == [0, 3, 8] and longest == 5 and used.tolist() == [3, 5]
        out = flash_attn_varlen_func(
            *(tokens[0] for tokens in packed), cu_seqlens, cu_seqlens, longest, longest
        )
        out = pad_input(out, indices, BATCH, 5)
        close(
            out[0, :3].double(),
            expected(q[:1, :3], k[:1, :3], v[:1, :3])[0][0],
            rtol=1e-4,
            atol=1e-5,
        )
        assert out[0, 3:].eq(0).all()
        raise KeyError
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
