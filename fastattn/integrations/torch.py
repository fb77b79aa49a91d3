"""fastattn under `torch.nn.functional.scaled_dot_product_attention`, for a block or for good.

Two doors. `sdpa` puts a function in its place: it reaches every caller that looks the function up
in `torch.nn.functional` when it calls, `torch.nn.MultiheadAttention` in training among them, with
dropout and with gradients of a bias; not one that imported the name before. `flash_impl` registers
kernels with torch's dispatcher, for CPU tensors, where torch >= 2.13 has a registry of them: it
reaches every caller, but only where torch would choose its own flash attention, which it does not
with dropout or where a bias needs a gradient.
"""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations.door import Door
from fastattn.ops import attention
from fastattn.ops.attention_problem import AttentionScalars, AttentionTensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
IMPL = "fastattn"

_lock = threading.Lock()
_opened = 0
_original: Callable[..., Tensor] = F.scaled_dot_product_attention


def sdpa() -> Door:
    """Put fastattn under `torch.nn.functional.scaled_dot_product_attention`.

    ::

        with fastattn.integrations.torch.sdpa():
            model(x)

        door = fastattn.integrations.torch.sdpa()  # for good, or until door.close()

    It may be opened several times; torch's function is back when the last door is closed. What
    `fastattn.attention` does not take (other dtypes than float32, float16 and bfloat16, head_dim
    over 256, nested and other special tensors, leading dims that differ) goes to torch's function.
    A query that sees no key gives 0; torch gives 0 or NaN, as the kernel has it.
    """
    global _opened, _original
    with _lock:
        if not _opened:
            _original = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = scaled_dot_product_attention
        _opened += 1
    return Door(_close_sdpa)


def _close_sdpa() -> None:
    global _opened
    with _lock:
        _opened -= 1
        if not _opened and F.scaled_dot_product_attention is scaled_dot_product_attention:
            F.scaled_dot_product_attention = _original


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on `fastattn.attention`.

    Arguments, result and errors are torch's; see `sdpa` for what differs.
    """
    if not _takes(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return _original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-3]
    if query.dim() == 3:
        query, key, value = (x[:, None] for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask[:, None]
    elif query.dim() > 4:
        query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    masks: dict[str, Any] = {}
    if attn_mask is not None:
        masks = {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
    out: Any = attention(
        query,
        key,
        value,
        softmax_scale=scale,
        causal=is_causal,
        dropout_p=dropout_p,
        **masks,
    )
    if not lead:
        return out[:, 0]
    return out.unflatten(0, lead) if len(lead) > 1 else out


def _takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether `fastattn.attention` takes the call; torch's function has the others."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    if any(not isinstance(x, Tensor) or x.is_nested or x.device != q.device for x in tensors):
        return False
    if not (q.dim() == k.dim() == v.dim() >= 3) or q.dtype not in _DTYPES:
        return False
    same = q.dtype == k.dtype == v.dtype and q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
    if not same or k.shape[-3:-1] != v.shape[-3:-1] or q.shape[-1] != k.shape[-1]:
        return False
    heads, heads_kv = q.shape[-3], k.shape[-3]
    if heads != heads_kv and not (enable_gqa and q.dim() > 3 and heads_kv and not heads % heads_kv):
        return False
    if not (0 < q.shape[-1] <= _MAX_HEAD_DIM and 0 < v.shape[-1] <= _MAX_HEAD_DIM):
        return False
    if not 0.0 <= dropout_p < 1.0 or (is_causal and mask is not None):
        return False
    if mask is None:
        return True
    if mask.dtype not in (torch.bool, q.dtype) or mask.dim() > min(q.dim(), 4):
        return False
    # A mask of less than two dims, or with leading dims of its own beside flattened ones.
    if mask.dim() < 2 or (q.dim() > 4 and mask.dim() > 2):
        return False
    shape = (*q.shape[:-1], k.shape[-2])
    return all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape)))


def register() -> None:
    """Offer fastattn to torch's registry of flash attention kernels; activates nothing.

    Then ``torch.nn.attention.activate_flash_attention_impl("fastattn")`` opens the door, and
    ``torch.nn.attention.restore_flash_attention_impl()`` closes it; or see `flash_impl`.

    Raises:
        RuntimeError: torch has no such registry: it came with 2.13.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "torch: expected at least 2.13, which has register_flash_attention_impl, got "
            f"{torch.__version__}; see fastattn.integrations.torch.sdpa"
        )
    torch.nn.attention.register_flash_attention_impl(IMPL, register_fn=_Kernels)


def flash_impl() -> Door:
    """Activate fastattn in torch's registry of flash attention kernels.

    When the door is closed the kernels that were active before are so again.

    Raises:
        RuntimeError: as `register`.
    """
    register()
    before = torch.nn.attention.current_flash_attention_impl()
    torch.nn.attention.activate_flash_attention_impl(IMPL)

    def close() -> None:
        if before is None:
            torch.nn.attention.restore_flash_attention_impl()
        else:
            torch.nn.attention.activate_flash_attention_impl(before)

    return Door(close)


class _Kernels:
    """The kernels in torch's dispatcher, from its making to `remove`."""

    def __init__(self) -> None:
        name = "_scaled_dot_product_flash_attention_for_cpu"
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
            self._library.impl(name, _flash_forward, "CPU")
            self._library.impl(f"{name}_backward", _flash_backward, "CPU")

    def remove(self) -> None:
        """Torch's kernels again."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _masks(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the bias of `fastattn.attention`."""
    if attn_mask is None:
        return None, None
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    mask, bias = _masks(attn_mask)
    with torch.no_grad():
        out, lse = attention(
            query,
            key,
            value,
            softmax_scale=scale,
            causal=is_causal,
            mask=mask,
            bias=bias,
            dropout_p=dropout_p,
            return_lse=True,
        )
    # Compiled code counts on these strides.
    like_query = torch.empty_like(query)
    if out.stride() != like_query.stride():
        out = like_query.copy_(out)
    return out, lse.mT.contiguous().mT


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask, bias = _masks(attn_mask)
    nothing = (None,) * (len(AttentionTensors._fields) - 5)
    tensors = AttentionTensors(query, key, value, mask, bias, *nothing)
    scalars = AttentionScalars(
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window_left=None,
        window_right=0 if is_causal else None,
        offset=0,
        softcap=0.0,
        dropout_p=dropout_p,
        max_seqlen_q=0,
        max_seqlen_k=0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    grads = torch.ops.fastattn.attention_bwd(
        grad_out, None, out, logsumexp, *tensors, *scalars, False
    )
    dq, dk, dv = (grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads[:3])
    return dq, dk, dv
