"""Handwritten digits from the UCI repository (Alpaydin and Kaynak 1998), inside scikit-learn."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastattn.training.datasets import Dataset


def load(held_out: float = 0.2, seed: int = 0) -> Dataset:
    """For image classification: 1797 images ``(1, 8, 8)`` and their digit.

    Args:
        held_out: share of the images held out, the same of every digit.
        seed: of the choice of these.
    """
    data = load_digits()
    pixels = torch.from_numpy(data.images).float().div_(16)[:, None]
    labels = [str(label) for label in data.target]
    pairs = list(zip(pixels, labels))
    return Dataset(*train_test_split(pairs, test_size=held_out, random_state=seed, stratify=labels))
