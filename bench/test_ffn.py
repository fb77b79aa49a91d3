"""fastattn.ffn and gated_ffn beside torch; `python bench/test_ffn.py` prints them interleaved."""

import pytest
import torch
import torch.nn.functional as F
from interleave import medians

import fastattn

# rows, d_model, d_ff
SIZES = [(1, 512, 2048), (32, 512, 2048), (512, 256, 1024), (512, 512, 2048), (1024, 1024, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torch_ffn(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fastattn_ffn(x, w1, b1, w2, b2):
    return fastattn.ffn(x, w1, b1, w2, b2, activation="gelu")


def torch_gated(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


LIBRARIES = {
    "plain": {"torch": torch_ffn, "fastattn": fastattn_ffn},
    "gated": {"torch": torch_gated, "fastattn": fastattn.gated_ffn},
}


def tensors(form, size, dtype):
    rows, d_model, d_ff = size
    shapes = {
        "plain": [(rows, d_model), (d_ff, d_model), (d_ff,), (d_model, d_ff), (d_model,)],
        "gated": [(rows, d_model), (d_ff, d_model), (d_ff, d_model), (d_model, d_ff)],
    }[form]
    return [(torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for shape in shapes]


def forward(call, args):
    def run():
        with torch.no_grad():
            return call(*args)

    return run


def training(call, args):
    args = [arg.detach().requires_grad_() for arg in args]
    y = call(*args)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(call(*args), args, dy)


@pytest.mark.parametrize("library", ["torch", "fastattn"])
@pytest.mark.parametrize("direction", [forward, training], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_ffn(benchmark, size, dtype, form, direction, library):
    benchmark.group = f"ffn {form} {direction.__name__} {size} {dtype}"
    benchmark(direction(LIBRARIES[form][library], tensors(form, size, dtype)))


def main():
    print(f"{'case':52} {'torch ms':>9} {'ours ms':>9} {'ratio':>6} {'GFLOP/s':>8} {'GB/s':>6}")
    for dtype in DTYPES:
        for form, size in [(form, size) for form in LIBRARIES for size in SIZES]:
            rows, d_model, d_ff = size
            if dtype == torch.float16 and rows > 32:
                continue
            weights = (2 if form == "plain" else 3) * d_model * d_ff
            for direction, passes in ((forward, 1), (training, 3)):
                args = tensors(form, size, dtype)
                rivals = {n: direction(call, args) for n, call in LIBRARIES[form].items()}
                seconds = medians(rivals, rounds=9)
                ours = seconds["fastattn"]
                case = f"{form} {direction.__name__} {size} {dtype}"
                print(
                    f"{case:52} {seconds['torch'] * 1e3:9.3f} {ours * 1e3:9.3f} "
                    f"{seconds['torch'] / ours:6.2f} "
                    f"{2 * passes * rows * weights / ours / 1e9:8.1f} "
                    f"{passes * weights * args[0].element_size() / ours / 1e9:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
