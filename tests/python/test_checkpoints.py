# SPDX-License-Identifier: Apache-2.0
"""Checkpoints beside each other: the oldest are removed, the newest is found, and nothing half-made is taken for one."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
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
