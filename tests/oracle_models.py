"""The models in plain PyTorch from their papers, given a state dict and a configuration."""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Weights:
    """Those under a prefix, applied."""

    def __init__(self, state, config, prefix=""):
        self.state, self.config, self.prefix = state, config, prefix

    def __getattr__(self, name):
        key = self.prefix + name
        if key in self.state:
            return self.state[key]
        return Weights(self.state, self.config, f"{key}.")

    __getitem__ = __getattr__

    def get(self, name):
        return self.state.get(self.prefix + name)


def linear(w, x):
    return F.linear(x, w.weight, w.get("bias"))


def norm(w, x):
    eps = w.config.norm_eps
    if getattr(w.config, "norm", "layer") == "rms":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.weight
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w.weight
    return y if w.get("bias") is None else y + w.bias


def option(config, name, default=None):
    value = getattr(config, name, None)
    return default if value is None else value


def rotated(x, positions, config):
    """Each pair (i, i + head_dim / 2) turned by its position times its frequency."""
    half = x.shape[-1] // 2
    angles = []
    for i in range(half):
        frequency = config.rope_theta ** (-i / half)
        if config.rope_scaling is not None:
            s = config.rope_scaling
            length = 2 * math.pi / frequency
            short = s.original_max_positions / s.high_freq_factor
            long = s.original_max_positions / s.low_freq_factor
            if length > long:
                frequency /= s.factor
            elif length > short:
                smooth = s.original_max_positions / length - s.low_freq_factor
                smooth /= s.high_freq_factor - s.low_freq_factor
                frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
        angles.append(frequency)
    angle = positions[:, None, :, None] * torch.tensor(angles, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attended(q, k, v, seen, config, bias=None):
    """Heads (batch, heads, seqlen, head_dim); `seen` broadcasts to the scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * option(config, "softmax_scale", q.shape[-1] ** -0.5)
    if (softcap := option(config, "softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -math.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0)  # of a row that sees nothing: 0
    return (p @ v).transpose(1, 2).flatten(2)


def split(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def layer(w, x, seen, *, norm_first, positions=None, bias=None, memory=None, memory_seen=None):
    c = w.config
    head_dim = option(c, "head_dim", c.d_model // c.num_heads)
    heads_kv = option(c, "num_heads_kv", c.num_heads)

    def attend(y):
        sizes = [c.num_heads * head_dim, heads_kv * head_dim, heads_kv * head_dim]
        projected = linear(w.self_attn.in_proj, y).split(sizes, -1)
        q, k, v = (split(part, head_dim) for part in projected)
        if positions is not None:
            q, k = rotated(q, positions, c), rotated(k, positions, c)
        return linear(w.self_attn.out_proj, attended(q, k, v, seen, c, bias))

    def attend_memory(y):
        q = split(linear(w.cross_attn.q_proj, y), head_dim)
        projected = linear(w.cross_attn.kv_proj, memory).chunk(2, -1)
        k, v = (split(part, head_dim) for part in projected)
        return linear(w.cross_attn.out_proj, attended(q, k, v, memory_seen, c))

    def feed_forward(y):
        activation, f = ACTIVATIONS[c.activation], w.feed_forward
        if getattr(c, "gated", False):
            hidden = activation(linear(f.gate_proj, y)) * linear(f.up_proj, y)
            return linear(f.down_proj, hidden)
        return linear(f.linear2, activation(linear(f.linear1, y)))

    sublayers = [("self_attn_norm", attend), ("feed_forward_norm", feed_forward)]
    if memory is not None:
        sublayers.insert(1, ("cross_attn_norm", attend_memory))
    for name, sublayer in sublayers:
        x = x + sublayer(norm(w[name], x)) if norm_first else norm(w[name], x + sublayer(x))
    return x


def stack(w, x, seen, *, norm_first, num_layers=None, **options):
    for index in range(num_layers or w.config.num_layers):
        x = layer(w.layers[str(index)], x, seen, norm_first=norm_first, **options)
    return norm(w.norm, x) if norm_first else x


def decoder(state, c, tokens, mask):
    """`Decoder`: logits ``(batch, seqlen, vocab_size)``."""
    w = Weights(state, c)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    i = torch.arange(tokens.shape[1])
    seen = mask[:, None, None, :] & (i <= i[:, None])
    if c.window is not None:
        seen = seen & (i > i[:, None] - c.window)
    x = w.embedding.tokens.weight[tokens]
    if c.positions == "learned":
        x = x + w.embedding.positions[positions]
    rotary = positions if c.positions == "rotary" else None
    x = stack(w.decoder, x, seen, norm_first=True, positions=rotary)
    return x @ (w.embedding.tokens.weight if c.tie_embeddings else w.output.weight).mT


def encoder(state, c, tokens, mask, types):
    """`Encoder`: states ``(batch, seqlen, d_model)``."""
    w = Weights(state, c)
    e = w.embedding
    x = e.tokens.weight[tokens] + e.positions[: tokens.shape[1]] + e.types.weight[types]
    return stack(w.encoder, norm(e.norm, x), mask[:, None, None, :], norm_first=False)


def vision(state, c, images):
    """`VisionTransformer`: logits ``(batch, num_labels)``."""
    w = Weights(state, c)
    e, size = w.embedding, c.patch_size
    weight = e.patches.weight.unflatten(1, (c.channels, size, size))
    x = F.conv2d(images, weight, e.patches.bias, stride=size).flatten(2).mT
    x = torch.cat([e.class_token.expand(len(x), 1, -1), x], 1) + e.positions
    x = stack(w.encoder, x, torch.tensor(True), norm_first=True)
    return linear(w.classifier, x[:, 0] if c.pooling == "class" else x[:, 1:].mean(1))


def position_bias(weight, seqlen_q, seqlen_k, bidirectional, max_distance):
    """T5's buckets of distances, one at a time."""
    bias = weight.new_zeros(1, weight.shape[1], seqlen_q, seqlen_k)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            buckets, first, distance = len(weight), 0, i - j
            if bidirectional:
                buckets //= 2
                first, distance = (buckets if j > i else 0), abs(distance)
            distance, exact = max(distance, 0), buckets // 2
            if distance >= exact:
                grown = math.log(distance / exact) / math.log(max_distance / exact)
                distance = min(exact + int(grown * (buckets - exact)), buckets - 1)
            bias[0, :, i, j] = weight[first + distance]
    return bias


def transformer(state, c, src, tgt):
    """`Transformer` with relative positions: logits ``(batch, seqlen_tgt, vocab_size)``."""
    w = Weights(state, c)
    source_seen = (src != c.pad_id)[:, None, None, :]
    scale = option(c, "embedding_scale", math.sqrt(c.d_model))

    def bias(which, seqlen, bidirectional):
        weight = w[which].position_bias.weight
        return position_bias(weight, seqlen, seqlen, bidirectional, c.relative_max_distance)

    memory = stack(
        w.encoder,
        w.input_embedding.tokens.weight[src] * scale,
        source_seen,
        norm_first=c.norm_first,
        bias=bias("encoder", src.shape[1], True),
    )
    x = stack(
        w.decoder,
        w.target_embedding.tokens.weight[tgt] * scale,
        torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).tril(),
        norm_first=c.norm_first,
        num_layers=c.num_decoder_layers,
        bias=bias("decoder", tgt.shape[1], False),
        memory=memory,
        memory_seen=source_seen,
    )
    return linear(w.output, x * c.output_scale)
