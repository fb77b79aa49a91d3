"""Layers are tested at tiny sizes, where threads only cost time."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Of every test here."""
