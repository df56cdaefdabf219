# SPDX-License-Identifier: Apache-2.0
"""What scripts written for the `damo` package do, and a reader of its serving file that knows the format alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

import damo

Rows = dict[tuple[int, int], tuple[float, ...]]


def parameters(values: dict[str, Any] | None = None, **more: Any) -> damo.Parameters:
    """Parameters with these names and values; `lambda` comes in the dict."""
    made = damo.Parameters()
    for name, value in {**(values or {}), **more}.items():
        made.insert(name, value)
    return made


def optimizer(name: str = "sgd", values: dict[str, Any] | None = None, **more: Any) -> damo.PyOptimizer:
    return damo.PyOptimizer(parameters(values, name=name, **more))


def initializer(name: str = "zeros", **values: Any) -> damo.PyInitializer:
    return damo.PyInitializer(parameters(name=name, **values))


def embedding(storage: damo.PyStorage, dimension: int = 4, group: int = 0, **given: Any) -> damo.PyEmbedding:
    """With sgd at rate 1 and zeros, unless others are given."""
    chosen = given.get("optimizer") or optimizer(gamma=1.0)
    start = given.get("initializer") or initializer()
    return damo.PyEmbedding(storage, chosen, start, dimension, group)


def look_up(rows: damo.PyEmbedding, keys: Any, dimension: int = 4) -> np.ndarray:
    """[n, dimension], through the array that a script gives."""
    array = np.asarray(keys) if np.asarray(keys).dtype.kind == "u" else np.asarray(keys, np.int64)
    weights = np.full(array.size * dimension, np.nan, np.float32)
    assert rows.lookup(array, weights) is None
    return weights.reshape(-1, dimension)


def apply(rows: damo.PyEmbedding, keys: Any, gradient: float = 1.0, dimension: int = 4) -> None:
    array = np.asarray(keys, np.int64)
    assert rows.apply_gradients(array, np.full(array.size * dimension, gradient, np.float32)) is None


def read_dump(path: Path) -> tuple[list[int], list[int], Rows]:
    """Dimensions and row counts of the 256 groups, and {(group, key): weights}; every byte of the file is used."""
    data = path.read_bytes()
    dimensions = list(struct.unpack_from("<256i", data, 0))
    counts = list(struct.unpack_from("<256Q", data, 1024))
    at, rows = 3072, {}
    found = [0] * 256
    while at < len(data):
        key, group = struct.unpack_from("<Qi", data, at)
        weights = struct.unpack_from(f"<{dimensions[group]}f", data, at + 12)
        assert (group, key) not in rows
        rows[group, key] = weights
        found[group] += 1
        at += 12 + 4 * dimensions[group]
    assert at == len(data)
    assert found == counts
    return dimensions, counts, rows
