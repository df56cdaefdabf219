# SPDX-License-Identifier: Apache-2.0
"""Storage: open and close, commit, checkpoint and restore, dump, the clock, and who may use it."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import assert_same_rows, files_of, rows_of

DIMENSION = 4
f32 = np.float32
LATE = 2**40  # ahead of any wall clock


def make(storage: de.Storage, group: int | str = 7, dimension: int = DIMENSION) -> de.Embedding:
    return de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=dimension, group=group)


def train(embedding: de.Embedding, steps: int = 3, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for _ in range(steps):
        keys = random.integers(0, 50, 40)
        embedding.apply_gradients(keys, random.standard_normal((40, embedding.dimension)).astype(f32))


def small(path: Path, **options: Any) -> de.Storage:
    return de.Storage(path, memory="16MiB", threads=2, **options)


@pytest.fixture
def closed(path: Path) -> Path:
    """A storage with rows in two groups, the second named; closed."""
    with small(path) as storage:
        train(make(storage))
        train(make(storage, "user", 2))
        make(storage).lookup([1000])
        storage.commit(5, b"five")
    return path


# ------------------------------------------------------------- open, create


def test_open_or_create_makes_a_storage_where_nothing_is(path: Path) -> None:
    with small(path) as storage:
        assert storage.groups() == {}
        assert storage.path == str(path)
        assert repr(storage) == f"Storage({str(path)!r})"
    assert repr(storage) == f"Storage({str(path)!r}, closed)"


def test_open_or_create_takes_an_empty_directory(path: Path) -> None:
    path.mkdir()
    small(path).close()
    assert (path / "CURRENT").exists()


def test_open_or_create_opens_what_is_there(closed: Path) -> None:
    with small(closed) as storage:
        assert storage.groups() == {7: "", 255: "user"}


def test_a_path_may_end_in_a_slash_and_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with de.Storage("table.damo/", memory="16MiB") as storage:
        monkeypatch.chdir("/")
        train(make(storage))
        storage.checkpoint(f"{tmp_path}/checkpoint/")
    with de.Storage.restore(f"{tmp_path}/checkpoint/", f"{tmp_path}/copy/", memory="16MiB") as storage:
        assert make(storage).step == 3


def test_create_refuses_a_storage_that_exists(closed: Path) -> None:
    before = files_of(closed)
    with pytest.raises(de.StorageError, match=r"\[create\].*is a storage already.*Storage.open"):
        de.Storage.create(closed, memory="16MiB")
    assert files_of(closed) == before


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_open_refuses_where_no_storage_is(path: Path, what: str) -> None:
    if what == "empty":
        path.mkdir()
    with pytest.raises(de.StorageError, match=r"\[open\].*Storage.create"):
        de.Storage.open(path, memory="16MiB")
    assert list(path.parent.rglob("*")) == ([path] if what == "empty" else [])


def test_create_and_open_are_strict_halves_of_storage(path: Path) -> None:
    with de.Storage.create(path, memory="16MiB") as storage:
        train(make(storage))
    with de.Storage.open(path, memory="16MiB") as storage:
        assert make(storage).step == 3


@pytest.mark.parametrize("opening", [de.Storage, de.Storage.create, de.Storage.open])
def test_a_directory_of_others_is_refused_and_untouched(path: Path, opening: Callable[..., de.Storage]) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(de.StorageError, match=r"(not a storage|is empty)"):
        opening(path, memory="16MiB")
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(de.StorageError, match="not a directory"):
        small(path)


def test_a_parent_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for opening in (de.Storage, de.Storage.create):
        for path in (tmp_path / "absent" / "table.damo", f"{tmp_path}/absent/table.damo/"):
            with pytest.raises(
                de.StorageError, match=r"\[open\] the directory .*/absent does not exist: make it first"
            ):
                opening(path, memory="16MiB")


def test_a_checkpoint_is_not_taken_for_a_storage_nor_a_storage_for_a_checkpoint(kept: Path, path: Path) -> None:
    before = files_of(kept)
    for opening in (de.Storage, de.Storage.create, de.Storage.open):
        with pytest.raises(de.StorageError, match=r"is a checkpoint: restore it .* with Storage\.restore"):
            opening(kept, memory="16MiB")
    small(path).close()
    with pytest.raises(de.StorageError, match=r"not a checkpoint: .*; it is a storage: open it with Storage\(path\)"):
        de.Storage.restore(path, path.with_name("copy"), memory="16MiB")
    assert files_of(kept) == before
    assert not path.with_name("copy").exists()


@pytest.fixture
def locked_away() -> Iterator[Path]:
    """An empty directory that we may not write to, reachable for a user who is nobody."""
    home = Path(tempfile.mkdtemp(prefix="damo-"))
    home.chmod(0o755)
    directory = home / "table.damo"
    directory.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        os.seteuid(user)
        shutil.rmtree(home)


def test_a_directory_that_is_not_writable_is_refused(locked_away: Path) -> None:
    with pytest.raises(de.StorageError, match="needs a directory it may write to"):
        small(locked_away)
    assert list(locked_away.iterdir()) == []


def test_a_creation_that_was_interrupted_starts_again(closed: Path, tmp_path: Path) -> None:
    path = tmp_path / "interrupted"
    shutil.copytree(closed, path)
    (path / "CURRENT").unlink()  # written last
    (path / "CREATING").touch()
    with small(path) as storage:
        assert storage.groups() == {}
    assert not (path / "CREATING").exists()
    assert [file.name for file in path.glob("generation-*")] == ["generation-000002"]


def test_a_generation_that_is_not_live_is_removed(closed: Path) -> None:
    (closed / "generation-000009").mkdir()
    with small(closed) as storage:
        assert make(storage).step == 3
    assert [file.name for file in closed.glob("generation-*")] == ["generation-000001"]


# ------------------------------------------------------------------- reopen


def test_reopening_keeps_everything_to_the_last_bit(path: Path) -> None:
    with small(path) as storage:
        storage.now = LATE
        train(make(storage))
        train(make(storage, "user", 2))
        make(storage).lookup([1000])
        make(storage).erase([3])
        before = {group: rows_of(make(storage, group, dimension)) for group, dimension in ((7, 4), ("user", 2))}
        numbers = [(len(make(storage)), make(storage).step), (len(make(storage, "user", 2)), 3)]
    for _ in range(2):
        with small(path) as storage:
            assert storage.groups() == {7: "", 255: "user"}
            assert [(len(e), e.step) for e in (make(storage), make(storage, "user", 2))] == numbers
            assert_same_rows(rows_of(make(storage)), before[7])
            assert_same_rows(rows_of(make(storage, "user", 2)), before["user"])


def test_reopening_after_a_close_redoes_nothing(closed: Path) -> None:
    with small(closed) as storage:
        assert storage.stats()["redone_records"] == 0


@pytest.mark.parametrize("rows", [200, 300], ids=["a segment for several records", "a segment for each record"])
def test_counts_are_right_when_the_log_begins_a_new_segment(path: Path, rows: int) -> None:
    with small(path, log_bytes="1MiB") as storage:
        embedding = make(storage, dimension=1024)
        for begin in range(0, 5 * rows, rows):
            embedding.apply_gradients(np.arange(begin, begin + rows), np.ones((rows, 1024), f32))
    with small(path) as storage:
        embedding = make(storage, dimension=1024)
        assert (embedding.step, len(embedding)) == (5, 5 * rows)


def test_a_storage_may_be_opened_with_other_memory_threads_and_durability(closed: Path) -> None:
    with de.Storage(closed, memory=64 << 20, threads=1, durability="durable", log_bytes="1MiB") as storage:
        train(make(storage))
        assert make(storage).step == 6
        assert storage.stats()["synced_sequence"] == storage.stats()["sequence"]


# -------------------------------------------------------------------- lock


def test_a_second_open_in_this_process_is_refused(storage: de.Storage) -> None:
    with pytest.raises(de.AlreadyOpenError, match=rf"in this process already \(process {os.getpid()}\)"):
        small(Path(storage.path))
    train(make(storage))


def test_a_second_open_by_another_name_is_refused(storage: de.Storage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(storage.path)
    with pytest.raises(de.AlreadyOpenError):
        small(tmp_path / "link")


OTHER_PROCESS = """
import sys, damo_embedding as de
try:
    de.Storage(sys.argv[1], memory="16MiB").close()
