"""The decoder-only model, and its generation: caches, padding, filters, streams."""

import pytest
import torch

from fastattn.models import Decoder
from fastattn.models.sampling import filter_logits, penalize

GPT2 = dict(vocab_size=23, d_model=32, num_layers=2, num_heads=4, d_ff=48, max_positions=40)
LLAMA = dict(
    **GPT2,
    num_heads_kv=2,
    positions="rotary",
    norm="rms",
    activation="silu",
    gated=True,
    bias=False,
    tie_embeddings=False,
)
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "window": {**LLAMA, "window": 5, "softcap": 3.0},
    "sinusoidal": {**GPT2, "positions": "sinusoidal", "head_dim": 12},
}
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "length_penalty": 0.7},
    "sample": {"do_sample": True, "temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.7, "min_new_tokens": 4},
}
close = torch.testing.assert_close


def make(which, dtype=torch.float64):
    torch.manual_seed(3)
    model = Decoder(**MODELS[which], dropout=0.0).to(dtype).eval()
    for name, parameter in model.named_parameters():
        # Distributions less even, so that no two continuations nearly tie.
        torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    return model


@pytest.fixture
def prompt():
    """Tokens ``(3, 7)`` and their mask, padded on the left."""
    mask = torch.arange(7) >= torch.tensor([0, 4, 2])[:, None]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 23, (3, 7), generator=generator).masked_fill(~mask, 0), mask


def generate(model, tokens, mode="greedy", seed=7, **options):
    return model.generate(
        tokens,
        max_new_tokens=12,
        generator=torch.Generator().manual_seed(seed),
        **{"eos_id": (1, 2), **MODES[mode], **options},
    )


@pytest.mark.parametrize("which", MODELS)
def test_the_future_and_padding_do_not_matter(which, prompt):
    model, (tokens, mask) = make(which), prompt
    logits = model(tokens, mask=mask)
    for row, real, got in zip(tokens, mask, logits, strict=True):
        close(model(row[real][None])[0], got[real])
    close(model(tokens[:, :5], mask=mask[:, :5])[mask[:, :5]], logits[:, :5][mask[:, :5]])
    padded = model(tokens.flip(1), mask=mask.flip(1))
    close(padded[1, :3], model(tokens.flip(1)[1:2, :3])[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", MODELS)
def test_caches_change_nothing(which, mode, prompt):
    model, (tokens, mask) = make(which), prompt
    static, paged, none = (
        generate(model, tokens, mode, mask=mask, cache=cache)
        for cache in ("static", "paged", "none")
    )
    assert static.equal(none) and paged.equal(none)
    assert static.shape[1] > 1


@pytest.mark.parametrize("mode", ["greedy", "beam", "penalty"])
@pytest.mark.parametrize("cache", ["static", "paged"])
def test_a_row_does_not_depend_on_its_batch(mode, cache, prompt):
    model, (tokens, mask) = make("llama"), prompt
    together = generate(model, tokens, mode, mask=mask, cache=cache, pad_id=0)
    for row, real, expected in zip(tokens, mask, together, strict=True):
        alone = generate(model, row[real][None], mode, cache=cache, pad_id=0)[0]
        assert alone.equal(expected[: len(alone)])
        assert expected[len(alone) :].eq(0).all()


def test_a_stream_is_what_generate_returns(prompt):
    model, (tokens, mask) = make("gpt2"), prompt
    options = dict(mask=mask, eos_id=2, max_new_tokens=9)
    steps = list(model.stream(tokens, **options))
    assert torch.stack(steps, 1).equal(model.generate(tokens, **options))
    with pytest.raises(ValueError, match="num_beams: expected 1 in a stream, got 2"):
        model.stream(tokens, num_beams=2, **options)


def test_a_stream_computes_as_it_is_read(prompt, monkeypatch):
    model, calls = make("gpt2"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, **k: (calls.append(1), hidden(*a, **k))[1])
    steps = model.stream(prompt[0], eos_id=None, max_new_tokens=9)
    assert not calls
    next(steps)
    assert len(calls) == 1


def test_ends(prompt):
    model, (tokens, mask) = make("gpt2"), prompt
    free = generate(model, tokens, mask=mask, eos_id=None)
    assert free.shape == (3, 12)
    ends = (int(free[0, 2]), int(free[1, 5]))
    out = generate(model, tokens, mask=mask, eos_id=ends, pad_id=0)
    for row, expected in zip(out, free, strict=True):
        stop = next((i for i, token in enumerate(expected.tolist()) if token in ends), 11)
        assert row[: stop + 1].equal(expected[: stop + 1])
        assert row[stop + 1 :].eq(0).all()
    late = generate(model, tokens, mask=mask, eos_id=ends, min_new_tokens=6, pad_id=0)
    assert not torch.isin(late[:, :6], torch.tensor(ends)).any()


def test_pad_id_is_a_mask(prompt):
    model, (tokens, mask) = make("llama"), prompt
    padded = Decoder(model.config, pad_id=0).double().eval()
    padded.load_state_dict(model.state_dict())
    assert generate(padded, tokens).equal(generate(model, tokens, mask=mask, pad_id=0))
    close(padded(tokens), model(tokens, mask=mask))


def test_penalty_and_min_p_are_their_definitions():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.9]])
    seen = torch.tensor([[True, True, False, False]])
    close(penalize(logits, seen, 2.0), torch.tensor([[1.0, -2.0, 0.5, 1.9]]))
    p = torch.tensor([[0.5, 0.3, 0.11, 0.09]])
    kept = filter_logits(p.log(), min_p=0.2).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("seed", range(3))
