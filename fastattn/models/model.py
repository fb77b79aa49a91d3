"""What the models share: they are made of a configuration, and can be counted."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn


class Model(nn.Module):
    """A model of `fastattn.models`.

    Args:
        config: sizes and options; default those of `fields`.
        fields: of the model's ``Config``, in place of the config's own.

    Raises:
        ValueError, TypeError: an option is out of range or `config` another model's; the message
            names it.
    """

    Config: ClassVar[Any]

    def __init__(self, config: Any = None, **fields: Any) -> None:
        super().__init__()
        if config is not None and not isinstance(config, self.Config):
            raise TypeError(f"config: expected {self.Config.__name__}, got {type(config).__name__}")
        self.config = self.Config(**fields) if config is None else replace(config, **fields)

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers; what is shared counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
