# SPDX-License-Identifier: Apache-2.0
"""What a suite is, and what the suites share: sessions of trainees, a place for files, what was promised."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

import damo_embedding as de
from comparing import files_of
from reliability import trainee
from reliability.oracle import Moment, Operation, Oracle
from reliability.workload import Shape
from storage_server import PATIENCE, ForkServer, Session, fork_server


class SkippedError(Exception):
    """This machine cannot run the suite; the text says what is missing."""


class Suite(ABC):
    """Cases by seed. A context manager: what the cases share is set up once.

    `case` raises AssertionError when a promise is broken, and counts what it did in `self.done`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    promise: ClassVar[str]  # what the storage must do, in a sentence
    unit: ClassVar[str]  # what is counted; a key of `done`
    small: ClassVar[int]  # units in scripts/test
    full: ClassVar[int]  # units in scripts/soak, at least
    cases: ClassVar[int] = 0  # all that there are, which scripts/soak does; 0: there is always another one
    # What its cases depend on: the package and how it is built, the modules that it imports, and more that it names.
    package: ClassVar[tuple[str, ...]] = ("CMakeLists.txt", "pyproject.toml", "src")
    files: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        del exception  # there is nothing to let go of

    @abstractmethod
    def case(self, seed: int) -> None: ...


class ServedSuite(Suite):
    """A suite whose storages live in processes of a fork server."""

    files = ("tests/faults",)

    def environment(self) -> dict[str, str] | None:
        return None

    def __enter__(self) -> Self:
        self._server = fork_server(self.environment(), "reliability.trainee")
        self.server: ForkServer = self._server.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.__exit__(*exception)


