# SPDX-License-Identifier: Apache-2.0
"""The rows of one group: look up, apply gradients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import damo_embedding as de
from damo.arrays import Floats, floats
from damo.initializer import PyInitializer
from damo.optimizer import PyOptimizer
from damo.storage import PyStorage
from damo_embedding import _core
from damo_embedding.integers import parse_int
from damo_embedding.keys import Keys, parse_keys

__all__ = ["PyEmbedding"]


class PyEmbedding:
    """The rows of one group of a storage: 64-bit keys, `dimension` float32 weights each.

    All objects of a group share its rows, and the optimizer and initializer of the newest of them.

    Args:
        storage: A PyStorage. The embedding goes on when that object is gone.
        optimizer: A PyOptimizer. The group's rows keep its state; another rate, schedule, beta or penalty later is
            fine, another optimizer is not.
        initializer: A PyInitializer. Another one later is fine: it is for keys that are new then.
        dimension: Weights of a row, 1 to 4096.
        group: 0 to 255.

    Raises:
        SchemaMismatchError: The group has another dimension or another optimizer.
        ValueError, TypeError: An argument is out of range or of the wrong type.
    """

    def __init__(
        self, storage: PyStorage, optimizer: PyOptimizer, initializer: PyInitializer, dimension: int, group: int = 0
    ) -> None:
        for name, value, kind in (
            ("storage", storage, PyStorage),
            ("optimizer", optimizer, PyOptimizer),
            ("initializer", initializer, PyInitializer),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"[PyEmbedding] {name} is {type(value).__name__}, expected a {kind.__name__}")
        self._dimension = parse_int("PyEmbedding", "dimension", dimension, 1, _core.MAX_DIMENSION)
        number = parse_int("PyEmbedding", "group", group, 0, 255)
        self._shared = storage._shared
        self._group = self._shared.run(
            lambda _: self._shared.group(self, number, self._dimension, optimizer._optimizer, initializer._initializer)
        )

    def lookup(self, keys: Keys, weights: Floats) -> None:
        """Fills `weights` with the weights of `keys`. An unknown key gets a row.

        Args:
            keys: int64 or uint64 of one dimension; the same bits are the same key, and all of them count.
            weights: float32 of one dimension, len(keys) * dimension long, contiguous.

        Raises:
            TypeError: keys are not integers, or weights not float32.
            ValueError: A shape is wrong, or `weights` cannot be filled.
            CorruptionError, StorageError: A row could not be read; `weights` is then unspecified.
        """
        array = self._keys("lookup", keys)
        out = floats("lookup", "weights", weights, array.size * self._dimension, filled=True)

        def fill(_: de.Storage) -> None:
            group = self._group
            if group.initializer == group.rows.initializer:
                group.rows.lookup(array, out.reshape(-1, self._dimension))
            else:
                with group.lock:
                    self._make_rows(array)
                    group.rows.lookup(array, out.reshape(-1, self._dimension))

        self._shared.run(fill)

    def apply_gradients(self, keys: Keys, gradients: Floats) -> None:
        """One step of the optimizer. Gradients of a key that stands several times are summed: one update.

        Args:
            keys: int64 or uint64 of one dimension. Keys without a row get one.
            gradients: float32 of one dimension, len(keys) * dimension long.

        Raises:
            ValueError: A gradient is NaN or infinite, or a shape is wrong; nothing was applied.
            TypeError: keys are not integers, or gradients not float32.
            StorageError: The log or the disk could not be written.
        """
        array = self._keys("apply_gradients", keys)
        grads = floats("apply_gradients", "gradients", gradients, array.size * self._dimension, filled=False)

        def apply(_: de.Storage) -> None:
            group = self._group
            if group.initializer == group.rows.initializer:
                group.rows.apply_gradients(array, grads.reshape(-1, self._dimension))
            elif np.isfinite(grads).all():
                with group.lock:
                    self._make_rows(array)
                    group.rows.apply_gradients(array, grads.reshape(-1, self._dimension))
            else:
                group.rows.apply_gradients(array, grads.reshape(-1, self._dimension))  # says which key it is

        self._shared.run(apply)

    @staticmethod
    def _keys(operation: str, keys: Keys) -> npt.NDArray[np.uint64]:
        array = parse_keys(operation, keys)
        if array.ndim != 1:
            raise ValueError(f"[{operation}] keys have shape {array.shape}, expected one dimension")
        return array

    def _make_rows(self, keys: npt.NDArray[np.uint64]) -> None:
        """Rows of unknown keys, by another initializer than the one the group is stored with."""
        group = self._group
        new = np.unique(keys[~group.rows.contains(keys)])
        if new.size == 0:
            return
        weights = np.empty((new.size, self._dimension), np.float32)
        name, settings = group.initializer.name, group.initializer._settings()
        for key, row in zip(new.tolist(), weights, strict=True):
            _core.initializer_fill(name, settings, group.rows.seed, group.number, key, row)
        group.rows.import_rows(new, weights)

    def __repr__(self) -> str:
        return f"PyEmbedding(group={self._group.number}, dimension={self._dimension})"
