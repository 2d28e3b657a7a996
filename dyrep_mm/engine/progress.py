"""Progress of long work, on a terminal and of the first rank alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from mmengine.dist import is_main_process

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar('Item')

#: What is on the terminal now.
_shown: list[Progress] = []


@contextmanager
def _display() -> Iterator[Progress | None]:
    """The present display, else a new one; None where nobody looks at one."""
    if _shown:
        yield _shown[-1]
        return
    if not sys.stderr.isatty() or not is_main_process():
        yield None
        return
    from rich.console import Console  # here: few processes need it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn()
    display = Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        # What is printed stays above it; a file or a pipe still gets it.
        redirect_stdout=sys.stdout.isatty(),
    )
    with display:
        _shown.append(display)
        try:
            yield display
        finally:
            _shown.remove(display)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """``items``, with a bar that goes away at their end.

    Args:
        items: Each is a step of the work.
        description: Of the work.
        total: How many items there are at most; by default their length, if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with _display() as display:
        if display is None:
            yield from items
            return
        task = display.add_task(description, total=total)
        try:
            for item in items:
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)


@contextmanager
def stages(description: str, total: int) -> Iterator[None]:
    """A bar for work of ``total`` stages, each of which calls :func:`stage` at its begin."""
    with _display() as display:
        if display is None:
            yield
            return
        task = display.add_task(description, total=total)
        try:
            yield
        finally:
            display.remove_task(task)


def stage(description: str) -> None:
    """The next of the :func:`stages` begins; nothing happens outside of them."""
    for display in _shown:
        for task in display.tasks[:1]:
            # The first stage has nothing complete before it.
            done = task.completed + bool(task.fields.get('begun'))
            display.update(
                task.id, description=description, completed=done, begun=True, refresh=True
            )
