"""Chooses the backend of a call: the first of ``BACKENDS`` that has no refusal."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from fastattn.backends import BACKENDS

_NAMES = tuple(backend.NAME for backend in BACKENDS)


class BackendError(RuntimeError):
    """The backend that the caller asked for cannot run this call."""


class Choice(NamedTuple):
    """How one call was dispatched: its problem, the backend, and what the others refused."""

    problem: Any
    backend: str | None
    refusals: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.problem.op}: {self.backend or 'no backend'}"]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.refusals.items()]
        return "\n".join(lines)


def _known(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(_NAMES)}, got {name!r}")
    return name


_from_environment = os.environ.get("FASTATTN_BACKEND") or None
if _from_environment is not None:
    _known(_from_environment, "FASTATTN_BACKEND")
_forced: ContextVar[str | None] = ContextVar("fastattn_backend", default=_from_environment)
_recording: ContextVar[list[Choice] | None] = ContextVar("fastattn_recording", default=None)
_selected: dict[tuple[str | None, Any], ModuleType] = {}
_SELECTED_LIMIT = 4096


def forced_backend() -> str | None:
    """Name of the backend that `use_backend` or ``FASTATTN_BACKEND`` forces, or None."""
    return _forced.get()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for the calls in the ``with`` block; None returns to the automatic choice.

    A forced backend never falls back: a call that it cannot run raises `BackendError` with
    its reasons. The backward of a call runs on the backend that was forced for its forward.
    """
    token = _forced.set(None if name is None else _known(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def backward_backend(forced: str | None) -> AbstractContextManager[None]:
    """The context in which a backward runs whose forward ran with `forced` in force."""
    return nullcontext() if forced is None else use_backend(forced)


def select(problem: Any) -> ModuleType:
    """The backend module that runs `problem`; raises `BackendError` if none may."""
    forced = _forced.get()
    key = (forced, problem)
    backend = _selected.get(key)
    if backend is not None and _recording.get() is None:
        return backend
    refusals: dict[str, list[str]] = {}
    backend = None
    for candidate in BACKENDS:
        reasons = candidate.unsupported(problem)
        if reasons:
            refusals[candidate.NAME] = reasons
        elif backend is None and forced in (None, candidate.NAME):
            backend = candidate
    recording = _recording.get()
    if recording is not None:
        recording.append(Choice(problem, backend.NAME if backend else None, refusals))
    if backend is None:
        asked = {forced: refusals[forced]} if forced else refusals
        reasons_text = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in asked.items())
        raise BackendError(f"{problem.op} cannot run on {forced or 'any backend'}:\n{reasons_text}")
    if len(_selected) >= _SELECTED_LIMIT:
        _selected.clear()
    _selected[key] = backend
    return backend


class Explanation(list[Choice]):
    """The `Choice` of every call that `explain` saw; prints as a report."""

    def __str__(self) -> str:
        """One line a choice, and under it each refusal; equal choices are counted."""
        counts: dict[str, int] = {}
        for choice in self:
            counts[str(choice)] = counts.get(str(choice), 0) + 1
        if not counts:
            return "no fastattn call was made"
        return "\n".join(
            text if n == 1 else text.replace(":", f" ({n} calls):", 1) for text, n in counts.items()
        )


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """The `Choice` of every fastattn call in the ``with`` block, as they are made.

    A call that no backend may run (one was forced, say) ends the block, and is not raised.
    """
    seen: list[Choice] = []
    token = _recording.set(seen)
    try:
        yield seen
    except BackendError:
        if not seen or seen[-1].backend is not None:
            raise
    finally:
        _recording.reset(token)
