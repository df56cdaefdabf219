# SPDX-License-Identifier: Apache-2.0
"""What the optimizers have in common, and the checks of their numbers."""

from __future__ import annotations

from typing import cast

import numpy as np

from damo_embedding.schedules import LearningRate, _base_lr, _learning_rate
from damo_embedding.settings import _BELOW_ONE, _MIN_FLOAT, Described, _number

__all__ = ["Optimizer"]


def _flag(owner: str, name: str, value: object) -> bool:
    """`value` as a bool: a number that is 0 or 1 is none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"[{owner}] {name} is {value!r} ({type(value).__name__}), expected True or False")
    return bool(value)


def _beta_pair(owner: str, betas: object) -> tuple[float, float]:
    """`betas` as two floats in [0, 1)."""
    if not isinstance(betas, tuple | list):
        raise TypeError(f"[{owner}] betas is {betas!r} ({type(betas).__name__}), expected two numbers (beta1, beta2)")
    if len(betas) != 2:
        raise ValueError(f"[{owner}] betas is {betas!r}, expected two numbers (beta1, beta2)")
    beta1, beta2 = (_number(owner, f"betas[{i}]", beta, 0.0, _BELOW_ONE) for i, beta in enumerate(betas))
    return beta1, beta2


class Optimizer(Described):
    """What the optimizers have in common. Take one of them; this class is for `isinstance`."""

    lr: LearningRate

    def _take_lr(self) -> None:
        # The core takes 0 as well: a step may have it, and files do. As the rate of an optimizer it is a slip.
        try:
            lr = _learning_rate(type(self).__name__, "lr", self.lr, lowest=_MIN_FLOAT)
        except ValueError as error:
            raise ValueError(
                f"{error}, a schedule or a function of the step; for steps at rate 0 give apply_gradients(lr=0), set"
                " embedding.lr = 0, or let a schedule give it"
            ) from None
        object.__setattr__(self, "lr", lr)

    def _rate(self) -> float:
        """The rate for the core: of a schedule where it starts, of a function of the step the default."""
        return _base_lr(self.lr, otherwise=cast(float, type(self).lr))

    def _settings(self) -> dict[str, float]:
        """What the core takes: the fields."""
        return {**super()._settings(), "lr": self._rate()}

    def _take_flag(self, field: str) -> None:
        """Checks a field and keeps it as a bool."""
        object.__setattr__(self, field, _flag(type(self).__name__, field, getattr(self, field)))
