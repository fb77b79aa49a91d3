"""Multi-head attention (Vaswani et al. 2017, section 3.2.2) under torch.nn's interface."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn import nested
from fastattn.nn.masks import mask_and_bias
from fastattn.ops.attention import attention
from fastattn.ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `fastattn.attention`.

    Constructor, parameters, state dict, and the arguments of `forward` and their meaning are
    torch's. What differs, on purpose:

    - A query that sees no key gets attention 0, so that `out_proj`'s bias comes out, with weights
      and gradient 0; torch gives NaN on some of its paths.
    - `out_proj` is called as a module: its hooks run, and it may be replaced (LoRA, quantised).
    - There is one path for training and evaluation, so that `is_causal` without `attn_mask`
      raises in both, a boolean and a floating mask may be given together without a warning, and
      a hook or an odd number of heads changes no speed.
    - With `add_bias_kv` or `add_zero_attn`, `is_causal` hides none of the keys that these add, as
      torch has it with ``need_weights=True``.
    - Masks of the wrong shape or dtype raise ValueError or TypeError.
    - `torch.jit.script` does not take it; `torch.compile` and `torch.export` do.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` to `key` and `value`.

        Args:
            query: ``(seqlen_q, batch, embed_dim)``, with `batch_first`
                ``(batch, seqlen_q, embed_dim)``, or unbatched ``(seqlen_q, embed_dim)``.
            key: ``(seqlen_k, batch, kdim)``, or as `query`. Pass one tensor as query, key and
                value where they are equal: it is then projected in one product.
            value: ``(seqlen_k, batch, vdim)``, or as `query`.
            key_padding_mask: ``(batch, seqlen_k)``, unbatched ``(seqlen_k,)``: boolean, True
                hides the key, or floating, added to the scores.
            need_weights: also return the attention weights. Costs memory
                ``batch * heads * seqlen_q * seqlen_k`` and time; False is the fast way.
            attn_mask: ``(seqlen_q, seqlen_k)`` or ``(batch * num_heads, seqlen_q, seqlen_k)``:
                boolean, True hides the key from the query, or floating, added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: promises that `attn_mask` is causal: hides the keys with index above the
                query's. The mask is then not read where `need_weights` is False.

        Returns:
            out of the shape of `query`, and the weights or None: ``(batch, seqlen_q, seqlen_k)``,
            not averaged ``(batch, num_heads, seqlen_q, seqlen_k)``; unbatched without the batch.
            In training they are the weights after dropout.

        Raises:
            RuntimeError: `is_causal` without `attn_mask`.
            ValueError, TypeError: an argument has the wrong shape or dtype.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal: needs attn_mask, of which it is a hint; "
                "torch.nn.Transformer.generate_square_subsequent_mask makes one"
            )
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            return self._forward_nested(query, key, value, masked, need_weights), None
        batched = query.dim() == 3
        if not batched:
            self._check_unbatched(query, key, value)
            query, key, value = _unsqueezed(query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
        seq_first = batched and not self.batch_first
        self._check_shapes(query, key, value, seq_first)
        q, k, v = self._project(query, key, value)
        if seq_first:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        batch, heads, seqlen_q, _ = q.shape
        seqlen_k = k.shape[2]
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._with_extra_keys(k, self.bias_k), self._with_extra_keys(v, self.bias_v)
        extra_keys = k.shape[2] - seqlen_k
        dropout_p = self.dropout if self.training else 0.0
        # All weights dropped is beyond the kernels' dropout and not worth a path of its own.
        explicit = need_weights or dropout_p >= 1.0
        causal = is_causal and not explicit and not extra_keys
        mask = bias = None
        if attn_mask is not None or key_padding_mask is not None:
            mask, bias = mask_and_bias(
                None if causal else attn_mask,
                key_padding_mask,
                batch,
                heads,
                seqlen_q,
                seqlen_k,
                extra_keys,
            )
        weights = None
        if explicit:
            weights = softmax((q * self.head_dim**-0.5) @ k.mT, mask=mask, bias=bias)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            out = weights @ v
        else:
            out = attention(  # type: ignore[assignment]
                q, k, v, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p
            )
        if seq_first:
            out = out.permute(2, 0, 1, 3).reshape(seqlen_q, batch, self.embed_dim)
        else:
            out = out.transpose(1, 2).reshape(batch, seqlen_q, self.embed_dim)
        out = self.out_proj(out)
        if weights is None or not need_weights:
            return (out if batched else out[0]), None
        if average_attn_weights:
            weights = weights.mean(1)
        return (out, weights) if batched else (out[0], weights[0])

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, masked: bool, need_weights: bool
    ) -> Tensor:
        if query is not key or key is not value:
            raise ValueError("query: a nested tensor must also be key and value")
        if masked or need_weights or self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                "query: a nested tensor goes with need_weights=False, and without masks, "
                "add_bias_kv and add_zero_attn"
            )
        values, cu_seqlens, max_seqlen = nested.pack(query)
        q, k, v = self._project(values, values, values)
        out: Tensor = attention(  # type: ignore[assignment]
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return nested.unpack(self.out_proj(out.flatten(1)), query)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value as ``(..., heads, head_dim)``; equal inputs share a product."""
        bias, embed_dim = self.in_proj_bias, self.embed_dim
        inputs: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            inputs, sizes = (query, key, value), [embed_dim] * 3
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            if query is key and key is value:
                return self._split_heads(F.linear(query, self.in_proj_weight, bias))
            if key is value:
                inputs, sizes = (query, key), [embed_dim, 2 * embed_dim]
            elif query is key:
                inputs, sizes = (query, value), [2 * embed_dim, embed_dim]
            else:
                inputs, sizes = (query, key, value), [embed_dim] * 3
            weights = self.in_proj_weight.split(sizes)
        biases = [None] * 3 if bias is None else bias.split(sizes)
        return tuple(
            part
            for x, w, b in zip(inputs, weights, biases, strict=False)
            for part in self._split_heads(F.linear(x, w, b))
        )

    def _split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        # Split before any transpose: the gradients then meet in one concatenation.
        *leading, size = x.shape
        x = x.view(*leading, size // self.head_dim, self.head_dim)
        return x.split(self.num_heads, -2)

    def _with_extra_keys(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (batch, heads, seqlen_k, head_dim) with the learned and the zero one."""
        batch, heads, _, head_dim = x.shape
        parts = [x]
        if bias is not None:
            row = bias.view(1, heads, 1, head_dim).to(x.dtype)
            parts.append(row.expand(batch, heads, 1, head_dim))
        if self.add_zero_attn:
            parts.append(x.new_zeros(batch, heads, 1, head_dim))
        return torch.cat(parts, 2)

    def _check_unbatched(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if not query.dim() == key.dim() == value.dim() == 2:
            raise ValueError(
                "query: expected 3 dims, or 2 in query, key and value, "
                f"got {query.dim()}, {key.dim()}, {value.dim()}"
            )

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, seq_first: bool) -> None:
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query: expected 2 or 3 dims, the last {self.embed_dim}, "
                f"got shape {tuple(query.shape)}"
            )
        if self._qkv_same_embed_dim and query is key and key is value:
            return
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != 3 or x.shape[-1] != size:
                raise ValueError(
                    f"{name}: expected {query.dim()} dims, the last {size}, "
                    f"got shape {tuple(x.shape)}"
                )
        if key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"value: expected {tuple(key.shape[:2])} before the last dim as in key, "
                f"got {tuple(value.shape[:2])}"
            )
        batch_dim = 1 if seq_first else 0
        if query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(
                f"key: expected batch {query.shape[batch_dim]} as in query, "
                f"got {key.shape[batch_dim]}"
            )


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with a batch of 1, equal ones still one object."""
    q = query[None]
    k = q if key is query else key[None]
    v = k if value is key else q if value is query else value[None]
    return q, k, v
