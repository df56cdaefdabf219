# SPDX-License-Identifier: Apache-2.0
"""read_only=True: one moment of a storage, beside a writer or without one; not a byte of the directory is touched."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import Row, assert_same_rows, rows_of
from reliability import trainee
from reliability.oracle import Found, Operation, Oracle
from reliability.suite import Told, ask, expect, hear_the_rest, make_base
from reliability.workload import SMALL, START, TIGHT, Shape, Workload
from storage_server import Group, Session, fork_server

pytestmark = pytest.mark.core

f32 = np.float32
NOW = 2**40
SMALL_MEMORY: dict[str, Any] = {"memory": "16MiB", "threads": 2}
READ: dict[str, Any] = {**SMALL_MEMORY, "read_only": True}


def users_of(storage: de.Storage, **options: Any) -> de.Embedding:
    return de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=16, group="user", **options)


def items_of(storage: de.Storage) -> de.Embedding:
    return de.Embedding(storage, de.SGD(lr=0.1), de.Normal(), dimension=8, group=3)


def train(storage: de.Storage, seed: int, keys: int = 500) -> None:
    random = np.random.default_rng(seed)
    for table in (users_of(storage), items_of(storage)):
        ids = random.integers(-400, 400, keys)
        table.lookup(ids)
        table.apply_gradients(ids, random.standard_normal((keys, table.dimension)).astype(f32))
        table.erase(random.integers(-400, 400, 20))


def all_rows(storage: de.Storage) -> dict[str, dict[int, Row]]:
    return {"users": rows_of(users_of(storage)), "items": rows_of(items_of(storage))}


def traces(directory: Path, contents: bool = True) -> dict[str, tuple[Any, ...]]:
    """All that may not change: names, inodes, lengths, times, bytes. Of an open storage without the bytes: whoever
    closes its LOCK gives the lock up."""
    found = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        info = path.lstat()
        data = hashlib.sha256(path.read_bytes()).hexdigest() if contents and path.is_file() else ""
        found[str(path)] = (info.st_ino, info.st_mode, info.st_nlink, info.st_size, info.st_mtime_ns, info.st_ctime_ns, data)  # noqa: E501  # fmt: skip
    return found


@contextmanager
def untouched(directory: Path, contents: bool = True) -> Iterator[None]:
    before = traces(directory, contents)
    yield
    assert traces(directory, contents) == before


def make(path: Path, close: bool = True, **options: Any) -> de.Storage:
    storage = de.Storage(path, **SMALL_MEMORY, **options)
    storage.now = NOW
    for seed in range(3):
        train(storage, seed)
    storage.commit(step=3, extra=b"three")
    train(storage, 3)
    if close:
        storage.close()
    return storage


# ------------------------------------------------------------------ nothing is touched


def read_everything(storage: de.Storage, tmp_path: Path) -> None:
    users, items = users_of(storage), items_of(storage)
    keys = np.arange(-600, 600)
    users.prefetch(keys)
    users.lookup(keys, insert=False)
    items.lookup(keys, insert=False, missing="zeros")
    users.contains(keys)
    users.inspect(1)
    assert len(users) == len(rows_of(users))
    assert len(items) == len(rows_of(items))
    storage.dump(tmp_path / "dump.bin")
    assert storage.verify().damages == ()
    storage.stats()
    storage.groups()
    assert storage.last_commit == (3, b"three")


def test_a_closed_storage_is_as_it_was_to_the_last_time_of_change(path: Path, tmp_path: Path) -> None:
    make(path)
    with de.Storage(path, **SMALL_MEMORY) as storage:
        expected = all_rows(storage)
    with untouched(path):
        with de.Storage.open(path, **READ) as reader:
            assert reader.read_only
            assert repr(reader) == f"Storage({str(path)!r}, read_only)"
            read_everything(reader, tmp_path)
            for name, rows in all_rows(reader).items():
                assert_same_rows(rows, expected[name])
            assert traces(path) == traces(path)
        assert reader.closed
    with untouched(path), de.Storage(path, read_only=True) as reader:
        assert len(users_of(reader)) == len(expected["users"])


def test_what_a_killed_writer_left_is_as_it_was_a_torn_end_of_the_log_too(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.damo"
    with make(source, close=False) as writer:
        shutil.copytree(source, path)  # as a kill leaves it: the log has it all
        expected, sequence = all_rows(writer), writer.stats()["sequence"]
    (path / "generation-000009").mkdir()  # of a restore that was interrupted
    log = sorted(path.glob("generation-000001/log/*.log"))[-1]
    with log.open("ab") as file:
        file.write(b"half a record")
    (log.parent / "0000000009.log.tmp").write_bytes(b"a segment that never got its name")
    with untouched(path), de.Storage(path, **READ) as reader:
        assert reader.stats()["sequence"] == sequence
        assert reader.stats()["redone_records"] > 0
        read_everything(reader, tmp_path)
        for name, rows in all_rows(reader).items():
            assert_same_rows(rows, expected[name])
    with log.open("r+b") as file:  # and an end that is cut off
        file.truncate(log.stat().st_size - 20)
    with untouched(path), de.Storage(path, **READ) as reader:
        assert reader.stats()["sequence"] == sequence - 1


@contextmanager
def mounted_read_only(source: Path, place: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place.mkdir()
    for command in (["mount", "--bind", source, place], ["mount", "-o", "remount,ro,bind", place]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["umount", place], capture_output=True, check=False)
            pytest.skip(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_file_system_will_do(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "disk"
    source.mkdir()
    with make(path, close=False) as writer:
        shutil.copytree(path, source / "table.damo")
        expected = all_rows(writer)
    with mounted_read_only(source, tmp_path / "mounted") as place:
        with pytest.raises(de.StorageError, match="Read-only file system"):
            de.Storage(place / "table.damo")
        with de.Storage(place / "table.damo", **READ) as reader:
            read_everything(reader, tmp_path)
            for name, rows in all_rows(reader).items():
                assert_same_rows(rows, expected[name])


# A process of its own: the test runner has threads, and forks badly.
WITHOUT_PERMISSION = """
import os, sys
import damo_embedding as de
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
path, count = sys.argv[1], int(sys.argv[2])
assert not os.access(path, os.W_OK)
with de.Storage(path, memory="16MiB", read_only=True) as reader:
    users = de.Embedding(reader, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=16, group="user")
    assert len(users) == count == sum(len(part.keys) for part in users.scan())
    assert reader.verify().damages == ()
