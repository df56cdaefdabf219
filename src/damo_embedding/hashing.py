# SPDX-License-Identifier: Apache-2.0
"""Stable 64-bit keys from the values of a named field, so that no vocabulary is ever built."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from damo_embedding import _core

Keys = NDArray[np.int64]

_SEQUENCE_HELP = "expected a list, tuple, NumPy array, pandas or polars Series, or Arrow array"


def hash_keys(field: str, values: Any, *, padding: str | bytes | int | None = None, seed: int = 0) -> Keys:
    """Turn values of the field `field` into 64-bit keys by XXH3-64.

    The same field, value and seed give the same key on every machine and in every version; docs/format.md
    has the definition. Another field gives other keys, so fields may share a group without sharing rows.

    Args:
        field: the field's name, part of what is hashed.
        values: a list or tuple, a NumPy array of any shape (integers, `U`, `S`, `StringDType`, objects,
            masked), a pandas Series or Index, or anything that speaks the Arrow C data interface (pyarrow,
            polars, ...). Text, bytes and integers may be mixed in lists and object arrays. Missing values
            (None, NaN, NA, null, masked) become key 0.
        padding: a value that becomes key 0 as well.
        seed: an integer in [0, 2**64); another seed gives other keys.

    Returns:
        int64 keys of the values' shape. Only `padding` and missing values become key 0.

    A text and its UTF-8 bytes have the same key. The text "5" and the integer 5 have different ones, so a
    column must come as the same kind every time. Integers of all widths agree; as everywhere, the 64 bits of
    a number count: -1 and 2**64 - 1 are the same. Booleans, floats and times are refused with a TypeError:
    say which integer or text is meant.

    Examples:
        >>> keys = hash_keys("city", ["Oslo", None, b"Oslo"])
        >>> keys[1] == 0, keys[0] == keys[2]
        (True, True)
        >>> hash_keys("user", [5])[0] == hash_keys("user", ["5"])[0]
        False
    """
    if not isinstance(field, str):
        raise TypeError(f'[hash_keys] field is a {type(field).__name__}, expected the name as a str, e.g. "city"')
    if not field:
        raise ValueError('[hash_keys] field is empty, expected the name of the field, e.g. "city"')
    try:
        name = field.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"[hash_keys] field {field!a} has no UTF-8: it holds a lone surrogate") from error
    hasher = _core.KeyHasher(name, _checked_seed(seed))
    if padding is not None:
        if isinstance(padding, bool) or not isinstance(padding, (str, bytes, int, np.integer)):
            raise TypeError(
                f"[hash_keys] padding is a {type(padding).__name__}, expected a str, bytes or int "
                "(missing values become key 0 without it)"
            )
        hasher.set_padding(int(_objects(hasher, [padding], ())[0]))
    return _column(hasher, values)


def _checked_seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, (bool, np.bool_)) or not 0 <= number < 2**64:
        raise ValueError(f"[hash_keys] seed is {seed!r}, expected an integer in [0, 2**64)")
    return number


def _column(hasher: _core.KeyHasher, values: Any) -> Keys:
    if isinstance(values, np.ndarray):
        return _array(hasher, values)
    if isinstance(values, (list, tuple)):
        return _objects(hasher, values, ())
    if type(values).__module__.partition(".")[0] == "pandas" and hasattr(values, "dtype"):
        return _pandas(hasher, values)
    if str(getattr(values, "dtype", "")) == "Object" and hasattr(values, "to_list"):
        return _objects(hasher, values.to_list(), ())  # of polars, whose Arrow form has the addresses of the objects
    if hasattr(values, "__arrow_c_array__"):
        return hasher.arrow_array(*values.__arrow_c_array__())
    if hasattr(values, "__arrow_c_stream__"):
        return hasher.arrow_stream(values.__arrow_c_stream__())
    if hasattr(values, "__array__") and not isinstance(values, np.generic):
        return _array(hasher, np.asarray(values))
    kind = type(values).__name__
    if isinstance(values, (str, bytes, bytearray, int, float, np.generic)) or values is None:
        raise TypeError(f"[hash_keys] values is a single {kind}, {_SEQUENCE_HELP}; put it into a list: [value]")
    raise TypeError(f"[hash_keys] values is a {kind}, {_SEQUENCE_HELP}; try list(values), or one of its columns")


def _array(hasher: _core.KeyHasher, values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> Keys:
    if values.ndim == 0:
        raise TypeError(f"[hash_keys] values is an array without a dimension, {_SEQUENCE_HELP}; use values.reshape(1)")
    if isinstance(values, np.ma.MaskedArray):
        valid = ~np.ma.getmaskarray(values)
        values = values.data
    values = np.asarray(values)  # subclasses (matrix, recarray) index differently
    kind = values.dtype.kind
    if kind in "OT":
        return _object_array(hasher, values, valid)
    bitmap = None if valid is None else np.packbits(valid, bitorder="little")
    if kind in "iuUS":
        flat = _native(values).reshape(-1)
        keys = np.empty(flat.shape, np.int64)
        if kind in "iu":
            hasher.integers(flat, bitmap, keys)
        elif flat.itemsize == 0 or flat.size == 0:  # NumPy makes no view of those; "U0" holds empty texts
            return _object_array(hasher, values.astype(object), valid)
        elif kind == "U":
            hasher.utf32(flat.view(np.uint32), flat.itemsize // 4, bitmap, keys)
        else:
            hasher.fixed_width(flat.view(np.uint8), flat.itemsize, bitmap, keys)
        return keys.reshape(values.shape)
    if kind == "f":
        present = ~np.isnan(values)
        if valid is not None:
            present &= valid
        if not present.any():
            return np.zeros(values.shape, np.int64)
        index = int(np.flatnonzero(present)[0])
        raise TypeError(
            f'[hash_keys] value {index} of field "{hasher.field}" is a float '
            f"({values.reshape(-1)[index]}), expected str, bytes, int or a missing value (None, NaN, NA); if "
            "the column holds integers beside NaN, keep them as such: astype('Int64') in pandas, or a masked "
            "array"
        )
    raise TypeError(
        f'[hash_keys] field "{hasher.field}" is an array of {values.dtype}, expected integers, text '
        'or bytes; convert it first, e.g. values.astype("int64") or values.astype(str)'
    )


def _native(values: NDArray[Any]) -> NDArray[Any]:
    """The array in C order, aligned, in the machine's byte order: itself when it is so."""
    return np.require(values, values.dtype.newbyteorder("="), ["C", "A"])


