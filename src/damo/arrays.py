# SPDX-License-Identifier: Apache-2.0
"""The arrays that calls read and fill."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def floats(operation: str, name: str, array: object, size: int | None = None, *, filled: bool) -> Floats:
    """`array`, if it is float32 of one dimension and of that size; one that is filled must be contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"[{operation}] {name} is {type(array).__name__}, expected a float32 array of one dimension")
    if array.dtype != np.float32 or not array.dtype.isnative:
        way = f"make it with np.empty({array.size}, np.float32)" if filled else "convert it with .astype(np.float32)"
        raise TypeError(f"[{operation}] {name} has dtype {array.dtype}, expected float32: {way}")
    expected = "one dimension" if size is None else f"({size},)"
    if array.ndim != 1 or (size is not None and array.size != size):
        way = ": give .reshape(-1), which shares its memory" if array.ndim != 1 and array.size == size else ""
        raise ValueError(f"[{operation}] {name} has shape {array.shape}, expected {expected}{way}")
    if not filled:
        return np.ascontiguousarray(array)
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(
            f"[{operation}] {name} is strided (a slice with steps, or a column): fill a contiguous array and copy"
            " from it"
        )
    if not array.flags.writeable:
        raise ValueError(f"[{operation}] {name} is read-only, expected an array that may be filled")
    return array
