# SPDX-License-Identifier: Apache-2.0
"""Where a row's weights start: Zeros, Ones, Constant, Uniform, Normal, TruncatedNormal, Xavier..., Kaiming....

A first weight is a pure function of (seed, group, key, position in the row), drawn by a counter-based
generator: the same in any order of arrival, on any number of threads, machines and restarts. A lookup that
inserts nothing returns the vector that training would start from. docs/initializers.md has the function to
the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from damo_embedding.settings import _MAX_FLOAT, _MIN_FLOAT, Described

__all__ = [
    "Constant",
    "Initializer",
    "KaimingNormal",
    "KaimingUniform",
    "Normal",
    "Ones",
    "TruncatedNormal",
    "Uniform",
    "XavierNormal",
    "XavierUniform",
    "Zeros",
]

_MAX_NORMAL = 1e37  # beyond it mean + std * z would leave float32


class Initializer(Described):
    """What the initializers here have in common. Take one of them; this class is for `isinstance`."""


@dataclass(frozen=True)
class Zeros(Initializer):
    """Every first weight is 0."""

    name: ClassVar[str] = "zeros"


@dataclass(frozen=True)
class Ones(Initializer):
    """Every first weight is 1."""

    name: ClassVar[str] = "ones"


@dataclass(frozen=True)
class Constant(Initializer):
    """Every first weight is `value`, rounded to float32.

    Args:
        value: any finite float32.
    """

    name: ClassVar[str] = "constant"
    value: float

    def __post_init__(self) -> None:
        self._take("value", -_MAX_FLOAT, _MAX_FLOAT)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Evenly distributed over [low, high): `low` may be drawn, `high` never is, both as float32.

    Args:
        low: lower bound.
        high: upper bound; must be above `low` after both were rounded to float32.

    Example:
        >>> Uniform(-0.01, 0.01)
        Uniform(low=-0.01, high=0.01)
    """

    name: ClassVar[str] = "uniform"
    low: float
    high: float

    def __post_init__(self) -> None:
        self._take("low", -_MAX_FLOAT, _MAX_FLOAT)
        self._take("high", -_MAX_FLOAT, _MAX_FLOAT)
        if not np.float32(self.low) < np.float32(self.high):
            raise ValueError(
                f"[Uniform] low is {self.low!r} and high is {self.high!r}, expected low < high as float32; "
                "for one value use Constant"
            )


@dataclass(frozen=True)
class Normal(Initializer):
    """Normally distributed. No weight is more than 6.3 standard deviations from the mean.

    Args:
        mean: of the distribution.
        std: its standard deviation, at least 0.
    """

    name: ClassVar[str] = "normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        self._take("mean", -_MAX_NORMAL, _MAX_NORMAL)
        self._take("std", 0.0, _MAX_NORMAL)


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normally distributed, given that it is within two standard deviations of the mean.

    The distribution that redrawing everything beyond two standard deviations gives; the standard deviation of
    what is drawn is 0.88 `std`.

    Args:
        mean: of the distribution.
        std: standard deviation of the distribution before it is cut off, at least 0.
    """

    name: ClassVar[str] = "truncated_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        self._take("mean", -_MAX_NORMAL, _MAX_NORMAL)
        self._take("std", 0.0, _MAX_NORMAL)


@dataclass(frozen=True)
class XavierUniform(Initializer):
    """Evenly distributed within `gain * sqrt(6 / dimension)` on both sides of 0.

    Xavier's bound is `gain * sqrt(6 / (fan_in + fan_out))`. As `torch.nn.init` counts, the fan_in of a table is
    its dimension and the fan_out its number of rows; a table without a number of rows has the former alone.

    Args:
        gain: factor, above 0; `torch.nn.init.calculate_gain` has those of activations.

    Paper: Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS
    2010.
    """

    name: ClassVar[str] = "xavier_uniform"
    gain: float = 1.0

    def __post_init__(self) -> None:
        self._take("gain", _MIN_FLOAT, _MAX_NORMAL)


@dataclass(frozen=True)
class XavierNormal(Initializer):
    """Normally distributed around 0 with standard deviation `gain * sqrt(2 / dimension)`.

    Fans are counted as for `XavierUniform`, whose standard deviation it has.

    Args:
        gain: factor, above 0.

    Paper: Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS
    2010.
    """

    name: ClassVar[str] = "xavier_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        self._take("gain", _MIN_FLOAT, _MAX_NORMAL)


@dataclass(frozen=True)
class KaimingUniform(Initializer):
    """Evenly distributed within `sqrt(6 / ((1 + a**2) * dimension))` on both sides of 0.

    `torch.nn.init.kaiming_uniform_` with mode="fan_in", which for a table is its dimension.

    Args:
        a: negative slope of the leaky ReLU that follows, at least 0: 0 for ReLU, 1 for none. `math.sqrt(5)` is
            what `torch.nn.Linear` starts with: within `sqrt(1 / dimension)`.

    Paper: He, Zhang, Ren, Sun: Delving deep into rectifiers, ICCV 2015.
    """

    name: ClassVar[str] = "kaiming_uniform"
    a: float = 0.0

    def __post_init__(self) -> None:
        self._take("a", 0.0, _MAX_NORMAL)


@dataclass(frozen=True)
class KaimingNormal(Initializer):
    """Normally distributed around 0 with standard deviation `sqrt(2 / ((1 + a**2) * dimension))`.

    `torch.nn.init.kaiming_normal_` with mode="fan_in", which for a table is its dimension.

    Args:
        a: negative slope of the leaky ReLU that follows, at least 0: 0 for ReLU, 1 for none.

    Paper: He, Zhang, Ren, Sun: Delving deep into rectifiers, ICCV 2015.
    """

    name: ClassVar[str] = "kaiming_normal"
    a: float = 0.0

    def __post_init__(self) -> None:
        self._take("a", 0.0, _MAX_NORMAL)
