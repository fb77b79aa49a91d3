"""Opens and closes the door."""

import threading
from typing import Any

from fastattn.integrations.door import Door
from fastattn.integrations.transformers.attention import NAME, attention_forward, attention_mask

_lock = threading.Lock()
_opened: set[object] = set()


def register() -> Door:
    """Offer ``attn_implementation="fastattn"`` to transformers, for good or for a block.

    The attention function and the mask function go in together, and out together when the last
    door is closed, or by `unregister`.

    Raises:
        ModuleNotFoundError: transformers is missing.
        RuntimeError: transformers has another attention function of this name.
    """
    attention, masks = _interfaces()
    mine = object()
    with _lock:
        other = attention._global_mapping.get(NAME, attention_forward)
        if other is not attention_forward:
            raise RuntimeError(f"transformers already knows an attention {NAME!r}: {other!r}")
        _opened.add(mine)
        attention.register(NAME, attention_forward)
        masks.register(NAME, attention_mask)
    return Door(lambda: _close(mine))


def unregister() -> None:
    """Take it out of transformers again, however often it was registered."""
    with _lock:
        _opened.clear()
        _remove()


def _close(mine: object) -> None:
    with _lock:
        if mine in _opened:
            _opened.remove(mine)
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
        ValueError: it computes its attention itself, as BERT and T5 of transformers 4.57 do.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    registered = register()
    before = {name: part.config._attn_implementation for name, part in _parts(model).items()}
    try:
        model.set_attn_implementation(NAME)
        if not any(part.config._attn_implementation == NAME for part in _parts(model).values()):
            raise ValueError(
                f"model: {type(model).__name__} does not call transformers' attention interface"
            )
    except BaseException:
        registered.close()
        raise

    def close() -> None:
        for name, part in _parts(model).items():
            if name in before:
                part.config._attn_implementation = before[name]
        registered.close()

    return Door(close)


def _parts(model: Any) -> dict[str, Any]:
    """The models of transformers in `model`, itself included, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if hasattr(part, "set_attn_implementation")
    }


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this door needs transformers: pip install 'fastattn[transformers]'", name=error.name
        ) from error
    return AttentionInterface, AttentionMaskInterface
