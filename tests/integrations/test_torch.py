"""The doors into torch: the same results as torch's own function, and torch as it was after."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.integrations import torch as door

close = torch.testing.assert_close
ORIGINAL = F.scaled_dot_product_attention
REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not REGISTRY, reason="torch has no registry of kernels")


def _qkv(*lead, seqlen_q=7, seqlen_k=9, head_dim=16, heads_kv=None, dtype=torch.float32):
    torch.manual_seed(0)
    kv = lead if heads_kv is None else (*lead[:-1], heads_kv)
    shapes = (*lead, seqlen_q), (*kv, seqlen_k), (*kv, seqlen_k)
    return [torch.randn(*shape, head_dim, dtype=dtype, requires_grad=True) for shape in shapes]


def _ran(fn, *args, **kwargs):
    """Whether a call of fastattn was made, and the result."""
    results = []
    explained = fastattn.explain(lambda: results.append(fn(*args, **kwargs)))
    return bool(explained), results[0]


MASKS = {
    "none": lambda: None,
    "boolean": lambda: torch.rand(7, 9) > 0.3,
    "boolean of each head": lambda: (torch.rand(2, 4, 7, 9) > 0.3).index_fill(
        3, torch.tensor(0), True
    ),
    "floating": lambda: torch.randn(2, 1, 7, 9),
    "of each row": lambda: torch.randn(7, 1),
}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_results_and_gradients_are_torchs(mask, scale):
    inputs = _qkv(2, 4)
    attn_mask = MASKS[mask]()
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask.requires_grad_()
        inputs.append(attn_mask)
    found = []
    for function in (ORIGINAL, F.scaled_dot_product_attention):
        with door.sdpa():
            ran, out = _ran(
                F.scaled_dot_product_attention if found else ORIGINAL,
                *inputs[:3],
                attn_mask=attn_mask,
                scale=scale,
            )
        assert ran == bool(found)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        found.append((out, *grads))
        del function
    for expected, got in zip(*found, strict=True):
        close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(3,), (2, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dims(lead, causal):
    q, k, v = _qkv(*lead)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with door.sdpa():
        ran, out = _ran(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
    assert ran
    close(out, expected, rtol=1e-4, atol=1e-5)


def test_grouped_queries():
    q, k, v = _qkv(2, 4, heads_kv=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with door.sdpa():
        ran, out = _ran(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        assert ran
        close(out, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v)


def test_dropout_keeps_the_mean():
    q, k, v = _qkv(1, 64, seqlen_q=64, seqlen_k=64)
    with door.sdpa(), torch.no_grad():
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(out, expected)
    close(out.mean(), expected.mean(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "what",
    ["float64", "head_dim", "mask and causal", "leading dims", "nested", "vector mask"],
)
def test_the_rest_is_torchs(what):
    kwargs = {}
    q, k, v = _qkv(2, 4, dtype=torch.float64 if what == "float64" else torch.float32)
    if what == "head_dim":
        q, k, v = _qkv(2, 4, head_dim=264)
    elif what == "mask and causal":
        kwargs = dict(attn_mask=torch.ones(7, 9, dtype=torch.bool), is_causal=True)
    elif what == "leading dims":
        k, v = k[:1], v[:1]
    elif what == "vector mask":
        kwargs = dict(attn_mask=torch.randn(9))
    elif what == "nested":
        q, k, v = (
            torch.nested.nested_tensor(list(x.detach().unbind()), layout=torch.jagged)
            .transpose(1, 2).contiguous().transpose(1, 2)
            for x in (q, k, v)
        )  # fmt: skip

    def outcome(function):
        try:
            return _ran(function, q, k, v, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            return False, type(error)

    _, expected = outcome(ORIGINAL)
    with door.sdpa():
        ran, got = outcome(F.scaled_dot_product_attention)
    # Torch's function takes a nested tensor apart, and calls itself on the parts.
    assert ran == (what == "nested")
    if isinstance(expected, type):
        assert got is expected
    elif not expected.is_nested:
        close(got, expected)


def test_hidden_rows_are_zero():
    q, k, v = _qkv(1, 2)
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    with door.sdpa():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out.sum().backward()
    assert out[:, :, 3].eq(0).all() and q.grad[:, :, 3].eq(0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_doors_nest_and_errors_close_them():
    with pytest.raises(KeyError), door.sdpa():
        first = F.scaled_dot_product_attention
        with door.sdpa():
            assert F.scaled_dot_product_attention is first is not ORIGINAL
        assert F.scaled_dot_product_attention is first
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    one, two = door.sdpa(), door.sdpa()
    one.close(), one.close()
    assert F.scaled_dot_product_attention is not ORIGINAL
    two.close()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_threads_open_and_close():
    def work():
        for _ in range(200):
            with door.sdpa():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_multihead_attention_goes_through():
    layer = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
    x = torch.randn(2, 5, 32)
    with door.sdpa():
        ran, _ = _ran(layer, x, x, x, need_weights=False)
    assert ran and not _ran(layer, x, x, x, need_weights=False)[0]


def test_compiled_code_goes_through():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    q, k, v = _qkv(2, 4, seqlen_q=9)
    with door.sdpa():
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        ran, out = _ran(compiled, q, k, v)
    assert ran
    close(out, f(q, k, v), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@needs_registry
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_kernels(dtype, causal):
    q, k, v = _qkv(2, 4, seqlen_q=9, dtype=dtype)
    found = []
    for active in (False, True):
        with door.flash_impl() if active else torch.no_grad(), torch.enable_grad():
            ran, out = _ran(ORIGINAL, q, k, v, is_causal=causal)
            assert ran == active
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for expected, got in zip(*found, strict=True):
        close(got, expected, rtol=tolerance, atol=tolerance)
        assert got.stride() == expected.stride()


@needs_registry
def test_registered_kernels_under_a_mask_and_compiled():
    q, k, v = _qkv(2, 4)
    mask = torch.rand(2, 1, 7, 9) > 0.3

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    expected = f(q, k, v)
    with door.flash_impl():
        ran, out = _ran(f, q, k, v)
        assert ran
        close(out, expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        ran, out = _ran(compiled, q, k, v)
    assert ran
    close(out, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@needs_registry
def test_the_registry_is_left_as_it_was():
    from torch.nn.attention import current_flash_attention_impl

    q, k, v = _qkv(2, 4)
    before = current_flash_attention_impl()
    with pytest.raises(KeyError), door.flash_impl():
        assert current_flash_attention_impl() == door.IMPL
        with door.flash_impl():
            assert _ran(ORIGINAL, q, k, v)[0]
        assert current_flash_attention_impl() == door.IMPL and _ran(ORIGINAL, q, k, v)[0]
        raise KeyError
    assert current_flash_attention_impl() == before and not _ran(ORIGINAL, q, k, v)[0]


@pytest.mark.skipif(REGISTRY, reason="torch has the registry")
def test_without_a_registry_the_other_door_is_named():
    with pytest.raises(RuntimeError, match="fastattn.integrations.torch.sdpa"):
        door.flash_impl()