try:
    de.Storage(path)
except de.StorageError as error:
    print(error)
"""


def test_a_directory_that_may_not_be_written_to_will_do() -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming a user without permission needs root")
    # Not in tmp_path, where another user does not come.
    with tempfile.TemporaryDirectory(prefix="damo-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "table.damo"
        source = Path(directory) / "source.damo"
        with make(source, close=False) as writer:
            shutil.copytree(source, path)
            count = len(users_of(writer))
        with untouched(path):
            done = subprocess.run(
                [sys.executable, "-c", WITHOUT_PERMISSION, str(path), str(count)],
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        assert "Permission denied" in done.stdout


# ------------------------------------------------------------------ beside a writer


def test_a_reader_shows_one_moment_and_a_new_one_shows_the_next(path: Path, tmp_path: Path) -> None:
    with make(path, close=False) as writer:
        with untouched(path, contents=False):
            first, second = de.Storage(path, **READ), de.Storage(path, **READ)
            then, sequence = all_rows(first), first.stats()["sequence"]
        assert sequence == writer.stats()["sequence"]
        for name, rows in all_rows(writer).items():
            assert_same_rows(rows, then[name])
        writer.dump(tmp_path / "writer.bin")
        assert first.last_commit == second.last_commit == writer.last_commit == (3, b"three")
        for seed in range(10, 15):
            train(writer, seed)
        writer.commit(step=15)
        writer.compact()
        for reader in (first, second):
            for name, rows in all_rows(reader).items():
                assert_same_rows(rows, then[name])
            assert (reader.stats()["sequence"], reader.last_commit) == (sequence, (3, b"three"))
            reader.dump(tmp_path / "reader.bin")
            assert (tmp_path / "reader.bin").read_bytes() == (tmp_path / "writer.bin").read_bytes()
        second.close()
        with de.Storage(path, **READ) as third:
            assert third.last_commit == (15, b"")
            for name, rows in all_rows(third).items():
                assert_same_rows(rows, all_rows(writer)[name])
    read_everything(first, tmp_path)  # the writer is closed
    first.close()
    with pytest.raises(de.ClosedError):
        first.stats()


def test_the_writer_keeps_its_lock_when_a_reader_of_its_process_closes(path: Path) -> None:
    with make(path, close=False), fork_server() as server:
        de.Storage(path, **READ).close()
        session = server.session()
        with pytest.raises(AssertionError, match="AlreadyOpenError"):
            session("open", path, [], NOW)
        session("open", path, [], NOW, **READ)
        session.leave()


def as_served(storage: trainee.Trainee) -> Any:
    return SimpleNamespace(trainee=storage)


def look(base: Path, shape: Shape, verify: bool = False) -> Found:
    one = trainee.Trainee(base, shape, READ, None)
    try:
        assert not verify or one.storage.verify().damages == ()
        return trainee.look(as_served(one))
    finally:
        one.storage.close()


def hear(session: Session, told: Told) -> None:
    """What a training has said by now."""
    while not told.ended and not told.died and session.connection.poll():
        try:
            told.take(session.connection.recv())
        except (EOFError, OSError):
            told.died = True


# The operations that were done before it began and issued when it was over, and what it showed.
Look = tuple[int, int, Found]


def moments(found: list[Look]) -> int:
    return len({one.sequence for _, _, one in found})


def look_again_and_again(
    session: Session, base: Path, shape: Shape, openings: int, pause: float = 0.0
) -> tuple[Told, list[Look]]:
    """Beside a training, which is killed after so many openings, or later where it gets on slowly beside them."""
    told = Told()
    found: list[Look] = []
    while not told.ended and not told.died and (len(found) < openings or moments(found) < 8):
        hear(session, told)
        low = told.done
        one = look(base, shape, len(found) % 4 == 0)
        hear(session, told)
        found.append((low, told.issued, one))
        time.sleep(pause)
    hear_the_rest(told, session)
    assert not told.raised, told.raised
    return told, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "count", "seed"), [(SMALL, 600, 1), (SMALL, 600, 2), (TIGHT, 250, 3), (TIGHT, 250, 4)]
)
def test_every_opening_beside_a_writer_is_exactly_one_of_its_moments(
    tmp_path: Path, shape: Shape, count: int, seed: int
) -> None:
    """It trains under the least memory, evicts, cuts its log, makes checkpoints and dumps, closes and opens again."""
    base = make_base(tmp_path / "base")
    oracle = Oracle(shape.groups, START)
    workload = Workload([seed, 2], shape)
    operations: list[Operation] = workload.fill() + workload.draw(count)
    with fork_server(None, "reliability.trainee") as server:
        session = server.session()
        options = {"memory": "16MiB", "threads": 1, "log_bytes": "1MiB", "durability": "logged"}
        ask(session, trainee.open_storage, base, shape.name, options)
        session.start("call", trainee.train, operations, oracle.now, "", False, 0.002)
        told, found = look_again_and_again(session, base, shape, openings=80)
        left = look(base, shape)  # what the killed one left
        found.append((told.done, told.issued, left))
        expected = expect(oracle, operations[: told.issued + 1], told)
        for low, high, one in found:
            oracle.compare(one, expected.sequence(low), expected.sequence(high))
        # And a writer that opens it after that finds just that.
        session = server.session()
        after = ask(session, trainee.recover, base, shape.name, options)
        assert after.sequence == left.sequence
        oracle.compare(after, left.sequence, left.sequence)
        session.leave()
    assert len(found) > 5
    assert moments(found) > 3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SMALL, TIGHT], ids=["small", "tight"])
def test_beside_a_writer_in_mode_commit_it_is_exactly_a_commit(tmp_path: Path, shape: Shape) -> None:
    base = make_base(tmp_path / "base")
    oracle = Oracle(shape.groups, START)
    workload = Workload([9, 2], shape)
    operations: list[Operation] = workload.fill() + workload.draw(250)
    with fork_server(None, "reliability.trainee") as server:
        session = server.session()
        options = {"memory": "16MiB", "threads": 1, "durability": "commit"}
        ask(session, trainee.open_storage, base, shape.name, options)
        session.start("call", trainee.train, operations, oracle.now, "", False, 0.002)
        told, found = look_again_and_again(session, base, shape, openings=150, pause=0.05)
        expected = expect(oracle, operations[: told.issued + 1], told)
    for low, high, one in found:
        kept = [place for place in range(high + 1) if operations[place].verb in ("commit", "reopen")]
        since = max((place for place in kept if place <= low), default=-1)
        may_be = {expected.sequence(place) for place in [since, *kept] if place >= since}
        assert one.sequence in may_be, f"operation {one.sequence} is the last one there, expected one of {may_be}"
        oracle.compare(one, one.sequence, one.sequence)
    assert moments(found) > 3


def test_a_restore_beside_a_reader_does_not_reach_it(path: Path, tmp_path: Path) -> None:
    with make(path, close=False) as writer:
        writer.checkpoint(tmp_path / "checkpoint", step=77)
        kept = all_rows(writer)
        train(writer, 20)
        reader = de.Storage(path, **READ)
        then = all_rows(reader)
        assert then["users"] != kept["users"]
    de.Storage.restore(tmp_path / "checkpoint", path, **SMALL_MEMORY).close()
    assert sorted(entry.name for entry in path.glob("generation-*")) == ["generation-000002"]
    for name, rows in all_rows(reader).items():
        assert_same_rows(rows, then[name])
    assert reader.verify().damages == ()
    reader.close()
    with de.Storage(path, **READ) as reader:
        assert reader.last_commit == (77, b"")
        for name, rows in all_rows(reader).items():
            assert_same_rows(rows, kept[name])


def test_restores_again_and_again_beside_openings(path: Path, tmp_path: Path) -> None:
    """An opening that meets a generation on its way out tries again."""
    with make(path, close=False) as writer:
        kept = all_rows(writer)
        writer.checkpoint(tmp_path / "checkpoint", step=77)
    stop, trouble = threading.Event(), []

    def restore() -> None:
        try:
            while not stop.is_set():
                de.Storage.restore(tmp_path / "checkpoint", path, **SMALL_MEMORY).close()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=restore)
    thread.start()
    try:
        for _ in range(25):
            with de.Storage(path, **READ) as reader:
                for name, rows in all_rows(reader).items():
                    assert_same_rows(rows, kept[name])
    finally:
        stop.set()
        thread.join()
    assert not trouble


COUNTED = 200


def counting(storage: de.Storage) -> de.Embedding:
    return de.Embedding(
        storage,
        de.SGD(lr=0.1),
        de.Zeros(),
        dimension=4,
        group=1,
        admission=de.CountingBloomFilter(capacity=200_000, count=15),
    )


def count_keys(path: Path, stop: Any) -> None:
    """Each lookup is an operation that adds COUNTED keys to the filter, and never one that has come before."""
    with de.Storage(path, memory="16MiB", threads=1, log_bytes="1MiB") as storage:
        table = counting(storage)
        for number in range(4000):
            table.lookup(np.arange(COUNTED) + COUNTED * number)
            if stop.wait(0.0005):
                return


@pytest.mark.slow
def test_filters_are_of_the_same_moment_as_the_rows_however_often_the_log_is_cut(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=count_keys, args=(path, stop))
    writer.start()
    try:
        sequences = []
        deadline = time.monotonic() + 20
        while not (path / "CURRENT").exists() and time.monotonic() < deadline:
            time.sleep(0.001)  # it is being made
        while len(set(sequences)) < 60 and time.monotonic() < deadline:
            with de.Storage(path, **READ) as reader:
                sequence = reader.stats()["sequence"]
                if sequence > 0:
                    admission = counting(reader).admission
                    assert admission is not None
                    assert admission.adds == COUNTED * sequence
                    sequences.append(sequence)
        assert len(set(sequences)) > 5
        assert sequences == sorted(sequences)
    finally:
        stop.set()
        writer.join()
    with de.Storage(path, **READ) as reader, de.Storage(path, **SMALL_MEMORY) as storage:
        keys = np.arange(0, 500_000, 7)
        ours, theirs = counting(reader).admission, counting(storage).admission
        assert ours is not None
        assert theirs is not None
        assert np.array_equal(ours.estimate(keys), theirs.estimate(keys))


# ------------------------------------------------------------------ a log larger than memory


def test_a_log_larger_than_memory_is_read_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    group = Group(3, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=1024, seed=5)
    random = np.random.default_rng(5)
    with fork_server() as server:
        session = server.session()
        session("open", path, [group], NOW, memory="256MiB", threads=1, log_bytes="1GiB")
        for _ in range(20):
            keys = random.integers(0, 4000, 400)
            gradients = random.standard_normal((400, 1024)).astype(f32)
            session("embedding_call", 3, "apply_gradients", keys, gradients)
        session("embedding_call", 3, "erase", np.arange(0, 4000, 3))
        expected = session("rows", 3)
        session.kill()
    assert sum(12 * 1024 for _ in expected) > 16 << 20
    with untouched(path), de.Storage(path, **READ) as reader:
        assert len(list(temporary.iterdir())) == 1  # rows that do not fit lie here, until the end
        table = group.open(reader)
        assert len(table) == len(expected)
        assert_same_rows(rows_of(table), expected)
        keys = np.array(list(expected), np.uint64)
        found = table.lookup(keys, insert=False)
        assert all(found[i].tobytes() == expected[key].weights for i, key in enumerate(keys.tolist()))
        assert reader.verify().rows == len(expected)
    assert list(temporary.iterdir()) == []


def test_a_small_log_needs_no_place_for_temporary_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.damo"
    with make(source, close=False) as writer:
        shutil.copytree(source, path)
        expected = all_rows(writer)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    with de.Storage(path, **READ) as reader:
        read_everything(reader, tmp_path)
        for name, rows in all_rows(reader).items():
            assert_same_rows(rows, expected[name])


# ------------------------------------------------------------------ what is refused


REFUSED: dict[str, Callable[[de.Storage, de.Embedding, Path], object]] = {
    "lookup": lambda storage, users, new: users.lookup([1, 10**9]),
    "lookup of nothing": lambda storage, users, new: users.lookup([]),
    "apply_gradients": lambda storage, users, new: users.apply_gradients([1], np.ones((1, 16), f32)),
    "erase": lambda storage, users, new: users.erase([1]),
    "erase of nothing": lambda storage, users, new: users.erase([10**9]),
    "import_rows": lambda storage, users, new: users.import_rows([1], np.ones((1, 16), f32)),
    "commit": lambda storage, users, new: storage.commit(step=9),
    "checkpoint": lambda storage, users, new: storage.checkpoint(new),
    "expire": lambda storage, users, new: storage.expire(),
    "expire(now)": lambda storage, users, new: storage.expire(now=NOW + 10),
    "compact": lambda storage, users, new: storage.compact(),
    "drop_group": lambda storage, users, new: storage.drop_group("user"),
    "a new group": lambda storage, users, new: de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), 4, group="new"),
    "a new group's number": lambda storage, users, new: de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), 4, group=77),
    "another ttl": lambda storage, users, new: users_of(storage, ttl="1d"),
    "a filter": lambda storage, users, new: users_of(storage, admission=de.CountingBloomFilter(capacity=1000, count=2)),
    "the filter's end": lambda storage, users, new: de.Embedding(
        storage, de.SGD(lr=0.1), de.Zeros(), dimension=4, group=1, admission="all"
    ),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_a_verb_that_changes_is_refused_at_the_door(path: Path, tmp_path: Path, verb: str) -> None:
    storage = make(path, close=False)
    counting(storage).lookup([1, 2, 3])
    storage.close()
    with untouched(path), de.Storage(path, **READ) as reader:
        before = all_rows(reader), reader.stats()["sequence"]
        with pytest.raises(de.ReadOnlyError, match="read-only") as caught:
            REFUSED[verb](reader, users_of(reader), tmp_path / "new")
        if verb.startswith("lookup"):
            assert "insert=False" in str(caught.value)
        if "new group" in verb:
            assert 'it has group 1, group 3, group "user"' in str(caught.value)
        assert (all_rows(reader), reader.stats()["sequence"]) == before
        assert not (tmp_path / "new").exists()


def test_groups_are_opened_as_they_are_stored(path: Path) -> None:
    with make(path, close=False) as storage:
        users_of(storage)
        counting(storage).lookup([1, 2])
    with untouched(path), de.Storage(path, **READ) as reader:
        assert reader.groups() == {1: "", 3: "", 255: "user"}
        counting(reader)  # with an equal filter
        # Another rate says nothing of rows.
        users = de.Embedding(reader, de.Adam(lr=0.7), de.Uniform(-1.0, 1.0), dimension=16, group="user")
        assert len(users) > 0
        with pytest.raises(de.SchemaMismatchError, match="dimension"):
            de.Embedding(reader, de.Adam(lr=0.7), de.Uniform(-1.0, 1.0), dimension=17, group="user")
        with pytest.raises(de.SchemaMismatchError):
            de.Embedding(reader, de.SGD(lr=0.1), de.Normal(), dimension=8, group=3, seed=9)
    with de.Storage(path, **SMALL_MEMORY) as storage:
        assert users_of(storage).lr == 0.1


def test_lookups_read_what_training_would_start_from(path: Path) -> None:
    make(path)
    keys = np.arange(10**6, 10**6 + 500)
    with de.Storage(path, **SMALL_MEMORY) as storage:
        known = np.array(sorted(rows_of(users_of(storage))), np.uint64)
        expected = users_of(storage).lookup(keys, insert=False), users_of(storage).lookup(known, insert=False)
    with de.Storage(path, **READ) as reader:
        for _ in range(2):  # from the disk, and then from memory
            users = users_of(reader)
            assert np.array_equal(users.lookup(keys, insert=False), expected[0])
            assert np.array_equal(users.lookup(known, insert=False), expected[1])
            assert not users.lookup(keys, insert=False, missing="zeros").any()
        assert reader.stats()["hits"] > 0
        assert len(users) == len(known)


def test_rows_that_are_read_stay_in_memory_and_leave_it_when_it_is_full(path: Path) -> None:
    count = 6000
    with de.Storage(path, **SMALL_MEMORY) as storage:
        table = de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=500, group=1)
        for begin in range(0, count, 1000):
            keys = np.arange(begin, begin + 1000)
            table.apply_gradients(keys, np.full((1000, 500), 0.5, f32))
        expected = table.lookup(np.arange(count), insert=False)
    with untouched(path), de.Storage(path, **READ) as reader:
        table = de.Embedding(reader, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=500, group=1)
        random = np.random.default_rng(1)
        for _ in range(50):
            keys = random.integers(0, count, 400)
            assert np.array_equal(table.lookup(keys, insert=False), expected[keys])
        stats = reader.stats()
        assert stats["evictions"] > 0
        assert stats["hot_bytes_in_use"] <= stats["hot_bytes"]


@pytest.mark.parametrize(
    "option", [{"durability": "durable"}, {"log_bytes": "1MiB"}, {"ttl": "1d"}, {"disk": "1GiB"}], ids=str
)
def test_options_of_a_writer_are_refused(path: Path, option: dict[str, Any]) -> None:
    make(path)
    with pytest.raises(ValueError, match=f"{next(iter(option))} given with read_only=True"):
        de.Storage(path, **READ, **option)


def test_read_only_is_true_or_false(path: Path) -> None:
    make(path)
    for wrong in (1, None, "yes"):
        with pytest.raises(TypeError, match="read_only"):
            de.Storage(path, read_only=wrong)  # type: ignore[arg-type]
    with de.Storage(path, memory="16MiB", read_only=False) as storage:
        assert not storage.read_only
    with pytest.raises(TypeError):
        de.Storage.create(path, read_only=True)  # type: ignore[call-arg]


def test_there_must_be_a_storage(path: Path, tmp_path: Path) -> None:
    for opening in (de.Storage, de.Storage.open):
        with pytest.raises(de.StorageError, match="does not exist"):
            opening(path, read_only=True)
        assert not path.exists()
    path.mkdir()
    with untouched(path), pytest.raises(de.StorageError, match="is empty"):
        de.Storage(path, read_only=True)
    (path / "file").write_text("of somebody else")
    with untouched(path), pytest.raises(de.StorageError, match="is not a storage"):
        de.Storage(path, read_only=True)
    with pytest.raises(de.StorageError, match="is not a directory"):
        de.Storage(path / "file", read_only=True)
    de.Storage(tmp_path / "other.damo", **SMALL_MEMORY).close()
    with de.Storage(tmp_path / "other.damo", **READ) as reader:
        assert (reader.groups(), reader.last_commit, reader.stats()["sequence"]) == ({}, None, 0)


def test_a_storage_whose_creation_was_cut_short_is_empty(path: Path) -> None:
    with de.Storage(path, **SMALL_MEMORY) as storage:
        pass
    shutil.rmtree(path / "generation-000001" / "rocksdb")
    (path / "generation-000001" / "rocksdb").mkdir()
    with untouched(path), de.Storage(path, **READ) as reader:
        assert (reader.groups(), reader.stats()["sequence"], reader.stats()["rows"]) == ({}, 0, 0)
    assert storage.closed


def test_a_checkpoint_is_read_where_it_lies(path: Path, tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    with make(path, close=False) as writer:
        counting(writer).lookup([7, 7, 8])
        writer.checkpoint(place, step=5, extra=b"five")
        expected, sequence = all_rows(writer), writer.stats()["sequence"]
        train(writer, 30)
    with untouched(place), de.Storage(place, **READ) as reader:
        assert (reader.last_commit, reader.stats()["sequence"]) == ((5, b"five"), sequence)
        for name, rows in all_rows(reader).items():
            assert_same_rows(rows, expected[name])
        admission = counting(reader).admission
        assert admission is not None
        assert admission.estimate([7, 8, 9]).tolist() == [2, 1, 0]
        users_of(reader).lookup(np.arange(-500, 500), insert=False)
        assert reader.verify().rows == sum(map(len, expected.values()))
        reader.dump(tmp_path / "dump.bin")
        for name in ("MANIFEST", "dump.bin"):
            with pytest.raises(de.StorageError, match="outside"):
                reader.dump(place / name)
        with pytest.raises(de.ReadOnlyError):
            reader.commit(step=6)
        table = next(place.glob("rocksdb/*.sst"))
        shutil.copy(table, tmp_path / "table")
    with pytest.raises(de.StorageError, match="read_only=True"):
        de.Storage(place)
    table.unlink()
    data = bytearray((tmp_path / "table").read_bytes())
    data[50] ^= 1
    table.write_bytes(data)
    with untouched(place), de.Storage(place, **READ) as reader:
        assert any(table.name in damage.what for damage in reader.verify(strict=False).damages)
    table.unlink()
    with untouched(place), pytest.raises(de.CorruptionError, match="missing"):
        de.Storage(place, read_only=True)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "CURRENT": lambda generation: (generation.parent / "CURRENT").write_text("generation-000001 0000\n"),
    "names": lambda generation: generation.rename(generation.parent / "generation-000005"),
    "MANIFEST": lambda generation: (generation / "MANIFEST").unlink(),
    "log": lambda generation: shutil.rmtree(generation / "log"),
    "segment": lambda generation: [file.unlink() for file in generation.glob("log/*.log")],
    "rocksdb": lambda generation: shutil.rmtree(generation / "rocksdb"),
    "sst": lambda generation: next(generation.glob("rocksdb/*.sst")).unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_a_corruption_error_and_stays_as_it_is(path: Path, what: str) -> None:
    make(path)
    DAMAGE[what](path / "generation-000001")
    started = time.monotonic()
    with untouched(path), pytest.raises(de.CorruptionError, match=r"\[(open|read)\]"):
        de.Storage(path, read_only=True)
    assert time.monotonic() - started < 5


def test_a_damaged_record_before_the_sync_mark_is_a_corruption_error(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.damo"
    with make(source, close=False):
        shutil.copytree(source, path)
    log = sorted(path.glob("generation-000001/log/*.log"))[0]
    data = bytearray(log.read_bytes())
    data[len(data) // 3] ^= 1
    log.write_bytes(data)
    with untouched(path), pytest.raises(de.CorruptionError, match=r"\.log"):
        de.Storage(path, read_only=True)


def test_verify_names_what_is_damaged(path: Path) -> None:
    make(path)
    table = next(path.glob("generation-000001/rocksdb/*.sst"))
    with de.Storage(path, **READ) as reader:
        whole = reader.verify()
        assert whole.files > 0
        data = bytearray(table.read_bytes())
        data[100] ^= 1
        table.write_bytes(data)
        with untouched(path):
            report = reader.verify(strict=False)
        assert any(table.name in damage.file for damage in report.damages)


# ------------------------------------------------------------------ time


def test_the_clock_of_a_reader_is_its_own(path: Path) -> None:
    ttl = timedelta(days=10)
    with de.Storage(path, **SMALL_MEMORY, ttl=ttl) as storage:
        storage.now = NOW
        users = users_of(storage)
        users.apply_gradients([1, 2, 3], np.ones((3, 16), f32))
        storage.now = NOW + 86_400 * 5
        users.apply_gradients([3, 4], np.ones((2, 16), f32))
        with untouched(path, contents=False), de.Storage(path, **READ) as reader:
            assert reader.now == NOW + 86_400 * 5
            view = users_of(reader)
            assert len(view) == 4
            reader.now = NOW + 86_400 * 12
            assert len(view) == 2 == len(rows_of(view))
            assert view.contains([1, 2, 3, 4]).tolist() == [False, False, True, True]
            reader.now = NOW + 86_400 * 4_000  # far ahead: nothing is lost by it
            assert len(view) == 0
            assert reader.now == NOW + 86_400 * 4_000
            assert users_of(reader, ttl=None) is not view
        assert (len(users), storage.now) == (4, NOW + 86_400 * 5)


def test_the_wall_clock_ages_rows_for_a_reader(path: Path) -> None:
    with de.Storage(path, **SMALL_MEMORY, ttl=30) as storage:
        storage.now = int(time.time()) - 60
        users_of(storage).lookup([1, 2])
    with de.Storage(path, **READ) as reader:
        assert len(users_of(reader)) == 0


# ------------------------------------------------------------------ handles


FORKED = """
import os, sys
import damo_embedding as de
reader = de.Storage(sys.argv[1], memory="16MiB", read_only=True)
users = de.Embedding(reader, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=16, group="user")
child = os.fork()
if child == 0:
    code = 1
    try:
        users.lookup([1], insert=False)
    except de.ForkedHandleError:
        with de.Storage(sys.argv[1], memory="16MiB", read_only=True) as own:
            code = 0 if own.groups() else 2
    del users, reader
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
users.lookup([1], insert=False)
reader.close()
"""


def test_a_forked_child_opens_its_own(path: Path) -> None:
    make(path)
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_threads_read_beside_each_other_until_the_close(path: Path) -> None:
    make(path)
    reader = de.Storage(path, **READ)
    users = users_of(reader)
    keys = np.arange(-400, 400)
    expected = users.lookup(keys, insert=False)
    trouble: list[BaseException] = []

    def read() -> None:
        try:
            while True:
                assert np.array_equal(users.lookup(keys, insert=False), expected)
                users.prefetch(keys)
                len(rows_of(users))
        except de.ClosedError:
            pass
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    reader.close()
    for thread in threads:
        thread.join()
    assert not trouble
    with pytest.raises(de.ClosedError):
        users.lookup(keys, insert=False)


def test_a_module_of_torch_reads_in_eval_and_says_so_in_train(path: Path) -> None:
    torch = pytest.importorskip("torch")
    from damo_embedding.torch import Embedding, EmbeddingCollection, Feature, load_checkpoint, save_checkpoint

    with de.Storage(path, **SMALL_MEMORY) as storage:
        table = Embedding(storage, group="item", dimension=4, optimizer=de.SGD(lr=0.1))
        table(torch.arange(5)).sum().backward()
        expected = table.eval()(torch.arange(8))
        save_checkpoint(path.parent / "1", table, None, storage, 1)
    with untouched(path), de.Storage(path, **READ) as reader:
        table = Embedding(reader, group="item", dimension=4, optimizer=de.SGD(lr=0.1))
        fields = EmbeddingCollection(reader, {"item": Feature(4)}, optimizer=de.SGD(lr=0.1))
        for module, ids in ((table, torch.arange(8)), (fields, {"item": torch.arange(8)})):
            with pytest.raises(de.ReadOnlyError, match=r"eval\(\)"):
                module(ids)
            module.eval()
        assert torch.equal(table(torch.arange(8)), expected)
        assert torch.equal(fields({"item": torch.arange(8)})["item"], expected)
        with pytest.raises(de.ReadOnlyError):
            save_checkpoint(path.parent / "2", table, None, reader, 2)
        assert not (path.parent / "2").exists()
        with pytest.raises(de.ReadOnlyError, match="go back"):
            load_checkpoint(path.parent / "1", table, None, reader)
        assert torch.equal(table(torch.arange(8)), expected)
