# SPDX-License-Identifier: Apache-2.0
"""A learning rate that changes with the steps: ExponentialDecay, CosineDecay, ..., and LinearWarmup before any.

A schedule stands where a number would: `Adam(lr=CosineDecay(lr=1e-3, decay_steps=10_000))`. The step is the
number of updates the group has had, over all runs: 0 for its first. Any function of the step will do as well.
docs/schedules.md has the formulas.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeGuard, cast

import numpy as np

from damo_embedding import _core
from damo_embedding.integers import parse_int
from damo_embedding.settings import _MAX_FLOAT, _MIN_FLOAT, Described, _number

__all__ = [
    "CosineDecay",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LinearCosineDecay",
    "LinearWarmup",
    "NaturalExponentialDecay",
    "PolynomialDecay",
    "Schedule",
]

LearningRate: TypeAlias = float | Callable[[int], float]  # a number, a Schedule, or another function of the step

_MAX_STEPS = 2**53  # beyond it not every step is a double


class Schedule(Described):
    """What the schedules here have in common; call one for its rate at a step.

    Take one of them; this class is for `isinstance`. A schedule of your own is a function of the step.

    Example:
        >>> schedule = CosineDecay(lr=0.1, decay_steps=100)
        >>> schedule(0), schedule(50), schedule(100)
        (0.1, 0.05, 0.0)
    """

    def __call__(self, step: int) -> float:
        """The rate of a group's update number `step`: 0 for its first, whatever is beyond the end at the end."""
        return _core.Rate(self._description()).at(parse_int("schedule", "step", step, 0, 2**64 - 1))

    def _settings(self) -> dict[str, float]:
        return {name: float(value) for name, value in super()._settings().items()}

    def _description(self) -> object:
        """What the core makes it of: the name, the settings, and what follows."""
        return (self.name, self._settings(), None)

    def _base_lr(self, otherwise: float) -> float:
        """The rate that its formula starts from; `otherwise`, where a function makes the rate."""
        return cast(float, self.lr)  # type: ignore[attr-defined]

    def _take_steps(self, field: str) -> None:
        steps = parse_int(type(self).__name__, field, getattr(self, field), 1, _MAX_STEPS)
        object.__setattr__(self, field, steps)


