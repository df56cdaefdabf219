# SPDX-License-Identifier: Apache-2.0
"""What a storage must hold after each of its operations, to the last bit.

Built on the tables of reference.py: every operation is applied in float32 by NumPy, in the process of the test. The
oracle keeps each row, and each filter, as it was after each sequence number, so that whatever number a storage comes
back with after a crash, all of it can be compared. A row that has expired is absent: when that is, the clock and the
group's step say.

A drop of a group has a sequence number here, which the storage does not give it: `sequence_of` counts them in.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import damo_embedding as de
from reference import Floats, ReferenceRow, ReferenceTable, Words, as_uint64
from reference_filter import AdmittedTable, ReferenceFilter
from storage_server import Group

Commit = tuple[int | None, bytes]


@dataclass(frozen=True)
class Operation:
    """One call. Verbs that change nothing (a scan, a checkpoint, ...) have no effect on the oracle."""

    verb: str
    group: int = -1
    keys: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    gradients: Floats | None = None  # weights, of import_rows
    counts: npt.NDArray[Any] | None = None  # of import_rows
    lr: float | None = None
    number: int = 0  # the step of a commit or checkpoint, the time of set_now
    extra: bytes = b""
    parts: tuple[Operation, ...] = ()  # of apply_together: an apply_gradients for each group


@dataclass(frozen=True)
class Numbers:
    """What a storage is beside its rows, after one sequence number."""

    rows: dict[int, int]
    steps: dict[int, int]
    clock: int
    last_commit: Commit | None


@dataclass(frozen=True)
class Moment:
    """What a storage in mode commit may go back to."""

    sequence: int
    last_commit: Commit | None
    groups: frozenset[int] | None = None  # all that exist; None: not known


@dataclass
class Rows:
    """All rows of a group, sorted by key."""

    keys: Words
    weights: Floats
    state: dict[str, Floats]
    update_counts: npt.NDArray[np.uint32]
    last_updates: npt.NDArray[np.int64]


@dataclass
class Found:
    """What a storage holds, as it says itself. `inspected`: (group, key) -> (sequence, step), a few rows."""

    sequence: int
    groups: set[int]  # those that exist
    numbers: Numbers
    rows: dict[int, Rows]
    inspected: dict[tuple[int, int], tuple[int, int]]
    stats: dict[str, Any]
    # Of groups that have a filter: adds, keys, the estimate of each.
    filters: dict[int, tuple[int, npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = field(default_factory=dict)


def _table_of(group: Group) -> ReferenceTable:
    names = {"seed": group.seed, "stream": group.group}
    if group.admission is None:
        return ReferenceTable(group.optimizer, group.initializer, group.dimension, **names)
    return AdmittedTable(group.optimizer, group.initializer, group.dimension, group.admission, **names)


class Oracle:
    """The history of one storage. `groups` are all it may ever have; unopened ones are empty."""

    def __init__(self, groups: Sequence[Group], now: int) -> None:
        self.groups = list(groups)
        self.tables = {group.group: _table_of(group) for group in groups}
        self._ttls = {group.group: group.ttl for group in groups}
        self.sequence = 0  # of the last operation
        self.now = now
        self.last_may_be_missing = False  # of the last operation nobody knows whether it happened
        # A drop that raised, after which nothing else changed: it may be on the disk, where only a sync failed.
        self.may_be_dropped: Operation | None = None
        self._clock = 0
        self._last_commit: Commit | None = None
        self._first = 0  # the oldest sequence number that can be asked for
        self._drops: list[int] = []  # sequence numbers of those
        self._numbers = [self._current_numbers()]
        # (group, key) -> sequence numbers at which the row changed, and what it was from then on (None: no row)
        self._versions: dict[tuple[int, int], tuple[list[int], list[ReferenceRow | None]]] = {}
        self._keys: dict[int, list[int]] = {group: [] for group in self.tables}  # of all that ever had a row
        # group -> sequence numbers at which the filter counted, and what it was from then on
        self._filters: dict[int, tuple[list[int], list[ReferenceFilter]]] = {
            group: ([0], [copy.deepcopy(table.filter)])
            for group, table in self.tables.items()
            if isinstance(table, AdmittedTable)
        }

    def _alive(self, group: int, row: ReferenceRow, clock: int, step: int) -> bool:
        ttl = self._ttls[group]
        if ttl is None:
            return True
        return step - row.step <= ttl.count if isinstance(ttl, de.Steps) else clock - row.time <= ttl

    def _current_numbers(self) -> Numbers:
        return Numbers(
            {
                group: len(table.rows)
                if self._ttls[group] is None
                else sum(self._alive(group, row, self._clock, table.step) for row in table.rows.values())
                for group, table in self.tables.items()
            },
            {group: table.step for group, table in self.tables.items()},
            self._clock,
            self._last_commit,
        )

    def _changed(self, changed: Mapping[int, Sequence[int]]) -> None:
        """Notes an operation that wrote one record: the keys of each group that it changed."""
        self.sequence += 1
        for group, keys in changed.items():
            rows = self.tables[group].rows
            for key in keys:
                row = rows.get(key)
                if (group, key) not in self._versions:
                    self._keys[group].append(key)
                sequences, versions = self._versions.setdefault((group, key), ([], []))
                sequences.append(self.sequence)
                versions.append(None if row is None else row.copied())
        self._numbers.append(self._current_numbers())

    def _drop(self, group: int) -> None:
        table = self.tables[group] = _table_of(next(known for known in self.groups if known.group == group))
        self._changed({group: [key for key in self._keys[group] if self._versions[group, key][1][-1] is not None]})
        self._drops.append(self.sequence)
        if isinstance(table, AdmittedTable):
            self._note_filter(group, table)

    def _note_filter(self, group: int, table: AdmittedTable) -> None:
        sequences, versions = self._filters[group]
        sequences.append(self.sequence)
        versions.append(copy.deepcopy(table.filter))

    def table_now(self, group: int) -> ReferenceTable:
        """The group as who calls it now finds it: without what has expired."""
        table = self.tables[group]
        table.now = max(self._clock, self.now)
        for key, row in list(table.rows.items()):
            if not self._alive(group, row, table.now, table.step):
                del table.rows[key]
        return table

    def _apply(self, updates: Iterable[Operation]) -> None:
        """One record, of groups that differ; none of a group whose batch is empty."""
        changed: dict[int, list[int]] = {}
        for update in updates:
            if update.keys.size == 0:
                continue
            assert update.gradients is not None
            table = self.table_now(update.group)
            table.apply_gradients(update.keys, update.gradients, update.lr)
            distinct = dict.fromkeys(as_uint64(update.keys).ravel().tolist())
            changed[update.group] = [key for key in distinct if key in table.rows]
        if changed:
            self._clock = max(self._clock, self.now)
            self._changed(changed)

    def perform(self, operation: Operation) -> Any:
        """Applies an operation; returns what the call returns."""
        if operation.verb == "set_now":
            self.now = max(self.now, operation.number)
            return None
        if operation.verb == "commit":
            self._last_commit = (operation.number, operation.extra)
            self._changed({})
            return None
        if operation.verb in ("expire", "compact"):  # each confirms the clock, and compact takes what expired by it
            before = self.rows_at(self.sequence) if operation.verb == "expire" else {}
            self._clock = max(self._clock, self.now)
            self._changed({})
            if operation.verb == "compact":
                return None
            return sum(len(rows.keys) for rows in before.values()) - sum(self._numbers[-1].rows.values())
        if operation.verb == "verify":
            return ()
        if operation.verb == "drop_group":
            self._drop(operation.group)
            return None
        if operation.verb == "lost commit":  # one that failed, in mode commit: its number is gone
            self._changed({})
            return None
        if operation.verb == "apply_gradients":
            self._apply((operation,))
            return None
        if operation.verb == "apply_together":
            self._apply(operation.parts)
            return None
        if operation.verb not in ("lookup", "lookup_only", "contains", "erase", "import_rows"):
            return None
        table = self.table_now(operation.group)
        if operation.verb == "lookup_only":
            return table.lookup(operation.keys, insert=False)
        if operation.verb == "contains":
            return table.contains(operation.keys)
        distinct = list(dict.fromkeys(as_uint64(operation.keys).ravel().tolist()))
        if operation.verb == "erase":
            gone = [key for key in distinct if key in table.rows]
            count = table.erase(operation.keys)
            if gone:
                self._clock = table.now
                self._changed({operation.group: gone})
            return count
        if operation.verb == "lookup":
            without = [key for key in distinct if key not in table.rows]
            weights = table.lookup(operation.keys)
            if without:  # each gets a row, or is counted by the filter
                self._clock = table.now
                self._changed({operation.group: [key for key in without if key in table.rows]})
                if isinstance(table, AdmittedTable):
                    self._note_filter(operation.group, table)
            return weights
        if not distinct:
            return None
        self._clock = table.now
        assert operation.gradients is not None
        assert operation.counts is not None
        for key, values, count in zip(distinct, operation.gradients, operation.counts.tolist(), strict=True):
            state = {name: block[0] for name, block in table.optimizer.initial_state(1, table.dimension).items()}
            table.rows[key] = ReferenceRow(values.copy(), state, count, table.step, table.now)
        self._changed({operation.group: distinct})
        return None

    # ------------------------------------------------------------- the past

    def numbers_at(self, sequence: int) -> Numbers:
        assert self._first <= sequence <= self.sequence, (self._first, sequence, self.sequence)
        return self._numbers[sequence - self._first]

    def version_at(self, group: int, key: int, sequence: int) -> tuple[int, ReferenceRow] | None:
        """The row, and the sequence number since when it is so."""
        return self._version(group, key, sequence, self.numbers_at(sequence).clock)

    def _version(self, group: int, key: int, sequence: int, clock: int) -> tuple[int, ReferenceRow] | None:
        sequences, versions = self._versions[group, key]
        place = bisect_right(sequences, sequence) - 1
        row = versions[place] if place >= 0 else None
        if row is None or not self._alive(group, row, clock, self.numbers_at(sequence).steps[group]):
            return None
        return sequences[place], row

    def filter_at(self, group: int, sequence: int) -> ReferenceFilter:
        sequences, versions = self._filters[group]
        return versions[bisect_right(sequences, sequence) - 1]

    def rows_at(self, sequence: int, clock: int | None = None) -> dict[int, Rows]:
        """All rows after the operation with this number; `clock`: where it stands, if not where that operation was."""
        if clock is None:
            clock = self.numbers_at(sequence).clock
        found: dict[int, list[tuple[int, ReferenceRow]]] = {group: [] for group in self.tables}
        for group, key in self._versions:
            version = self._version(group, key, sequence, clock)
            if version is not None:
                found[group].append((key, version[1]))
        return {group: self._as_arrays(group, sorted(rows, key=lambda row: row[0])) for group, rows in found.items()}

    def keys_at(self, group: int, sequence: int, clock: int) -> list[int]:
        """Of the rows of a group, in order; a part of rows_at() that costs little."""
        return sorted(key for key in self._keys[group] if self._version(group, key, sequence, clock))

    def _as_arrays(self, group: int, rows: list[tuple[int, ReferenceRow]]) -> Rows:
        dimension, entries = self.tables[group].dimension, self.tables[group].optimizer.entries
        none = np.empty((0, dimension), np.float32)
        return Rows(
            np.array([key for key, _ in rows], np.uint64),
            np.stack([row.weights for _, row in rows]) if rows else none,
            {name: np.stack([row.state[name] for _, row in rows]) if rows else none for name in entries},
            np.array([row.update_count for _, row in rows], np.uint32),
            np.array([row.time for _, row in rows], np.int64),
        )

    def moment(self, groups: Iterable[int] | None = None) -> Moment:
        """The storage as it is now; `groups`: those that exist, where that is known."""
        return Moment(self.sequence, self._last_commit, None if groups is None else frozenset(groups))

    def moment_at(self, sequence: int, groups: Iterable[int]) -> Moment:
        return Moment(sequence, self.numbers_at(sequence).last_commit, frozenset(groups))

    def from_moment(self, moment: Moment) -> Oracle:
        other = self.from_here(moment.sequence)
        other._last_commit = moment.last_commit
        other._numbers = [other._current_numbers()]
        return other

    def from_here(self, sequence: int) -> Oracle:
        """Another oracle that goes on from this sequence number and knows nothing from before it."""
        numbers = self.numbers_at(sequence)
        other = Oracle(self.groups, self.now)
        other.sequence = other._first = sequence
        other._drops = [drop for drop in self._drops if drop <= sequence]
        other._clock, other._last_commit = numbers.clock, numbers.last_commit
        for group, table in other.tables.items():
            table.step = numbers.steps[group]
            if isinstance(table, AdmittedTable):
                table.filter = copy.deepcopy(self.filter_at(group, sequence))
                other._filters[group] = ([sequence], [copy.deepcopy(table.filter)])
        for group, key in self._versions:
            version = self.version_at(group, key, sequence)
            if version is not None:
                since, row = version
                other.tables[group].rows[key] = row.copied()
                other._versions[group, key] = ([since], [row.copied()])
                other._keys[group].append(key)
        other._numbers = [other._current_numbers()]
        assert other._numbers[0].rows == {group: len(rows.keys) for group, rows in self.rows_at(sequence).items()}
        return other

    # ------------------------------------------------------------ comparing

    def compare(self, found: Found, low: int, high: int) -> None:
        """Whether it is exactly the storage after some operation of low .. high. AssertionError says what is not."""
        sequence = found.sequence
        assert low <= sequence, f"operation {sequence} is the last one there, but {low} was promised (issued: {high})"
        assert sequence <= high, f"operation {sequence} is there, but only {high} were issued"
        numbers = self.numbers_at(sequence)
        expected = self.rows_at(sequence, numbers.clock)
        numbers = replace(numbers, rows={group: len(rows.keys) for group, rows in expected.items()})
        assert found.numbers == numbers, f"after operation {sequence}: {found.numbers}, expected {numbers}"
        assert found.rows.keys() == expected.keys()
        for group, rows in expected.items():
            compare_rows(f"group {group} after operation {sequence}", found.rows[group], rows)
        for group, (adds, keys, estimates) in found.filters.items():
            bloom = self.filter_at(group, sequence)
            where = f"the filter of group {group} after operation {sequence}"
            assert adds == bloom.adds, f"{where} has counted {adds}, expected {bloom.adds}"
            wrong = estimates != [bloom.estimate(key) for key in as_uint64(keys).tolist()]
            assert not wrong.any(), f"{where}: other estimates of {wrong.sum()} keys"
        for (group, key), (row_sequence, step) in found.inspected.items():
            version = self._version(group, key, sequence, numbers.clock)
            assert version is not None, f"group {group} has the row {key}"
            since = version[0] - bisect_right(self._drops, version[0])  # as the storage counts
            assert (row_sequence, step) == (since, version[1].step), (
                f"group {group}, key {key} after operation {sequence}: the row says operation {row_sequence} and "
                f"step {step}, expected {since} and {version[1].step}"
            )

    def compare_moments(self, found: Found, moments: Sequence[Moment]) -> Moment:
        """As compare, of what mode commit may come back with: exactly one of these. Returns which."""
        for moment in moments:
            if (moment.sequence, moment.last_commit) != (found.sequence, found.numbers.last_commit):
                continue
            if moment.groups is not None and moment.groups != found.groups:
                continue
            usual = self.numbers_at(moment.sequence).last_commit  # that of a commit which failed may be there instead
            as_usual = replace(found, numbers=replace(found.numbers, last_commit=usual))
            self.compare(as_usual, moment.sequence, moment.sequence)
            return moment
        raise AssertionError(
            f"mode commit came back with operation {found.sequence}, last commit {found.numbers.last_commit}, groups "
            f"{sorted(found.groups)}, expected one of {moments}"
        )

    def compare_group(self, group: int, found: Rows, sequence: int) -> None:
        compare_rows(f"group {group} after operation {sequence}", found, self.rows_at(sequence)[group])


def compare_rows(where: str, found: Rows, expected: Rows) -> None:
    order = np.argsort(found.keys)
    keys = found.keys[order]
    if not np.array_equal(keys, expected.keys):
        lost, more = np.setdiff1d(expected.keys, keys), np.setdiff1d(keys, expected.keys)
        raise AssertionError(
            f"{where}: {len(keys)} rows, expected {len(expected.keys)}; lost {lost[:3]}..., "
            f"not expected {more[:3]}..., twice {len(keys) - len(np.unique(keys))}"
        )
    pairs = {"update_counts": (found.update_counts, expected.update_counts)}
    pairs["last_updates"] = (found.last_updates, expected.last_updates)
    pairs["weights"] = (_bits(found.weights), _bits(expected.weights))
    assert found.state.keys() == expected.state.keys(), where
    for name, block in expected.state.items():
        pairs[name] = (_bits(found.state[name]), _bits(block))
    for name, (got, want) in pairs.items():
        wrong = got[order] != want
        if not wrong.any():
            continue
        rows = np.flatnonzero(wrong.reshape(len(keys), -1).any(axis=1))
        row = int(rows[0])
        raise AssertionError(
            f"{where}: {name} of {len(rows)} of {len(keys)} rows differ; the first, key {keys[row]}: update count "
            f"{found.update_counts[order][row]}, expected {expected.update_counts[row]}; {name} "
            f"{np.ravel(got[order][row])[:4]}, expected {np.ravel(want[row])[:4]} (floats as their bits)"
        )


def _bits(floats: Floats) -> npt.NDArray[np.uint32]:
    assert floats.dtype == np.float32
    return np.ascontiguousarray(floats).view(np.uint32)
