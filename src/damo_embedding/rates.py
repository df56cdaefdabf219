# SPDX-License-Identifier: Apache-2.0
"""Where the groups of an open storage take their learning rates from."""

from __future__ import annotations

import threading

from damo_embedding import _core
from damo_embedding.schedules import LearningRate, _describe

__all__ = ["Rates"]


class Rates:
    """The rate of each group: what it was opened with, and what it follows now.

    A storage has one, and so keeps the functions among them: the core's own reference to a function cannot be
    seen by Python's collector, which would then never collect a function that knows its storage.
    """

    def __init__(self) -> None:
        # Nothing is called while it is held: not the caller's functions, and not what waits for an operation. But
        # the collector may run anywhere, and the end of what it collects may come back here.
        self._lock = threading.RLock()
        self._opened: dict[int, LearningRate] = {}  # by table id, which no other table ever has
        self._followed: dict[int, tuple[LearningRate, _core.Rate]] = {}

    def open(self, table: _core.Table, lr: LearningRate) -> LearningRate:
        """The group's first opening sets its rate. Returns the rate it was first opened with."""
        entry = lr, _core.Rate(_describe(lr))
        with self._lock:
            known = self._opened.setdefault(table.table_id, lr)
            if table.table_id not in self._followed:
                table.set_rate(entry[1])
                self._followed[table.table_id] = entry
        return known

    def follow(self, table: _core.Table, lr: LearningRate) -> None:
        """The rate of the next updates of a group that is open."""
        entry = lr, _core.Rate(_describe(lr))
        with self._lock:
            # Named, so that it goes when the lock is free again: the end of a function is the caller's code, too.
            before = self._followed[table.table_id]
            table.set_rate(entry[1])
            self._followed[table.table_id] = entry
        del before

    def followed(self, table: _core.Table) -> LearningRate:
        return self._followed[table.table_id][0]
