# SPDX-License-Identifier: Apache-2.0
"""An embedding: the rows of one group of a storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from damo_embedding import _core
from damo_embedding.admission import Admission, parse_admission
from damo_embedding.admission import Settings as Filter
from damo_embedding.arrays import as_array
from damo_embedding.errors import SchemaMismatchError
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.initializers import Initializer
from damo_embedding.integers import parse_int
from damo_embedding.keys import Keys, parse_keys
from damo_embedding.lifetimes import Steps, Ttl, parse_ttl, show_ttl
from damo_embedding.optimizers import Optimizer
from damo_embedding.schedules import LearningRate, _learning_rate
from damo_embedding.settings import _MAX_FLOAT, _number
from damo_embedding.storage import Storage

__all__ = ["Embedding", "RowInfo", "Rows"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowInfo:
    """One row, as `Embedding.inspect` saw it."""

    key: int  # as an unsigned 64-bit number
    weights: Floats  # [dimension]
    state: dict[str, Floats]  # optimizer state by name, e.g. "exp_avg": [dimension]
    update_count: int
    last_update: int  # seconds since 1970; the time of creation until the first update
    step: int  # the group's step at the last update
    sequence: int  # number of the last operation that changed it
    tier: Literal["memory", "disk"]


@dataclass(frozen=True)
class Rows:
    """A part of a scan; n rows."""

    keys: npt.NDArray[np.uint64]  # [n]
    weights: Floats  # [n, dimension]
    state: dict[str, Floats]  # by name: [n, dimension], or [n, 1] for one float a row
    update_counts: npt.NDArray[np.uint32]  # [n]
    last_updates: npt.NDArray[np.int64]  # [n], seconds since 1970


def parse_settings(
    optimizer: Optimizer,
    initializer: Initializer,
    *,
    dimension: int,
    group: int | str,
    seed: int,
    ttl: Ttl | None,
    admission: CountingBloomFilter | Literal["all"] | None,
) -> tuple[
    int | None, str, int, str, dict[str, float], str, dict[str, float], int, tuple[int, int] | None, Filter | None
]:
    """What an embedding is opened with, as the core takes it; nothing is opened."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"[embedding] optimizer is {optimizer!r}, expected an optimizer such as Adam(lr=1e-3)")
    if not isinstance(initializer, Initializer):
        raise TypeError(f"[embedding] initializer is {initializer!r}, expected one such as Uniform(-0.01, 0.01)")
    dimension = parse_int("embedding", "dimension", dimension, 1, _core.MAX_DIMENSION)
    seed = parse_int("embedding", "seed", seed, 0, 2**64 - 1)
    if not isinstance(group, str):
        group = parse_int("embedding", "group", group, 0, 255, "an int or a name")
    elif not 1 <= len(group.encode()) <= 255:
        raise ValueError(f"[embedding] the group's name has {len(group.encode())} bytes, expected 1 to 255")
    return (
        None if isinstance(group, str) else group,
        group if isinstance(group, str) else "",
        dimension,
        optimizer.name,
        optimizer._settings(),
        initializer.name,
        initializer._settings(),
        seed,
        parse_ttl("embedding", ttl),
        parse_admission("embedding", admission),
    )


