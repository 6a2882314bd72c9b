"""How long work tells of itself: whoever starts it gives a way to show it, such as show/progress.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[str, int], object]
"""Told what is at work now ("": the same) and how much more is done."""
Showing = Callable[[str, int], AbstractContextManager[Advance]]
"""Of a kind of work, and how much of it there is."""


@contextmanager
def show_nothing(_what: str, _total: int) -> Iterator[Advance]:
    yield lambda _words, _steps: None
