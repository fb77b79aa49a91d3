"""An open door, and how it is closed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class Door(AbstractContextManager["Door"]):
    """An open door; `close` it, or leave the ``with`` block."""

    def __init__(self, close: Callable[[], None]) -> None:
        self._close: Callable[[], None] | None = close

    def close(self) -> None:
        """Take fastattn out again; a second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