def memory_directory() -> str | None:
    """A file system in memory where there is one: its syncs are fast, and no test here depends on them."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def scratch(where: str | None = None) -> Iterator[Path]:
    """A directory for a case, in memory if there is room."""
    directory = Path(tempfile.mkdtemp(prefix="damo-case-", dir=where or memory_directory()))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_base(base: Path) -> Path:
    """Where a trainee works."""
    base.mkdir(exist_ok=True)
    for name in ("checkpoints", "dumps"):
        (base / name).mkdir(exist_ok=True)
    return base


@dataclass
class Told:
    """What a training said until it ended or died."""

    issued: int = -1  # places in the list of operations
    done: int = -1
    answers: dict[int, bytes] = field(default_factory=dict)
    raised: dict[int, tuple[str, str, int]] = field(default_factory=dict)  # name, message, sequence number
    ended: bool = False  # all was done
    died: bool = False

    def take(self, message: Any) -> None:
        match message:
            case ("issued", place):
                self.issued = place
            case ("done", place, answer):
                self.done = place
                self.answers[place] = answer
            case ("raised", place, name, text, sequence):
                self.raised[place] = (name, text, sequence)
            case ("returned", _):
                self.ended = True
            case _:
                raise AssertionError(f"{message}")


def listen(session: Session, until: int | None = None) -> Told:
    """Hears a training to its end, to the death of its process, or until this place is done."""
    told = Told()
    while not told.ended and (until is None or told.done < until):
        if not session.connection.poll(PATIENCE):
            raise session.overdue(f"operation {told.issued}")
        try:
            told.take(session.connection.recv())
        except (EOFError, OSError):
            told.died = True
            break
    return told


def hear_the_rest(told: Told, session: Session) -> None:
    """Kills the process, and takes what it had still said."""
    for message in session.kill():
        told.take(message)


# What syncs the log in mode logged: once it has returned, all that came before it survives power loss.
SYNCED = ("commit", "checkpoint", "dump", "scan", "verify", "drop_group", "reopen")


@dataclass
class Expected:
    """The oracle after operations, and what each of them made."""

    sequence_before: int
    time_before: int
    sequences: list[int] = field(default_factory=list)  # after each operation
    times: list[int] = field(default_factory=list)  # after each operation, what it is for who reads
    checkpoints: dict[int, int] = field(default_factory=dict)  # number -> sequence number
    dumps: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # number -> group, sequence number, clock
    places: dict[int, int] = field(default_factory=dict)  # of checkpoints and dumps, by number
    # (place, group): the operations that opened a group; after which it must exist; that dropped it
    opened: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)

    def sequence(self, place: int) -> int:
        """After the operation at this place; -1: before the first."""
        return self.sequences[place] if place >= 0 else self.sequence_before

    def last_durable(self, operations: list[Operation], done: int, durable: bool) -> int:
        """The sequence number that survives power loss once the operations up to place `done` have returned."""
        for place in range(done, -1, -1):
            if durable or operations[place].verb in SYNCED:
                return self.sequences[place]
        return self.sequence_before

    def groups(self, before: Iterable[int], done: int, issued: int) -> set[int]:
        """Those that must exist."""
        return _exist(before, self.saved, done, self.dropped, issued)

    def groups_at_the_end(self, before: Iterable[int]) -> set[int]:
        last = len(self.sequences)
        return _exist(before, self.opened, last, self.dropped, last)

    def moments(
        self, oracle: Oracle, operations: list[Operation], done: int, issued: int, before: Moment
    ) -> list[Moment]:
        """In mode commit: the last commit, or end of a process, of those that returned, and the one in flight."""
        moments = [before]
        assert before.groups is not None
        for place, operation in enumerate(operations[: issued + 1]):
            if operation.verb not in ("commit", "reopen"):
                continue
            groups = _exist(before.groups, self.opened, place - 1, self.dropped, place - 1)
            moment = oracle.moment_at(self.sequences[place], groups)
            moments = [moment] if place <= done else [*moments, moment]
        return moments


def _exist(
    before: Iterable[int], made: list[tuple[int, int]], made_until: int, dropped: list[tuple[int, int]], until: int
) -> set[int]:
    changes = [(place, True, group) for place, group in made if place <= made_until]
    changes += [(place, False, group) for place, group in dropped if place <= until]
    groups = set(before)
    for _, there, group in sorted(changes):
        groups.add(group) if there else groups.discard(group)
    return groups


def expect(oracle: Oracle, operations: list[Operation], told: Told | None = None) -> Expected:
    """Does the operations in the oracle, and compares the answers of those that were done."""
    expected = Expected(oracle.sequence, oracle.now)
    open_groups: set[int] = set()
    for place, operation in enumerate(operations):
        before = oracle.sequence
        answer = oracle.perform(operation)
        expected.sequences.append(oracle.sequence)
        expected.times.append(oracle.now)
        if operation.verb == "drop_group":
            open_groups.discard(operation.group)
            expected.dropped.append((place, operation.group))
        else:
            for group in {operation.group, *(part.group for part in operation.parts)} - {-1}:
                open_groups.add(group)
                expected.opened.append((place, group))
        # A group is saved by the first operation after its opening that writes a record, or that reads one moment.
        if oracle.sequence > before or operation.verb in ("scan", "dump", "checkpoint", "verify", "reopen"):
            expected.saved += [(place, group) for group in open_groups]
        if operation.verb == "checkpoint":
            expected.checkpoints[operation.number] = oracle.sequence
            expected.places[operation.number] = place
        if operation.verb == "dump":
            expected.dumps[operation.number] = (operation.group, oracle.sequence, oracle.now)
            expected.places[operation.number] = place
        if told is not None and place in told.answers and operation.verb not in ("prefetch", "dump"):
            assert told.answers[place] == trainee.digest(answer), (
                f"operation {place}, {operation.verb} of {len(operation.keys)} keys of group {operation.group}, "
                "returned something else than the oracle"
            )
    return expected


class DiedError(Exception):
    """The process ended without an answer."""


def ask(session: Session, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Calls a function of trainee.py. DiedError if its process did not survive it."""
    try:
        return session("call", function, *args, **named)
    except (EOFError, OSError) as error:
        raise DiedError(function.__name__) from error


@dataclass
class Kept:
    """A checkpoint or a dump: what it must be if it is there, and whether it must be there."""

    path: Path
    sequence: int
    returned: bool
    group: int = -1  # of a dump
    clock: int = 0  # of a dump: what had expired then is not in it


def kept(base: Path, expected: Expected, done: int) -> list[Kept]:
    """The checkpoints and dumps that operations made or began to make; `done`: the last that returned."""
    checkpoints = [
        Kept(base / "checkpoints" / str(number), sequence, expected.places[number] <= done)
        for number, sequence in expected.checkpoints.items()
    ]
    dumps = [
        Kept(base / "dumps" / f"{number}.bin", sequence, expected.places[number] <= done, group, clock)
        for number, (group, sequence, clock) in expected.dumps.items()
    ]
    return checkpoints + dumps


