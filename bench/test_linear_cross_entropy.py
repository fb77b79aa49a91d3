"""fastattn.linear_cross_entropy beside torch's pair; run it as a script for a table.

A step is the forward and the backward; the forward alone is without a gradient.
"""

import pytest
import torch
from interleave import medians
from torch.nn.functional import cross_entropy, linear

import fastattn

# rows, d_model, vocabulary
SHAPES = [
    (64, 256, 1000),
    (1024, 256, 8000),
    (512, 512, 32000),
    (2048, 512, 32000),
    (1024, 1024, 50257),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARIES = {
    "torch": lambda x, weight, targets: cross_entropy(linear(x, weight), targets),
    "fastattn": fastattn.linear_cross_entropy,
}


def forward(library, x, weight, targets):
    def call():
        with torch.no_grad():
            return LIBRARIES[library](x, weight, targets)

    return call


def step(library, x, weight, targets):
    leaves = [one.detach().requires_grad_() for one in (x, weight)]
    return lambda: torch.autograd.grad(LIBRARIES[library](*leaves, targets), leaves)


def draw(shape, dtype):
    rows, d_model, vocabulary = shape
    weight = torch.randn(vocabulary, d_model) / d_model**0.5
    x, targets = torch.randn(rows, d_model), torch.randint(vocabulary, (rows,))
    return x.to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", [forward, step], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear_cross_entropy(benchmark, shape, dtype, direction, library):
    benchmark.group = f"linear_cross_entropy {direction.__name__} {shape} {dtype}"
    benchmark(direction(library, *draw(shape, dtype)))


def main():
    print(f"{'case':50} {'torch ms':>9} {'ours ms':>9} {'ratio':>6} {'GFLOP/s':>8}")
    for dtype in DTYPES[:2]:
        for shape in SHAPES:
            tensors = draw(shape, dtype)
            for direction, products in ((forward, 1), (step, 3)):
                rivals = {name: direction(name, *tensors) for name in LIBRARIES}
                seconds = medians(rivals, rounds=7)
                rate = 2 * products * shape[0] * shape[1] * shape[2] / seconds["fastattn"]
                case = f"{direction.__name__} {shape} {dtype}"
                print(
                    f"{case:50} {seconds['torch'] * 1e3:9.2f} {seconds['fastattn'] * 1e3:9.2f} "
                    f"{seconds['torch'] / seconds['fastattn']:6.2f} {rate / 1e9:8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
