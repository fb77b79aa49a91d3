"""Hugging Face's models with their own sdpa attention and with fastattn under them.

Run with ``pytest bench/test_transformers.py``; rows of a group compare. Weights are random: time
does not depend on them.
"""

import contextlib

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")
from fastattn.integrations.transformers import use  # noqa: E402

VOCAB_SIZE = 1000
SIZES = {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8}
HIDDEN = {"intermediate_size": 2048, "vocab_size": VOCAB_SIZE}
ROWS = {"num_key_value_heads": 2, "max_position_embeddings": 4096}


def llama():
    config = transformers.LlamaConfig(**SIZES, **HIDDEN, **ROWS)
    return transformers.LlamaForCausalLM(config), torch.randint(3, VOCAB_SIZE, (2, 512))


def mistral():
    """Of 2048 tokens each sees 256."""
    config = transformers.MistralConfig(**SIZES, **HIDDEN, **ROWS, sliding_window=256)
    return transformers.MistralForCausalLM(config), torch.randint(3, VOCAB_SIZE, (1, 2048))


def bert():
    config = transformers.BertConfig(**SIZES, **HIDDEN)
    return transformers.BertForMaskedLM(config), torch.randint(3, VOCAB_SIZE, (8, 128))


CASES = {"llama": llama, "mistral": mistral, "bert": bert}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["torch", "fastattn"])
def library(request):
    return request.param


@contextlib.contextmanager
def built(case, library, dtype):
    """The model and its arguments, with fastattn under it or not."""
    torch.manual_seed(0)
    model, tokens = CASES[case]()
    model.to(dtype)
    # The second half of the last row is padding.
    mask = torch.ones_like(tokens)
    if len(mask) > 1:
        mask[-1, mask.shape[1] // 2 :] = 0
    arguments = {"input_ids": tokens, "attention_mask": mask}
    with contextlib.ExitStack() as doors:
        if library == "fastattn":
            doors.enter_context(use(model))
            doors.enter_context(fastattn.accelerate(model))
        yield model, arguments


@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, case, dtype, library):
    benchmark.group = f"forward {case} {dtype}"
    with built(case, library, dtype) as (model, arguments), torch.no_grad():
        model.eval()
        benchmark.pedantic(model, kwargs=arguments, warmup_rounds=1, rounds=5)


@pytest.mark.parametrize("case", CASES)
def test_training_step(benchmark, case, dtype, library):
    benchmark.group = f"training step {case} {dtype}"
    with built(case, library, dtype) as (model, arguments):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

        def step():
            loss = model(**arguments, labels=arguments["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        benchmark.pedantic(step, warmup_rounds=1, rounds=3)


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_greedy(benchmark, case, dtype, library):
    benchmark.group = f"greedy, 32 tokens {case} {dtype}"
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    with built(case, library, dtype) as (model, arguments):
        model.eval()
        # Generation wants its padding on the left.
        arguments = {name: value.flip(1) for name, value in arguments.items()}
        benchmark.pedantic(model.generate, kwargs=arguments | options, warmup_rounds=1, rounds=3)
