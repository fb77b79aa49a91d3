"""The kernels' own tests need Triton."""

import contextlib
import importlib.util

import pytest
import torch

import fastattn

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture
def triton():
    """Forces the Triton backend, new tensors on the GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda") if on_gpu else contextlib.nullcontext()
    with device, fastattn.use_backend("triton"):
        yield
