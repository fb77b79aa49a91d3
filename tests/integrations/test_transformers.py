"""Models of transformers on fastattn agree with their eager attention."""

import copy
import pickle

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")
from fastattn.integrations import transformers as door  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5  # of the norm of the difference, beside that of the eager result
OLD = int(transformers.__version__.partition(".")[0]) < 5
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, **IDS,
)  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
T5 = dict(
    vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8, decoder_start_token_id=0,
    **IDS,
)  # fmt: skip
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, **IDS)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {**GQA, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0,
                "query_pre_attn_scalar": 8}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig",
            dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                 image_size=16, patch_size=4)),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                dict(vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2,
                     encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                     decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
                     max_target_positions=40, decoder_start_token_id=1, **IDS)),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL),
    "gated_t5": ("T5ForConditionalGeneration", "T5Config",
                 {**T5, "feed_forward_proj": "gated-gelu"}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig",
               {**GQA, "head_dim": 8, "num_hidden_layers": 4, "attention_chunk_size": 4,
                "num_local_experts": 2, "intermediate_size_mlp": 48}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                {**GQA, "head_dim": 8, "sliding_window": 4, "num_local_experts": 2,
                 "num_experts_per_tok": 1}),
}  # fmt: skip
GENERATING = [name for name in MODELS if name not in ("bert", "roberta", "vit")]
FUSED = {  # what accelerate fuses of their feed-forward networks
    "bert": "BertLayer", "gpt2": "GPT2MLP", "llama": "LlamaMLP", "mistral": "MistralMLP",
    "qwen3": "Qwen3MLP", "gemma2": "Gemma2MLP", "t5": "T5DenseActDense", "whisper": None,
    "roberta": "RobertaLayer", "gated_t5": "T5DenseGatedActDense", "vit": None if OLD else "ViTMLP",
}  # fmt: skip


def make(which):
    name, config, options = MODELS[which]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    for key, parameter in model.named_parameters():
        mean = 1.0 if "norm" in key.lower() and "Gemma" not in name else 0.0
        torch.nn.init.normal_(parameter, mean if key.endswith("weight") else 0.0, 0.15)
    model.set_attn_implementation("eager")
    return model.eval()


def inputs(which, side):
    """Keyword arguments of a model, and a mask of the logits that count."""
    generator = torch.Generator().manual_seed(1)
    if which == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}, ...
    tokens = torch.randint(3, 50, (3, 11), generator=generator)
    if which == "whisper":
        features = torch.randn(3, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens}, ...
    mask = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    found = {"input_ids": tokens.masked_fill(~mask, 0), "attention_mask": mask.long()}
    if which in ("t5", "gated_t5"):
        return {**found, "decoder_input_ids": tokens[:, :8]}, ...
    return found, mask


def near(got, expected):
    assert (got - expected).norm() <= TOLERANCE * expected.norm()


def run(model, given, counts):
    """Logits and the gradients of all parameters."""
    logits = model(**given).logits[counts]
    model.zero_grad()
    logits.square().mean().backward()
    return [logits.detach()] + [
        torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()
    ]


def skip_if_apart(which):
    if OLD and which in ("bert", "roberta", "t5", "gated_t5"):
        pytest.skip("BERT and T5 of transformers 4 compute their attention themselves")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", MODELS)
