# SPDX-License-Identifier: Apache-2.0
"""Arguments that are ints of any library."""

from __future__ import annotations

import operator

__all__ = ["as_int", "parse_int"]


def as_int(value: object) -> int | None:
    """What an int of any library is; None for floats, bools and everything else, arrays of them included."""
    # A tensor of one element or of a bool has an index, too.
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # RuntimeError: of a tensor without values
        return None


def parse_int(operation: str, argument: str, value: object, low: int, high: int, expected: str = "an int") -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"[{operation}] {argument} is {value!r}, expected {expected}")
    if not low <= number <= high:
        raise ValueError(f"[{operation}] {argument} is {number}, expected {low} to {high}")
    return number
