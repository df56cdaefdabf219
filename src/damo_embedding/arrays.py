# SPDX-License-Identifier: Apache-2.0
"""Arguments that NumPy makes arrays of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["as_array"]


def as_array(operation: str, what: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    """TypeError for what NumPy cannot take: a ragged list, a tensor with a gradient or on another device."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"[{operation}] {what} are {type(value).__name__}, expected an array: {error}") from None
