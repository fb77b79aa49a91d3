"""The backends, in the order in which `fastattn.dispatch` asks them."""

from fastattn.backends import cpu, cuda, reference, triton

BACKENDS = (cpu, cuda, triton, reference)
