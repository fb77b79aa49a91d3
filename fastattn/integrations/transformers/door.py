"""Opens and closes the door."""

import threading
from typing import Any

from fastattn.integrations.torch import Door
from fastattn.integrations.transformers.attention import NAME, attention_forward, attention_mask

_lock = threading.Lock()
_opened = 0


def register() -> Door:
    """Offer ``attn_implementation="fastattn"`` to transformers, for good or for a block.

    The attention function and the mask function go in together, and out together when the last
    door is closed, or by `unregister`.

    Raises:
        ModuleNotFoundError: transformers is missing.
    """
    global _opened
    attention, masks = _interfaces()
    with _lock:
        _opened += 1
        attention.register(NAME, attention_forward)
        masks.register(NAME, attention_mask)
    return Door(_close)


def unregister() -> None:
    """Take it out of transformers again, however often it was registered."""
    global _opened
    with _lock:
        _opened = 0
        _remove()


def _close() -> None:
    global _opened
    with _lock:
        _opened = max(_opened - 1, 0)
        if not _opened:
            _remove()


def _remove() -> None:
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)


def use(model: Any) -> Door:
    """Run a model of transformers on fastattn's attention, until the door is closed.

    Raises:
        ModuleNotFoundError: transformers is missing.
        TypeError: `model` is not one of its models.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    registered = register()
    before = {
        name: part.config._attn_implementation
        for name, part in model.named_modules()
        if hasattr(part, "set_attn_implementation")
    }
    try:
        model.set_attn_implementation(NAME)
    except BaseException:
        registered.close()
        raise

    def close() -> None:
        for name, part in model.named_modules():
            if name in before:
                part.config._attn_implementation = before[name]
        registered.close()

    return Door(close)


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this door needs transformers: pip install 'fastattn[transformers]'", name=error.name
        ) from error
    return AttentionInterface, AttentionMaskInterface
