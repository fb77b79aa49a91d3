"""Finds that a boolean mask is a band and key lengths, of which kernels skip what is hidden."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn.ops.common import is_plain

# Of each mask its version when it was looked at, for how many keys, and what was found.
_found = WeakTensorKeyDictionary()


def band(mask: Tensor, seqlen_k: int) -> dict[str, Any] | None:
    """The arguments of `fastattn.attention` that hide what `mask` hides, None if there are none.

    All of the mask is compared with them, for the first of the layers that are called with it; on a
    GPU the host waits for that. Under ``torch.compile`` and in a CUDA graph nothing is found.

    Args:
        mask: boolean, ``(batch, 1 or heads, seqlen_q, seqlen_k or more)``, True = take part.
        seqlen_k: how many keys there are.

    Returns:
        Some of ``causal``, ``window``, ``offset`` and ``seqlens_k``; one length where the
        mask is the same for all sequences.
    """
    if not is_plain(mask) or mask.is_meta or 0 in mask.shape:
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if mask.is_inference():  # has no version
        return _look(mask[..., :seqlen_k])
    seen, found = _found.get(mask, (None, None))
    if seen != (mask._version, seqlen_k):
        with torch.inference_mode(False):  # it may be used outside
            found = _look(mask[..., :seqlen_k])
        _found[mask] = (mask._version, seqlen_k), found
    return found


def _look(mask: Tensor) -> dict[str, Any] | None:
    """Guesses from the first and the last query, and compares."""
    _, heads, seqlen_q, seqlen_k = mask.shape
    if heads > 1 and mask.stride(1):
        return None
    mask = mask[:, 0] if mask.stride(0) else mask[:1, 0]
    first, last, some = torch.stack((mask[:, 0], mask[:, -1], mask.any(1))).cpu()
    keys = torch.arange(seqlen_k, device=some.device)
    ends = (some * (keys + 1)).amax(1)  # (batch,), after the last key that a query sees
    longest = ends.argmax()
    start = int(last[longest].byte().argmax())
    if not last.equal((keys >= start) & (keys < ends[:, None])):
        return None
    # Key j is visible to query i if lower <= j - i <= upper, and before the end.
    lower, upper = start - (seqlen_q - 1), int((first * (keys + 1)).max()) - 1
    if upper < lower:
        return None
    options: dict[str, Any] = {}
    end = seqlen_k
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=mask.device)
    if upper + 1 < ends[longest]:
        options = dict(causal=True, offset=upper)
        end = min(end, seqlen_q + upper)
        visible.tril_(upper)
    if start:
        options = {"offset": lower} | options | {"window": (upper - lower if options else 0, None)}
        visible.triu_(lower)
    if (ends < end).any():
        seqlens_k = ends.to(mask.device, torch.int32)
        options["seqlens_k"] = seqlens_k
        visible = visible & (keys.to(mask.device) < seqlens_k[:, None, None])
    return options if torch.equal(mask, visible.expand_as(mask)) else None
