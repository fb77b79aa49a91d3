"""CPU backend: the hand-written SIMD kernels of the native module ``fastattn._C``."""

NAME = "cpu"


def unsupported(problem) -> list[str]:
    """Every reason why this backend cannot run `problem`; empty if it can."""
    return ["not built yet"]
