# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent, with momentum or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import Optimizer
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _BELOW_ONE, _MAX_FLOAT

__all__ = ["SGD"]


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: `w -= lr * g`, with `g` the gradient plus `weight_decay * w`.

    With `momentum` the step is taken along a buffer of past gradients:

        momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g    (a row's first update: undampened)
        w -= lr * momentum_buffer                       (nesterov: lr * (g + momentum * momentum_buffer))

    The formulas of `torch.optim.SGD`, on the rows that have a gradient: neither weight decay nor momentum moves
    a row between its updates. torch's momentum does, for rows it has seen.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        momentum: how much of the buffer an update keeps, in [0, 1). 0: there is no buffer.
        dampening: what a gradient's share in the buffer lacks of 1, in [0, 1]. Above 0 it needs momentum.
        weight_decay: L2 penalty, at least 0, added to the gradient.
        nesterov: Nesterov's momentum. It needs momentum, and dampening 0.

    State: none, 0 bytes a row; with momentum `momentum_buffer`, 4 bytes a weight. So a group is opened again
    either always with momentum or always without.

    Paper: Robbins, Monro: A stochastic approximation method, Annals of Mathematical Statistics 1951; the form of
    momentum: Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep
    learning, ICML 2013.

    Example:
        >>> SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)
    """

    name: ClassVar[str] = "sgd"
    lr: LearningRate = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("momentum", 0.0, _BELOW_ONE)
        self._take("dampening", 0.0, 1.0)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        self._take_flag("nesterov")
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError(
                f"[SGD] nesterov is True with momentum {self.momentum} and dampening {self.dampening}, expected "
                "momentum above 0 and dampening 0"
            )
        if self.dampening != 0.0 and self.momentum == 0.0:
            raise ValueError(f"[SGD] dampening is {self.dampening} with momentum 0, expected momentum above 0")

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self._rate(),
            "momentum": self.momentum,
            "dampening": self.dampening,
            "weight_decay": self.weight_decay,
            "nesterov": float(self.nesterov),
        }
