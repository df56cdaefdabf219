# SPDX-License-Identifier: Apache-2.0
"""What the optimizers have in common, and the checks of their numbers."""

from __future__ import annotations

import math
import numbers
from typing import ClassVar

import numpy as np

__all__ = ["Optimizer"]

_MAX_FLOAT = 3.4028234663852886e38  # the largest float32
_MIN_FLOAT = 1.1754943508222875e-38  # the smallest normal float32
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


def _number(owner: str, name: str, value: object, lowest: float, highest: float) -> float:
    """`value` as a float in [lowest, highest]; bool, str and the like are a TypeError, NaN a ValueError."""
    # NumPy's bool is not a numbers.Real, Python's is.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"[{owner}] {name} is {value!r} ({type(value).__name__}), expected a number")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest double, of either sign
        number = math.inf
    if not lowest <= number <= highest:
        raise ValueError(f"[{owner}] {name} is {value!r}, expected a number in [{lowest:.8g}, {highest:.8g}]")
    return number


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


class Optimizer:
    """What the optimizers have in common. Take one of them; this class is for `isinstance`."""

    name: ClassVar[str]
    """The optimizer's name in the core, the manifest and the docs: "adam"."""
    lr: float

    def _settings(self) -> dict[str, float]:
        """What the core's optimizer of this name takes."""
        raise NotImplementedError

    def _take(self, field: str, lowest: float, highest: float) -> None:
        """Checks a field and keeps it as a float."""
        value = _number(type(self).__name__, field, getattr(self, field), lowest, highest)
        object.__setattr__(self, field, value)

    def _take_flag(self, field: str) -> None:
        """Checks a field and keeps it as a bool."""
        object.__setattr__(self, field, _flag(type(self).__name__, field, getattr(self, field)))