except de.AlreadyOpenError as error:
    print(error)
"""


def test_a_second_open_in_another_process_names_the_holder(storage: de.Storage) -> None:
    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, storage.path],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    assert f"process {os.getpid()} on " in other()
    with pytest.raises(de.AlreadyOpenError):  # does not lose the lock, as closing a POSIX-locked file would
        small(Path(storage.path))
    assert f"process {os.getpid()} on " in other()
    storage.close()
    assert other() == ""


# ------------------------------------------------------------------- damage


def _log(path: Path) -> Path:
    return next((path / "generation-000001" / "log").glob("*.log"))


PLACES: dict[str, Callable[[Path], Path]] = {
    "CURRENT": lambda path: path / "CURRENT",
    "MANIFEST": lambda path: path / "generation-000001" / "MANIFEST",
    "head of the log": _log,
}


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "emptied", "removed"])
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_file_is_an_error_that_names_it_and_nothing_is_touched(closed: Path, place: str, damage: str) -> None:
    file = PLACES[place](closed)
    good = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        flipped = bytes([good[0] ^ 1, *good[1:]])
        file.write_bytes({"flipped bit": flipped, "cut off": good[:10], "emptied": b""}[damage])
    before = files_of(closed, ignore_directories=["rocksdb"])  # RocksDB writes its own manifest anew when it opens
    with pytest.raises(de.CorruptionError, match=file.name if damage != "removed" else None):
        small(closed)
    assert files_of(closed, ignore_directories=["rocksdb"]) == before
    file.write_bytes(good)
    with small(closed) as storage:
        assert (make(storage).step, storage.last_commit) == (3, (5, b"five"))


@pytest.mark.parametrize("lost", ["rocksdb", "log", "rocksdb/CURRENT", "."])
def test_what_was_lost_is_an_error_never_an_empty_table(closed: Path, lost: str) -> None:
    victim = closed / "generation-000001" / lost
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    with pytest.raises(de.CorruptionError):
        small(closed)


# ------------------------------------------------------------------- commit


def test_the_last_commit_comes_back_over_a_reopening(path: Path) -> None:
    with small(path) as storage:
        assert storage.last_commit is None
        storage.commit()
        assert storage.last_commit == (None, b"")
        storage.commit(2**63 - 1, "größer")
        train(make(storage))
        storage.commit(7, b"\0\xff")
        assert storage.last_commit == (7, b"\0\xff")
    for _ in range(2):
        with small(path) as storage:
            assert storage.last_commit == (7, b"\0\xff")


def test_a_commit_syncs_what_came_before(storage: de.Storage) -> None:
    train(make(storage))
    storage.commit()
    stats = storage.stats()
    assert stats["synced_sequence"] == stats["sequence"] >= 4


# --------------------------------------------------------------- checkpoint


def test_a_checkpoint_holds_the_storage_as_it_was(storage: de.Storage, tmp_path: Path) -> None:
    storage.now = LATE
    embedding, users = make(storage), make(storage, "user", 2)
    train(embedding)
    train(users, 1)
    embedding.erase([5])
    expected = rows_of(embedding), rows_of(users), len(embedding)
    storage.checkpoint(tmp_path / "checkpoint", step=3, extra=b"extra")
    train(embedding, seed=1)
    users.erase(np.arange(50))
    with de.Storage.restore(tmp_path / "checkpoint", tmp_path / "copy", memory="16MiB") as restored:
        embedding, users = make(restored), make(restored, "user", 2)
        assert (embedding.step, users.step, len(embedding)) == (3, 1, expected[2])
        assert_same_rows(rows_of(embedding), expected[0])
        assert_same_rows(rows_of(users), expected[1])


def test_a_restored_storage_says_which_step_it_is_of(storage: de.Storage, tmp_path: Path) -> None:
    storage.commit(2, b"two")
    storage.checkpoint(tmp_path / "unnamed")
    storage.checkpoint(tmp_path / "named", step=3, extra="three")
    for name, expected in (("unnamed", (2, b"two")), ("named", (3, b"three"))):
        with de.Storage.restore(tmp_path / name, tmp_path / "copy", memory="16MiB") as restored:
            assert restored.last_commit == expected


def test_training_after_a_restore_goes_on_as_it_did(storage: de.Storage, tmp_path: Path) -> None:
    storage.now = LATE
    embedding = make(storage)
    train(embedding)
    storage.checkpoint(tmp_path / "checkpoint")
    train(embedding, seed=1)
    expected = rows_of(embedding)
    storage.close()
    with de.Storage.restore(tmp_path / "checkpoint", storage.path, memory="16MiB") as restored:
        restored.now = LATE
        embedding = make(restored)
        train(embedding, seed=1)
        assert_same_rows(rows_of(embedding), expected)
    with small(Path(storage.path)) as reopened:
        assert_same_rows(rows_of(make(reopened)), expected)


def test_a_checkpoint_is_not_changed_by_what_is_restored_from_it(storage: de.Storage, tmp_path: Path) -> None:
    train(make(storage))
    storage.checkpoint(tmp_path / "checkpoint")
    before = files_of(tmp_path / "checkpoint")
    for number in range(2):
        with de.Storage.restore(tmp_path / "checkpoint", tmp_path / str(number), memory="16MiB") as restored:
            assert make(restored).step == 3
            train(make(restored), seed=1)
    assert files_of(tmp_path / "checkpoint") == before


@pytest.mark.parametrize("what", ["a checkpoint", "an empty directory", "a file", "a broken link"])
def test_a_checkpoint_never_replaces_anything(storage: de.Storage, tmp_path: Path, what: str) -> None:
    train(make(storage))
    wanted = tmp_path / "checkpoint"
    if what == "a checkpoint":
        storage.checkpoint(wanted)
    elif what == "an empty directory":
        wanted.mkdir()
    elif what == "a file":
        wanted.write_text("mine")
    else:
        wanted.symlink_to(tmp_path / "nowhere")
    before, names = files_of(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(de.StorageError, match=r"\[checkpoint\].*exists already"):
        storage.checkpoint(wanted)
    assert (files_of(tmp_path), sorted(os.listdir(tmp_path))) == (before, names)


def test_a_checkpoint_without_a_parent_leaves_nothing(storage: de.Storage, tmp_path: Path) -> None:
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(de.StorageError, match=r"\[checkpoint\].*absent does not exist"):
        storage.checkpoint(tmp_path / "absent" / "checkpoint")
    assert sorted(os.listdir(tmp_path)) == names


def test_a_checkpoint_leaves_nothing_beside_itself(storage: de.Storage, tmp_path: Path) -> None:
    train(make(storage))
    storage.checkpoint(tmp_path / "checkpoint")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "table.damo"]
    assert {"CHECKPOINT", "MANIFEST", "rocksdb"} <= set(os.listdir(tmp_path / "checkpoint"))


def test_a_checkpoint_of_an_empty_storage_restores(storage: de.Storage, tmp_path: Path) -> None:
    storage.checkpoint(tmp_path / "checkpoint")
    with de.Storage.restore(tmp_path / "checkpoint", tmp_path / "copy", memory="16MiB") as restored:
        assert restored.groups() == {}
        train(make(restored))


# ------------------------------------------------------------------ restore


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for tests that damage copies of it."""
    directory = tmp_path_factory.mktemp("kept")
    with small(directory / "table.damo") as storage:
        train(make(storage))
        storage.checkpoint(directory / "checkpoint")
    return directory / "checkpoint"


