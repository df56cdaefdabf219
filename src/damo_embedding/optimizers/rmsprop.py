# SPDX-License-Identifier: Apache-2.0
"""RMSprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import Optimizer
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _BELOW_ONE, _MAX_FLOAT, _MIN_FLOAT

__all__ = ["RMSprop"]


@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """RMSprop: each step is divided by the root of a running average of squared gradients.

    With `g` the gradient plus `weight_decay * w`:

        square_avg = alpha * square_avg + (1 - alpha) * g**2
        root       = sqrt(square_avg) + eps
        w -= lr * g / root
        centered:   grad_avg += (1 - alpha) * (g - grad_avg)
                    root      = sqrt(square_avg - grad_avg**2) + eps
        momentum:   momentum_buffer = momentum * momentum_buffer + g / root
                    w -= lr * momentum_buffer

    The formulas of `torch.optim.RMSprop` on the rows that have a gradient. Where the difference under the root
    is below 0 by rounding it is taken as 0; torch makes NaN of it.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        alpha: how much of the averages an update keeps, in [0, 1).
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).
        weight_decay: L2 penalty, at least 0, added to the gradient.
        momentum: how much of the buffer an update keeps, in [0, 1). 0: there is no buffer.
        centered: divide by the root of the variance instead.

    State: `square_avg`, 4 bytes a weight; centered `grad_avg` and with momentum `momentum_buffer`, 4 more each.
    So a group is opened again always with momentum or always without, and centered or not as before.

    Paper: Tieleman, Hinton: Lecture 6.5, Coursera 2012; centered: Graves: Generating sequences with recurrent
    neural networks, 2013.

    Example:
        >>> RMSprop(lr=0.001, centered=True)
        RMSprop(lr=0.001, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, centered=True)
    """

    name: ClassVar[str] = "rmsprop"
    lr: LearningRate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("alpha", 0.0, _BELOW_ONE)
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        self._take("momentum", 0.0, _BELOW_ONE)
        self._take_flag("centered")

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self._rate(),
            "alpha": self.alpha,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "centered": float(self.centered),
        }
