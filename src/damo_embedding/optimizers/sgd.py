# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import _MAX_FLOAT, Optimizer

__all__ = ["SGD"]


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: `w -= lr * (g + weight_decay * w)`.

    The formula of `torch.optim.SGD` without momentum. `weight_decay` acts when a row is updated, not between.

    Args:
        lr: learning rate, at least 0.
        weight_decay: L2 penalty, at least 0, added to the gradient.

    State: none, 0 bytes a row.

    Example:
        >>> SGD(lr=0.1)
        SGD(lr=0.1, weight_decay=0.0)
    """

    name: ClassVar[str] = "sgd"
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {"lr": self.lr, "weight_decay": self.weight_decay}