def test_logits_and_gradients(which, side):
    skip_if_apart(which)
    model = make(which)
    given, counts = inputs(which, side)
    expected = run(model, given, counts)
    scale = max(grad.norm() for grad in expected[1:])
    with door.use(model):
        explained = fastattn.explain(lambda: model(**given))
        got = run(model, given, counts)
    assert {choice.problem.op for choice in explained} == {"attention_fwd"}
    near(got[0], expected[0])
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        # A key's bias has no gradient but rounding errors.
        assert (ours - theirs).norm() <= TOLERANCE * max(theirs.norm(), 0.1 * scale)
    again = run(model, given, counts)
    assert all(a.equal(b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("which", GENERATING)
def test_greedy_generation(which, cache):
    skip_if_apart(which)
    model = make(which)
    given, _ = inputs(which, "left")
    given.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False)
    options |= dict(use_cache=cache is not None)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    expected = model.generate(**given, **options)
    got = []
    with door.use(model):
        explained = fastattn.explain(lambda: got.append(model.generate(**given, **options)))
    assert explained and got[0].equal(expected)


@pytest.mark.parametrize("which", ["mistral", "bert"])
def test_compiled(which):
    skip_if_apart(which)
    model = make(which)
    given, counts = inputs(which, "right")
    expected = model(**given).logits[counts]
    with door.use(model), fastattn.accelerate(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        near(compiled(**given).logits[counts], expected)
    torch._dynamo.reset()


def test_compiled_generation():
    model = make("mistral")
    given, _ = inputs("mistral", "left")
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(**given, **options)
    compiling = transformers.generation.CompileConfig(backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options |= dict(cache_implementation="static", compile_config=compiling)
    with door.use(model):
        assert model.generate(**given, **options).equal(expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "which, window, lengths",
    [("bert", (None, None), True), ("llama", (None, 0), True), ("mistral", (3, 0), True),
     ("vit", (None, None), False)],
)  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_mask_hides_on_the_right_is_skipped(which, window, lengths, mode):
    skip_if_apart(which)
    model = make(which)
    given, _ = inputs(which, "right")
    with door.use(model), mode():
        for choice in fastattn.explain(lambda: model(**given)):
            problem = choice.problem
            assert (problem.window_left, problem.window_right) == window
            assert not problem.mask and problem.seqlens_k == lengths


def test_packed_sequences():
    model = make("llama")
    tokens = torch.randint(3, 50, (1, 12))
    lengths = (5, 4, 3)
    cu = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([model(part).logits for part in tokens.split(lengths, 1)], 1)
    with door.use(model):
        near(model(tokens, position_ids=positions, use_cache=False).logits, expected)
        packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5, max_length_k=5)
        near(model(tokens, position_ids=positions, **packed).logits, expected)


def _call(module=None, **options):
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    module = module or torch.nn.Identity()
    return door.attention_forward(module, q, k, k, options.pop("attention_mask", None), **options)


def test_sinks_and_bias():
    sinks, bias = torch.randn(4, requires_grad=True), torch.randn(1, 4, 7, 7, requires_grad=True)
    out, weights = _call(s_aux=sinks, position_bias=bias, scaling=1.0, is_causal=False)
    assert weights is None and out.shape == (2, 7, 4, 8) and out.is_contiguous()
    out.square().sum().backward()
    assert sinks.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0


def _attend(q, k, **options):
    module = torch.nn.Identity()
    return door.attention_forward(module, q, k, k, options.pop("attention_mask", None), **options)[
        0
    ]


def test_a_mask_holds_within_packed_sequences():
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    expected = _attend(q, k, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    near(expected[:, 3:], _attend(q[:, :, 3:], k[:, :, 3:]))
    for mask in (causal, torch.zeros(1, 1, 7, 7).masked_fill(~causal, -torch.inf)):
        near(_attend(q, k, attention_mask=mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu), expected)
    last = torch.tensor([0, 1, 2], dtype=torch.int32)
    few = _attend(q[:, :, [2, 6]], k, cu_seq_lens_q=last, cu_seq_lens_k=cu)
    near(few, expected[:, [2, 6]])


def test_a_window_holds_without_a_mask():
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    expected = _attend(q, k, sliding_window=3)
    near(expected[:, 6:], _attend(q[:, :, 6:], k[:, :, 4:]))
    near(_attend(q[:, :, 6:], k, sliding_window=3), expected[:, 6:])
    with pytest.raises(ValueError, match="sliding_window: expected a mask"):
        _attend(q, k, sliding_window=3, is_causal=False)
    _attend(q, k, sliding_window=7, is_causal=False)


def test_masks_of_another_kind_are_refused():
    with pytest.raises(
        ValueError, match=r"attention_mask: expected \(batch, .* got shape \(2, 7\)"
    ):
        _call(attention_mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attention_mask: expected torch.bool .* torch.int64"):
        _call(attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.long))


@pytest.mark.skipif(not OLD, reason="later versions call the function from every model")
@pytest.mark.parametrize("which", ["bert", "t5"])
def test_a_model_that_computes_its_attention_itself_is_refused(which):
    model = make(which)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="does not call transformers' attention interface"):
        door.use(model)
    assert model.config._attn_implementation == before


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="blocks: not known to fastattn's attention, got 3"):
        _call(blocks=3)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        _call(output_attentions=True)
    _call(blocks=None, output_attentions=False, use_cache=True)


def test_the_door_closes():
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    def known():
        return [
            door.NAME in interface._global_mapping
            for interface in (AttentionInterface, AttentionMaskInterface)
        ]

    assert known() == [False, False]
    with pytest.raises(KeyError), door.register():
        with door.register():
            assert known() == [True, True]
        assert known() == [True, True]
        raise KeyError
    assert known() == [False, False]
    door.register(), door.register()
    door.unregister()
    assert known() == [False, False]
    stale = door.register()
    door.unregister()
    with door.register():
        stale.close()
        assert known() == [True, True]
    AttentionInterface.register(door.NAME, print)
    try:
        with pytest.raises(RuntimeError, match="already knows an attention 'fastattn'"):
            door.register()
    finally:
        del AttentionInterface._global_mapping[door.NAME]
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel, got Linear"):
        door.use(torch.nn.Linear(2, 2))


def test_minilm():
    skip_if_apart("bert")
    from fastattn.demo import minilm

    folder = minilm.find()
    if not hasattr(folder, "is_dir"):
        pytest.skip(folder)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    given, counts = inputs("bert", "right")
    with torch.no_grad():
        expected = model(**given)[0][counts]
        with door.use(model), fastattn.accelerate(model):
            near(model(**given)[0][counts], expected)


@pytest.mark.parametrize("which", FUSED)
def test_accelerated(which):
    model = make(which)
    given, counts = inputs(which, "right")
    expected = run(model, given, counts)
    scale = max(grad.norm() for grad in expected[1:])
    with fastattn.accelerate(model) as report:
        swapped = {entry.original.__name__ for entry in report.swapped}
        assert any("Norm" in name for name in swapped)
        assert FUSED[which] is None or FUSED[which] in swapped
        explained = fastattn.explain(lambda: model(**given))
        ops = {choice.problem.op for choice in explained}
        assert any("ffn" in op for op in ops) == (FUSED[which] is not None)
        assert fastattn.explain(model)
        got = run(model, given, counts)
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            near(each(**given).logits[counts], got[0])
            assert type(each) is type(model)
    near(got[0], expected[0])
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * max(theirs.norm(), 0.1 * scale)
    again = run(model, given, counts)
    assert all(a.equal(b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("which", [name for name in FUSED if name not in ("t5", "whisper")])
def test_accelerated_in_training(which):
    """Dropout outside of the fused products is transformers' own, with the same numbers."""
    model = make(which).train()
    given, counts = inputs(which, "right")
    torch.manual_seed(1)
    expected = run(model, given, counts)
    with fastattn.accelerate(model):
        torch.manual_seed(1)
        near(run(model, given, counts)[0], expected[0])


@pytest.mark.parametrize("which", [name for name in FUSED if FUSED[name] is not None])
def test_hooks_within_an_accelerated_network_are_called(which):
    model = make(which)
    given, counts = inputs(which, "right")
    expected = model(**given).logits[counts]
    with fastattn.accelerate(model) as report:
        networks = [e.module for e in report.swapped if e.original.__name__ == FUSED[which]]
        parts = [
            part
            for network in networks
            for name, part in network.named_modules()
            if name and "attention" not in name
        ]
        seen = []
        for part in parts:
            handle = part.register_forward_hook(lambda part, *_: seen.append(part))
            near(model(**given).logits[counts], expected)
            assert part in seen
            handle.remove()


def test_accelerated_t5_of_two_dtypes():
    model = make("t5").bfloat16()
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    given, counts = inputs("t5", "right")
    expected = model(**given).logits[counts]
    with fastattn.accelerate(model):
        got = model(**given).logits[counts]
    assert got.dtype == expected.dtype
    assert (got - expected).norm() < 0.02 * expected.norm()
