# SPDX-License-Identifier: Apache-2.0
"""Names with values: what every object of this package is configured by."""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections.abc import Iterable

import numpy as np

__all__ = ["Parameters"]

Value = str | bool | int | float

# A name means the same kind of thing in every object that takes it, so that a wrong one shows where it is inserted.
_TEXTS = ("name", "path")
_FLAGS = ("reload",)
_INTS = ("capacity", "count", "decay_steps", "expire_days", "group", "min_count")
_FLOATS = (
    *("alpha", "beta", "beta1", "beta2", "decay_rate", "end_learning_rate", "epsilon", "eta", "fpr", "gamma"),
    *("lambda", "lambda1", "lambda2", "max", "mean", "min", "num_periods", "power", "stddev"),
)
_KNOWN = sorted(_TEXTS + _FLAGS + _INTS + _FLOATS)


class Parameters:
    """A list of names with values, filled by `insert` and given to the other objects of this package.

    An object copies what it is given: what is inserted later does not reach it.

    Example:
        >>> parameters = Parameters()
        >>> parameters.insert("name", "sgd")
        >>> parameters.insert("gamma", 0.1)
        >>> parameters.to_json()
        '{"name": "sgd", "gamma": 0.1}'
    """

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}

    def insert(self, name: str, value: Value) -> None:
        """Sets `name` to `value`; of two values of one name the later one counts.

        Args:
            name: One that some object of this package takes.
            value: What that name wants: a str, a bool, an int, or a float, where an int will do; NumPy's are
                as good as Python's. A bool is no number here. `decay_steps` may be a float that is whole.

        Raises:
            ValueError: No object takes this name (the message lists those that are taken), or a number is NaN or
                infinite.
            TypeError: The value is of another type than the name wants.
        """
        if not isinstance(name, str):
            raise TypeError(f"[insert] the name is {name!r} ({type(name).__name__}), expected a str")
        if name not in _KNOWN:
            raise ValueError(f"[insert] there is no parameter {name!r}, expected one of {', '.join(_KNOWN)}")
        self._values[name] = _checked(name, value)

    def to_json(self) -> str:
        """The names and values as a JSON object, in the order in which the names were first inserted."""
        return json.dumps(self._values)

    def __repr__(self) -> str:
        return f"Parameters({self.to_json()})"


def _checked(name: str, value: object) -> Value:
    """The value as Python's own str, bool, int or float."""
    if name in _TEXTS:
        if isinstance(value, str):
            return str(value)
        expected = "a str"
    elif name in _FLAGS:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        expected = "True or False"
    elif isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        expected = "an int" if name in _INTS else "a number"
    elif name in _FLOATS:
        try:
            number = float(value)
        except OverflowError:  # an int beyond the largest double
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"[insert] {name} is {value!r}, expected a number that is finite")
        return number
    else:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            if name == "decay_steps" and float(value).is_integer():
                return int(float(value))
            expected = "an int"
    raise TypeError(f"[insert] {name} is {value!r} ({type(value).__name__}), expected {expected}")


def values_of(owner: str, argument: str, parameters: object) -> dict[str, Value]:
    """A copy of the values; TypeError if it is no Parameters."""
    if not isinstance(parameters, Parameters):
        raise TypeError(f"[{owner}] {argument} is {parameters!r} ({type(parameters).__name__}), expected a Parameters")
    return dict(parameters._values)


def refuse_others(owner: str, values: Iterable[str], accepted: Iterable[str]) -> None:
    """ValueError for a name that `owner` does not take."""
    known = list(accepted)
    for name in values:
        if name not in known:
            takes = f"expected {', '.join(known)}" if known else "and none at all"
            raise ValueError(f"[{owner}] takes no parameter {name!r}, {takes}")


def choose(owner: str, values: dict[str, Value], names: Iterable[str]) -> str:
    """Takes `name` out of the values; ValueError if it is missing or none of `names`."""
    known = list(names)
    if "name" not in values:
        raise ValueError(f"[{owner}] the parameter 'name' is missing, expected one of {', '.join(known)}")
    name = str(values.pop("name"))
    if name not in known:
        raise ValueError(f"[{owner}] name is {name!r}, expected one of {', '.join(known)}")
    return name
