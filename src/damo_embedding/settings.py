# SPDX-License-Identifier: Apache-2.0
"""Settings of optimizers, initializers and schedules: numbers with names, checked where a description is made."""

from __future__ import annotations

import math
import numbers
from dataclasses import fields
from typing import ClassVar

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


class Described:
    """A frozen dataclass of numbers that names something of the core."""

    name: ClassVar[str]
    """The name in the core and the docs: "truncated_normal"."""

    def _settings(self) -> dict[str, float]:
        """What the core takes beside the name: the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _take(self, field: str, lowest: float, highest: float) -> None:
        """Checks a field and keeps it as a float."""
        value = _number(type(self).__name__, field, getattr(self, field), lowest, highest)
        object.__setattr__(self, field, value)