@dataclass(frozen=True, kw_only=True)
class ExponentialDecay(Schedule):
    """`lr * decay_rate ** (step / decay_steps)`: `decay_steps` updates make it `decay_rate` times what it was.

    Args:
        lr: rate of the first update, at least 0.
        decay_steps: updates, at least 1.
        decay_rate: factor, at least 0; below 1 the rate falls.

    Example:
        >>> ExponentialDecay(lr=0.1, decay_steps=1000, decay_rate=0.5)(2000)
        0.025
    """

    name: ClassVar[str] = "exponential_decay"
    lr: float
    decay_steps: int
    decay_rate: float

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")
        self._take("decay_rate", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class PolynomialDecay(Schedule):
    """`(lr - end_lr) * (1 - step / decay_steps) ** power + end_lr`, and `end_lr` from `decay_steps` on.

    Args:
        lr: rate of the first update, at least 0.
        decay_steps: updates until the end, at least 1.
        end_lr: rate from then on, at least 0.
        power: exponent, above 0; 1 is a straight line.

    Example:
        >>> PolynomialDecay(lr=0.5, decay_steps=1000, end_lr=0.25)(500)
        0.375
    """

    name: ClassVar[str] = "polynomial_decay"
    lr: float
    decay_steps: int
    end_lr: float = 1e-4
    power: float = 1.0

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")
        self._take("end_lr", 0.0, _MAX_FLOAT)
        self._take("power", _MIN_FLOAT, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class NaturalExponentialDecay(Schedule):
    """`lr * exp(-decay_rate * step / decay_steps)`.

    Args:
        lr: rate of the first update, at least 0.
        decay_steps: updates in which the rate falls to `exp(-decay_rate)` times what it was, at least 1.
        decay_rate: at least 0.
    """

    name: ClassVar[str] = "natural_exponential_decay"
    lr: float
    decay_steps: int
    decay_rate: float

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")
        self._take("decay_rate", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class InverseTimeDecay(Schedule):
    """`lr / (1 + decay_rate * step / decay_steps)`.

    Args:
        lr: rate of the first update, at least 0.
        decay_steps: updates, at least 1.
        decay_rate: what `decay_steps` updates add to the divisor, at least 0.

    Example:
        >>> InverseTimeDecay(lr=0.5, decay_steps=1000, decay_rate=1.0)(3000)
        0.125
    """

    name: ClassVar[str] = "inverse_time_decay"
    lr: float
    decay_steps: int
    decay_rate: float

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")
        self._take("decay_rate", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Schedule):
    """`lr * (1 + cos(pi * step / decay_steps)) / 2`, and 0 from `decay_steps` on.

    Args:
        lr: rate of the first update, at least 0.
        decay_steps: updates until the end, at least 1.
    """

    name: ClassVar[str] = "cosine_decay"
    lr: float
    decay_steps: int

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")


@dataclass(frozen=True, kw_only=True)
class LinearCosineDecay(Schedule):
    """A straight line times a cosine that swings `num_periods` times.

    With `m = min(step, decay_steps)`:

        lr * ((alpha + 1 - m / decay_steps) * (1 + cos(2 * pi * num_periods * m / decay_steps)) / 2 + beta)

    Args:
        lr: factor of the whole, at least 0. The first update's rate is `lr * (alpha + 1 + beta)`.
        decay_steps: updates until the end, at least 1.
        num_periods: periods of the cosine until the end, at least 0.
        alpha: added to the line, at least 0.
        beta: added to the product, at least 0.
    """

    name: ClassVar[str] = "linear_cosine_decay"
    lr: float
    decay_steps: int
    num_periods: float = 0.5
    alpha: float = 0.0
    beta: float = 1e-3

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        self._take_steps("decay_steps")
        self._take("num_periods", 0.0, _MAX_FLOAT)
        self._take("alpha", 0.0, _MAX_FLOAT)
        self._take("beta", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class LinearWarmup(Schedule):
    """Rises in a straight line from `start_lr` to where `then` begins, and goes on with it.

    `start_lr + (then(0) - start_lr) * step / warmup_steps` while `step < warmup_steps`, and
    `then(step - warmup_steps)` from there on: what follows begins at its own step 0 when the warm-up is over.

    Args:
        warmup_steps: updates of the warm-up, at least 1.
        then: what follows: a number, a schedule or a function of the step.
        start_lr: rate of the first update, at least 0. With 0 it moves nothing (momenta do change).

    Example:
        >>> warmed = LinearWarmup(warmup_steps=100, then=CosineDecay(lr=0.1, decay_steps=1000))
        >>> warmed(0), warmed(50), warmed(100), warmed(1100)
        (0.0, 0.05, 0.1, 0.0)
    """

    name: ClassVar[str] = "linear_warmup"
    warmup_steps: int
    then: LearningRate
    start_lr: float = 0.0

    def __post_init__(self) -> None:
        self._take_steps("warmup_steps")
        object.__setattr__(self, "then", _learning_rate(type(self).__name__, "then", self.then))
        self._take("start_lr", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {"warmup_steps": float(self.warmup_steps), "start_lr": self.start_lr}

    def _description(self) -> object:
        return (self.name, self._settings(), _describe(self.then))

    def _base_lr(self, otherwise: float) -> float:
        return _base_lr(self.then, otherwise)


_SCHEDULES = (
    ExponentialDecay,
    PolynomialDecay,
    NaturalExponentialDecay,
    InverseTimeDecay,
    CosineDecay,
    LinearCosineDecay,
    LinearWarmup,
)


def _learning_rate(owner: str, name: str, value: object, lowest: float = 0.0) -> LearningRate:
    """A number in range as a float; a schedule or a function as it is. A class is neither."""
    if callable(value) and not isinstance(value, type):
        return cast(Callable[[int], float], value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"[{owner}] {name} is {value!r} ({type(value).__name__}), "
            "expected a number, a schedule or a function of the step"
        )
    return _number(owner, name, value, lowest, _MAX_FLOAT)


def _is_the_core_s(lr: LearningRate) -> TypeGuard[Schedule]:
    """Not a subclass, which may have changed anything: that is a function like any other."""
    return type(lr) in _SCHEDULES


def _base_lr(lr: LearningRate, otherwise: float) -> float:
    """The number that is stored for a rate; `otherwise` for a function, which has none."""
    if _is_the_core_s(lr):
        return lr._base_lr(otherwise)
    return otherwise if callable(lr) else lr


def _describe(lr: LearningRate) -> object:
    """What `_core.Rate` is made of."""
    if _is_the_core_s(lr):
        return lr._description()
    if callable(lr):
        return functools.partial(_returned, lr)
    return ("constant", {"lr": lr}, None)


def _returned(function: Callable[[int], float], step: int) -> float:
    """What a function makes of a step, as a float of any size; what is no number is a TypeError."""
    rate: object = function(step)
    if isinstance(rate, bool | np.bool_) or not hasattr(rate, "__float__"):
        raise TypeError(
            f"[schedule] the function gives {rate!r} ({type(rate).__name__}) for step {step}, expected a number"
        )
    try:
        return float(rate)
    except OverflowError:  # an int beyond the largest double
        return np.inf
