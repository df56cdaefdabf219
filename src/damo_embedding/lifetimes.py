# SPDX-License-Identifier: Apache-2.0
"""How long a row lives without an update: the `ttl` of a storage or of an embedding."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from damo_embedding.integers import as_int, parse_int

__all__ = ["Steps", "Ttl"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_MAX_SECONDS = 2**40
_MAX_STEPS = 2**30  # a row has the low 32 bits of its step
_NONE, _SECONDS, _STEPS = range(3)  # the core's AgeUnit


@dataclass(frozen=True)
class Steps:
    """A ttl in steps of the group: its rows expire by the updates of the group that they had no part in.

    Args:
        count: 1 to 2**30.

    Example:
        >>> Steps(10_000)
        Steps(count=10000)
    """

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", parse_int("ttl", "count", self.count, 1, _MAX_STEPS, "an int, of steps"))


Ttl = int | str | datetime.timedelta | Steps


def parse_ttl(operation: str, value: Ttl | None) -> tuple[int, int] | None:
    """(unit, count) as the core takes it; None for None."""
    if value is None:
        return None
    if isinstance(value, Steps):
        return _STEPS, value.count
    form = 'seconds, a text such as "30d" or "12h", a timedelta, Steps(n), or "never"'
    if isinstance(value, str):
        if value == "never":
            return _NONE, 0
        match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*([smhdw]?)\s*", value)
        if match is None:
            raise ValueError(f"[{operation}] ttl is {value!r}, expected {form}")
        seconds = round(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, datetime.timedelta):
        seconds = int(value.total_seconds())
    elif (number := as_int(value)) is None:
        raise TypeError(f"[{operation}] ttl is {value!r} ({type(value).__name__}), expected {form}")
    else:
        seconds = number
    if not 1 <= seconds <= _MAX_SECONDS:
        raise ValueError(f"[{operation}] ttl is {value!r}, expected 1 to {_MAX_SECONDS} seconds")
    return _SECONDS, seconds


def show_ttl(unit: int, count: int) -> str | Steps | int:
    """The value of `ttl` that means this: seconds, Steps(n) or "never"."""
    return Steps(count) if unit == _STEPS else count if unit == _SECONDS else "never"
