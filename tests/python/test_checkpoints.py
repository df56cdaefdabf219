# SPDX-License-Identifier: Apache-2.0
"""Checkpoints beside each other: the oldest go, the newest is found, and nothing half-made is taken for one."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import damo_embedding as de
from comparing import assert_same_rows, files_of, rows_of

f32 = np.float32


def small(path: Path, **options: Any) -> de.Storage:
    return de.Storage(path, memory="16MiB", threads=1, **options)


def make(storage: de.Storage) -> de.Embedding:
    return de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=4, group=7)


def train(storage: de.Storage, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    make(storage).apply_gradients(random.integers(0, 60, 40), random.standard_normal((40, 4)).astype(f32))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The directory that the checkpoints lie in."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# --------------------------------------------------------------------- keep


def test_the_oldest_checkpoints_beyond_those_to_keep_are_removed(storage: de.Storage, kept: Path) -> None:
    for step in range(1, 6):
        train(storage, step)
        storage.checkpoint(kept / str(step), step=step, keep=3)
        assert names(kept) == [str(number) for number in range(max(1, step - 2), step + 1)]
    storage.checkpoint(kept / "6", step=6)
    assert names(kept) == ["3", "4", "5", "6"]  # without keep nothing goes
    storage.checkpoint(kept / "7", step=7, keep=1)
    assert names(kept) == ["7"]
    with de.Storage.restore(kept / "7", kept.parent / "copy", memory="16MiB") as restored:
        assert_same_rows(rows_of(make(restored)), rows_of(make(storage)))


def test_what_is_no_complete_checkpoint_of_this_storage_stays(storage: de.Storage, kept: Path, tmp_path: Path) -> None:
    train(storage)
    with small(tmp_path / "other.damo") as other:
        train(other)
        other.checkpoint(kept / "another storage's")
    for step in range(4):
        storage.checkpoint(kept / str(step), step=step)
    (kept / "file").write_text("x")
    (kept / "directory").mkdir()
    (kept / "directory" / "CHECKPOINT").write_text("x")
    (kept / "link").symlink_to(kept / "0")
    next((kept / "0" / "rocksdb").glob("*.sst")).unlink()
    (kept / "1" / "CHECKPOINT").unlink()
    (kept / "mine.removing-0000000000000000").mkdir()
    (kept / "mine.building-0000000000000000-1-0").mkdir()
    before = files_of(kept, ["2"])
    storage.checkpoint(kept / "new", keep=2)
    assert files_of(kept, ["2", "new"]) == before
    assert not (kept / "2").exists()
    assert (kept / "link").is_symlink()
    assert len(names(kept)) == 10


def test_a_checkpoint_in_another_directory_stays(storage: de.Storage, kept: Path, tmp_path: Path) -> None:
    storage.checkpoint(tmp_path / "elsewhere")
    storage.checkpoint(kept / "1")
    storage.checkpoint(kept / "2", keep=1)
    assert (tmp_path / "elsewhere").exists()


def test_the_checkpoints_from_before_a_restore_are_siblings(storage: de.Storage, kept: Path) -> None:
    train(storage)
    storage.checkpoint(kept / "1", keep=2)
    storage.checkpoint(kept / "2", keep=2)
    storage.close()
    with de.Storage.restore(kept / "2", storage.path, memory="16MiB", threads=1) as restored:
        restored.checkpoint(kept / "3", keep=2)
    assert names(kept) == ["2", "3"]


def test_the_newest_is_the_one_made_last_also_of_an_older_state(storage: de.Storage, kept: Path) -> None:
    storage.checkpoint(kept / "1")
    for seed in range(3):
        train(storage, seed)
    storage.checkpoint(kept / "4")
    storage.close()
    with de.Storage.restore(kept / "1", storage.path, memory="16MiB", threads=1) as restored:
        train(restored)
        restored.checkpoint(kept / "2 again", keep=1)  # of a lower sequence number, in the same second
    assert names(kept) == ["2 again"]


def test_a_clock_that_ran_back_does_not_change_the_order(storage: de.Storage, kept: Path) -> None:
    storage.checkpoint(kept / "1")
    file = kept / "1" / "CHECKPOINT"
    data = bytearray(file.read_bytes())
    data[36:44] = struct.pack("<q", int(time.time()) + 10_000)  # made, as it seems, in the future
    data[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:-8])))
    file.write_bytes(data)
    storage.checkpoint(kept / "2", keep=2)
    storage.checkpoint(kept / "3", keep=2)
    assert names(kept) == ["2", "3"]


def lineage(storage: de.Storage) -> str:
    """As it stands in names: the first half of the storage's id."""
    manifest = next(Path(storage.path).glob("generation-*")) / "MANIFEST"
    return manifest.read_bytes()[12:20][::-1].hex()


