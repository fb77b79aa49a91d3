"""Nested tensors (torch.nn.TransformerEncoder makes them of padded batches) as packed ones."""

from typing import Any

import torch
from torch import Tensor


def pack(nested: Any) -> tuple[Tensor, Tensor, int]:
    """The tokens ``(total, d_model)``, their cu_seqlens int32 ``(batch + 1,)``, and max_seqlen."""
    if nested.layout == torch.jagged:
        values, offsets = nested.values(), nested.offsets()
        if values.dim() != 2 or nested.lengths() is not None:
            raise ValueError(
                "query: expected a nested tensor of (seqlen, d_model) sequences without holes"
            )
        return values, offsets.int(), int(offsets.diff().max())
    lengths = nested._nested_tensor_size()[:, 0]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    values = nested.contiguous().values().view(-1, nested.size(-1))
    return values, cu_seqlens.to(values.device), int(lengths.max())


def unpack(values: Tensor, like: Any) -> Tensor:
    """The nested tensor of the sequence lengths of `like` with tokens ``(total, d_model)``."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(values, like.offsets())
    like = like.contiguous()
    return torch._nested_view_from_buffer(
        values.reshape(-1),
        like._nested_tensor_size(),
        like._nested_tensor_strides(),
        like._nested_tensor_storage_offsets(),
    )
