"""Models from Hugging Face's folders: the same logits as transformers' own, or a refusal."""

import json
import shutil
import warnings

import pytest
import torch

from fastattn import models
from fastattn.models import from_huggingface

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
BERT = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
)
LLAMA = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=1000.0,
)
T5 = dict(
    vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=6, decoder_start_token_id=0
)
GPT2 = dict(
    n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=24, bos_token_id=1, eos_token_id=2
)


def make(name, config, **options):
    """A model of transformers with random weights, none of them special."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if config in ("LlamaConfig", "MistralConfig", "Qwen2Config", "T5Config"):
        for key, parameter in model.named_parameters():
            if "norm" in key:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.set_attn_implementation("eager")
    return model.eval()


def close(ours, theirs):
    atol = TOLERANCE * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=atol)


@pytest.fixture
def tokens():
    """Tokens ``(3, 12)`` and their mask, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(1, 50, (3, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
    return found.masked_fill(~mask, 0), mask


@pytest.mark.parametrize(
    "name, ours",
    [
        ("BertModel", models.Encoder),
        ("BertForMaskedLM", models.MaskedLanguageModel),
        ("BertForSequenceClassification", models.SequenceClassifier),
        ("BertForTokenClassification", models.TokenClassifier),
        ("BertForQuestionAnswering", models.SpanClassifier),
    ],
)
def test_bert(tmp_path, tokens, name, ours):
    theirs = make(name, "BertConfig", **BERT, num_labels=5 if "Classification" in name else 2)
    theirs.save_pretrained(tmp_path)
    model = from_huggingface(tmp_path)
    assert type(model) is ours and not model.training
    x, mask = tokens
    types = (torch.arange(12) > 4).long().expand(3, 12)
    expected = theirs(x, attention_mask=mask.long(), token_type_ids=types)
    if ours is models.SpanClassifier:
        got = torch.stack(model(x, types=types), -1)
        want = torch.stack([expected.start_logits, expected.end_logits], -1)
    else:
        got, want = model(x, types=types), expected[0]
    if got.dim() == 3:
        got, want = got[mask], want[mask]
    close(got, want)


DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "llama head_dim": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "head_dim": 16}),
    "llama biased": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True}),
    "llama 3": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", DECODERS)
def test_decoders(tmp_path, tokens, which, side):
    name, config, options = DECODERS[which]
    theirs = make(name, config, **options)
    theirs.save_pretrained(tmp_path)
    x, mask = tokens
    if side == "left":
        x, mask = x.flip(1), mask.flip(1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(x, attention_mask=mask.long(), position_ids=positions).logits
    close(from_huggingface(tmp_path)(x, mask=mask)[mask], expected[mask])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel"])
def test_vit(tmp_path, name):
    theirs = make(
        name,
        "ViTConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        num_labels=5,
    )
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 24)
    expected = theirs(images)
    want = expected.logits if "Image" in name else expected.last_hidden_state[:, 0]
    close(from_huggingface(tmp_path)(images), want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_decoder_layers": 3, "relative_attention_max_distance": 6},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ],
    ids=["1.0", "other sizes", "1.1"],
)
def test_t5(tmp_path, tokens, options):
    theirs = make("T5ForConditionalGeneration", "T5Config", **{**T5, **options})
    theirs.save_pretrained(tmp_path)
    x, mask = tokens
    targets = torch.randint(1, 50, (3, 9))
    expected = theirs(x, attention_mask=mask.long(), decoder_input_ids=targets).logits
    close(from_huggingface(tmp_path)(x, targets), expected)


def test_gradients(tmp_path, tokens):
    theirs = make("LlamaForCausalLM", "LlamaConfig", **LLAMA)
    theirs.save_pretrained(tmp_path)
    ours = from_huggingface(tmp_path)
    x = tokens[0]
    theirs(x).logits.square().mean().backward()
    ours(x).square().mean().backward()
    layer = theirs.model.layers[1]
    close(ours.embedding.tokens.weight.grad, theirs.model.embed_tokens.weight.grad)
    want = torch.cat([getattr(layer.self_attn, f"{x}_proj").weight.grad for x in "qkv"])
    close(ours.decoder.layers[1].self_attn.in_proj.weight.grad, want)


