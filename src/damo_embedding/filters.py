# SPDX-License-Identifier: Apache-2.0
"""Which keys came often enough: the counting Bloom filter."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from damo_embedding import _core
from damo_embedding.integers import parse_int
from damo_embedding.keys import Keys, parse_keys
from damo_embedding.settings import _number
from damo_embedding.storage import PathLike, parse_path

__all__ = ["CountingBloomFilter"]

_T = TypeVar("_T", np.bool_, np.uint8)


def _ask(operation: str, keys: Keys, dtype: type[_T], ask: Callable[[Any, Any], None]) -> tuple[npt.NDArray[_T], bool]:
    """What `ask` fills in for each key, and whether one key was given."""
    array = parse_keys(operation, keys)
    out = np.empty(array.shape, dtype)
    ask(array.reshape(-1), out.reshape(-1))
    return out, array.ndim == 0


class CountingBloomFilter:
    """Counts keys in a few bytes each, and says which were added at least `count` times.

    It never forgets a key that was (without `halve_every`); of the keys that were not, it lets a share of
    `fpr` through when it holds `capacity` distinct keys, and fewer before. In memory, or with a file whose
    counts outlive the process. docs/admission.md has the formulas and the measured rates.

    Making one is cheap: without a path, memory comes with the first `add`. All methods may be called from any
    thread; a forked child makes its own. As `admission=` of an `Embedding`, one without a path that was not used
    yet says which filter the storage keeps for the group; it stays empty itself.

    Args:
        capacity: Distinct keys it is made for, 1 to 2**40. More may be added; the rate then grows.
        count: A key is let through from this many adds on, 1 to 15.
        fpr: The false-positive rate at capacity, 1e-9 to 0.5. It decides the memory: 4.9 bytes a key at 1e-2,
            7.7 at 1e-3, 10.9 at 1e-4; `memory_bytes` says exactly.
        path: The filter's file (str or Path), made if it is absent; beside it, PATH.lock. One process has it
            open at a time.
        reload: True: go on with the file at `path`; it must be whole, and of these settings. False: start
            anew, replacing a filter file of any settings, also a damaged one; but never another file.
        halve_every: All counters are halved (rounded down) each time the number of adds reaches a multiple of
            this, so that a filter that runs for months goes on filtering. None: never. A key added `num` times
            at once is added whole before.

    Raises:
        CorruptionError: The file is damaged or cut off, or is no filter file. It is left as it is.
        SchemaMismatchError: The file is a filter of other settings.
        AlreadyOpenError: The file is open elsewhere; names the holder.
        StorageError: The system refused: no such directory, no permission, disk full.
        ValueError, TypeError: An argument is out of range or of the wrong type.

    Example:
        >>> seen = CountingBloomFilter(capacity=1000, count=2)
        >>> seen.add([7, 8])
        >>> seen.add(7)
        >>> seen.check([7, 8, 9])
        array([ True, False, False])
    """

    def __init__(
        self,
        *,
        capacity: int,
        count: int = 15,
        fpr: float = 1e-3,
        path: PathLike | None = None,
        reload: bool = True,
        halve_every: int | None = None,
    ) -> None:
        owner, limits = type(self).__name__, _core.StandaloneFilter
        self._capacity = parse_int(owner, "capacity", capacity, 1, limits.MAX_CAPACITY)
        self._count = parse_int(owner, "count", count, 1, limits.MAX_COUNT)
        self._fpr = _number(owner, "fpr", fpr, limits.MIN_FPR, limits.MAX_FPR)
        self._path = None if path is None else parse_path(owner, "path", path)
        if not isinstance(reload, bool):
            raise TypeError(f"[{owner}] reload is {reload!r}, expected True or False")
        self._halve_every = None if halve_every is None else parse_int(owner, "halve_every", halve_every, 1, 2**63 - 1)
        self._core = limits(self._capacity, self._count, self._fpr, self._halve_every or 0, self._path, reload)

    @property
    def capacity(self) -> int:
        """Distinct keys it is made for."""
        return self._capacity

    @property
    def count(self) -> int:
        """A key is let through from this many adds on."""
        return self._count

    @property
    def fpr(self) -> float:
        """The false-positive rate at capacity."""
        return self._fpr

    @property
    def path(self) -> str | None:
        """Its file; None in memory."""
        return self._path

    @property
    def halve_every(self) -> int | None:
        """Adds from one halving of all counters to the next; None: never."""
        return self._halve_every

    def add(self, keys: Keys, num: int = 1) -> None:
        """Counts each key `num` times; one that stands twice, twice.

        With a file: on return the counts survive the death of the process.

        Args:
            keys: One key, or an array of any shape; int64 or uint64.
            num: At least 0. Beyond 15 nothing is told apart.

        Raises:
            StorageError: The file could not be written (disk full), or another program has cut it off,
                removed or replaced it. Nothing was counted.
        """
        times = parse_int("add", "num", num, 0, 2**32 - 1)
        self._core.add(parse_keys("add", keys).reshape(-1), times)

    @overload
    def check(self, keys: int) -> bool: ...
    @overload
    def check(self, keys: Keys) -> bool | npt.NDArray[np.bool_]: ...

    def check(self, keys: Keys) -> bool | npt.NDArray[np.bool_]:
        """Whether each key was added at least `count` times, or seems so.

        Args:
            keys: One key, or an array of any shape; int64 or uint64.

        Returns:
            A bool for one key, else bools of the keys' shape. Never False for a key that was.
        """
        out, one = _ask("check", keys, np.bool_, self._core.check)
        return bool(out) if one else out

    @overload
    def estimate(self, keys: int) -> int: ...
    @overload
    def estimate(self, keys: Keys) -> int | npt.NDArray[np.uint8]: ...

    def estimate(self, keys: Keys) -> int | npt.NDArray[np.uint8]:
        """How often each key was added: that, or more; 15 means 15 or more.

        Args:
            keys: One key, or an array of any shape; int64 or uint64.

        Returns:
            An int for one key, else uint8 of the keys' shape.
        """
        out, one = _ask("estimate", keys, np.uint8, self._core.estimate)
        return int(out) if one else out

    def __len__(self) -> int:
        """About how many distinct keys it holds: estimated from the fill, good to a percent up to capacity."""
        return round(self._core.distinct_keys())

    @property
    def adds(self) -> int:
        """How often a key was added, all keys together, since the filter was made."""
        return self._core.adds()

    @property
    def fill(self) -> float:
        """The share of counters above zero: 0 to 1, about 0.4 at capacity."""
        return self._core.fill()

    @property
    def estimated_fpr(self) -> float:
        """The share of keys never added that `check` lets through now. Reads all counters."""
        return self._core.estimated_fpr()

    @property
    def memory_bytes(self) -> int:
        """Memory of the counters, once there are some. A file takes this, and up to half as much for its log."""
        return self._core.memory_bytes

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._core.closed

    def sync(self) -> None:
        """Returns when all counts are on the disk: they survive power loss. Nothing without a file."""
        self._core.sync()

    def close(self) -> None:
        """Syncs the file and lets go of it; frees the memory. Again: nothing."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _settings(self) -> dict[str, float]:
        """What the core's filter takes, as numbers: the fields, and 0 for no halving."""
        return {
            "capacity": self._capacity,
            "count": self._count,
            "fpr": self._fpr,
            "halve_every": self._halve_every or 0,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is not None or self._core.used or self._core.closed:
            raise TypeError(
                f"[{type(self).__name__}] a filter that holds counts cannot be copied or pickled:"
                " copy its settings, before the first add"
            )
        return _restore, (type(self), self._capacity, self._count, self._fpr, self._halve_every)

    def __repr__(self) -> str:
        fields = [f"capacity={self._capacity}", f"count={self._count}", f"fpr={self._fpr!r}"]
        if self._path is not None:
            fields.append(f"path={self._path!r}")
        if self._halve_every is not None:
            fields.append(f"halve_every={self._halve_every}")
        return f"{type(self).__name__}({', '.join(fields)})"


def _restore(
    kind: type[CountingBloomFilter], capacity: int, count: int, fpr: float, halve_every: int | None
) -> CountingBloomFilter:
    return kind(capacity=capacity, count=count, fpr=fpr, halve_every=halve_every)
