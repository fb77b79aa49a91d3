"""Real English text that every Python brings along: its language reference."""

import random
from pydoc_data.topics import topics

from fastattn.training.datasets import Dataset


def load(held_out: float = 0.1, seed: int = 0) -> Dataset:
    """For language modeling: its chapters, each once though it may have several names.

    Args:
        held_out: share of the text held out, in whole chapters.
        seed: of the choice of these.
    """
    texts = sorted(set(topics.values()))
    random.Random(seed).shuffle(texts)
    goal = held_out * sum(map(len, texts))
    count = total = 0
    while total < goal:
        total += len(texts[count])
        count += 1
    return Dataset(texts[count:], texts[:count])
