# SPDX-License-Identifier: Apache-2.0
"""Gradients that wait for SparseOptimizer.step()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from damo_embedding._core import Batch
    from damo_embedding.torch.group import Group

    # The batch of a lookup and its gradients, float32 [positions, dimension].
    Item = tuple[Batch, object]


class Pending:
    """What the backward passes since the last step owe one group's rows.

    Gradients are kept as the backward passes gave them and summed by the core in the step. Only who wants to
    see or change them (GradScaler, clip_grad_norm_) has them summed before: see `sums`.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.items: list[Item] = []
        self._sums: torch.Tensor | None = None  # of items[0], when it is the only one

    def extend(self, items: list[Item]) -> None:
        self.items.extend(items)
        self._sums = None

    def clear(self) -> None:
        self.items.clear()
        self._sums = None

    def sums(self) -> torch.Tensor | None:
        """One row for each distinct key, [keys, dimension]. The step applies what is in it by then."""
        if self._sums is None and self.items:
            batch, sums = self.group.table.merge(self.items)
            self.items = [(batch, sums)]
            self._sums = torch.from_numpy(sums)
        return self._sums


class RowGradients(torch.Tensor):
    """Stands for a group's rows in `SparseOptimizer.param_groups`.

    It has no elements (the rows are in the storage), but its `grad` is real: what torch's tools read and
    write there, such as `torch.amp.GradScaler` and `torch.nn.utils.clip_grad_norm_`, is the gradient the step
    applies.
    """

    pending: Pending

    @staticmethod
    def of(pending: Pending) -> RowGradients:
        empty = torch.empty(0, pending.group.dimension, dtype=torch.float32, device="cpu")
        gradients: RowGradients = torch.Tensor._make_subclass(RowGradients, empty)
        gradients.pending = pending
        return gradients

    @property
    def grad(self) -> torch.Tensor | None:
        return self.pending.sums()

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None:
            self.pending.clear()
            return
        sums = self.pending.sums()
        if sums is None or value.shape != sums.shape:
            expected = "None, for there is no gradient to replace" if sums is None else str(tuple(sums.shape))
            raise ValueError(f"[grad] the new gradient has shape {tuple(value.shape)}, expected {expected}")
        sums.copy_(value)
