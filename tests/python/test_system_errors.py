# SPDX-License-Identifier: Apache-2.0
"""Ways in which a call to the operating system failed and something broke; found by the suites in reliability/."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import background_session
import memory_session
from reliability import faults, trainee
from reliability.oracle import Operation, Oracle
from reliability.suite import DiedError, Told, ask, expect, listen, make_base
from reliability.workload import HOURS, SMALL, START
from storage_server import ForkServer, fork_server

pytestmark = pytest.mark.core

OPTIONS = {"memory": "16MiB", "threads": 1, "log_bytes": "64MiB", "durability": "logged"}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "reliability.trainee") as server:
        yield server


def apply(keys: range) -> Operation:
    return Operation("apply_gradients", 0, np.array(keys), np.ones((len(keys), 3), np.float32))


SCAN = Operation("scan", 0)  # a cut: it writes table files


def train_with_a_failure(
    server: ForkServer, base: Path, before: list[Operation], failure: tuple[object, ...], after: list[Operation]
) -> tuple[Oracle, Told]:
    """`before`, then `after` while calls fail, then kill -9; the oracle has what happened."""
    oracle = Oracle(SMALL.groups, START)
    session = server.session()
    try:
        ask(session, trainee.watch, make_base(base))
        ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
        session.start("call", trainee.train, before, oracle.now)
        expect(oracle, before, listen(session))
        ask(session, trainee.arm, *failure)
        session.start("call", trainee.train, after, oracle.now, after_errors=True)
        told = listen(session)
        assert told.ended, "the process died"
        assert ask(session, trainee.disarm)[0] != "", "nothing failed"
    finally:
        session.kill()
    for place, operation in enumerate(after):
        if place not in told.raised:
            oracle.perform(operation)
    return oracle, told


def assert_comes_back(server: ForkServer, base: Path, oracle: Oracle) -> None:
    session = server.session()
    try:
        oracle.compare(ask(session, trainee.recover, base, SMALL.name, OPTIONS), oracle.sequence, oracle.sequence)
    finally:
        session.kill()


@pytest.mark.parametrize(
    ("file_class", "error"),
    [("ingest.sst", errno.EIO), ("rocksdb-manifest", errno.EIO), ("rocksdb-manifest", errno.ENOSPC)],
)
def test_a_cut_that_cannot_be_written_is_heard_of_by_the_next_change(
    server: ForkServer, tmp_path: Path, file_class: str, error: int
) -> None:
    """It was kept to itself until memory or the log was full, and in mode commit for good."""
    failure = (faults.FAIL, "sync", file_class, 1, error)
    after = [SCAN, apply(range(50)), SCAN]
    oracle, told = train_with_a_failure(server, tmp_path / "base", [apply(range(50))], failure, after)
    assert sorted(told.raised) == [0, 1, 2]
    for place in (1, 2):
        assert told.raised[place][0] == "StorageError"
        assert "until the storage is closed and opened again" in told.raised[place][1]
    assert_comes_back(server, tmp_path / "base", oracle)


def hear_of_it(server: ForkServer, base: Path, failure: tuple[object, ...], cuts: int, rows: int, log: str) -> None:
    """A call fails in a background thread: the next update raises it, with the way out, and lookups go on."""
    session = server.session()
    try:
        ask(session, trainee.watch, make_base(base))
        ask(session, trainee.open_storage, base, SMALL.name, OPTIONS | {"log_bytes": log})
        ask(session, background_session.update_once, rows)
        ask(session, trainee.arm, *failure)
        if cuts:
            assert ask(session, background_session.cut_until_a_call_has_failed, cuts) > 0, "nothing failed"
        raised, said, committed, looked = ask(session, background_session.update_until_it_raises, rows)
        assert ask(session, trainee.disarm)[0] != "", "nothing failed"
        assert raised == "StorageError"
        assert "Input/output error" in said
        assert said.count("until the storage is closed and opened again") == 1
        assert committed == said
        assert looked
    finally:
        session.kill()
    session = server.session()
    try:
        ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)  # and it opens
    finally:
        session.kill()


def test_a_compaction_that_cannot_be_written_is_heard_of_by_the_next_change(server: ForkServer, tmp_path: Path) -> None:
    """It was kept to itself until memory or the log was full."""
    hear_of_it(server, tmp_path / "base", (faults.FAIL, "write", "sst", 1, errno.EIO), 20, 50, "64MiB")


@pytest.mark.parametrize(("call", "file_class"), [("sync", "ingest.sst"), ("unlink", "log")])
def test_a_cut_in_the_background_that_fails_is_heard_of_by_the_next_change(
    server: ForkServer, tmp_path: Path, call: str, file_class: str
) -> None:
    """What was no failure of the cold tier did not say the way out."""
    hear_of_it(server, tmp_path / "base", (faults.FAIL, call, file_class, 1, errno.EIO), 0, 5_000, "1MiB")


def test_a_storage_opens_after_a_failed_sync_of_the_manifest_of_its_cold_tier(
    server: ForkServer, tmp_path: Path
) -> None:
    """RocksDB removed the tables again that the manifest, not synced but written, told of."""
    failure = (faults.FAIL, "sync", "rocksdb-manifest", 1, errno.EIO)
    oracle, told = train_with_a_failure(server, tmp_path / "base", [apply(range(50))], failure, [SCAN])
    assert told.raised[0][0] == "StorageError"
    assert_comes_back(server, tmp_path / "base", oracle)


def test_opening_on_a_full_disk_does_not_end_the_process(server: ForkServer, tmp_path: Path) -> None:
    """RocksDB's log of its own doings met an assertion of RocksDB's."""
    reopen = Operation("reopen")
    failure = (faults.FAIL_FOR_GOOD, "write", "", 3, errno.ENOSPC)
    oracle, told = train_with_a_failure(
        server, tmp_path / "base", [apply(range(50)), SCAN, apply(range(50))], failure, [reopen]
    )
    assert told.raised[0][0] == "StorageError"
    assert_comes_back(server, tmp_path / "base", oracle)


def test_an_operation_that_fails_does_not_move_the_clock(server: ForkServer, tmp_path: Path) -> None:
    """expire did not count what had expired by the time of an update that was not written."""
    keys = np.arange(20)
    mortal = Operation("apply_gradients", 7, keys, np.ones((20, 16), np.float32))  # they live 40 hours
    update = apply(range(50))
    weights = Operation("import_rows", 0, keys, np.ones((20, 3), np.float32), counts=keys)
    for number, changing in enumerate((update, weights)):
        after = [Operation("set_now", number=START + 41 * HOURS), changing, Operation("expire")]
        failure = (faults.FAIL, "write", "log", 1, errno.ENOSPC)
        _, told = train_with_a_failure(server, tmp_path / f"base-{number}", [mortal], failure, after)
        assert list(told.raised) == [1]
        assert told.answers[2] == trainee.digest(20)


def test_memory_that_runs_out_once_in_an_update_of_new_keys_is_a_memory_error(
    server: ForkServer, tmp_path: Path
) -> None:
    """The names of the state of each new row were made anew, where nothing may be thrown: that ended the process."""
    keys = np.arange(100)
    update = Operation("apply_gradients", 200, keys, np.ones((100, 33), np.float32))
    for nth in range(1, 1_000):
        base = make_base(tmp_path / str(nth))
        session = server.session()
        try:
            ask(session, trainee.watch, base)
            ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
            ask(session, trainee.weights_of, 200, keys)
            ask(session, trainee.arm, faults.FAIL, "allocate", "", nth, errno.ENOMEM)
            session.start("call", trainee.train, [update], START, after_errors=True)
            told = listen(session)
            assert told.ended, f"allocation {nth}: the process died"
            hit = ask(session, trainee.disarm)[0]
        finally:
            session.kill()
        shutil.rmtree(base)
        assert {name for name, _, _ in told.raised.values()} <= {"MemoryError"}, f"allocation {nth}: {told.raised}"
        if not hit:
            break
    assert 10 < nth < 999


@pytest.mark.parametrize("group", [200, 90])  # 90 has a filter
@pytest.mark.parametrize("call", ["lookup", "forward_many"])
def test_a_lookup_that_raises_a_memory_error_made_no_row_or_the_storage_goes_no_further(
    server: ForkServer, tmp_path: Path, call: str, group: int
) -> None:
    """It repeated rows, and noted its keys and its batch, with memory that it asked for after its record."""
    refused, deaths = 0, 0
    for nth in range(1, 1_000):
        base = make_base(tmp_path / str(nth))
        session = server.session()
        try:
            ask(session, trainee.watch, base)
            ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
            looked = ask(session, memory_session.look_up, call, group, nth)
        except DiedError:  # nanobind asks for memory for what is returned, and cannot say that there is none
            deaths += 1
            continue
        finally:
            session.kill()
            shutil.rmtree(base)
        assert looked.raised in ("", "MemoryError"), f"allocation {nth}: {looked}"
        assert not (looked.raised and looked.operations and looked.goes_on), f"allocation {nth}: {looked}"
        assert looked.goes_on or "until the storage is closed and opened again" in looked.refused, f"{nth}: {looked}"
        refused += looked.raised == "MemoryError" and looked.operations == 0
        if not looked.hit:
            break
    assert nth < 999
    assert refused > 20
    assert deaths < 5


def test_a_commit_that_fails_for_good_at_any_opening_of_a_file_leaves_a_commit(
    server: ForkServer, tmp_path: Path
) -> None:
    """One whose switch had happened, and whose file CURRENT could then not be read, was removed."""
    options = {**OPTIONS, "durability": "commit"}
    commits = [Operation("commit", number=1, extra=b"one"), Operation("commit", number=2, extra=b"two")]
    for nth in range(1, 200):
        base = make_base(tmp_path / str(nth))
        oracle = Oracle(SMALL.groups, START)
        session = server.session()
        try:
            ask(session, trainee.watch, base)
            ask(session, trainee.open_storage, base, SMALL.name, options)
            session.start("call", trainee.train, [apply(range(50)), commits[0], apply(range(60))], START)
            assert listen(session).ended
            ask(session, trainee.arm, faults.FAIL_FOR_GOOD, "open", "", nth, errno.EMFILE)
            session.start("call", trainee.train, commits[1:], START, after_errors=True)
            told = listen(session)
            hit = ask(session, trainee.disarm)[0]
        finally:
            session.kill()
        assert told.ended, f"opening {nth}: the process died"
        moments = []
        for operation in (apply(range(50)), commits[0], apply(range(60)), commits[1]):
            oracle.perform(operation)
            if operation.verb == "commit":
                moments.append(oracle.moment())
        session = server.session()
        try:
            found = ask(session, trainee.recover, base, SMALL.name, OPTIONS)
            oracle.compare_moments(found, moments if told.raised else moments[1:])
        finally:
            session.kill()
        shutil.rmtree(base)
        if not hit:
            break
    assert 5 < nth < 199


CHANGING = ("write", "sync", "rename", "link", "mkdir", "unlink", "truncate")
KINDS = ("open", "read", *CHANGING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", [faults.FAIL, faults.FAIL_FOR_GOOD, faults.KILL_BEFORE], ids=["fail", "for-good", "kill"]
)
def test_a_restore_that_does_not_end_leaves_the_old_storage_or_the_new_one(
    server: ForkServer, tmp_path: Path, action: int
) -> None:
    """At each call to the system that it makes; those that fail, at every third."""
    base = make_base(tmp_path / "base")
    oracle = Oracle(SMALL.groups, START)
    session = server.session()
    try:
        ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
        checkpoint = Operation("checkpoint", number=1)
        operations = [apply(range(50)), SCAN, checkpoint, apply(range(25, 80)), SCAN, apply(range(60, 90))]
        session.start("call", trainee.train, operations, oracle.now)
        expect(oracle, operations, listen(session))
    finally:
        session.kill()
    ends = {1: 0, 3: 0}  # the last operation of the restored storage, and of the old one
    # To die before a call that changes nothing is to die after the one before it.
    for call in CHANGING if action == faults.KILL_BEFORE else KINDS:
        for nth in range(1, 200, 1 if action == faults.KILL_BEFORE else 3):
            place = tmp_path / f"{call}-{nth}"
            shutil.copytree(base, place)
            session = server.session()
            try:
                ask(session, trainee.watch, place)
                ask(session, trainee.arm, action, call, "", nth, errno.EIO)
                try:
                    refused = ask(session, trainee.try_to_open, place, SMALL.name, OPTIONS, place / "checkpoints" / "1")
                    hit = ask(session, trainee.disarm)[0]
                except DiedError:
                    assert action == faults.KILL_BEFORE
                    refused, hit = ("killed", ""), "killed"
            finally:
                session.kill()
            session = server.session()
            try:
                found = ask(session, trainee.recover, place, SMALL.name, OPTIONS)
            finally:
                session.kill()
            shutil.rmtree(place)
            assert found.sequence in ends
            # A checkpoint is a commit, too.
            assert found.numbers.last_commit == {1: (1, b""), 3: None}[found.sequence]
            oracle.compare(replace(found, numbers=replace(found.numbers, last_commit=None)), 1, 3)
            ends[found.sequence] += 1
            assert refused is None or refused[0] in ("StorageError", "killed"), f"{call} {nth}: {refused}"
            assert refused is not None or found.sequence == 1, f"{call} {nth}: it returned, and is not restored"
            if not hit:
                break
        else:
            raise AssertionError(f"{call}: there is no end")
    assert min(ends.values()) > 5