def _object_array(hasher: _core.KeyHasher, values: NDArray[Any], valid: NDArray[np.bool_] | None) -> Keys:
    missing: tuple[Any, ...] = ()
    na_object = getattr(values.dtype, "na_object", None)
    if na_object is not None and not isinstance(na_object, str):  # a str na_object is a value like any other
        missing = (na_object,)
    objects = np.ascontiguousarray(values, dtype=object)
    if valid is not None:
        objects = np.where(valid, objects, np.array(None, dtype=object))
    return _objects(hasher, objects.reshape(-1), missing).reshape(values.shape)


def _objects(hasher: _core.KeyHasher, values: Any, missing: tuple[Any, ...]) -> Keys:
    keys = np.empty(len(values), np.int64)
    pandas = sys.modules.get("pandas")  # who holds its NA has imported it
    if pandas is not None:
        missing = (*missing, getattr(pandas, "NA", None), getattr(pandas, "NaT", None))
    hasher.objects(values, (*missing, np.ma.masked), keys)
    return keys


def _pandas(hasher: _core.KeyHasher, values: Any) -> Keys:
    dtype = values.dtype
    if isinstance(dtype, np.dtype):
        return _array(hasher, np.asarray(values.to_numpy()))
    array = getattr(values, "array", values)  # of a Series or Index; an extension array is its own
    if dtype.name == "category":  # hash each category once; code -1 (missing) reads the 0 at the end
        keys: Keys = np.append(_column(hasher, array.categories), np.int64(0))[np.asarray(array.codes)]
        return keys
    if getattr(dtype, "storage", None) == "pyarrow" or type(dtype).__name__ == "ArrowDtype":
        return _column(hasher, array.__arrow_array__())
    numpy_dtype = getattr(dtype, "numpy_dtype", None)
    if isinstance(numpy_dtype, np.dtype) and numpy_dtype.kind in "iufb":
        missing = np.asarray(array.isna())
        data = np.asarray(array.to_numpy(dtype=numpy_dtype, na_value=numpy_dtype.type(0)))
        return _array(hasher, data, ~missing)
    return _array(hasher, np.asarray(array))
