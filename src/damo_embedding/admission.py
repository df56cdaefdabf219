# SPDX-License-Identifier: Apache-2.0
"""The filter of a group, as the storage keeps it: which keys get a row."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from damo_embedding import _core
from damo_embedding.filters import CountingBloomFilter, _ask
from damo_embedding.keys import Keys

__all__ = ["Admission"]

Settings = tuple[()] | tuple[int, int, float, int]


def parse_admission(operation: str, value: CountingBloomFilter | Literal["all"] | None) -> Settings | None:
    """As the core takes it: None as stored, () no filter, else the filter's settings."""
    if value is None:
        return None
    if isinstance(value, str) and value == "all":
        return ()
    if not isinstance(value, CountingBloomFilter):
        raise TypeError(
            f"[{operation}] admission is {value!r}, expected a CountingBloomFilter(capacity=..., count=...),"
            ' "all", or None'
        )
    if value.path is not None:
        raise ValueError(
            f"[{operation}] admission is a filter with the file {value.path!r}: a storage keeps its filter among its"
            " own files; give one without a path"
        )
    if value.closed or value._core.used:
        what = "was closed" if value.closed else f"has counted {value.adds} adds"
        raise ValueError(
            f"[{operation}] admission is a filter that {what}: it says only which filter the storage is to keep, whose"
            " counts are its own; give a new one of the same settings"
        )
    return value.capacity, value.count, value.fpr, value.halve_every or 0


class Admission:
    """What `Embedding.admission` gives: the group's filter, to look at. Lookups count in it; nothing here does.

    Its settings are those of the `CountingBloomFilter` that it was made from.
    """

    def __init__(self, table: _core.Table, settings: tuple[int, int, float, int]) -> None:
        self._table = table
        self._settings = settings

    @property
    def capacity(self) -> int:
        """Distinct keys it is made for."""
        return self._settings[0]

    @property
    def count(self) -> int:
        """A key gets a row in the training lookup in which it is seen for this time."""
        return self._settings[1]

    @property
    def fpr(self) -> float:
        """The false-positive rate at capacity."""
        return self._settings[2]

    @property
    def halve_every(self) -> int | None:
        """Counted sightings from one halving of all counters to the next; None: never."""
        return self._settings[3] or None

    @overload
    def check(self, keys: int) -> bool: ...
    @overload
    def check(self, keys: Keys) -> bool | npt.NDArray[np.bool_]: ...

    def check(self, keys: Keys) -> bool | npt.NDArray[np.bool_]:
        """Whether each key has come to the count, or seems so: its next training lookup gives it a row, if it has none.

        A key whose row was imported may not have; `Embedding.contains` says which keys have a row.

        Args:
            keys: One key, or an array of any shape; int64 or uint64.
        """
        out, one = _ask("check", keys, np.bool_, self._table.filter_check)
        return bool(out) if one else out

    @overload
    def estimate(self, keys: int) -> int: ...
    @overload
    def estimate(self, keys: Keys) -> int | npt.NDArray[np.uint8]: ...

    def estimate(self, keys: Keys) -> int | npt.NDArray[np.uint8]:
        """How often training lookups have seen each key without a row: that, or more; 15 means 15 or more.

        Args:
            keys: One key, or an array of any shape; int64 or uint64.
        """
        out, one = _ask("estimate", keys, np.uint8, self._table.filter_estimate)
        return int(out) if one else out

    def __len__(self) -> int:
        """About how many distinct keys it has counted."""
        return int(self._info("keys"))

    def __bool__(self) -> bool:
        return True  # an empty filter is still one

    @property
    def adds(self) -> int:
        """How often keys without a row were seen, all together, since the filter was made."""
        return int(self._info("adds"))

    @property
    def fill(self) -> float:
        """The share of counters above zero: 0 to 1, about 0.4 at capacity."""
        return float(self._info("fill"))

    @property
    def estimated_fpr(self) -> float:
        """The share of keys never seen that would get a row at once. Reads all counters."""
        return self._table.filter_estimated_fpr()

    @property
    def memory_bytes(self) -> int:
        """Memory of the counters, out of the storage's budget."""
        return int(self._info("memory_bytes"))

    def _info(self, what: str) -> Any:
        return self._table.filter_info()[what]

    def __repr__(self) -> str:
        fields = [f"capacity={self.capacity}", f"count={self.count}", f"fpr={self.fpr!r}"]
        if self.halve_every is not None:
            fields.append(f"halve_every={self.halve_every}")
        return f"Admission({', '.join(fields)})"
