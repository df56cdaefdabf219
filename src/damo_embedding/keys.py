# SPDX-License-Identifier: Apache-2.0
"""Keys as the core takes them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from damo_embedding.arrays import as_array

__all__ = ["Keys", "parse_keys"]

Keys = npt.ArrayLike


def parse_keys(operation: str, keys: Keys) -> npt.NDArray[np.uint64]:
    """Keys as a C-contiguous uint64 array of the same shape; the bits of int64 are kept."""
    array = as_array(operation, "keys", keys)
    if array.size == 0 and array.dtype == np.float64 and not isinstance(keys, np.ndarray):
        array = array.astype(np.int64)  # an empty list has no type
    if array.dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
        if array.dtype.kind in "iu" and array.dtype.isnative:
            array = array.astype(np.int64)  # narrower integers widen without loss
        else:
            raise TypeError(
                f"[{operation}] keys have dtype {array.dtype}, expected int64 or uint64:"
                " make ids of other values with hash_keys"
            )
    return np.ascontiguousarray(array).view(np.uint64).reshape(array.shape)