def files_in(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


@pytest.mark.parametrize("damage", ["flipped", "cut off", "longer", "removed"])
def test_restore_of_a_damaged_checkpoint_changes_nothing(kept: Path, closed: Path, tmp_path: Path, damage: str) -> None:
    before = files_of(closed)
    for number, original in enumerate(files_in(kept)):
        checkpoint = tmp_path / f"damaged-{number}"
        shutil.copytree(kept, checkpoint)
        file = checkpoint / original.relative_to(kept)
        content = file.read_bytes()
        middle = len(content) // 2
        if damage == "removed":
            file.unlink()
        elif damage == "flipped":
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :] if content else b"x"
            )
        else:
            file.write_bytes(content[:-1] if damage == "cut off" else content + b"\0")
        error = de.StorageError if (file.name, damage) == ("CHECKPOINT", "removed") else de.CorruptionError
        with pytest.raises(error, match=file.name):
            de.Storage.restore(checkpoint, closed, memory="16MiB")
        with pytest.raises(error):
            de.Storage.restore(checkpoint, tmp_path / "absent", memory="16MiB")
        assert not (tmp_path / "absent").exists()
    assert files_of(closed) == before


def test_restore_replaces_everything(kept: Path, closed: Path) -> None:
    with de.Storage.restore(kept, closed, memory="16MiB") as storage:
        assert storage.groups() == {7: ""}
        assert make(storage).step == 3
        assert storage.last_commit is None
    assert [file.name for file in closed.glob("generation-*")] == ["generation-000002"]


