# SPDX-License-Identifier: Apache-2.0
"""FTRL-Proximal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import Optimizer
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _MAX_FLOAT

__all__ = ["FTRL"]


@dataclass(frozen=True, kw_only=True)
class FTRL(Optimizer):
    """FTRL-Proximal: a rate for each weight, and an L1 penalty that makes weights exactly 0.

        sigma = (sqrt(n + g**2) - sqrt(n)) / lr
        z    += g - sigma * w
        n    += g**2
        w     = 0                                                             if abs(z) <= lambda1
                -(z - sign(z) * lambda1) / ((beta + sqrt(n)) / lr + lambda2)  else

    With both penalties 0 and first weights 0 it is gradient descent at the rate lr / (beta + sqrt(n)). w follows
    from z and n alone, which start from 0: the first gradient of a weight other than 0 draws it towards 0, to
    abs(g) / (beta + abs(g)) of itself, before the step. Give it `Zeros()`, or beta=0, under which it is drawn
    nowhere. A weight whose gradients were all 0 stays what it is.

    Args:
        lr: learning rate, the paper's alpha, above 0. It is part of what w follows from: a lower rate later
            shrinks w at its next update, so prefer a constant one. An update at rate 0 changes nothing.
        beta: keeps the rate of the first updates down, at least 0.
        lambda1: L1 penalty, at least 0.
        lambda2: L2 penalty, at least 0.

    The paper takes beta=1 and has no default of lr, which depends on the data. State: `z` and `n`, 8 bytes a
    weight.

    Paper: McMahan et al.: Ad click prediction: a view from the trenches, KDD 2013, algorithm 1.

    Example:
        >>> FTRL(lr=0.1, lambda1=1.0)
        FTRL(lr=0.1, beta=1.0, lambda1=1.0, lambda2=0.0)
    """

    name: ClassVar[str] = "ftrl"
    lr: LearningRate = 5e-3
    beta: float = 1.0
    lambda1: float = 0.0
    lambda2: float = 0.0

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("beta", 0.0, _MAX_FLOAT)
        self._take("lambda1", 0.0, _MAX_FLOAT)
        self._take("lambda2", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {"lr": self._rate(), "beta": self.beta, "lambda1": self.lambda1, "lambda2": self.lambda2}
