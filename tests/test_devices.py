"""Models, doors and training on each device of this machine; float64 on the CPU is what is right.

The other tests of them are on the CPU alone, and say much more.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import models
from fastattn.integrations import flash_attn
from fastattn.integrations import torch as torch_door

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CASES = [(device, dtype) for device in DEVICES for dtype in (torch.float32, torch.bfloat16)]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # a GPU may compute float32 in TF32

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize(
        "device, dtype", CASES, ids=[f"{device}-{str(dtype)[6:]}" for device, dtype in CASES]
    ),
]
SIZES = dict(d_model=64, num_layers=2, num_heads=2, d_ff=128, dropout=0.0)
TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 61 + 1
MODELS = {
    "Transformer": (
        dict(input_vocab_size=64, target_vocab_size=64, max_positions=64, pad_id=0),
        (TOKENS, TOKENS.flip(1)),
    ),
    "Decoder": (
        dict(
            vocab_size=64, max_positions=64, num_heads_kv=1, positions="rotary", norm="rms",
            activation="silu", gated=True, bias=False, window=16,
        ),
        (TOKENS,),
    ),
    "SequenceClassifier": (dict(vocab_size=64, max_positions=64), (TOKENS,)),
    "VisionTransformer": (
        dict(num_labels=8, image_size=32, patch_size=8),
        (torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32),),
    ),
}  # fmt: skip


def _results(model, inputs, device, dtype):
    """Outputs and gradients, of inputs moved there."""
    model = copy.deepcopy(model).to(device, dtype)
    moved = [each.to(device, dtype if each.is_floating_point() else None) for each in inputs]
    out = model(*moved)
    out = out.logits if hasattr(out, "logits") else out
    F.cross_entropy(
        out.flatten(0, -2), torch.zeros_like(out[..., 0], dtype=int).flatten()
    ).backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    return {"out": out, **grads}


def _assert_near(found, expected, dtype):
    for name, right in expected.items():
        error = (found[name].detach().cpu().double() - right.detach()).norm()
        assert error <= TOLERANCE[dtype] * (right.norm() + 1e-3), name


@pytest.mark.parametrize("name", MODELS)
def test_models(name, device, dtype):
    fields, inputs = MODELS[name]
    model = models.build(name, **SIZES, **fields)
    right = _results(model, inputs, "cpu", torch.float64)
    _assert_near(_results(model, inputs, device, dtype), right, dtype)


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_generation(cache, device, dtype):
    model = models.build("Decoder", **SIZES, **MODELS["Decoder"][0]).to(device, dtype).eval()
    tokens = TOKENS[:, :8].to(device)
    found = model.generate(tokens, eos_id=None, max_new_tokens=8, cache=cache)
    logits = model(torch.cat([tokens, found], 1))[:, 7:-1].float()
    taken = logits.gather(2, found[..., None])[..., 0]
    assert (taken >= logits.amax(2) - 0.02).all()  # rounding may decide between two


def test_torch_doors(device, dtype):
    stock = nn.Transformer(64, 2, 1, 1, 128, dropout=0.0, batch_first=True)
    inputs = (torch.randn(2, 24, 64), torch.randn(2, 20, 64))
    right = _results(stock, inputs, "cpu", torch.float64)
    with fastattn.accelerate(stock):
        _assert_near(_results(stock, inputs, device, dtype), right, dtype)
    with torch_door.sdpa():
        _assert_near(_results(stock, inputs, device, dtype), right, dtype)


def test_flash_attn(device, dtype):
    q, k, v = torch.randn(3, 2, 24, 4, 32, dtype=torch.float64)
    right = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)
    out = flash_attn.flash_attn_func(*(x.to(device, dtype) for x in (q, k, v)), causal=True)
    _assert_near({"out": out}, {"out": right}, dtype)


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_transformers_door(name, device, dtype):
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations.transformers import use

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, attn_implementation="eager",
    )  # fmt: skip
    head = dict(Llama="ForCausalLM", Bert="ForMaskedLM")[name]
    model = getattr(transformers, name + head)(config).eval()
    right = _results(model, (TOKENS,), "cpu", torch.float64)
    with use(model), fastattn.accelerate(model):
        _assert_near(_results(model, (TOKENS,), device, dtype), right, dtype)


def test_training(device, dtype, tmp_path):
    pytest.importorskip("tokenizers")
    from fastattn.training import config
    from fastattn.training.trainer import Trainer

    rows = tmp_path / "rows.tsv"
    lines = ["the cat sat\tanimal", "the car ran\tthing", "a dog ran\tanimal", "a cup sat\tthing"]
    rows.write_text("\n".join(lines * 4) + "\n")
    run = Trainer(
        config.from_dict(
            dict(
                task="text-classification",
                data=dict(train=str(rows), held_out=str(rows)),
                tokenizer=dict(kind="characters"),
                model=SIZES,
                training=dict(
                    steps=40, batch=8, warmup=4, dtype=str(dtype)[6:], device=device, eval_every=20
                ),
            )
        ),
        tmp_path / "run",
    )
    assert run.run()["held_out_accuracy"] == 1.0
