"""The learning rate of each step."""

import math

from fastattn.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """That of step `step`, from 1 on: a rise from 0, then the schedule."""
    highest, lowest, warmup = config.learning_rate, config.min_learning_rate, config.warmup
    if step <= warmup:
        return highest * step / warmup
    if config.schedule == "inverse_sqrt":
        return max(highest * math.sqrt(max(warmup, 1) / step), lowest)
    if config.schedule == "constant":
        return highest
    done = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * done))
