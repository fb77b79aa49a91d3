"""The backends, in the order in which `fastattn.dispatch` asks them."""

from fastattn.backends import cpu, reference, triton

BACKENDS = (cpu, triton, reference)