def test_minilm(tokens):
    from fastattn.demo import minilm

    folder = minilm.find()
    if not hasattr(folder, "is_dir"):
        pytest.skip(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    x, mask = tokens
    close(from_huggingface(folder)(x)[mask], theirs(x, attention_mask=mask.long())[0][mask])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    make("GPT2LMHeadModel", "GPT2Config", **GPT2).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(gpt2, tmp_path):
    return shutil.copytree(gpt2, tmp_path / "copy")


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("how", ["bin", "old bin", "parts", "no prefix"])
def test_other_files_of_the_same_weights(copied, tokens, how):
    from safetensors.torch import save_file

    expected = from_huggingface(copied)(tokens[0])
    found = weights(copied)
    (copied / "model.safetensors").unlink()
    if how.endswith("bin"):
        torch.save(found, copied / "pytorch_model.bin", _use_new_zipfile_serialization=how == "bin")
    elif how == "no prefix":
        named = {key.removeprefix("transformer."): value for key, value in found.items()}
        save_file(named, copied / "model.safetensors")
    else:
        names = sorted(found)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for name, keys in parts.items():
            save_file({key: found[key] for key in keys}, copied / name)
        index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(from_huggingface(copied)(tokens[0]), expected)


def _save(folder, found):
    from safetensors.torch import save_file

    save_file(found, folder / "model.safetensors")


def test_a_missing_weight_is_named(copied):
    found = weights(copied)
    del found["transformer.h.1.mlp.c_fc.weight"]
    _save(copied, found)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight is missing.*\(128, 32\)"):
        from_huggingface(copied)


def test_a_strange_weight_is_named(copied):
    _save(copied, {**weights(copied), "transformer.h.0.extra.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"h\.0\.extra\.weight \(3,\) has no place in Decoder"):
        from_huggingface(copied)


def test_another_shape_is_named(copied):
    _save(copied, {**weights(copied), "transformer.wte.weight": torch.zeros(50, 31)})
    with pytest.raises(ValueError, match=r"wte\.weight \(50, 31\): expected \(50, 32\) together"):
        from_huggingface(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_half_a_file_is_refused(copied, name):
    if name.endswith("bin"):
        torch.save(weights(copied), copied / name)
        (copied / "model.safetensors").unlink()
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}: not a whole"):
        from_huggingface(copied)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was unpickled",)


def test_no_pickle_is_unpickled(copied):
    torch.save({"wte.weight": Bomb()}, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="tensors only"):
        from_huggingface(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type: expected one of bert, .*got 'mamba'"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "architectures: expected one of"),
        ({"activation_function": "mish"}, "activation_function: expected .*got 'mish'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected"),
        ({"n_layer": 3}, r"h\.2\..* is missing"),
        ({"n_layer": ...}, "n_layer: expected in config.json, got none"),
        ({"model_type": ["gpt2"]}, "model_type: expected str"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures: expected list"),
        ({"architectures": [["GPT2LMHeadModel"]]}, "architectures: expected one of"),
        ({"activation_function": ["gelu"]}, "activation_function: expected str"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected bool, got 'false'"),
        ({"n_embd": "32"}, "n_embd: expected int, got '32'"),
    ],
)
def test_what_ours_has_not_is_refused(copied, change, message):
    path = copied / "config.json"
    changed = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: x for name, x in changed.items() if x is not ...}))
    with pytest.raises(ValueError, match=message):
        from_huggingface(copied)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "yarn"}, "rope_type: expected 'default' or 'llama3', got 'yarn'"),
        ({"rope_type": "llama3"}, "factor: expected in config.json, got none"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ("linear", "rope_parameters: expected dict, got 'linear'"),
    ],
)
def test_other_rotations_are_refused(tmp_path, rope, message):
    make("LlamaForCausalLM", "LlamaConfig", **LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    with pytest.raises(ValueError, match=message):
        from_huggingface(tmp_path)


def test_mistral_has_a_window_unless_it_says_null(tmp_path):
    make("MistralForCausalLM", "MistralConfig", **LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for absent, window in ((True, 4096), (False, None)):
        config["sliding_window"] = None
        if absent:
            del config["sliding_window"]
        path.write_text(json.dumps(config))
        assert from_huggingface(tmp_path).config.window == window


UNTIED = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 1.1": ("T5ForConditionalGeneration", "T5Config", {**T5, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("which", UNTIED)
def test_an_output_of_its_own_is_used_whatever_the_config_says(tmp_path, tokens, which):
    name, config, options = UNTIED[which]
    make(name, config, **options).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    output = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    _save(tmp_path, {**weights(tmp_path), "lm_head.weight": output})
    theirs = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager")
    x = tokens[0][:1]
    ours = from_huggingface(tmp_path)
    if which.startswith("t5"):
        close(ours(x, x), theirs.eval()(input_ids=x, decoder_input_ids=x).logits)
    else:
        close(ours(x), theirs.eval()(x).logits)


COPIES = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "encoder.embed_tokens.weight": "shared.weight",
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_is_none_is_refused(tmp_path, copy):
    original = COPIES[copy]
    if copy.startswith("cls"):
        theirs = make("BertForMaskedLM", "BertConfig", **BERT)
    else:
        theirs = make("T5ForConditionalGeneration", "T5Config", **T5)
    theirs.save_pretrained(tmp_path)
    found = weights(tmp_path)
    full = next(key for key in found if key.endswith(original))
    _save(tmp_path, {**found, copy: found[full].clone()})
    from_huggingface(tmp_path)
    _save(tmp_path, {**found, copy: found[full] + 1})
    with pytest.raises(ValueError, match=f"{copy}: expected a copy of {original}, got another"):
        from_huggingface(tmp_path)


def test_bert_untied_is_refused(tmp_path):
    options = {**BERT, "tie_word_embeddings": False}
    make("BertForMaskedLM", "BertConfig", **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tie_word_embeddings: expected True, got False"):
        from_huggingface(tmp_path)


def test_names_of_the_first_bert_files(tmp_path, tokens):
    theirs = make("BertModel", "BertConfig", **BERT)
    theirs.save_pretrained(tmp_path)
    expected = from_huggingface(tmp_path)(tokens[0])
    named = {}
    for key, value in weights(tmp_path).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        named["bert." + key.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    _save(tmp_path, named)
    assert torch.equal(from_huggingface(tmp_path)(tokens[0]), expected)


def test_a_weight_under_two_names_is_refused(copied):
    _save(copied, {**weights(copied), "wte.weight": torch.zeros(50, 32)})
    with pytest.raises(ValueError, match="wte.weight is there under another name"):
        from_huggingface(copied)


def test_keys_and_values_of_other_sizes_are_refused(tmp_path):
    make("LlamaForCausalLM", "LlamaConfig", **LLAMA).save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.{}_proj.weight"
    parts = {name.format("k"): torch.zeros(8, 32), name.format("v"): torch.zeros(24, 32)}
    _save(tmp_path, {**weights(tmp_path), **parts})
    with pytest.raises(ValueError, match=r"k_proj.weight \(8, 32\).*expected \(64, 32\) together"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_other_dtypes_are_refused(copied, dtype):
    name = "transformer.ln_f.weight"
    _save(copied, {**weights(copied), name: torch.ones(32).to(dtype)})
    with pytest.raises(ValueError, match=f"{dtype}"):
        from_huggingface(copied)
    if dtype == torch.bfloat16:
        assert from_huggingface(copied, dtype=torch.float32).output.weight.dtype == torch.float32


def test_transformers_own_parts(tmp_path, tokens):
    theirs = make("GPT2LMHeadModel", "GPT2Config", **GPT2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    close(from_huggingface(tmp_path)(tokens[0]), theirs(tokens[0]).logits)


@pytest.mark.parametrize("content", [{0: torch.ones(1)}, {"a": torch.eye(2).to_sparse()}, [1]])
def test_what_is_no_state_dict_is_refused(copied, content):
    (copied / "model.safetensors").unlink()
    torch.save(content, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a state dict"):
        from_huggingface(copied)


@pytest.mark.parametrize("old", [False, True])
def test_damage_in_a_pickle_is_refused_or_not_seen(tmp_path, old):
    from fastattn.models.files import read_weights

    path = tmp_path / "pytorch_model.bin"
    found = {f"layer.{i}.weight": torch.ones(2) for i in range(4)}
    torch.save(found, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, min(len(whole), 900), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_weights(path)
            except ValueError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("damage", ["twice", "map", "outside"])
def test_a_wrong_index_is_refused(copied, damage):
    from safetensors.torch import save_file

    (copied / "model.safetensors").rename(copied / "a.safetensors")
    save_file({"transformer.wte.weight": torch.zeros(50, 32)}, copied / "b.safetensors")
    files = {"transformer.ln_f.weight": "a.safetensors", "transformer.wte.weight": "b.safetensors"}
    message = {"twice": "in b.safetensors and in a file before it", "map": "a weight_map of files"}
    if damage == "map":
        files["transformer.wte.weight"] = 5
    if damage == "outside":
        files["transformer.wte.weight"] = "../b.safetensors"
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ValueError, match=message.get(damage, "names of files beside it")):
        from_huggingface(copied)


def test_an_index_of_a_missing_file_is_refused(copied):
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "gone.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        from_huggingface(copied)


def test_fields_and_dtype(copied):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_huggingface(copied, dtype=torch.float64, dropout=0.5)
    assert model.config.dropout == 0.5 and model.output.weight.dtype == torch.float64
