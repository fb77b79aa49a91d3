"""fastattn's Triton kernels: one file an op, and what they share.

A kernel file reads top to bottom: configurations, helpers, kernels, launchers. Launchers take
tensors, results included, and know nothing of the package; ``fastattn/backends/triton`` calls them.
"""
