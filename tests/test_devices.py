"""Models, doors and training on each device of this machine; float64 on the CPU is what is right.

The other tests of them are on the CPU alone, and say much more.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import dispatch, models
from fastattn.integrations import flash_attn
from fastattn.integrations import torch as torch_door

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CASES = [(device, dtype) for device in DEVICES for dtype in (torch.float32, torch.bfloat16)]
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 4e-3}  # a GPU may compute float32 in TF32

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
    targets = torch.zeros(out.shape[:-1], dtype=torch.long, device=device)
    F.cross_entropy(out.flatten(0, -2), targets.flatten()).backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    return {"out": out, **grads}


@contextlib.contextmanager
def _by_kernels(device):
    """Calls in here, of which there must be some, are those of the device's own kernels."""
    with dispatch.recording() as choices:
        yield
    assert choices
    kernels = ("cuda", "triton") if device == "cuda" else ("cpu",)
    for choice in choices:
        assert choice.backend in kernels, choice.refusals


def _check(model, inputs, device, dtype, *doors):
    """Through the doors, errors are about those of plain PyTorch on the CPU in the same dtype."""
    with fastattn.use_backend("reference"):
        right = _results(model, inputs, "cpu", torch.float64)
        plain = _results(model, inputs, "cpu", dtype)
    with contextlib.ExitStack() as stack:
        for door in doors:
            stack.enter_context(door(model))
        with _by_kernels(device):
            found = _results(model, inputs, device, dtype)
    for name, exact in right.items():
        error, usual = (
            (each[name].detach().cpu().double() - exact.detach()).norm() for each in (found, plain)
        )
        assert error <= 2 * usual + ROUNDING[dtype] * exact.norm() + 1e-4, name


@pytest.mark.parametrize("name", MODELS)
def test_models(name, device, dtype):
    fields, inputs = MODELS[name]
    _check(models.build(name, **SIZES, **fields), inputs, device, dtype)


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_generation(cache, device, dtype):
    model = models.build("Decoder", **SIZES, **MODELS["Decoder"][0]).to(device, dtype).eval()
    tokens = TOKENS[:, :8].to(device)
    with _by_kernels(device):
        found = model.generate(tokens, eos_id=None, max_new_tokens=8, cache=cache)
    logits = model(torch.cat([tokens, found], 1))[:, 7:-1].float()
    taken = logits.gather(2, found[..., None])[..., 0]
    assert (taken >= logits.amax(2) - 0.02).all()  # rounding may decide between two


@pytest.mark.parametrize(
    "door", [fastattn.accelerate, lambda model: torch_door.sdpa()], ids=["accelerate", "sdpa"]
)
def test_torch_doors(door, device, dtype):
    stock = nn.Transformer(64, 2, 1, 1, 128, dropout=0.0, batch_first=True)
    _check(stock, (torch.randn(2, 24, 64), torch.randn(2, 20, 64)), device, dtype, door)


def test_flash_attn(device, dtype):
    q, k, v = torch.randn(3, 2, 24, 4, 32, dtype=torch.float64)

    def expected(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    with _by_kernels(device):
        out = flash_attn.flash_attn_func(*(x.to(device, dtype) for x in (q, k, v)), causal=True)
    right = expected(q, k, v)
    usual = (expected(*(x.to(dtype) for x in (q, k, v))) - right).norm()
    assert (out.cpu() - right).norm() <= 2 * usual + ROUNDING[dtype] * right.norm()


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
    _check(model, (TOKENS,), device, dtype, use, fastattn.accelerate)


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
