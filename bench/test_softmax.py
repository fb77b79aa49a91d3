"""fastattn.softmax beside torch.softmax; `python bench/test_softmax.py` prints them interleaved."""

import pytest
import torch
from interleave import medians

import fastattn

SHAPES = [(64, 128), (4096, 128), (1024, 512), (4096, 512), (4096, 4096), (512, 32000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARIES = {"torch": torch.softmax, "fastattn": lambda x, dim: fastattn.softmax(x)}


def forward(library, x):
    return lambda: LIBRARIES[library](x, -1)


def backward(library, x):
    x = x.detach().requires_grad_()
    y = LIBRARIES[library](x, -1)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_softmax(benchmark, shape, dtype, direction, library):
    benchmark.group = f"softmax {direction.__name__} {shape} {dtype}"
    benchmark(direction(library, torch.randn(shape).to(dtype)))


def main():
    print(f"{'case':44} {'torch us':>9} {'ours us':>9} {'ratio':>6} {'GB/s':>6} {'of copy':>7}")
    for dtype in DTYPES:
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype)
            for direction, tensors in ((forward, 2), (backward, 3)):
                rivals = {name: direction(name, x) for name in LIBRARIES}
                seconds = medians(rivals | {"copy": x.clone})
                ours = seconds["fastattn"]
                rate = tensors * x.numel() * x.element_size() / ours
                copy = 2 * x.numel() * x.element_size() / seconds["copy"]
                case = f"{direction.__name__} {shape} {dtype}"
                print(
                    f"{case:44} {seconds['torch'] * 1e6:9.1f} {ours * 1e6:9.1f} "
                    f"{seconds['torch'] / ours:6.2f} {rate / 1e9:6.1f} {rate / copy:7.0%}"
                )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