class Embedding:
    """The rows of one group: 64-bit keys, each with `dimension` float32 weights and its optimizer's state.

    Args:
        storage: An open Storage. The embedding does not close it.
        optimizer: What `apply_gradients` does, e.g. Adam(lr=1e-3).
        initializer: What a new row starts with, e.g. Uniform(-0.01, 0.01).
        dimension: Weights of a row, 1 to 4096.
        group: 0-255, or a name of 1 to 255 bytes. A named group takes the highest free number.
        seed: 0 to 2**64 - 1. First weights are a pure function of (seed, group, key, position).
        ttl: How long a row lives after its last update (or its creation), as for `Storage`. None: as stored for
            this group, else the storage's.
        admission: Which keys get a row: CountingBloomFilter(capacity=..., count=3), say, those that training
            lookups have seen three times. It describes the filter that the storage makes and keeps, and takes the
            memory from the storage's budget: so it has no path and counts nothing itself. None: as stored for this
            group, at first every key. "all": every key from now on; a filter that the group has is dropped. A group
            that has none may get one later: its rows stay, and other keys are counted from nothing.

    Opening the group again needs the same dimension, optimizer (its rate or schedule and its betas may change
    from one run to the next), initializer and seed; two embeddings of one group share its rows. All methods may
    be called from any thread.

    With a filter, a key without a row reads as `missing` of `lookup` says, its gradients are ignored, and each
    training lookup counts it as often as it stands there; in the lookup in which it comes to `count` it gets its
    row. A key that has a row keeps it and is not counted. When the row is erased or expires, the count is what it
    was, and the next training lookup gives it a new one. Evaluation counts nothing; `import_rows` asks no filter.

    Raises:
        SchemaMismatchError: The group is stored, or open, with other settings.
        ReadOnlyError: The storage is open read-only, and has no such group, or one with another ttl or filter.
        ValueError, TypeError: An argument is out of range or of the wrong type; or the filter does not fit into the
            storage's memory budget.

    Example:
        >>> optimizer, initializer = Adam(lr=1e-3), Uniform(-0.01, 0.01)
        >>> users = Embedding(storage, optimizer, initializer, 16, group="user")  # doctest: +SKIP
        >>> weights = users.lookup(np.array([[7, 9], [7, 1 << 60]]))  # doctest: +SKIP
        >>> weights.shape  # doctest: +SKIP
        (2, 2, 16)
        >>> users.apply_gradients(np.array([7, 9]), np.ones((2, 16), np.float32))  # doctest: +SKIP
    """

    def __init__(
        self,
        storage: Storage,
        optimizer: Optimizer,
        initializer: Initializer,
        dimension: int,
        group: int | str,
        seed: int = 0,
        *,
        ttl: Ttl | None = None,
        admission: CountingBloomFilter | Literal["all"] | None = None,
    ) -> None:
        if not isinstance(storage, Storage):
            raise TypeError(f"[embedding] storage is {type(storage).__name__}, expected a Storage")
        self._opened_with = parse_settings(
            optimizer, initializer, dimension=dimension, group=group, seed=seed, ttl=ttl, admission=admission
        )
        self._storage = storage
        self._optimizer = optimizer
        self._initializer = initializer
        self._table: _core.Table
        self._open_table()
        self._state = _core.optimizer_state(optimizer.name, optimizer._settings())
        storage._embeddings[self] = None

    def _open_table(self) -> None:
        self._table = self._storage._core.table(*self._opened_with)
        first = self._storage._rates.open(self._table, self._optimizer.lr)
        if first != self._optimizer.lr:
            raise SchemaMismatchError(
                f"[embedding] {self._label()} is open with lr={first!r}, opened with lr={self._optimizer.lr!r}: "
                "use the same rate, or set it with lr"
            )

    @property
    def storage(self) -> Storage:
        """The storage it belongs to."""
        return self._storage

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer it was opened with."""
        return self._optimizer

    @property
    def initializer(self) -> Initializer:
        """The initializer it was opened with."""
        return self._initializer

    @property
    def dimension(self) -> int:
        """Weights of a row."""
        return self._table.dimension

    @property
    def group(self) -> int:
        """The group's number."""
        return self._table.group

    @property
    def name(self) -> str:
        """The group's name; "" when it is known by its number."""
        return self._table.name

    @property
    def seed(self) -> int:
        """Seed of the first weights."""
        return self._table.seed

    @property
    def ttl(self) -> int | str | Steps:
        """How long a row lives after its last update: seconds, Steps(n), or "never"."""
        return show_ttl(*self._table.ttl)

    @property
    def admission(self) -> Admission | None:
        """The filter that decides which keys get a row, to look at; None when every key gets one."""
        settings = self._table.filter_settings
        return None if settings is None else Admission(self._table, settings)

    @property
    def step(self) -> int:
        """How many updates were applied to the group, over all runs."""
        return self._table.step

    @property
    def lr(self) -> float:
        """The learning rate that the next update will use, at least 0.

        It is the optimizer's until you set it, to a number, a schedule or a function of the step; from then on
        it is that (`embedding.lr = embedding.optimizer.lr` goes back). All embeddings of the group share it. It
        is not stored: a storage that is opened again starts from the optimizer's.

        Raises:
            Exception: What a function of yours raises.
            ValueError: It gives a number that is no rate.
        """
        return self._table.lr

    @lr.setter
    def lr(self, lr: LearningRate) -> None:
        self._storage._rates.follow(self._table, _learning_rate("embedding", "lr", lr))

    @property
    def schedule(self) -> Callable[[int], float] | None:
        """The schedule, or the function of the step, that `lr` follows; None when it is a number."""
        followed = self._storage._rates.followed(self._table)
        return followed if callable(followed) else None

    def lookup(
        self,
        keys: Keys,
        out: Floats | None = None,
        *,
        insert: bool = True,
        missing: Literal["initial", "zeros"] = "initial",
    ) -> Floats:
        """The weights of `keys`.

        Args:
            keys: int64 or uint64 of any shape; the same bits are the same key. Repeated keys are fine.
            out: Where to write: float32, C-contiguous, writable, of shape keys.shape + (dimension,). None: a
                new array.
            insert: A training lookup: unknown keys get a row, which counts from now on; with `admission`, those
                that come to its count by this lookup. False: nothing is stored, counted or evicted.
            missing: What keys read as that have no row after that: the first weights that training would start
                from, or zeros.

        Returns:
            float32 [*keys.shape, dimension]; `out` if given. Each row is of one moment, the whole not: other
            threads may train meanwhile.

        Raises:
            TypeError: keys are not integers, `out` is not float32, or `insert` no bool.
            ValueError: `out` has another shape, or is not contiguous or not writable.
            CorruptionError, StorageError: A row could not be read; `out` is then unspecified.
            ReadOnlyError: The storage is open read-only: pass insert=False.
        """
        array = parse_keys("lookup", keys)
        if not isinstance(insert, bool | np.bool_):
            raise TypeError(f"[lookup] insert is {insert!r} ({type(insert).__name__}), expected True or False")
        if not isinstance(missing, str) or missing not in ("initial", "zeros"):
            raise ValueError(f'[lookup] missing is {missing!r}, expected "initial" or "zeros"')
        shape = (*array.shape, self.dimension)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif not isinstance(out, np.ndarray) or out.dtype != np.float32:
            kind = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
            raise TypeError(f"[lookup] out is {kind}, expected a float32 array")
        elif out.shape != shape:
            raise ValueError(f"[lookup] out has shape {out.shape}, expected {shape} for {self._label()}")
        elif not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
            raise ValueError(
                "[lookup] out is not contiguous or not writable, expected a C-contiguous array that may be filled"
            )
        self._table.forward(array.reshape(-1), out.reshape(-1, self.dimension), bool(insert), missing == "zeros")
        return out

    def apply_gradients(self, keys: Keys, gradients: npt.ArrayLike, *, lr: float | None = None) -> None:
        """One optimizer step. Gradients of a key that stands several times are summed, then applied once.

        Args:
            keys: int64 or uint64 of any shape. Keys without a row get one; with `admission`, their gradients are
                ignored instead (`stats()` counts them).
            gradients: float32 of shape keys.shape + (dimension,), of the loss itself: never divided by the
                batch size.
            lr: The rate of this step instead of `self.lr`, at least 0; a schedule is then not asked.

        An empty batch does nothing and is no step; one whose gradients are all ignored is a step. When the call
        returns, the update survives the death of the process; with durability="commit", once commit() has returned.

        Raises:
            ValueError: A gradient is NaN or infinite (names the first such key), or a shape is wrong; nothing
                was applied.
            TypeError: keys are not integers, or gradients are not float32.
            Exception: What a schedule of yours raises; ValueError when it gives what is no rate. Nothing was
                applied.
            CorruptionError: A row that the call needs is damaged on disk. Nothing was applied.
            StorageError: The log or the disk could not be written: docs/errors.md says what to do.
            ReadOnlyError: The storage is open read-only.
        """
        array = parse_keys("apply_gradients", keys)
        rate = None if lr is None else _number("apply_gradients", "lr", lr, 0.0, _MAX_FLOAT)
        grads = as_array("apply_gradients", "gradients", gradients)
        shape = (*array.shape, self.dimension)
        if grads.dtype != np.float32 and not (grads.size == 0 and not isinstance(gradients, np.ndarray)):
            raise TypeError(
                f"[apply_gradients] gradients have dtype {grads.dtype}, expected float32: convert with .astype"
            )
        if grads.shape != shape:
            if not (grads.size == 0 and array.size == 0):
                raise ValueError(
                    f"[apply_gradients] gradients have shape {grads.shape}, expected {shape} for {self._label()}"
                )
            return
        rows = np.ascontiguousarray(grads, dtype=np.float32).reshape(-1, self.dimension)
        self._table.apply_gradients(array.reshape(-1), rows, rate)

    def prefetch(self, keys: Keys) -> None:
        """Starts bringing rows that are on disk into memory, for a lookup that follows; returns at once.

        A hint: keys without a row get none, an error is left to the lookup that meets it, and of more than
        four waiting calls the oldest is dropped.
        """
        self._table.prefetch(parse_keys("prefetch", keys).reshape(-1))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key has a row; bool of the keys' shape. Changes nothing."""
        array = parse_keys("contains", keys)
        out = np.empty(array.shape, dtype=np.bool_)
        self._table.contains(array.reshape(-1), out.reshape(-1))
        return out

    def erase(self, keys: Keys) -> int:
        """Removes the rows of `keys` (int64 or uint64, any shape); returns how many there were.

        An erased key that is looked up again starts from its first weights, update count 0. The disk space
        comes back when RocksDB next merges its files.

        Raises:
            TypeError: keys are not integers.
            StorageError: The log or the disk could not be written, or a row not be read. Nothing was erased.
            ReadOnlyError: The storage is open read-only.
        """
        return self._table.erase(parse_keys("erase", keys).reshape(-1))

    def import_rows(
        self,
        keys: Keys,
        weights: npt.ArrayLike,
        state: Mapping[str, npt.ArrayLike] | None = None,
        counts: npt.ArrayLike | None = None,
    ) -> None:
        """Rows as you give them: pretrained weights, or what `scan` of another table yields. Whole rows are replaced.

        Args:
            keys: int64 or uint64 [n], each once.
            weights: float32 [n, dimension].
            state: The optimizer's state by name, float32 [n, dimension] or [n, 1], every entry of it. None: as a
                new row starts.
            counts: How often each row was updated, integers [n] below 2**32; Adam's bias correction uses it. None: 0.

        The rows count as updated now, for `ttl`; the group's step stays. `admission` is not asked. A call takes
        memory as large as its rows: give millions of rows in parts.

        Raises:
            ValueError: A key stands twice (names it), a float is NaN or infinite, a shape or a state's name is wrong;
                nothing was imported.
            TypeError: keys are not integers, or weights or state not float32.
            CorruptionError, StorageError: As from `apply_gradients`.
            ReadOnlyError: The storage is open read-only.

        Example:
            >>> for part in old.scan():  # doctest: +SKIP
            ...     new.import_rows(part.keys, part.weights, part.state, part.update_counts)
        """
        array = parse_keys("import_rows", keys)
        if array.ndim != 1:
            raise ValueError(f"[import_rows] keys have shape {array.shape}, expected one dimension")
        n = len(array)
        floats = np.empty((n, self._table.num_floats), dtype=np.float32)
        starts = {name: start for name, _, start in self._state}
        if state is not None and set(state) != set(starts):
            raise ValueError(f"[import_rows] state has {sorted(state)}, expected {sorted(starts)}")
        into_weights, into_state = self._split(floats)
        into_weights[...] = self._floats("weights", weights, (n, self.dimension))
        for name, into in into_state.items():
            into[...] = starts[name] if state is None else self._floats(name, state[name], into.shape)
        given = np.zeros(n, np.uint32) if counts is None else as_array("import_rows", "counts", counts)
        if given.dtype.kind not in "iu" and given.size:
            raise TypeError(f"[import_rows] counts have dtype {given.dtype}, expected integers")
        if given.shape != (n,):
            raise ValueError(f"[import_rows] counts have shape {given.shape}, expected ({n},)")
        if n and not 0 <= int(given.min()) <= int(given.max()) < 2**32:
            raise ValueError(f"[import_rows] counts are {given.min()} to {given.max()}, expected 0 to {2**32 - 1}")
        self._table.import_rows(array, np.ascontiguousarray(given, dtype=np.uint32), floats)

    def _floats(self, what: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Floats:
        array = as_array("import_rows", what, values)
        if array.dtype != np.float32 and array.size:
            raise TypeError(f"[import_rows] {what} has dtype {array.dtype}, expected float32: convert with .astype")
        if array.shape != shape:
            raise ValueError(f"[import_rows] {what} has shape {array.shape}, expected {shape} for {self._label()}")
        return array.astype(np.float32, copy=False)

    def inspect(self, key: int) -> RowInfo | None:
        """Everything about one row, or None if the key has none. Changes nothing.

        Args:
            key: The key as a signed or unsigned 64-bit number.
        """
        row = self._table.inspect(parse_int("inspect", "key", key, -(2**63), 2**64 - 1))
        if row is None:
            return None
        weights, state = self._split(np.array(row.floats, dtype=np.float32)[None])
        return RowInfo(
            key=row.key,
            weights=weights[0],
            state={name: values[0] for name, values in state.items()},
            update_count=row.update_count,
            last_update=row.time,
            step=row.step,
            sequence=row.sequence,
            tier="memory" if row.in_memory else "disk",
        )

    def scan(self, batch: int = 65_536) -> Iterator[Rows]:
        """All rows as of now, in parts of up to `batch`, in no order that means anything.

        The rows are of one moment: training that goes on meanwhile is not seen. Changed rows are written to
        disk first. Files that are replaced meanwhile stay on the disk until the iterator ends or is dropped.

        Args:
            batch: Rows of one part, 1 to 2**24. A part takes 20 bytes a row beside its weights and state.

        Yields:
            Rows; the last part may be shorter, none is empty.

        Raises:
            CorruptionError: A row on disk is damaged; names its key, or the file and the offset of its block.
            StorageError: The changed rows could not be written first, or a row could not be read.

        Example:
            >>> sum(int(part.update_counts.sum()) for part in users.scan())  # doctest: +SKIP
        """
        size = parse_int("scan", "batch", batch, 1, 2**24)
        return self._scan(self._table.scan(), size)

    def _scan(self, scan: _core.Scan, batch: int) -> Iterator[Rows]:
        while True:
            keys = np.empty(batch, dtype=np.uint64)
            floats = np.empty((batch, scan.num_floats), dtype=np.float32)
            counts = np.empty(batch, dtype=np.uint32)
            times = np.empty(batch, dtype=np.int64)
            found = scan.next(keys, floats, counts, times)
            if found == 0:
                return
            weights, state = self._split(floats[:found])
            yield Rows(keys[:found], weights, state, counts[:found], times[:found])

    def _split(self, floats: Floats) -> tuple[Floats, dict[str, Floats]]:
        at = self.dimension
        state = {}
        for name, per_weight, _ in self._state:
            width = self.dimension if per_weight else 1
            state[name] = floats[:, at : at + width]
            at += width
        return floats[:, : self.dimension], state

    def _label(self) -> str:
        return f'group "{self.name}"' if self.name else f"group {self.group}"

    def __len__(self) -> int:
        """How many rows the group has."""
        return len(self._table)

    def __bool__(self) -> bool:
        return True  # an empty embedding is still one

    def __repr__(self) -> str:
        group = self.name or self.group
        settings = f"group={group!r}, dimension={self.dimension}, optimizer={self.optimizer!r}"
        return f"Embedding({settings}, rows={len(self)})"

    def __reduce__(self) -> Any:
        raise TypeError("[embedding] an Embedding cannot be pickled or copied: it belongs to its open storage")