def test_filters_agree_with_hugging_face(seed):
    processors = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(seed)
    logits, tokens = 3 * torch.randn(4, 50), torch.randint(0, 50, (4, 9))
    expected = logits
    for processor in (
        processors.RepetitionPenaltyLogitsProcessor(1.4),
        processors.TemperatureLogitsWarper(0.8),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.1),
    ):
        expected = processor(tokens, expected)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)
    ours = filter_logits(penalize(logits, seen, 1.4), 0.8, 20, 0.9, 0.1)
    close(ours.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_generation_agrees_with_hugging_face(which, prompt, tmp_path):
    transformers = pytest.importorskip("transformers")
    from fastattn.models import from_huggingface

    sizes = dict(vocab_size=23, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    if which == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, **sizes)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            **sizes,
        )
        theirs = transformers.LlamaForCausalLM(config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name or "ln" in name), 0.3)
    theirs.save_pretrained(tmp_path)
    tokens, mask = prompt
    ours = from_huggingface(tmp_path)
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.5}):
        expected = theirs.eval().generate(
            tokens, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, **options
        )[:, 7:]
        got = ours.generate(tokens, mask=mask, eos_id=2, max_new_tokens=12, pad_id=0, **options)
        assert got.equal(expected), options


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_gradients_with_checkpointed_activations(which):
    model = make(which).train()
    saving = Decoder(model.config, checkpoint_activations=True).double().train()
    saving.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 23, (2, 9))
    for each in (model, saving):
        each(tokens).square().mean().backward()
    for expected, got in zip(model.parameters(), saving.parameters(), strict=True):
        close(got.grad, expected.grad)


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_compiles_whole(which):
    model = make(which, torch.float32)
    tokens = torch.randint(0, 23, (2, 9))
    mask = torch.arange(9) < torch.tensor([9, 5])[:, None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(tokens, mask=mask), model(tokens, mask=mask))


@pytest.mark.parametrize(
    "name, options",
    [
        ("tokens", {"tokens": torch.ones(3, dtype=torch.long)}),
        ("mask", {"mask": torch.ones(2, 7)}),
        ("mask", {"mask": torch.ones(2, 6, dtype=torch.bool)}),
        ("mask", {"mask": torch.tensor([[True, False]]).repeat(2, 4)[:, :7]}),
        ("max_new_tokens", {"max_new_tokens": 34}),
        ("eos_id", {"eos_id": (2, 23)}),
        ("cache", {"cache": "dynamic"}),
    ],
)
def test_wrong_arguments_are_refused(name, options):
    tokens = torch.ones(2, 7, dtype=torch.long)
    arguments = {"tokens": tokens, "eos_id": 2, "max_new_tokens": 4, **options}
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*"):
        make("gpt2").generate(arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
    "name, options",
    [
        ("num_heads", {"num_heads": 3}),
        ("num_heads_kv", {"num_heads_kv": 3}),
        ("positions", {"positions": "relative"}),
        ("norm", {"norm": "batch"}),
        ("window", {"window": 0}),
        ("softcap", {"softcap": -1.0}),
        ("pad_id", {"pad_id": 23}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_wrong_configurations_are_refused(name, options):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        Decoder(**{**GPT2, **options})
