# SPDX-License-Identifier: Apache-2.0
"""durability="commit": no log, and after a crash of any kind exactly what the storage was at the last commit.

What it was is what the same process said of it right after that commit: every row, its state, count and time, the
groups with their steps, the filters' counts, the clock, last_commit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from commit_session import GROUPS, NOW, arm, everything, everything_changes, train
from comparing import Row, assert_same_rows, rows_of
from reliability import faults
from reliability.mounts import Tmpfs
from reliability.suite import SkippedError
from storage_server import ForkServer, Group, Session, fork_server

pytestmark = pytest.mark.core

FILTER = de.CountingBloomFilter(capacity=1000, count=3)
FILTERED = Group(9, de.SGD(lr=0.5), de.Zeros(), dimension=4, admission=FILTER)
OPTIONS: dict[str, Any] = {"memory": "16MiB", "threads": 2}
IN_MODE_COMMIT = {**OPTIONS, "durability": "commit"}
MODES = ("commit", "logged", "durable")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value for name, value in found.items() if name != "rows"} == {
        name: value for name, value in expected.items() if name != "rows"
    }
    assert found["rows"].keys() == expected["rows"].keys()
    for group, rows in expected["rows"].items():
        assert_same_rows(found["rows"][group], rows)


def call(session: Session, function: Any, *args: Any) -> Any:
    return session("call", function, *args)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "commit_session") as started:
        yield started


class Life:
    """A storage and the process that has it open now."""

    def __init__(self, server: ForkServer, path: Path, groups: list[Group] = GROUPS) -> None:
        self.server = server
        self.path = path
        self.groups = groups
        self.trained = 0

    def open(self, groups: list[Group] | None = None, **options: Any) -> None:
        self.session = self.server.session()
        wanted = self.groups if groups is None else groups
        self.session("open", self.path, wanted, NOW, **{**IN_MODE_COMMIT, **options})

    def train(self, steps: int = 10) -> None:
        call(self.session, train, self.trained, steps)
        self.trained += steps

    def commit(self, step: int, extra: bytes = b"") -> dict[str, Any]:
        self.session("storage_call", "commit", step, extra)
        return self.everything()

    def everything(self) -> dict[str, Any]:
        return dict(call(self.session, everything))

    def kill_and_look(self, **options: Any) -> dict[str, Any]:
        self.session.kill()
        self.open([], **options)
        return self.everything()


@pytest.fixture
def life(server: ForkServer, path: Path) -> Iterator[Life]:
    made = Life(server, path)
    yield made
    made.session.kill()


def generations(path: Path) -> list[Path]:
    return sorted(path.glob("generation-*"))


def current(path: Path) -> Path:
    return path / (path / "CURRENT").read_text().split()[0]


def log_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.log"))


# ------------------------------------------------------------------- kill -9


def test_a_kill_goes_back_to_the_last_commit_to_the_last_bit(life: Life) -> None:
    life.open()
    for number in range(3):
        life.train()
        kept = life.commit(number, b"here")
        assert kept["last_commit"] == (number, b"here")
        life.train()
        assert life.session("storage_call", "stats")["evictions"] > 0  # rows of after the commit are on the disk
        assert life.everything()["rows"] != kept["rows"]
        found = life.kill_and_look()
        assert_same(found, kept)


def test_without_a_commit_a_kill_goes_back_to_the_opening(life: Life) -> None:
    life.open()
    life.train()
    empty = life.kill_and_look()
    assert empty["groups"] == []
    assert empty["last_commit"] is None
    assert empty["sequence"] == 0
    life.session.kill()
    life.open(durability="logged")
    life.train()
    logged = life.everything()
    assert_same(life.kill_and_look(), logged)  # opened in mode commit, it has what the log had
    life.session.kill()
    life.open()
    life.train()
    assert_same(life.kill_and_look(), logged)


POINTS = [
    (faults.KILL_BEFORE, "mkdir", "generation", "old"),
    (faults.KILL_AFTER, "mkdir", "generation", "old"),
    (faults.KILL_BEFORE, "sync", "ingest.sst", "old"),
    (faults.KILL_BEFORE, "rename", "COMMITTED", "old"),
    (faults.KILL_AFTER, "link", "sst", "old"),
    (faults.TEAR, "write", "rocksdb-manifest", "old"),
    (faults.KILL_AFTER, "rename", "MANIFEST", "old"),
    (faults.TEAR, "write", "log.tmp", "old"),
    (faults.KILL_AFTER, "rename", "log", "old"),
    (faults.KILL_BEFORE, "sync", "generation", "old"),
    (faults.TEAR, "write", "CURRENT.tmp", "old"),
    (faults.KILL_BEFORE, "rename", "CURRENT", "old"),
    (faults.KILL_AFTER, "rename", "CURRENT", "new"),
    (faults.KILL_BEFORE, "unlink", "sst", "new"),
    (faults.KILL_AFTER, "unlink", "sst", "new"),
    (faults.KILL_AFTER, "unlink", "generation", "new"),
]


@pytest.fixture(scope="module")
def before_and_after(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """A storage at its commit and after it, by the account of one with a log: nothing is on the disk for asking."""
    twin = Life(server, tmp_path_factory.mktemp("twin") / "table.damo")
    twin.open(durability="logged")
    twin.train(6)
    old = twin.commit(1)
    twin.train(6)
    new = twin.everything()
    twin.session.kill()
    return old, new


@pytest.mark.parametrize(("action", "name", "file_class", "which"), POINTS)
@pytest.mark.parametrize("closing", [False, True], ids=["commit", "close"])
def test_killed_within_a_commit_it_is_the_old_one_or_the_new_one(
    life: Life,
    tmp_path: Path,
    before_and_after: tuple[dict[str, Any], ...],
    action: int,
    name: str,
    file_class: str,
    which: str,
    closing: bool,
) -> None:
    old, new = before_and_after
    life.open()
    life.train(6)
    life.session("storage_call", "commit", 1)
    life.train(6)
    epitaph = tmp_path / "epitaph"

    def end() -> None:
        call(life.session, arm, life.path, action, name, file_class, epitaph)  # an eviction may come by at once
        life.session("storage_call", *(("close",) if closing else ("commit", 2)))

    with pytest.raises((EOFError, OSError)):
        end()
    assert epitaph.read_text().startswith(name)
    if not closing:
        new = {**new, "sequence": new["sequence"] + 1, "last_commit": (2, b"")}
    found = life.kill_and_look()
    assert_same(found, old if which == "old" else new)
    assert len(generations(life.path)) == 2  # nothing is left of what was interrupted


def test_after_a_commit_that_cannot_be_written_nothing_more_is_learnt_in_vain(life: Life, tmp_path: Path) -> None:
    life.open()
    life.train(6)
    old = life.commit(1)
    life.train(6)
    call(life.session, arm, life.path, faults.FAIL, "sync", "ingest.sst", tmp_path / "epitaph")
    with pytest.raises(AssertionError, match=r"StorageError: .*Input/output error"):
        life.session("storage_call", "commit", 2)
    for verb in (lambda: life.train(1), lambda: life.session("storage_call", "commit", 3)):
        with pytest.raises(AssertionError, match=r"StorageError: .*until the storage is closed and opened again"):
            verb()
    assert_same(life.kill_and_look(), old)


# ------------------------------------------------------------- close, other modes


def test_a_clean_close_keeps_everything_and_the_commit_of_before(life: Life) -> None:
    life.open()
    life.train()
    life.commit(7, b"x")
    life.train()
    last = life.everything()
    life.session("storage_call", "close")
    assert len(generations(life.path)) == 1
    life.session.kill()
    for mode in MODES:
        life.open([], durability=mode)
        assert_same(life.everything(), last)
        assert life.session("storage_call", "stats")["redone_records"] == 0
        life.session("storage_call", "close")
        life.session.kill()
    assert last["last_commit"] == (7, b"x")


@pytest.mark.parametrize("ends", ["kill", "close"])
def test_modes_may_change_at_each_opening(life: Life, ends: str) -> None:
    order = [MODES[which] for which in (0, 1, 0, 2, 0, 0, 1, 2, 1, 0)]
    for number, mode in enumerate(order):
        life.open(durability=mode)
        life.train(4)
        kept = life.commit(number)
        life.train(4)
        if mode != "commit" or ends == "close":
            kept = life.everything()
        if ends == "close":
            life.session("storage_call", "close")
        life.session.kill()
        life.open([], durability=MODES[number % 3])
        assert_same(life.everything(), kept)
        life.session.kill()


def test_after_a_kill_nothing_is_there_that_another_version_would_not_know(life: Life) -> None:
    life.open()
    life.train()
    life.commit(1)
    life.train()
    life.session.kill()
    assert sorted(entry.name.split("-")[0] for entry in life.path.iterdir()) == [
        "CURRENT",
        "LOCK",
        "generation",
        "generation",
    ]
    kept = current(life.path)
    assert sorted(entry.name for entry in kept.iterdir()) == ["MANIFEST", "log", "rocksdb"]
    (working,) = set(generations(life.path)) - {kept}
    assert [entry.name for entry in working.iterdir()] == ["rocksdb"]


# ------------------------------------------------- everything that is not rows


def test_filters_lifetimes_the_clock_imports_and_groups_go_back_too(server: ForkServer, path: Path) -> None:
    life = Life(server, path, [*GROUPS, FILTERED])
    life.open()
    life.train(4)
    look(life, FILTERED, np.arange(0, 200).repeat(2))
    life.session("storage_call", "drop_group", 4)
    kept = life.commit(1)
    assert kept["filters"][9][0] == 400
    call(life.session, everything_changes)
    changed = life.everything()
    assert changed["filters"] != kept["filters"]
    assert changed["now"] > kept["now"]
    assert {group[0] for group in changed["groups"]} == {3, 9, 200}
    life.session.kill()
    life.open([FILTERED])
    assert_same(life.everything(), kept)
    # Counted twice before the commit: the third time is the one.
    found = life.session("embedding_call", 9, "lookup", np.arange(0, 300))
    assert found.shape == (300, 4)
    assert sorted(life.everything()["rows"][9]) == list(range(200))
    life.session.kill()


def look(life: Life, group: Group, keys: np.ndarray) -> None:
    life.session("embedding_call", group.group, "lookup", keys)


def test_what_expired_after_the_commit_is_alive_again(path: Path, server: ForkServer) -> None:
    life = Life(server, path)
    life.open(ttl="10d")
    life.train(4)
    kept = life.commit(1)
    assert kept["groups"][0][2] > 0
    life.session("set_now", NOW + 20 * 86_400)
    assert life.session("storage_call", "expire") > 0
    life.session("storage_call", "compact")
    found = life.kill_and_look()
    assert_same(found, kept)
    life.session.kill()


# ------------------------------------------------------------------ stats, cost


def test_no_log_is_written_and_stats_say_so(life: Life) -> None:
    life.open()
    before = log_bytes(life.path)
    life.train(20)
    stats = life.session("storage_call", "stats")
    assert stats["log_bytes"] == 0
    assert stats["sequence"] > 20
    assert stats["synced_sequence"] == 0
    assert log_bytes(life.path) == before < 4096
    life.commit(1)
    stats = life.session("storage_call", "stats")
    assert stats["synced_sequence"] == stats["sequence"]
    life.train(20)
    life.session("storage_call", "compact")
    stats = life.session("storage_call", "stats")
    kept = [file for file in (current(life.path) / "rocksdb").glob("*.sst") if file.stat().st_nlink == 1]
    assert stats["recovery_bytes"] == sum(file.stat().st_size for file in kept) > 0
    life.commit(2)
    assert life.session("storage_call", "stats")["recovery_bytes"] == 0


def test_a_commit_links_the_table_files_that_did_not_change(life: Life) -> None:
    life.open()
    life.train()
    life.commit(1)
    before = {file.stat().st_ino for file in (current(life.path) / "rocksdb").glob("*.sst")}
    life.session("embedding_call", 3, "apply_gradients", np.array([1]), np.ones((1, 1024), np.float32))
    written = life.session("storage_call", "stats")["disk_bytes_written"]
    life.commit(2)
    after = {file.stat().st_ino for file in (current(life.path) / "rocksdb").glob("*.sst")}
    assert len(before) > 0
    assert before <= after
    assert len(after - before) == 1
    assert life.session("storage_call", "stats")["disk_bytes_written"] - written < 20_000


def test_a_commit_of_nothing_new_builds_nothing(life: Life) -> None:
    life.open()
    life.train()
    life.commit(1)
    point = current(life.path)
    kept = life.commit(2, b"later")
    assert current(life.path) == point
    assert kept["last_commit"] == (2, b"later")
    assert_same(life.kill_and_look(), kept)


# ------------------------------------------------------- checkpoints, verify


def test_checkpoints_are_as_in_the_other_modes(tmp_path: Path, path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    with de.Storage(path, **IN_MODE_COMMIT) as storage:
        embedding = FILTERED.open(storage)
        embedding.lookup(np.arange(50).repeat(3))
        storage.commit(1)
        embedding.apply_gradients(np.arange(50), np.ones((50, 4), np.float32))
        storage.checkpoint(checkpoints / "1", step=1)  # the filter has not counted since the commit
        rows, adds = rows_of(embedding), embedding.admission.adds  # type: ignore[union-attr]
        embedding.erase(np.arange(50))
        storage.commit(2)
        storage.checkpoint(checkpoints / "2", step=2)
    for mode in MODES:
        options = {**OPTIONS, "durability": mode}
        with de.Storage.restore(checkpoints / "1", tmp_path / mode, **options) as storage:
            assert storage.last_commit == (1, b"")
            embedding = FILTERED.open(storage)
            assert_same_rows(rows_of(embedding), rows)
            assert embedding.admission is not None
            assert embedding.admission.adds == adds
            assert storage.verify().damages == ()
    with de.Storage.open_or_restore(tmp_path / "third", checkpoints, **IN_MODE_COMMIT) as storage:
        assert storage.last_commit == (2, b"")
        assert len(FILTERED.open(storage)) == 0
        storage.commit(3)
    with de.Storage.open_or_restore(tmp_path / "third", checkpoints, **IN_MODE_COMMIT) as storage:
        assert storage.restored_from is None
        assert storage.last_commit == (3, b"")


def test_verify_reads_the_recovery_point(path: Path) -> None:
    with de.Storage(path, **IN_MODE_COMMIT) as storage:
        embedding = GROUPS[0].open(storage)
        embedding.apply_gradients(np.arange(300), np.ones((300, 1024), np.float32))
        storage.commit(1)
        assert storage.verify().damages == ()
        embedding.apply_gradients(np.arange(300), np.ones((300, 1024), np.float32))
        storage.compact()
        point = current(path)
        assert storage.verify().damages == ()
        for name in ("MANIFEST", "log/0000000001.log", "rocksdb/*.sst", "rocksdb/MANIFEST-*"):
            (file,) = point.glob(name)
            whole = file.read_bytes()
            file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
            with pytest.raises(de.CorruptionError, match=file.name):
                storage.verify()
            file.write_bytes(whole)
        assert storage.verify().damages == ()


def test_salvage_without_current_takes_the_recovery_point(life: Life, tmp_path: Path) -> None:
    life.open()
    life.train()
    kept = life.commit(1)
    life.train()
    life.session.kill()
    (life.path / "CURRENT").write_text("generation-000009 0\n")
    report = de.Storage.salvage(life.path, tmp_path / "out")
    assert report.rows == sum(group[2] for group in kept["groups"])
    with de.Storage.open(tmp_path / "out", **IN_MODE_COMMIT) as storage:
        for group in GROUPS:
            assert_same_rows(rows_of(group.open(storage)), kept["rows"][group.group])


# ------------------------------------------------------------------ full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs]:
    try:
        mounted = Tmpfs(tmp_path / "disk", megabytes=128)
    except SkippedError as reason:
        pytest.skip(str(reason))
    yield mounted
    mounted.unmount()


def rows_after_a_crash(path: Path, copy: Path) -> tuple[dict[int, Row], Any]:
    """What an opening would find if the process that has it open died now."""
    shutil.copytree(path, copy)
    with de.Storage.open(copy, **OPTIONS) as storage:
        return rows_of(GROUPS[0].open(storage)), storage.last_commit


def test_a_commit_on_a_full_disk_leaves_the_last_one_and_the_handle_goes_on(disk: Tmpfs, tmp_path: Path) -> None:
    path = disk.directory / "storage"
    with de.Storage(path, **IN_MODE_COMMIT) as storage:
        embedding = GROUPS[0].open(storage)
        embedding.apply_gradients(np.arange(400), np.ones((400, 1024), np.float32))
        storage.commit(1)
        kept = rows_of(embedding)
        for pages in (2, 10, 30, 60, 100):
            embedding.apply_gradients(np.arange(100), np.ones((100, 1024), np.float32))
            disk.leave(pages)
            with pytest.raises(de.StorageError, match="No space left"):
                storage.commit(2)
            disk.make_space()
            assert storage.last_commit == (1, b"")
            rows, last = rows_after_a_crash(path, tmp_path / f"copy-{pages}")
            assert last == (1, b"")
            assert_same_rows(rows, kept)
        later = rows_of(embedding)
        storage.commit(3)
        rows, last = rows_after_a_crash(path, tmp_path / "copy")
        assert last == (3, b"")
        assert_same_rows(rows, later)
        assert len(generations(path)) == 2


def test_a_close_on_a_full_disk_raises_and_leaves_the_last_commit(disk: Tmpfs) -> None:
    path = disk.directory / "storage"
    storage = de.Storage(path, **IN_MODE_COMMIT)
    embedding = GROUPS[0].open(storage)
    embedding.apply_gradients(np.arange(400), np.ones((400, 1024), np.float32))
    storage.commit(1)
    kept = rows_of(embedding)
    embedding.apply_gradients(np.arange(400), np.ones((400, 1024), np.float32))
    disk.leave(10)
    with pytest.raises(de.StorageError, match="No space left"):
        storage.close()
    assert storage.closed
    storage.close()
    disk.make_space()
    with de.Storage.open(path, **OPTIONS) as storage:
        assert storage.last_commit == (1, b"")
        assert_same_rows(rows_of(GROUPS[0].open(storage)), kept)


def test_a_limit_on_disk_counts_the_files_of_the_last_commit(path: Path) -> None:
    limit = 96 << 20
    most = 0
    with de.Storage(path, **IN_MODE_COMMIT, disk=limit) as storage:
        embedding = GROUPS[0].open(storage)
        for step in range(120):
            keys = np.arange(60 * step, 60 * step + 120)
            embedding.apply_gradients(keys, np.ones((120, 1024), np.float32))
            most = max(most, bytes_below(path))
            if step % 20 == 19:
                storage.commit(step)
        assert storage.stats()["forgotten"] > 0
        assert len(embedding) > 300
    assert most < limit


def bytes_below(path: Path) -> int:
    """What the directory takes, each file once."""
    sizes: dict[int, int] = {}
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                status = os.stat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())
