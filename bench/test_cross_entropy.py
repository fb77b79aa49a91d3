"""fastattn.cross_entropy beside torch's; `python bench/test_cross_entropy.py` prints a table."""

import pytest
import torch
from interleave import medians

import fastattn

SHAPES = [(64, 128), (4096, 128), (4096, 512), (2048, 4096), (512, 32000), (256, 128256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARIES = {"torch": torch.nn.functional.cross_entropy, "fastattn": fastattn.cross_entropy}


def forward(library, x, targets):
    return lambda: LIBRARIES[library](x, targets)


def backward(library, x, targets):
    x = x.detach().requires_grad_()
    loss = LIBRARIES[library](x, targets)
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)


def training(library, x, targets):
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(LIBRARIES[library](x, targets), x)


DIRECTIONS = [forward, backward, training]


def draw(shape, dtype):
    return torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_cross_entropy(benchmark, shape, dtype, direction, library):
    benchmark.group = f"cross_entropy {direction.__name__} {shape} {dtype}"
    benchmark(direction(library, *draw(shape, dtype)))


def main():
    print(f"{'case':44} {'torch us':>9} {'ours us':>9} {'ratio':>6} {'GB/s':>6} {'of copy':>7}")
    for dtype in DTYPES:
        for shape in SHAPES:
            x, targets = draw(shape, dtype)
            for direction, passes in zip(DIRECTIONS, (1, 2, 3), strict=True):
                rivals = {name: direction(name, x, targets) for name in LIBRARIES}
                seconds = medians(rivals | {"copy": x.clone})
                ours = seconds["fastattn"]
                rate = passes * x.numel() * x.element_size() / ours
                copy = 2 * x.numel() * x.element_size() / seconds["copy"]
                case = f"{direction.__name__} {shape} {dtype}"
                print(
                    f"{case:44} {seconds['torch'] * 1e6:9.1f} {ours * 1e6:9.1f} "
                    f"{seconds['torch'] / ours:6.2f} {rate / 1e9:6.1f} {rate / copy:7.0%}"
                )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
