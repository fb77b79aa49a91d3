"""Weights from elsewhere into the models."""

from torch import Tensor, nn

from fastattn.models.transformer import Transformer

_RENAMED = {
    "encoder": {".norm1.": ".self_attn_norm.", ".norm2.": ".feed_forward_norm."},
    "decoder": {
        ".norm1.": ".self_attn_norm.",
        ".norm2.": ".cross_attn_norm.",
        ".norm3.": ".feed_forward_norm.",
        ".multihead_attn.": ".cross_attn.",
    },
}


def _renamed(key: str) -> str:
    for old, new in _RENAMED[key.partition(".")[0]].items():
        key = key.replace(old, new)
    return key.replace(".linear", ".feed_forward.linear").replace(".in_proj_", ".in_proj.")


def load_torch(model: Transformer, stock: nn.Transformer) -> None:
    """Copy the layers of a `torch.nn.Transformer` into a model of the same sizes.

    With the same embeddings around them, both then compute the same. A post-norm model has no
    final norms: leave them out of `stock` too (``stock.encoder.norm = None``, and the decoder's).

    Raises:
        ValueError: num_heads or norm_first differ, or a weight of either has no counterpart.
        RuntimeError: the shapes differ (from `load_state_dict`).
    """
    config, layer = model.config, stock.encoder.layers[0]
    for name, ours, theirs in (
        ("num_heads", config.num_heads, stock.nhead),
        ("norm_first", config.norm_first, layer.norm_first),
    ):
        if ours != theirs:
            raise ValueError(f"stock: expected {name}={ours} as in model, got {theirs}")
    weights: dict[str, Tensor] = {}
    for key, weight in stock.state_dict().items():
        key = _renamed(key)
        if ".cross_attn.in_proj." in key:
            split = config.d_model
            weights[key.replace("in_proj", "q_proj")] = weight[:split]
            weights[key.replace("in_proj", "kv_proj")] = weight[split:]
        else:
            weights[key] = weight
    expected = {key for key in model.state_dict() if key.startswith(("encoder.", "decoder."))}
    if odd := sorted(expected ^ weights.keys()):
        raise ValueError(f"stock: expected the layers of model, got other weights: {odd}")
    model.load_state_dict(weights, strict=False)
