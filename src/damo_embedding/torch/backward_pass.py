# SPDX-License-Identifier: Apache-2.0
"""One backward pass: collects the gradients of all lookups it reaches and applies them once, when it ends.

Autograd runs a callback at the end of a pass, and only if the pass did not fail. That callback holds the
gradients and nothing else does: a pass that raises half-way takes them with it, so none is left for the next.

Activation checkpointing with use_reentrant=True runs a whole backward pass inside a node of another. What the
inner pass finds belongs to the outer one. Autograd does not tell the inner pass of the outer, but
checkpointing calls the modules again before it starts the inner pass, and at that moment the outer pass is
the one that runs: `join` is called there. (Who runs a backward pass inside another over a graph made before
both gets an update at the end of the inner pass.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from damo_embedding.torch.group import Group

if TYPE_CHECKING:
    from damo_embedding._core import Storage as Core
    from damo_embedding.torch.pending import Item

    Found = tuple[Group, Item]  # of one lookup
    Update = tuple[list[Item], float | None]  # of one group, at its own rate or the one given

_lock = threading.Lock()  # protects _passes, which has a pass by the number of its task in autograd
_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()
_thread = threading.local()  # .outermost: a weak reference to the pass this thread is in


class BackwardPass:
    """The outermost backward pass of a thread. Alive while it runs: autograd's callback is its only owner."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.over = False

    def finish(self) -> None:
        """The callback. An exception here comes out of the user's backward()."""
        self.over = True
        groups: dict[Group, list[Item]] = {}
        for group, item in self.found:
            groups.setdefault(group, []).append(item)
        apply({group: (items, None) for group, items in groups.items() if group.pending is None})
        for group, items in groups.items():
            if (pending := group.pending) is not None:
                pending.extend(items)


def apply(updates: Mapping[Group, Update]) -> None:
    """One update of each group: one call for each storage, which checks all of it before it changes any.

    What is applied leaves its `Pending`: where a second storage fails, a second try is of that one alone.
    """
    calls: dict[Core, list[tuple[Group, list[Item], float | None]]] = {}
    several = len({group.storage for group in updates}) > 1
    for group, (items, lr) in updates.items():
        if several:  # each storage would find its own only when others have their updates already
            batch, sums = group.table.merge(items)
            if not np.isfinite(sums).all():
                raise ValueError(
                    f'[apply_gradients] a gradient of group "{group.label}" is NaN or infinite: nothing was applied.'
                    " Look at the loss, or clip the gradients"
                )
            items = [(batch, sums)]
        calls.setdefault(group.storage._core, []).append((group, items, lr))
    for core, of_groups in calls.items():
        core.backward_many([(group.table, items, lr) for group, items, lr in of_groups])
        for group, _, _ in of_groups:
            if group.pending is not None:
                group.pending.clear()


def join() -> None:
    """Called by every training lookup: what starts inside a pass that runs now belongs to that pass."""
    if torch._C._current_graph_task_id() != -1:
        _running()


def collect(found: list[Found]) -> None:
    """Adds gradients to the running backward pass."""
    _running().found.extend(found)


def _running() -> BackwardPass:
    task = torch._C._current_graph_task_id()
    with _lock:
        # A pass that uses another device runs on several threads; its number finds it from each of them.
        for running in (_outermost(), _passes.get(task)):
            if running is not None and not running.over:
                break
        else:
            running = BackwardPass()
            torch.autograd.Variable._execution_engine.queue_callback(running.finish)
            _passes[task] = running
        _thread.outermost = weakref.ref(running)
        return running


def _outermost() -> BackwardPass | None:
    reference: weakref.ref[BackwardPass] | None = getattr(_thread, "outermost", None)
    return None if reference is None else reference()
