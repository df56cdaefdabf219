# SPDX-License-Identifier: Apache-2.0
"""Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import Optimizer, _beta_pair
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _MAX_FLOAT

__all__ = ["Lion"]


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion: every weight moves by `lr`, in the direction of the sign of momentum and gradient mixed.

        w      -= lr * (sign(beta1 * exp_avg + (1 - beta1) * g) + weight_decay * w)
        exp_avg = beta2 * exp_avg + (1 - beta2) * g

    The sign of 0 is 0. Steps are as long as the rate, whatever the gradient: take a third to a tenth of what
    AdamW would get, and as many times its weight decay. A row decays when it is updated, not between.

    Args:
        lr: learning rate, above 0: how far a weight moves in an update; or a schedule, or a function of the
            group's step.
        betas: how much of `exp_avg` the direction takes, and how much of it an update keeps, each in [0, 1).
        weight_decay: what an update takes of each weight, times lr; at least 0.

    Defaults are those of the authors' own code. State: `exp_avg`, 4 bytes a weight.

    Paper: Chen et al.: Symbolic discovery of optimization algorithms, NeurIPS 2023.

    Example:
        >>> Lion(lr=3e-4)
        Lion(lr=0.0003, betas=(0.9, 0.99), weight_decay=0.0)
    """

    name: ClassVar[str] = "lion"
    lr: LearningRate = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._take_lr()
        object.__setattr__(self, "betas", _beta_pair("Lion", self.betas))
        self._take("weight_decay", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self._rate(),
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "weight_decay": self.weight_decay,
        }
