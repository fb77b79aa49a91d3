"""How far the resident set grows in one training step, beyond the inputs and the gradients.

Each library runs in a process of its own, in which the kernel keeps the peak. It is set back when
the inputs are there and a small step has loaded all code; the gradients, which the step returns,
are taken off. So the scratch memory of native code counts, which torch's profiler does not see.
Linux only.
"""

import subprocess
import sys
from pathlib import Path

import test_linear_cross_entropy
import torch

LIBRARIES = tuple(test_linear_cross_entropy.LIBRARIES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peaks(shape, dtype, threads):
    """Bytes of a step of linear_cross_entropy by library."""
    arguments = [str(threads), dtype, *map(str, shape)]
    return {
        library: int(
            subprocess.run(
                [sys.executable, __file__, library, *arguments],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
        )
        for library in LIBRARIES
    }


def resident(field):
    """Bytes of a line of the process's status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main(library, threads, dtype, *shape):
    torch.set_num_threads(int(threads))

    def step(*sizes):
        tensors = test_linear_cross_entropy.draw(sizes, DTYPES[dtype])
        return test_linear_cross_entropy.step(library, *tensors)

    step(8, 16, 32)()
    large = step(*map(int, shape))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    gradients = large()
    print(resident("VmHWM") - before - sum(gradient.nbytes for gradient in gradients))


if __name__ == "__main__":
    main(*sys.argv[1:])