def test_restore_takes_an_absent_and_an_empty_directory(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with de.Storage.restore(kept, tmp_path / name, memory="16MiB") as storage:
            assert make(storage).step == 3


def test_restore_over_an_open_storage_is_refused(kept: Path, storage: de.Storage) -> None:
    train(make(storage), 1)
    before = rows_of(make(storage))
    with pytest.raises(de.AlreadyOpenError):
        de.Storage.restore(kept, storage.path, memory="16MiB")
    assert_same_rows(rows_of(make(storage)), before)


def test_restore_of_what_is_no_checkpoint_is_refused(closed: Path, tmp_path: Path) -> None:
    before = files_of(closed)
    for source in (tmp_path, closed, tmp_path / "absent"):
        with pytest.raises(de.StorageError, match=r"\[restore\].*not a checkpoint"):
            de.Storage.restore(source, closed, memory="16MiB")
    assert files_of(closed) == before


def test_restore_over_a_directory_of_others_is_refused(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(de.StorageError, match="not a storage"):
        de.Storage.restore(kept, tmp_path / "mine", memory="16MiB")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


# --------------------------------------------------------------------- dump


def test_a_dump_holds_what_a_scan_sees(storage: de.Storage, tmp_path: Path) -> None:
    embedding, users = make(storage), make(storage, "user", 2)
    train(embedding)
    train(users, 1)
    embedding.lookup([1000])
    count = storage.dump(tmp_path / "weights.bin")
    dumped = de.read_dump(tmp_path / "weights.bin")
    assert dumped.keys() == {7, 255}
    assert count == len(embedding) + len(users)
    for group, expected in ((7, rows_of(embedding)), (255, rows_of(users))):
        keys, weights = dumped[group]
        found = {int(key): row.tobytes() for key, row in zip(keys, weights, strict=True)}
        assert found == {key: row.weights for key, row in expected.items()}
    assert sorted(os.listdir(tmp_path)) == ["table.damo", "weights.bin"]


@pytest.mark.parametrize("group", [255, "user"])
def test_a_dump_of_one_group_holds_no_other(storage: de.Storage, tmp_path: Path, group: int | str) -> None:
    train(make(storage))
    train(make(storage, "user", 2), 1)
    assert storage.dump(tmp_path / "weights.bin", group=group) == len(make(storage, "user", 2))
    assert de.read_dump(tmp_path / "weights.bin").keys() == {255}


@pytest.mark.parametrize(("min_count", "expected"), [(0, [1, 2, 3]), (1, [1, 2]), (2, [1]), (3, [])])
def test_a_dump_leaves_out_rows_that_were_updated_less(
    storage: de.Storage, tmp_path: Path, min_count: int, expected: list[int]
) -> None:
    embedding = make(storage)
    for keys in ([1, 2], [1]):
        embedding.apply_gradients(keys, np.ones((len(keys), DIMENSION), f32))
    embedding.lookup([3])
    assert storage.dump(tmp_path / "weights.bin", min_count=min_count) == len(expected)
    assert sorted(de.read_dump(tmp_path / "weights.bin")[7][0].tolist()) == expected


@pytest.mark.parametrize(("expire_days", "expected"), [(None, [1, 2]), (10, [1, 2]), (9, [2]), (0, [2])])
def test_a_dump_leaves_out_rows_that_were_not_updated_for_long(
    storage: de.Storage, tmp_path: Path, expire_days: int | None, expected: list[int]
) -> None:
    embedding = make(storage)
    storage.now = LATE
    embedding.lookup([1])
    storage.now = LATE + 10 * 86_400
    embedding.lookup([1, 2])  # a lookup is no update
    assert storage.dump(tmp_path / "weights.bin", expire_days=expire_days) == len(expected)
    assert sorted(de.read_dump(tmp_path / "weights.bin")[7][0].tolist()) == expected


def test_a_dump_replaces_a_file_and_no_directory(storage: de.Storage, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("old")
    assert storage.dump(tmp_path / "weights.bin") == 0
    assert de.read_dump(tmp_path / "weights.bin") == {}
    with pytest.raises(de.StorageError, match="is a directory"):
        storage.dump(tmp_path)
    with pytest.raises(de.StorageError, match="absent does not exist"):
        storage.dump(tmp_path / "absent" / "weights.bin")


# -------------------------------------------------------------- clock, stats


def test_the_clock_is_the_wall_s_until_it_is_given(storage: de.Storage) -> None:
    assert abs(storage.now - time.time()) < 60
    storage.now = LATE
    assert storage.now == LATE


def test_the_clock_never_runs_back(storage: de.Storage) -> None:
    storage.now = LATE
    storage.now = LATE - 1
    assert storage.now == LATE
    make(storage).lookup([1])
    storage.now = 5
    make(storage).lookup([2])
    row = make(storage).inspect(2)
    assert row is not None
    assert row.last_update == LATE


def test_the_clock_of_a_replay_starts_in_the_past(storage: de.Storage) -> None:
    storage.now = 1_000
    make(storage).lookup([1])
    assert make(storage).inspect(1).last_update == 1_000  # type: ignore[union-attr]


def test_the_clock_goes_on_after_a_reopening(path: Path) -> None:
    with small(path) as storage:
        storage.now = LATE
        train(make(storage))
    with small(path) as storage:
        assert storage.now == LATE


STATS = {
    "rows", "hot_rows", "hot_bytes", "hot_bytes_in_use", "hits", "misses", "cold_hits", "created", "evictions",
    "written_back", "write_waits", "cuts", "cut_rows", "cut_displaced", "cut_pause_seconds", "disk_bytes", "disk_files",
    "disk_cache_bytes", "disk_keys_read", "disk_keys_found", "disk_keys_written", "disk_bytes_written", "log_bytes",
    "recovery_bytes",
    "sequence", "synced_sequence", "redone_records", "groups",
}  # fmt: skip


def test_every_number_of_stats_is_documented(storage: de.Storage) -> None:
    make(storage)
    documented = re.findall(r"\w+", de.Storage.stats.__doc__ or "")
    stats = storage.stats()
    assert set(stats) | set(stats["groups"][0]) <= set(documented)


def test_stats_count_rows_hits_and_misses(storage: de.Storage) -> None:
    embedding = make(storage)
    embedding.lookup([1, 2, 3, 3])
    embedding.lookup([1, 2])
    stats = storage.stats()
    assert stats.keys() >= STATS
    assert (stats["rows"], stats["created"], stats["misses"], stats["hits"]) == (3, 3, 3, 2)
    (group,) = stats["groups"]
    assert (group["group"], group["dimension"], group["rows"], group["step"]) == (7, DIMENSION, 3, 0)


def test_stats_say_what_new_rows_of_a_group_start_with(storage: de.Storage) -> None:
    de.Embedding(storage, de.SGD(), de.Uniform(-0.1, 0.3), dimension=4, group=1, seed=2**64 - 1)
    de.Embedding(storage, de.SGD(), de.Zeros(), dimension=4, group=2)
    one, two = storage.stats()["groups"]
    assert (one["initializer"], one["initializer_settings"], one["seed"]) == (
        "uniform",
        {"low": -0.1, "high": 0.3},
        2**64 - 1,
    )
    assert (two["initializer"], two["initializer_settings"], two["seed"]) == ("zeros", {}, 0)


# -------------------------------------------------------- close, fork, pickle

USES: dict[str, Callable[[de.Storage], object]] = {
    "embedding": make,
    "commit": lambda s: s.commit(),
    "last_commit": lambda s: s.last_commit,
    "checkpoint": lambda s: s.checkpoint(f"{s.path}-checkpoint"),
    "dump": lambda s: s.dump(f"{s.path}-dump"),
    "now": lambda s: s.now,
    "now = ": lambda s: setattr(s, "now", 5),
    "stats": lambda s: s.stats(),
    "groups": lambda s: s.groups(),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close_is_refused(storage: de.Storage, use: str) -> None:
    storage.close()
    before = files_of(Path(storage.path).parent)
    with pytest.raises(de.ClosedError, match="is closed: open it again"):
        USES[use](storage)
    assert files_of(Path(storage.path).parent) == before


def test_close_may_be_called_again(storage: de.Storage) -> None:
    assert not storage.closed
    storage.close()
    storage.close()
    assert storage.closed


def test_a_with_statement_closes_on_an_error_too(path: Path) -> None:
    with pytest.raises(KeyError), small(path) as storage:
        raise KeyError
    assert storage.closed


def test_a_storage_that_nobody_holds_any_more_lets_go_of_its_directory(path: Path) -> None:
    train(make(small(path)))
    with small(path) as storage:
        assert make(storage).step == 3


# A process of its own: the test runner has threads, and forks badly.
FORK = """
import gc, os, signal, sys
import numpy as np, damo_embedding as de

storage = de.Storage(sys.argv[1], memory="16MiB", threads=2)
embedding = de.Embedding(storage, de.Adam(), de.Zeros(), dimension=4, group=1)
ones = np.ones((2, 4), np.float32)
embedding.apply_gradients([1, 2], ones)
scan = embedding.scan(1)
next(scan)
child = os.fork()
if child == 0:
    signal.alarm(30)
    refused = 0
    for use in (
        lambda: embedding.lookup([1]), lambda: embedding.lookup([1], insert=False), lambda: embedding.contains([1]),
        lambda: embedding.apply_gradients([1, 2], ones), lambda: embedding.erase([1]), lambda: embedding.inspect(1),
        lambda: embedding.prefetch([1]), lambda: embedding.scan(), lambda: next(scan), lambda: storage.commit(),
        lambda: storage.checkpoint(sys.argv[1] + "-c"), lambda: storage.dump(sys.argv[1] + "-d"),
        lambda: storage.stats(), lambda: storage.now, lambda: storage.close(),
    ):
        try:
            use()
        except de.ForkedHandleError as error:
            assert f"process {os.getppid()}" in str(error), error
            refused += 1
    try:
        de.Storage(sys.argv[1], memory="16MiB")
    except de.AlreadyOpenError:
        refused += 1
    del use, scan, embedding, storage
    gc.collect()
    os._exit(refused)
_, status = os.waitpid(child, 0)
print("refused", os.waitstatus_to_exitcode(status))
embedding.apply_gradients([1, 2], ones)
assert embedding.step == 2
del scan
storage.close()
with de.Storage(sys.argv[1], memory="16MiB") as storage:
    print("steps", de.Embedding(storage, de.Adam(), de.Zeros(), dimension=4, group=1).step)
"""


def test_a_forked_child_is_refused_everything_and_the_parent_goes_on(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused 16\nsteps 2\n"


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_storage_is_neither_pickled_nor_copied(storage: de.Storage, way: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        way(storage)


# ----------------------------------------------------------------- bad input

Call = Callable[[de.Storage], object]
BAD_CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "commit a negative step": (lambda s: s.commit(-1), ValueError, r"\[commit\] step is -1"),
    "commit a step beyond 63 bits": (
        lambda s: s.commit(2**63),
        ValueError,
        r"\[commit\] step is 9223372036854775808",
    ),
    "commit a float": (lambda s: s.commit(1.0), TypeError, r"\[commit\] step is 1.0"),  # type: ignore[arg-type]
    "commit a bool": (lambda s: s.commit(True), TypeError, r"\[commit\] step is True"),
    "commit a list": (lambda s: s.commit(1, [1]), TypeError, r"\[commit\] extra is list"),  # type: ignore[arg-type]
    "commit too much": (
        lambda s: s.commit(1, bytes(2**24 + 1)),
        ValueError,
        r"\[commit\] extra has 16777217 bytes",
    ),
    "checkpoint to a number": (lambda s: s.checkpoint(3), TypeError, r"\[checkpoint\] directory is int"),  # type: ignore[arg-type]
    "checkpoint to bytes": (lambda s: s.checkpoint(b"c"), TypeError, r"\[checkpoint\] directory is bytes"),  # type: ignore[arg-type]
    "checkpoint to nothing": (lambda s: s.checkpoint(""), ValueError, r"\[checkpoint\] directory is ''"),
    "checkpoint as a generation": (
        lambda s: s.checkpoint(f"{s.path}/generation-000002"),
        de.StorageError,
        r"\[checkpoint\] .* is among the storage's own files, in generation-000002 of .*: give a place outside",
    ),
    "dump over its own file": (
        lambda s: s.dump(f"{s.path}/../{Path(s.path).name}/CURRENT"),
        de.StorageError,
        r"\[dump\] .* is among the storage's own files, in CURRENT of",
    ),
    "dump among its own files": (
        lambda s: s.dump(f"{s.path}/generation-000001/rocksdb/weights.bin"),
        de.StorageError,
        r"\[dump\] .* is among the storage's own files, in generation-000001 of",
    ),
    "commit what is no text": (
        lambda s: s.commit(1, "\udc80"),
        ValueError,
        r"\[commit\] extra is '\\udc80', which UTF-8",
    ),
    "checkpoint a step": (
        lambda s: s.checkpoint(f"{s.path}-c", -2),
        ValueError,
        r"\[checkpoint\] step is -2",
    ),
    "checkpoint too much": (
        lambda s: s.checkpoint(f"{s.path}-c", extra=bytes(2**24 + 1)),
        ValueError,
        r"\[checkpoint\] extra has 16777217",
    ),
    "dump to None": (lambda s: s.dump(None), TypeError, r"\[dump\] path is NoneType"),  # type: ignore[arg-type]
    "dump to a NUL": (lambda s: s.dump("a\0b"), ValueError, r"\[dump\] path is 'a\\x00b'"),
    "dump an unknown name": (lambda s: s.dump(f"{s.path}-d", group="item"), ValueError, "no group 'item'"),
    "dump an unknown number": (lambda s: s.dump(f"{s.path}-d", group=8), ValueError, "no group 8"),
    "dump group 256": (lambda s: s.dump(f"{s.path}-d", group=256), ValueError, "group is 256"),
    "dump a number as a text": (
        lambda s: s.dump(f"{s.path}-d", group="7"),
        ValueError,
        r"no group '7'; the storage has 7, 'user'$",
    ),
    "dump a group of no name": (lambda s: s.dump(f"{s.path}-d", group=""), ValueError, "no group ''"),
    "dump a bool": (lambda s: s.dump(f"{s.path}-d", group=True), TypeError, r"group is True"),
    "dump a group between two": (lambda s: s.dump(f"{s.path}-d", group=7.0), TypeError, "group is 7.0"),  # type: ignore[arg-type]
    "dump an array of groups": (
        lambda s: s.dump(f"{s.path}-d", group=np.array([7, 255])),  # type: ignore[arg-type]
        TypeError,
        "group is array",
    ),
    "dump more days than there were": (
        lambda s: s.dump(f"{s.path}-d", expire_days=10**9 + 1),
        ValueError,
        "expire_days is 1000000001, expected 0 to 1000000000",
    ),
    "dump to a name that is not UTF-8": (
        lambda s: s.dump("\udcff"),
        ValueError,
        r"\[dump\] path is '\\udcff', expected a name that is UTF-8",
    ),
    "dump a negative count": (lambda s: s.dump(f"{s.path}-d", min_count=-1), ValueError, "min_count is -1"),
    "dump a float": (lambda s: s.dump(f"{s.path}-d", min_count=1.5), TypeError, "min_count is 1.5"),  # type: ignore[arg-type]
    "dump negative days": (lambda s: s.dump(f"{s.path}-d", expire_days=-1), ValueError, "expire_days is -1"),
    "now a float": (
        lambda s: setattr(s, "now", 1.5),
        TypeError,
        r"\[now\] now is 1.5, expected whole seconds since 1970 as an int, e\.g\. int\(time\.time\(\)\)",
    ),
    "now None": (lambda s: setattr(s, "now", None), TypeError, r"\[now\] now is None"),
    "now before 1970": (lambda s: setattr(s, "now", -1), ValueError, r"\[now\] now is -1"),
}

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "memory too small": (
        {"memory": "15MiB"},
        ValueError,
        "memory is 15728640 bytes, expected at least 16777216",
    ),
    "memory 0": ({"memory": 0}, ValueError, "memory is 0 bytes"),
    "memory negative": ({"memory": -1}, ValueError, "memory is -1 bytes"),
    "memory beyond all machines": ({"memory": 2**48}, ValueError, r"expected less than 2\*\*48"),
    "memory a float": ({"memory": 1e9}, TypeError, "memory is 1000000000.0"),
    "memory a bool": ({"memory": True}, TypeError, "memory is True"),
    "memory None": ({"memory": None}, TypeError, "memory is None"),
    "memory of no unit": ({"memory": "1 GiBs"}, ValueError, "memory is '1 GiBs', expected a size"),
    "memory of a float array": ({"memory": np.array(2.0**30)}, TypeError, "memory is array"),
    "memory of more digits than there are": ({"memory": "9" * 400}, ValueError, "memory is '999.*expected a size"),
    "memory of no number": ({"memory": "much"}, ValueError, "memory is 'much'"),
    "durability": (
        {"durability": "never"},
        ValueError,
        'durability is \'never\', expected "commit", "logged" or "durable"',
    ),
    "durability None": ({"durability": None}, ValueError, "durability is None"),
    "threads 0": ({"threads": 0}, ValueError, "threads is 0, expected 1 to 1024"),
    "threads 1025": ({"threads": 1025}, ValueError, "threads is 1025"),
    "threads a float": ({"threads": 2.0}, TypeError, "threads is 2.0"),
    "log too small": ({"log_bytes": "1MB"}, ValueError, "log_bytes is 1000000, expected at least 1048576"),
    "log a list": ({"log_bytes": [1]}, TypeError, r"log_bytes is \[1\]"),
    "unknown": ({"cache": 5}, TypeError, "cache"),
}


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[de.Storage]:
    """For calls that must not change anything: one storage for all of them."""
    with small(tmp_path_factory.mktemp("settled") / "table.damo") as storage:
        train(make(storage))
        make(storage, "user", 2)
        yield storage


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_input_is_refused_in_words_and_changes_nothing(settled: de.Storage, what: str) -> None:
    call, error, message = BAD_CALLS[what]
    before = files_of(Path(settled.path).parent)
    commit = settled.last_commit
    with pytest.raises(error, match=message):
        call(settled)
    assert settled.last_commit == commit
    assert files_of(Path(settled.path).parent) == before


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_made(path: Path, kept: Path, what: str) -> None:
    options, error, message = BAD_OPTIONS[what]
    for opening in (de.Storage, de.Storage.create, de.Storage.open):
        with pytest.raises(error, match=message):
            opening(path, **options)
    with pytest.raises(error, match=message):
        de.Storage.restore(kept, path, **options)
    assert not path.exists()


@pytest.mark.parametrize("bad", [3, None, b"table", ["a"]])
def test_a_path_that_is_no_path_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError, match="path is"):
        de.Storage(bad, memory="16MiB")


@pytest.mark.parametrize("text", ["16MiB", "16 mib", "0.5GiB", "64MB", "16777216", 2**24, np.int64(2**24)])
def test_sizes_are_numbers_or_texts_with_a_unit(path: Path, text: str | int) -> None:
    de.Storage(path, memory=text).close()