def test_what_a_crash_left_is_removed(storage: de.Storage, kept: Path) -> None:
    train(storage)
    storage.checkpoint(kept / "1")
    shutil.copytree(kept / "1", kept / f"0.removing-{lineage(storage)}")
    shutil.copytree(kept / "1", kept / f"0.building-{lineage(storage)}-1-0")
    (kept / f"0.building-{lineage(storage)}-1-1").mkdir()
    storage.checkpoint(kept / "2")
    assert len(names(kept)) == 5  # without keep nothing goes
    storage.checkpoint(kept / "3", keep=3)
    assert names(kept) == ["1", "2", "3"]


def test_threads_that_keep_some_leave_each_other_s_alone(storage: de.Storage, kept: Path) -> None:
    """A directory that one had made and not locked yet was a leftover for another."""
    train(storage, 1)
    wrong: list[Exception] = []

    def keep(thread: int) -> None:
        try:
            for number in range(60):
                storage.checkpoint(kept / f"{thread}-{number}", keep=4)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=keep, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not [name for name in names(kept) if "building" in name]


def test_what_somebody_is_building_stays(storage: de.Storage, kept: Path) -> None:
    building = kept / f"0.building-{lineage(storage)}-1-0"
    building.mkdir()
    descriptor = os.open(building, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    storage.checkpoint(kept / "1", keep=1)
    assert building.exists()
    os.close(descriptor)
    storage.checkpoint(kept / "2", keep=1)
    assert names(kept) == ["2"]


def test_a_checkpoint_that_cannot_be_removed_is_told(storage: de.Storage, kept: Path) -> None:
    storage.checkpoint(kept / "1")
    # A file is in the place of the name that the old one is to take.
    (kept / f"1.removing-{lineage(storage)}").write_text("x")
    with pytest.warns(RuntimeWarning, match="2 is there, but an old one could not be removed: .*1.*"):
        storage.checkpoint(kept / "2", keep=1)
    assert {"1", "2"} <= set(names(kept))


@pytest.mark.parametrize("keep", [0, -1, 2**31])
def test_a_number_to_keep_that_is_out_of_range_is_refused(storage: de.Storage, kept: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=rf"\[checkpoint\] keep is {keep}, expected 1 to"):
        storage.checkpoint(kept / "1", keep=keep)
    assert names(kept) == []


@pytest.mark.parametrize("keep", [True, 1.0, "1"])
def test_a_number_to_keep_of_another_type_is_refused(storage: de.Storage, kept: Path, keep: Any) -> None:
    with pytest.raises(TypeError, match=r"\[checkpoint\] keep is .*, expected an int"):
        storage.checkpoint(kept / "1", keep=keep)
    assert names(kept) == []


# ---------------------------------------------------------- open or restore


def open_or_restore(path: Path, kept: Path, **options: Any) -> de.Storage:
    return de.Storage.open_or_restore(path, kept, memory="16MiB", threads=1, **options)


def outcome(path: Path, kept: Path, **options: Any) -> tuple[str | None, tuple[int | None, bytes] | None]:
    """Opens and closes it: the name of the checkpoint it was restored from, and the last commit."""
    with open_or_restore(path, kept, **options) as storage:
        found = storage.restored_from
        return (Path(found.path).name if found else None), storage.last_commit


@pytest.fixture
def three(path: Path, kept: Path) -> Path:
    """A storage with three checkpoints, which has gone on since; closed."""
    with small(path) as storage:
        for step in range(1, 4):
            train(storage, step)
            storage.checkpoint(kept / str(step), step=step)
        train(storage, 4)
        storage.commit(4)
    return path


def damage(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.unlink()  # it may have other names
    file.write_bytes(data)


def table_of(checkpoint: Path) -> Path:
    return sorted((checkpoint / "rocksdb").glob("*.sst"))[-1]


def test_a_storage_that_is_there_is_opened_as_it_is(three: Path, kept: Path) -> None:
    with open_or_restore(three, kept) as storage:
        assert storage.restored_from is None
        assert storage.last_commit == (4, b"")


def test_without_a_storage_the_newest_checkpoint_is_restored(three: Path, kept: Path) -> None:
    shutil.rmtree(three)
    with open_or_restore(three, kept) as storage:
        found = storage.restored_from
        assert found is not None
        assert (found.path, found.step) == (str(kept / "3"), 3)
        assert found == de.Storage.checkpoints(kept)[-1]
        assert storage.last_commit == (3, b"")


@pytest.mark.parametrize("what", ["an empty directory", "an interrupted creation"])
def test_a_directory_without_a_storage_is_as_none(three: Path, kept: Path, what: str) -> None:
    shutil.rmtree(three)
    three.mkdir()
    if what == "an interrupted creation":
        (three / "CREATING").touch()
        (three / "generation-000001").mkdir()
    with open_or_restore(three, kept) as storage:
        assert storage.last_commit == (3, b"")


def test_checkpoints_that_are_not_whole_are_passed_over_by_name(three: Path, kept: Path) -> None:
    shutil.rmtree(three)
    damage(table_of(kept / "3"))
    (kept / "2" / "CHECKPOINT").unlink()
    with pytest.warns(RuntimeWarning, match="passed over") as told:
        assert outcome(three, kept) == ("1", (1, b""))
    assert ["/2 has" in str(told[0].message), "/3/rocksdb" in str(told[1].message)] == [True, True]
    assert {one.filename for one in told} == {__file__}


def test_without_storage_and_checkpoints_a_new_one_is_made(path: Path, kept: Path, tmp_path: Path) -> None:
    (kept / "4.building-0000000000000000-1-0").mkdir()
    for number, place in enumerate((kept, tmp_path / "absent")):
        with open_or_restore(path.with_name(str(number)), place) as storage:
            assert storage.restored_from is None
            assert storage.stats()["rows"] == 0


def test_checkpoints_none_of_which_is_whole_never_make_a_new_storage(three: Path, kept: Path) -> None:
    shutil.rmtree(three)
    for step in "123":
        damage(table_of(kept / step))
    with pytest.warns(RuntimeWarning, match="passed over"):
        with pytest.raises(de.CorruptionError, match=r"none of the 3 checkpoints in .* is whole"):
            open_or_restore(three, kept)
    assert not three.exists()


def test_a_damaged_storage_is_never_replaced_unasked(three: Path, kept: Path) -> None:
    damage(next(three.glob("generation-*")) / "MANIFEST")
    before = files_of(three)
    with pytest.raises(de.CorruptionError, match=r"MANIFEST is damaged [^:]*: .*replace_damaged=True.*salvage") as told:
        open_or_restore(three, kept)
    assert str(told.value).count("salvage") == 1
    with pytest.raises(de.CorruptionError, match=r"MANIFEST is damaged .*: restore a checkpoint.*Storage\.salvage"):
        de.Storage(three)
    assert files_of(three) == before
    assert names(three.parent) == ["checkpoints", "table.damo"]


@pytest.mark.parametrize("name", ["MANIFEST", "CURRENT"])
def test_a_damaged_storage_is_kept_under_another_name_when_replaced(three: Path, kept: Path, name: str) -> None:
    generation = next(three.glob("generation-*"))
    if name == "CURRENT":
        (three / "CURRENT").unlink()
    else:
        damage(generation / "MANIFEST")
    before = files_of(three)
    damage(table_of(kept / "3"))
    three.with_name("table.damo.damaged-1").mkdir()
    with pytest.warns(RuntimeWarning) as told:
        assert outcome(three, kept, replace_damaged=True) == ("2", (2, b""))
    assert ["passed over" in str(one.message) for one in told] == [True, False]
    assert "table.damo.damaged-2" in str(told[1].message)
    assert files_of(three.with_name("table.damo.damaged-2")) == before


def test_a_damaged_storage_is_not_renamed_with_its_checkpoints_in_it(three: Path, kept: Path) -> None:
    """They went along, and the next start found neither a storage nor checkpoints and began an empty one."""
    inside = three / "checkpoints"
    shutil.copytree(kept, inside)
    damage(next(three.glob("generation-*")) / "MANIFEST")
    before = files_of(three)
    with pytest.raises(de.CorruptionError, match=r"is in the storage's own directory.* move the checkpoints"):
        open_or_restore(three, inside, replace_damaged=True)
    assert files_of(three) == before


def test_a_damaged_storage_stays_when_no_checkpoint_is_whole(three: Path, kept: Path, tmp_path: Path) -> None:
    damage(next(three.glob("generation-*")) / "MANIFEST")
    before = files_of(three)
    with pytest.raises(de.CorruptionError, match=r"MANIFEST is damaged .* there is no checkpoint in .*absent.*salvage"):
        open_or_restore(three, tmp_path / "absent", replace_damaged=True)
    for step in "123":
        damage(table_of(kept / step))
    with pytest.warns(RuntimeWarning, match="passed over"):
        with pytest.raises(de.CorruptionError, match="none of the 3 checkpoints"):
            open_or_restore(three, kept, replace_damaged=True)
    assert files_of(three) == before


def test_checkpoints_of_two_storages_are_not_chosen_from(three: Path, kept: Path, tmp_path: Path) -> None:
    shutil.rmtree(three)
    with small(tmp_path / "other.damo") as other:
        other.checkpoint(kept / "other")
    with pytest.raises(de.StorageError, match=r"checkpoints of different storages, such as .*/(1 and .*/)?other"):
        open_or_restore(three, kept)
    assert not three.exists()
    with open_or_restore(three, kept / "2") as storage:  # one of them, by its path
        assert storage.last_commit == (2, b"")


def test_what_is_no_storage_is_an_error_and_stays(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with small(tmp_path / "open.damo") as storage:
        storage.checkpoint(kept / "1")
        for name, error in (("file", de.StorageError), ("mine", de.StorageError), ("open.damo", de.AlreadyOpenError)):
            with pytest.raises(error):
                open_or_restore(tmp_path / name, kept, replace_damaged=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_wrong_arguments_are_refused_before_anything_is_made(path: Path, kept: Path) -> None:
    with pytest.raises(TypeError, match=r"\[open_or_restore\] replace_damaged is 1, expected True or False"):
        open_or_restore(path, kept, replace_damaged=1)
    with pytest.raises(TypeError, match=r"\[open_or_restore\] checkpoints is int"):
        de.Storage.open_or_restore(path, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory"):
        de.Storage.open_or_restore(path, kept, memory=1)
    (kept / "file").write_text("x")
    for wrong in (kept / "file", kept / "file" / "below"):
        with pytest.raises(de.StorageError, match=rf"\[list checkpoints\] {wrong}: Not a directory"):
            open_or_restore(path, wrong)
    assert not path.exists()


def test_checkpoints_are_listed_in_the_order_in_which_they_were_made(three: Path, kept: Path) -> None:
    with small(three) as storage:
        storage.checkpoint(kept / "0")
        found = de.Storage.checkpoints(kept)
        assert [(Path(one.path).name, one.step) for one in found] == [("1", 1), ("2", 2), ("3", 3), ("0", None)]
        assert found[-1].sequence == storage.stats()["sequence"]
        assert abs(found[-1].created - time.time()) < 100
    assert de.Storage.checkpoints(kept / "absent") == []
