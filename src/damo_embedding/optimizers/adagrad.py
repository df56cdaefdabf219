# SPDX-License-Identifier: Apache-2.0
"""Adagrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import _MAX_FLOAT, _MIN_FLOAT, Optimizer

__all__ = ["Adagrad"]


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad: `sum += g**2; w -= lr * g / (sqrt(sum) + eps)`, with `g` the gradient plus `weight_decay * w`.

    The formula of `torch.optim.Adagrad` without `lr_decay`. A weight's rate falls with the gradients it has
    seen, so a rare row goes on taking large steps.

    Args:
        lr: learning rate, at least 0.
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).
        weight_decay: L2 penalty, at least 0, added to the gradient.
        initial_accumulator_value: what `sum` starts from, at least 0.

    State: `sum`, 4 bytes a weight.

    Paper: Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization,
    JMLR 2011.

    Example:
        >>> Adagrad(lr=0.05)
        Adagrad(lr=0.05, eps=1e-10, weight_decay=0.0, initial_accumulator_value=0.0)
    """

    name: ClassVar[str] = "adagrad"
    lr: float = 1e-2
    eps: float = 1e-10
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        self._take("initial_accumulator_value", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self.lr,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "initial_accumulator_value": self.initial_accumulator_value,
        }
