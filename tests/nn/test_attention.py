"""MultiheadAttention against torch's own with the same weights: every option, values, gradients."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from fastattn.nn import MultiheadAttention

BATCH, HEADS, SEQLEN_Q, SEQLEN_K, EMBED_DIM = 3, 4, 7, 5, 32
DTYPES = (torch.float32, torch.bfloat16)


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(EMBED_DIM, HEADS, dtype=dtype, **options)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=EMBED_DIM**-0.5)
    ours = MultiheadAttention(EMBED_DIM, HEADS, dtype=dtype, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(stock, kind, dtype=torch.float32, batched=True, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K):
    """Query, key and value: "self", "cross" (key is value), "pos" (query is key) or "all"."""
    if kind in ("self", "pos"):
        seqlen_k = seqlen_q

    def make(seqlen, size):
        shape = (BATCH, seqlen, size) if stock.batch_first else (seqlen, BATCH, size)
        return torch.randn(shape if batched else (seqlen, size)).to(dtype).requires_grad_()

    query = make(seqlen_q, EMBED_DIM)
    key = query if kind in ("self", "pos") else make(seqlen_k, stock.kdim)
    value = key if kind in ("self", "cross") else make(seqlen_k, stock.vdim)
    return query, key, value


def leaves_like(tensors, dtype):
    """Leaves of the same values; equal objects stay equal."""
    copies = {id(t): t.detach().to(dtype, copy=True).requires_grad_() for t in tensors}
    return [copies[id(t)] for t in tensors]


def close(actual: Tensor, expected: Tensor):
    """Element by element in float32; in bfloat16 by the norm, against a float32 result."""
    assert actual.shape == expected.shape
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    else:
        expected = expected.float()
        assert (actual.float() - expected).norm() <= 2e-2 * expected.norm() + 1e-3


def run(module, qkv, arguments):
    """Output, weights if any, and gradients of inputs, parameters and floating masks, by name."""
    module.zero_grad()
    leaves = leaves_like(qkv, qkv[0].dtype)
    masks = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    out, weights = module(*leaves, **masks)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    torch.manual_seed(1)
    sum((result * torch.randn(result.shape)).sum() for result in results.values()).backward()
    grads = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    grads |= {name: p.grad for name, p in module.named_parameters()}
    grads |= {name: mask.grad for name, mask in masks.items() if isinstance(mask, Tensor)}
    return results | {name: grad for name, grad in grads.items() if grad is not None}


def compare(stock, ours, qkv, **arguments):
    """Everything that `run` returns agrees, with `stock` in float32."""
    actual = run(ours, qkv, arguments)
    expected = run(copy.deepcopy(stock).float(), leaves_like(qkv, torch.float32), arguments)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        close(actual[name], tensor)


def attn_masks(seqlen_q, seqlen_k, batched=True):
    """Masks of every form in which no query is left without a key."""
    full = ((BATCH if batched else 1) * HEADS, seqlen_q, seqlen_k)

    def boolean(*shape):
        mask = torch.rand(shape) < 0.4
        mask[..., 0] = False
        return mask

    def infinite(*shape):
        return torch.zeros(shape).masked_fill(boolean(*shape), float("-inf"))

    return {
        "none": None,
        "bool 2-D": boolean(seqlen_q, seqlen_k),
        "bool 3-D": boolean(*full),
        "float 2-D": torch.randn(seqlen_q, seqlen_k),
        "float 3-D": torch.randn(full),
        "inf 2-D": infinite(seqlen_q, seqlen_k),
    }


def padding_masks(seqlen_k, batched=True):
    lengths = torch.tensor([seqlen_k, 2, seqlen_k - 1])
    padding = torch.arange(seqlen_k) >= lengths[:, None]
    floats = torch.randn(BATCH, seqlen_k)
    masks = {"none": None, "bool": padding, "float": floats}
    return masks if batched else {n: m if m is None else m[1] for n, m in masks.items()}


ATTN_MASKS = tuple(attn_masks(2, 2))
PADDING_MASKS = tuple(padding_masks(3))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", PADDING_MASKS)
@pytest.mark.parametrize("mask", ATTN_MASKS)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_masks(need_weights, batched, mask, padding):
    for batch_first, training in itertools.product((True, False), repeat=2):
        stock, ours = pair(batch_first=batch_first)
        stock.train(training), ours.train(training)
        attn_mask = attn_masks(SEQLEN_Q, SEQLEN_K, batched)[mask]
        key_padding_mask = padding_masks(SEQLEN_K, batched)[padding]
        compare(
            stock,
            ours,
            inputs(stock, "cross", batched=batched),
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["self", "cross", "pos", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        {"kdim": 24, "vdim": 40},
        {"vdim": 40, "bias": False, "add_bias_kv": True},
    ],
    ids=str,
)
def test_options(options, kind, dtype):
    if "vdim" in options and kind != "all":
        pytest.skip("key and value have different sizes")
    for batch_first, need_weights, masked in itertools.product((True, False), repeat=3):
        stock, ours = pair(dtype, batch_first=batch_first, **options)
        qkv = inputs(stock, kind, dtype)
        masks = {}
        if masked:
            seqlen_k = qkv[1].shape[1 if batch_first else 0]
            masks = {
                "attn_mask": attn_masks(SEQLEN_Q, seqlen_k)["bool 3-D"],
                "key_padding_mask": padding_masks(seqlen_k)["bool"],
            }
        compare(stock, ours, qkv, need_weights=need_weights, **masks)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_weights_of_each_head(batched):
    stock, ours = pair(batch_first=True)
    qkv = inputs(stock, "cross", batched=batched)
    compare(stock, ours, qkv, average_attn_weights=False)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(6, 6), (4, 6), (6, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_causal(seqlen_q, seqlen_k, floating, padded, need_weights):
    stock, ours = pair(batch_first=True)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
    key_padding_mask = None
    if padded:
        key_padding_mask = torch.zeros(BATCH, seqlen_k, dtype=torch.bool)
        key_padding_mask[1, 1:] = True
    if floating:
        mask = torch.zeros(mask.shape).masked_fill(mask, float("-inf"))
        if padded:
            key_padding_mask = torch.zeros(BATCH, seqlen_k).masked_fill(
                key_padding_mask, float("-inf")
            )
    qkv = [x.detach() for x in inputs(stock, "cross", seqlen_q=seqlen_q, seqlen_k=seqlen_k)]
    masks = {"attn_mask": mask, "key_padding_mask": key_padding_mask}
    expected = stock(*qkv, **masks, need_weights=need_weights)[0]
    close(ours(*qkv, **masks, need_weights=need_weights)[0], expected)
    close(ours(*qkv, **masks, need_weights=need_weights, is_causal=True)[0], expected)


def test_causal_needs_a_mask():
    stock, ours = pair()
    for module in (stock, ours):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(*inputs(stock, "self"), is_causal=True)


def test_causal_hides_no_extra_key():
    stock, ours = pair(add_bias_kv=True, add_zero_attn=True)
    qkv = inputs(stock, "self")
    mask = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1)
    expected = stock(*qkv, attn_mask=mask, is_causal=True, need_weights=True)[0]
    close(ours(*qkv, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_query_without_keys_gives_bias(floating, need_weights):
    _, ours = pair(batch_first=True)
    query, key, value = inputs(ours, "cross")
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    padding[1] = True
    if floating:
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
    out, weights = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    close(out[1], ours.out_proj.bias.expand_as(out[1]))
    if need_weights:
        assert (weights[1] == 0).all()
    out.sum().backward()
    assert (query.grad[1] == 0).all() and (key.grad[1] == 0).all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_dropout(need_weights):
    torch.manual_seed(0)
    ours = MultiheadAttention(EMBED_DIM, HEADS, dropout=0.5, batch_first=True)
    query, key, value = inputs(ours, "cross")

    def run(seed):
        torch.manual_seed(seed)
        return ours(query, key, value, need_weights=need_weights)[0].detach()

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))
    mean = torch.stack([run(seed) for seed in range(400)]).mean(0)
    ours.eval()
    torch.testing.assert_close(run(1), run(2), rtol=0, atol=0)
    assert (mean - run(0)).abs().max() < 0.15


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_dropout_of_everything(need_weights):
    ours = MultiheadAttention(EMBED_DIM, HEADS, dropout=1.0)
    out, _ = ours(*inputs(ours, "self"), need_weights=need_weights)
    close(out, ours.out_proj.bias.expand_as(out))


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(batch, seqlen_q, seqlen_k):
    ours = MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    query = torch.randn(batch, seqlen_q, EMBED_DIM, requires_grad=True)
    key = torch.randn(batch, seqlen_k, EMBED_DIM)
    for need_weights in (True, False):
        out, weights = ours(query, key, key, need_weights=need_weights)
        assert out.shape == query.shape and out.isfinite().all()
        assert weights is None or weights.shape == (batch, seqlen_q, seqlen_k)
        out.sum().backward()


@pytest.mark.parametrize("batch_first", [True, False])
def test_output_can_be_viewed_flat(batch_first):
    ours = MultiheadAttention(EMBED_DIM, HEADS, batch_first=batch_first)
    assert ours(*inputs(ours, "self"), need_weights=False)[0].is_contiguous()


def test_state_dict_and_start_values():
    for options in ({}, {"kdim": 24, "vdim": 40, "add_bias_kv": True}, {"bias": False}):
        torch.manual_seed(3)
        stock = torch.nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
        torch.manual_seed(3)
        ours = MultiheadAttention(EMBED_DIM, HEADS, **options)
        assert list(ours.state_dict()) == list(stock.state_dict())
        for name, value in stock.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
        stock.load_state_dict(ours.state_dict())
        ours.load_state_dict(stock.state_dict())


def test_out_proj_is_called_as_a_module():
    class LowRank(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down = torch.nn.Linear(EMBED_DIM, 2, bias=False)
            self.up = torch.nn.Linear(2, EMBED_DIM, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    _, ours = pair()
    qkv = inputs(ours, "self")
    for need_weights in (True, False):
        plain = ours(*qkv, need_weights=need_weights)[0]
        handle = ours.out_proj.register_forward_hook(lambda module, args, out: out + 1)
        close(ours(*qkv, need_weights=need_weights)[0], plain + 1)
        handle.remove()
    ours.requires_grad_(False)
    ours.out_proj = LowRank(ours.out_proj)
    ours(*qkv)[0].sum().backward()
    assert ours.out_proj.up.weight.grad is not None


def test_autocast():
    stock, ours = pair(batch_first=True)
    qkv = inputs(stock, "cross")
    mask = attn_masks(SEQLEN_Q, SEQLEN_K)["float 2-D"]
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            out = ours(*qkv, attn_mask=mask, need_weights=need_weights)[0]
            expected = stock(*qkv, attn_mask=mask, need_weights=need_weights)[0]
            assert out.dtype == expected.dtype == torch.bfloat16
            close(out, expected)
    out.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested():
    stock, ours = pair(batch_first=True)
    stock.eval(), ours.eval()
    sequences = [torch.randn(length, EMBED_DIM) for length in (4, 1, 7)]
    nested = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        out = ours(nested, nested, nested, need_weights=False)[0]
        assert out.is_nested
        for one, x in zip(out.unbind(), sequences, strict=True):
            close(one, stock(x, x, x, need_weights=False)[0])
    with pytest.raises(ValueError, match="need_weights"):
        ours(nested, nested, nested)


def test_parametrized_projection():
    stock, ours = pair()
    qkv = inputs(stock, "self")
    for module in (stock, ours):
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    compare(stock, ours, qkv, need_weights=False)


def test_compile():
    _, ours = pair(batch_first=True)
    qkv = inputs(ours, "cross")
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    padding = padding_masks(SEQLEN_K)["bool"]
    for need_weights in (False, True):
        arguments = {"need_weights": need_weights, "key_padding_mask": padding}
        expected = run(ours, qkv, arguments)
        for name, tensor in run(compiled, qkv, arguments).items():
            close(tensor, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize(
    "name, change",
    [
        ("attn_mask", {"attn_mask": torch.zeros(2, 2)}),
        ("attn_mask", {"attn_mask": torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=torch.int)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(1, SEQLEN_K)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(BATCH, SEQLEN_K).long()}),
        ("query", {"query": torch.zeros(BATCH, SEQLEN_Q, EMBED_DIM + 1)}),
        ("query", {"query": torch.zeros(1, BATCH, SEQLEN_Q, EMBED_DIM)}),
        ("key", {"key": torch.zeros(BATCH, SEQLEN_K, EMBED_DIM + 1)}),
        ("key", {"key": torch.zeros(SEQLEN_K, EMBED_DIM)}),
        ("value", {"value": torch.zeros(BATCH, SEQLEN_K + 1, EMBED_DIM)}),
        ("key", {"query": torch.zeros(BATCH + 1, SEQLEN_Q, EMBED_DIM)}),
    ],
)
def test_errors_name_the_argument(name, change):
    ours = MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    query, key, value = inputs(ours, "cross")
    with pytest.raises((ValueError, TypeError), match=f"^{name}:"):
        ours(**({"query": query, "key": key, "value": value} | change))
