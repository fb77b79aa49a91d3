"""Softmax (the module) under torch.nn's interface."""

import torch
from torch import Tensor

from fastattn.ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on `fastattn.softmax`.

    A row of -inf alone gives 0, where torch gives NaN. `dim` is best the last one: another is
    moved there and back.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Softmax over `dim` of a floating tensor of any shape, in its dtype."""
        if self.dim is None:
            return super().forward(input)
        if self.dim in (-1, input.dim() - 1):
            return softmax(input)
        return softmax(input.movedim(self.dim, -1)).movedim(-1, self.dim)
