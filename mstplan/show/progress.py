"""A bar on the terminal for what takes a while: what is at work, how much is done, the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function that is told what is at work now ("": the same) and how many more of `total` are done. On stderr, if anyone is there to see it."""
    console = Console(stderr=True)
    words = TextColumn("{task.description}", markup=False)
    columns = (
        words,
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda words, done: bar.update(task, advance=done, description=words[:40] or None)