def check_kept(server: ForkServer, what: Kept, shape: Shape, options: dict[str, Any], oracle: Oracle) -> bool:
    """Whether it is there; whole then, to the last bit."""
    if not what.path.exists():
        assert not what.returned, f"{what.path} is not there, but the call had returned"
        return False
    if what.group >= 0:
        _check_dump(what, oracle)
    else:
        _check_checkpoint(server, what.path, shape, options, oracle, what.sequence, what.sequence)
        if dense := trainee.dense_part(int(what.path.name)):
            assert (what.path / trainee.DENSE).read_bytes() == dense, f"{what.path} has another dense part"
    return True


def check_checkpoint_beside(
    server: ForkServer, path: Path, shape: Shape, options: dict[str, Any], oracle: Oracle, expected: Expected
) -> None:
    """Of one that a second thread made during the operations: it is of one moment between them."""
    _check_checkpoint(server, path, shape, options, oracle, expected.sequence_before, oracle.sequence)


def check_dumps_beside(directory: Path, oracle: Oracle, expected: Expected) -> int:
    """Of those that a second thread made during the operations: each is of one moment. Returns how many there are."""
    sequences, times = [expected.sequence_before, *expected.sequences], [expected.time_before, *expected.times]
    moments = [
        (sequence, max(time, oracle.numbers_at(sequence).clock))
        for sequence, time in dict.fromkeys(zip(sequences, times, strict=True))
    ]
    keys_at = cache(oracle.keys_at)
    rows_at = cache(oracle.rows_at)
    dumps = sorted(directory.glob("*.bin"))
    for path in dumps:
        groups = {group: _read_dump(path, group) for group in oracle.tables}
        until = path.with_suffix(".until")
        last, latest = json.loads(until.read_text()) if until.exists() else (sequences[-1], times[-1])
        may_be = [moment for moment in moments if moment[0] <= last and moment[1] <= latest]
        with_these_keys = [
            moment
            for moment in may_be
            if all(keys_at(group, *moment) == keys.tolist() for group, (keys, _) in groups.items())
        ]
        assert any(
            all(
                weights.tobytes() == rows_at(*moment)[group].weights.tobytes() for group, (_, weights) in groups.items()
            )
            for moment in with_these_keys
        ), f"{path} is of no moment of {may_be}: {len(with_these_keys)} have its keys, none its weights"
    return len(dumps)


def _read_dump(path: Path, group: int) -> tuple[Any, Any]:
    keys, weights = de.read_dump(path).get(group, (np.empty(0, np.uint64), np.empty(0, np.float32)))
    order = np.argsort(keys)
    return keys[order], weights[order]


def _check_dump(what: Kept, oracle: Oracle) -> None:
    keys, weights = _read_dump(what.path, what.group)
    expected = oracle.rows_at(what.sequence, max(what.clock, oracle.numbers_at(what.sequence).clock))[what.group]
    assert np.array_equal(keys, expected.keys), f"{what.path} has other keys than after {what.sequence}"
    assert weights.tobytes() == expected.weights.tobytes(), f"{what.path} has other weights"


def _check_checkpoint(
    server: ForkServer, path: Path, shape: Shape, options: dict[str, Any], oracle: Oracle, low: int, high: int
) -> None:
    """Restores it into a directory of its own. `low`, `high`: the sequence number that it may have."""
    before = files_of(path)
    with scratch() as directory:
        session = server.session()
        try:
            found = ask(session, trainee.recover, make_base(directory / "restored"), shape.name, options, path)
            ask(session, trainee.go_on)
        finally:
            session.kill()
    assert files_of(path) == before, f"{path} has changed with a storage that was restored from it"
    # A restored storage gives the checkpoint's step as its last commit.
    assert found.numbers.last_commit == (int(path.name), b"")
    if low <= found.sequence <= high:
        found.numbers = replace(found.numbers, last_commit=oracle.numbers_at(found.sequence).last_commit)
    oracle.compare(found, low, high)
