"""The functions of the flash-attn package (Dao 2023), on any device, through `fastattn.attention`.

Names, order, defaults and meaning of the arguments are those of flash-attn 2; tensors are
``(batch, seqlen, heads, head_dim)``, packed ``(total, heads, head_dim)``. What differs, on purpose:

- The argument after the tensors is `dropout_p` in flash-attn 2 and `softmax_scale` in 3. By
  position only 0.0 is taken, which means one thing in both; anything else is asked for by keyword.
- A query that sees no key has a log-sum-exp of -inf (there it has been inf as well).
- With `return_attn_probs` the third result is None: the probabilities are never in memory.
- `num_splits` is a hint of speed there, and has no effect.
"""

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations import padding
from fastattn.integrations.door import Door
from fastattn.ops import attention, rotary

VERSION = "2.8.3"  # whose signatures these are
Result = Tensor | tuple[Tensor, Tensor, None]


def _dropout_by_keyword(place: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refuses a positional argument at `place` that flash-attn 2 and 3 understand differently."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place and (args[place] is None or args[place] != 0.0):
                raise TypeError(
                    f"{function.__name__}: argument {place + 1} is dropout_p in flash-attn 2 and "
                    f"softmax_scale in 3: expected it by keyword, got {args[place]!r} by position"
                )
            return function(*args, **kwargs)

        return checked

    return wrap


@_dropout_by_keyword(3)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of `q` to `k` and `v`; with fewer heads of these, queries are grouped.

    Args:
        q: ``(batch, seqlen_q, heads, head_dim)``.
        k, v: ``(batch, seqlen_k, heads_kv, head_dim)``.
        dropout_p: probability of dropping an attention weight.
        softmax_scale: factor of the scores; default ``1 / sqrt(head_dim)``.
        causal: hide the keys right of the diagonal, which ends at the bottom right.
        window_size: bounds (left, right) of the visible band around it, -1 for none.
        softcap: of the scores; 0 for none.
        alibi_slopes: float32 ``(heads,)`` or ``(batch, heads)``.
        deterministic: the same bits at any number of threads.
        return_attn_probs: return ``(out, lse, None)``.

    Returns:
        out ``(batch, seqlen_q, heads, head_dim)``; lse ``(batch, heads, seqlen_q)``, float32.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
    """
    _check_dims(4, q=q, k=k, v=v)
    out, lse = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        offset=k.shape[1] - q.shape[1],
        return_lse=True,
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
        ),
    )
    return _result(out.transpose(1, 2), lse, return_attn_probs)


@_dropout_by_keyword(1)
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of `qkv`, ``(batch, seqlen, 3, heads, head_dim)``."""
    _check_dims(5, qkv=qkv)
    return flash_attn_func(
        *qkv.unbind(2),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


@_dropout_by_keyword(2)
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of `q` and `kv`, ``(batch, seqlen_k, 2, heads_kv, head_dim)``."""
    _check_dims(5, kv=kv)
    return flash_attn_func(
        q,
        *kv.unbind(2),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


@_dropout_by_keyword(7)
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of packed sequences.

    Args:
        q: ``(total_q, heads, head_dim)``.
        k, v: ``(total_k, heads_kv, head_dim)``, or with `block_table` pages
            ``(num_pages, page_size, heads_kv, head_dim)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``, where each sequence begins.
        max_seqlen_q, max_seqlen_k: the longest one.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.
        block_table: int32 ``(batch, max_pages)``, the pages of each sequence.

    Returns:
        out ``(total_q, heads, head_dim)``; lse ``(heads, total_q)``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device.
    """
    _check_dims(3, q=q)
    lengths_k = cu_seqlens_k.diff()
    where: dict[str, Any] = dict(cu_seqlens_k=cu_seqlens_k, max_seqlen_k=int(max_seqlen_k))
    if block_table is not None:
        where = dict(block_table=block_table, seqlens_k=lengths_k)
    out, lse = attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=int(max_seqlen_q),
        offset=lengths_k - cu_seqlens_q.diff(),
        return_lse=True,
        **where,
        **_options(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
        ),
    )
    return _result(out, lse, return_attn_probs)


@_dropout_by_keyword(3)
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of `qkv`, ``(total, 3, heads, head_dim)``."""
    _check_dims(4, qkv=qkv)
    return flash_attn_varlen_func(
        *qkv.unbind(1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


@_dropout_by_keyword(6)
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of `q` and `kv`, ``(total_k, 2, heads_kv, head_dim)``."""
    _check_dims(4, kv=kv)
    return flash_attn_varlen_func(
        q,
        *kv.unbind(1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, to which new keys and values are written first, in place.

    Args:
        q: ``(batch, seqlen_q, heads, head_dim)``.
        k_cache, v_cache: ``(batch_cache, seqlen_cache, heads_kv, head_dim)``, or with
            `block_table` pages ``(num_pages, page_size, heads_kv, head_dim)``.
        k, v: ``(batch, seqlen_new, heads_kv, head_dim)``, written behind the `cache_seqlens`.
        rotary_cos, rotary_sin: ``(seqlen_rotary, rotary_dim / 2)``: turn `k` at its positions, and
            `q` at those of the newest tokens if causal or in a window, else at `cache_seqlens`.
        cache_seqlens: int32 ``(batch,)`` or one for all: the tokens in the cache; default all.
        cache_batch_idx: ``(batch,)``: the row of the cache of each sequence; default its own.
        cache_leftpad: not supported.
        block_table: int32 ``(batch, max_pages)``, the pages of each sequence.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: turn pairs of neighbours, instead of halves.
        num_splits: has no effect.
        return_softmax_lse: return ``(out, lse)``.

    Returns:
        out ``(batch, seqlen_q, heads, head_dim)``; lse ``(batch, heads, seqlen_q)``, float32.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or the cache has
            no room for `k`.
    """
    _check_dims(4, q=q, k_cache=k_cache, v_cache=v_cache)
    if cache_leftpad is not None:
        raise ValueError("cache_leftpad: expected None, as it is not supported, got a tensor")
    if (k is None) != (v is None):
        raise ValueError("v: expected both k and v, or none, got one of them")
    batch, seqlen_q = q.shape[:2]
    page_size = k_cache.shape[1]
    if block_table is None:
        # A cache of rows is one of pages, of which each sequence has one.
        rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
        block_table = rows.int()[:, None]
    elif cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: expected None beside block_table, got a tensor")
    capacity = block_table.shape[1] * page_size
    if cache_seqlens is None:
        cache_seqlens = capacity if k is None else 0
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, device=q.device)
    seqlens = cache_seqlens.int()
    banded = causal or tuple(window_size) != (-1, -1)
    if rotary_cos is not None:
        if rotary_sin is None or k is None:
            raise ValueError("rotary_cos: expected rotary_sin, k and v beside it, got none")
        k = _turned(k, rotary_cos, rotary_sin, seqlens.long(), rotary_interleaved, True)
        q = _turned(q, rotary_cos, rotary_sin, seqlens.long(), rotary_interleaved, banded)
    if k is not None and v is not None:
        positions = seqlens[:, None] + torch.arange(k.shape[1], device=q.device)
        filled = int(positions.max()) + 1 if positions.numel() else 0
        if filled > capacity:
            raise ValueError(f"k: expected at most {capacity} tokens in the cache, got {filled}")
        pages = block_table.long().gather(1, (positions // page_size).long())
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[pages, (positions % page_size).long()] = new.to(cache.dtype)
        seqlens = seqlens + k.shape[1]
    out, lse = attention(
        q.transpose(1, 2),
        k_cache,
        v_cache,
        block_table=block_table,
        seqlens_k=seqlens.int(),
        offset=(seqlens - seqlen_q).int(),
        return_lse=True,
        **_options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False),
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, interleaved: bool, rising: bool
) -> Tensor:
    """`x` ``(batch, seqlen, heads, head_dim)`` at positions from `start` on, or all at it."""
    if rising:
        turned = rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved, offset=start)
        return turned.transpose(1, 2)
    rows = [table[start][:, None].expand(-1, x.shape[1], -1) for table in (cos, sin)]
    return rotary(x.transpose(1, 2), *rows, interleaved=interleaved).transpose(1, 2)


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    left, right = window_size
    return dict(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window=(None if left < 0 else left, None if right < 0 else right),
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    return (out, lse, None) if return_attn_probs else out


def _check_dims(dims: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dims, got shape {tuple(tensor.shape)}")


FUNCTIONS = (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)


def install_as_flash_attn(*, force: bool = False) -> Door:
    """Offer these functions to code that imports the module ``flash_attn``.

    ::

        with fastattn.integrations.flash_attn.install_as_flash_attn():
            from flash_attn import flash_attn_func

    It has the modules ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding`` too. The
    door's `close` takes them out again; what was imported meanwhile stays with who imported it.

    Args:
        force: also where the real flash-attn is installed.

    Raises:
        RuntimeError: flash-attn is installed, and `force` was not asked for.
    """
    names = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
    before = {name: sys.modules.get(name) for name in names}
    ours = before["flash_attn"] is not None and hasattr(before["flash_attn"], "__fastattn__")
    if not (force or ours) and importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError(
            "flash_attn: expected it not to be installed, or force=True, got the installed package"
        )
    contents = {function.__name__: function for function in FUNCTIONS}
    padders = {name: getattr(padding, name) for name in padding.__all__}
    modules = {
        names[0]: _module(names[0], {**contents, "__version__": VERSION, "__path__": []}),
        names[1]: _module(names[1], contents),
        names[2]: _module(names[2], padders),
    }
    for name in names[1:]:
        setattr(modules[names[0]], name.rpartition(".")[2], modules[name])
    sys.modules.update(modules)

    def close() -> None:
        for name in names:
            if sys.modules.get(name) is modules[name]:
                if (module := before[name]) is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module

    return Door(close)


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, "fastattn in the place of flash-attn.")
    spec = importlib.machinery.ModuleSpec(name, None, is_package="__path__" in contents)
    module.__spec__ = spec
    vars(module).update(contents, __fastattn__=True)
    return module
