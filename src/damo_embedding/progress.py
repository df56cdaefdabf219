# SPDX-License-Identifier: Apache-2.0
"""How a long call tells how far it is: a function of two numbers, or a progress bar such as tqdm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Bar", "Progress", "reporting"]


class Bar(Protocol):
    """What a bar must have; tqdm's have it."""

    def reset(self, total: int) -> object:
        """Begins, with so much to do."""

    def update(self, n: int) -> object:
        """So much more is done."""


# A class is made into a bar without arguments, and that bar is closed at the end: `progress=tqdm`.
Progress = Callable[[int, int], object] | Bar | type[Any]


@contextmanager
def reporting(operation: str, progress: Progress | None) -> Iterator[Callable[[int, int], object] | None]:
    """`progress` as a function of (done, total), for as long as `operation` goes on."""
    bar: Any = progress
    if not (hasattr(bar, "reset") and hasattr(bar, "update")):
        if progress is not None and (isinstance(progress, type) or not callable(progress)):
            raise TypeError(
                f"[{operation}] progress is {progress!r}, expected a function of (done, total), or a progress bar such"
                " as tqdm"
            )
        yield bar
        return
    if isinstance(progress, type):
        bar = progress()
    before = -1

    def report(done: int, total: int) -> None:
        nonlocal before
        if before < 0:
            bar.reset(total=total)
            before = 0
        bar.update(done - before)
        before = done

    try:
        yield report
    finally:
        if bar is not progress:
            bar.close()
