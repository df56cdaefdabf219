# SPDX-License-Identifier: Apache-2.0
"""What a newer version wrote is refused in words that say to upgrade, and stays as it is, byte for byte.

Made from whole files of this version: a version number raised, or a name this version does not know, under a checksum
that agrees. A stored row of a newer format is in tests/core/storage_test.cc: Python does not reach into the cold tier.
"""

from __future__ import annotations

import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

import damo_embedding as de
from comparing import files_of

pytestmark = pytest.mark.core


def xxh3(seed: int, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def raised(data: bytes, at: int) -> bytes:
    """More than the u32 at `at`, by far: some formats have two versions."""
    return data[:at] + struct.pack("<I", struct.unpack_from("<I", data, at)[0] + 100) + data[at + 4 :]


def sealed(data: bytes) -> bytes:
    """With the checksum at its end made to agree."""
    return data[:-8] + struct.pack("<Q", xxh3(0, data[:-8]))


def head_sealed(data: bytes) -> bytes:
    """A log segment with the checksum of its head made to agree."""
    state = data[128 : 128 + struct.unpack_from("<Q", data, 48)[0]]
    return data[:56] + struct.pack("<Q", xxh3(0, data[:56] + state)) + data[64:]


def first_record_sealed(data: bytes) -> bytes:
    seed = xxh3(0, data[16:40])  # storage id, segment number
    at = 128 + (struct.unpack_from("<Q", data, 48)[0] + 7) // 8 * 8
    body = data[at + 32 : at + 32 + struct.unpack_from("<Q", data, at)[0]]
    return data[: at + 24] + struct.pack("<Q", xxh3(seed, data[at : at + 24] + body)) + data[at + 32 :]


def of_unknown_type(data: bytes) -> bytes:
    at = 128 + (struct.unpack_from("<Q", data, 48)[0] + 7) // 8 * 8 + 16
    return data[:at] + b"\xc8" + data[at + 1 :]


def of_unknown_optimizer(data: bytes) -> bytes:
    assert data.count(b"\4\0\0\0adam") == 1
    return data.replace(b"\4\0\0\0adam", b"\4\0\0\0adem")


Change = Callable[[bytes], bytes]
# The file, what a newer version would have in it, and whether RocksDB is opened before it is read: opening rewrites
# files of RocksDB's own.
OF_A_STORAGE: dict[str, tuple[str, Change, bool]] = {
    "manifest": ("generation-000001/MANIFEST", lambda data: sealed(raised(data, 8)), False),
    "optimizer in the manifest": ("generation-000001/MANIFEST", lambda data: sealed(of_unknown_optimizer(data)), False),
    "log": ("generation-000001/log/0000000001.log", lambda data: head_sealed(raised(data, 8)), False),
    "log under a checksum of another kind": (
        "generation-000001/log/0000000001.log",
        lambda data: raised(data, 8),
        False,
    ),
    "counters in the log": (
        "generation-000001/log/0000000001.log",
        lambda data: head_sealed(raised(data, 128)),
        False,
    ),
    "record": (
        "generation-000001/log/0000000001.log",
        lambda data: first_record_sealed(of_unknown_type(data)),
        True,
    ),
}


def train(storage: de.Storage) -> None:
    embedding = de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1, 1), dimension=3, group=7)
    embedding.apply_gradients(np.arange(20), np.ones((20, 3), np.float32))


@pytest.fixture
def killed(path: Path, tmp_path: Path) -> Path:
    """A storage whose operations are in its log alone, as a killed process leaves them."""
    with de.Storage(tmp_path / "running.damo", memory="16MiB", threads=1) as storage:
        train(storage)
        storage.commit(3)
        for file in sorted(Path(storage.path).rglob("*")):
            copy = path / file.relative_to(storage.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and file.name != "LOCK":
                copy.write_bytes(file.read_bytes())
            elif file.is_dir():
                copy.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize("what", OF_A_STORAGE)
def test_a_storage_of_a_newer_version_is_refused_and_untouched(killed: Path, what: str) -> None:
    name, change, after_rocksdb = OF_A_STORAGE[what]
    good = (killed / name).read_bytes()
    newer = change(good)
    assert len(newer) == len(good)
    assert newer != good
    (killed / name).write_bytes(newer)
    ignored = ["rocksdb"] if after_rocksdb else []
    before = files_of(killed, ignored)
    # A damaged head of the log may say so, too.
    raised = de.CorruptionError if what.startswith("log") else de.NewerVersionError
    for opening in (de.Storage, de.Storage.open):
        with pytest.raises(raised, match="upgrade damo-embedding") as refused:
            opening(killed, memory="16MiB", threads=1)
        assert type(refused.value) is raised
        assert str(killed / "generation-000001") in str(refused.value)
    assert files_of(killed, ignored) == before
    (killed / name).write_bytes(good)
    with de.Storage(killed, memory="16MiB", threads=1) as storage:
        assert storage.last_commit == (3, b"")
        assert storage.stats()["rows"] == 20


@pytest.mark.parametrize("what", ["manifest", "optimizer in the manifest", "counters in the log", "record"])
def test_a_storage_of_a_newer_version_is_not_replaced_as_damaged(killed: Path, tmp_path: Path, what: str) -> None:
    """Its rows are newer than any checkpoint's."""
    (tmp_path / "checkpoints").mkdir()
    with de.Storage(tmp_path / "running.damo", memory="16MiB", threads=1) as storage:
        train(storage)
        storage.checkpoint(tmp_path / "checkpoints" / "1", step=1)
    name, change, after_rocksdb = OF_A_STORAGE[what]
    (killed / name).write_bytes(change((killed / name).read_bytes()))
    ignored = ["rocksdb"] if after_rocksdb else []
    before = files_of(killed, ignored)
    for replace_damaged in (False, True):
        with pytest.raises(de.NewerVersionError, match=r"upgrade damo-embedding$"):
            de.Storage.open_or_restore(
                killed, tmp_path / "checkpoints", memory="16MiB", threads=1, replace_damaged=replace_damaged
            )
    if what != "record":  # a salvage does no operations
        with pytest.raises(de.NewerVersionError, match="upgrade damo-embedding"):
            de.Storage.salvage(killed, tmp_path / "rescued.damo", manifest_of=tmp_path / "checkpoints" / "1")
    assert files_of(killed, ignored) == before
    assert sorted(file.name for file in tmp_path.glob("*.damo*")) == ["running.damo", killed.name]


def counters_raised(data: bytes) -> bytes:
    at = 8 + 4 + 16 + 8 + 8  # magic, version, storage id, step, time
    at += 4 + struct.unpack_from("<I", data, at)[0]  # extra
    return raised(data, at + 4)


def of_other_manifest(checkpoint: bytes, manifest: bytes) -> bytes:
    """CHECKPOINT with the length and CRC-32C that MANIFEST has now."""
    at = checkpoint.index(b"\x08\0\0\0MANIFEST") + 12
    crc = 0xFFFFFFFF
    for byte in manifest:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    fields = struct.pack("<QI", len(manifest), crc ^ 0xFFFFFFFF)
    return sealed(checkpoint[:at] + fields + checkpoint[at + 12 :])


OF_A_CHECKPOINT: dict[str, tuple[str, Change]] = {
    "checkpoint": ("CHECKPOINT", lambda data: sealed(raised(data, 8))),
    "counters": ("CHECKPOINT", lambda data: sealed(counters_raised(data))),
    "manifest": ("MANIFEST", lambda data: sealed(raised(data, 8))),
    "optimizer in the manifest": ("MANIFEST", lambda data: sealed(of_unknown_optimizer(data))),
}


@pytest.mark.parametrize("there", ["a storage", "nothing"])
@pytest.mark.parametrize("what", OF_A_CHECKPOINT)
def test_a_checkpoint_of_a_newer_version_is_refused_before_anything_is_replaced(
    path: Path, tmp_path: Path, what: str, there: str
) -> None:
    name, change = OF_A_CHECKPOINT[what]
    checkpoint = tmp_path / "checkpoint"
    with de.Storage(tmp_path / "source.damo", memory="16MiB", threads=1) as storage:
        train(storage)
        storage.checkpoint(checkpoint, step=3, extra=b"note")
    if there == "a storage":
        with de.Storage(path, memory="16MiB", threads=1) as storage:
            storage.commit(9)
    good = {name: (checkpoint / name).read_bytes() for name in ("CHECKPOINT", "MANIFEST")}
    (checkpoint / name).write_bytes(change(good[name]))
    if name == "MANIFEST":
        newer = of_other_manifest(good["CHECKPOINT"], (checkpoint / "MANIFEST").read_bytes())
        (checkpoint / "CHECKPOINT").write_bytes(newer)
    before = files_of(tmp_path)
    with pytest.raises(de.NewerVersionError, match="upgrade damo-embedding") as refused:
        de.Storage.restore(checkpoint, path, memory="16MiB", threads=1)
    assert str(checkpoint / name) in str(refused.value)
    assert files_of(tmp_path) == before
    assert path.exists() == (there == "a storage")
    for other, data in good.items():
        (checkpoint / other).write_bytes(data)
    with de.Storage.restore(checkpoint, path, memory="16MiB", threads=1) as storage:
        assert storage.last_commit == (3, b"note")


@pytest.mark.parametrize("there", ["nothing", "a damaged storage"])
@pytest.mark.parametrize("what", OF_A_CHECKPOINT)
def test_a_checkpoint_of_a_newer_version_is_not_passed_over_for_an_older_one(
    path: Path, tmp_path: Path, what: str, there: str
) -> None:
    """That would lose the steps between."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    with de.Storage(path, memory="16MiB", threads=1) as storage:
        for step in (1, 2):
            train(storage)
            storage.checkpoint(checkpoints / str(step), step=step)
    name, change = OF_A_CHECKPOINT[what]
    good = {name: (checkpoints / "2" / name).read_bytes() for name in ("CHECKPOINT", "MANIFEST")}
    (checkpoints / "2" / name).write_bytes(change(good[name]))
    if name == "MANIFEST":
        newer = of_other_manifest(good["CHECKPOINT"], (checkpoints / "2" / "MANIFEST").read_bytes())
        (checkpoints / "2" / "CHECKPOINT").write_bytes(newer)
    if there == "nothing":
        shutil.rmtree(path)
    else:
        (path / "CURRENT").write_bytes(b"damaged")
    before = files_of(tmp_path)
    with pytest.raises(de.NewerVersionError, match="upgrade damo-embedding"):
        de.Storage.open_or_restore(path, checkpoints, memory="16MiB", threads=1, replace_damaged=True)
    assert files_of(tmp_path) == before
    shutil.rmtree(checkpoints / "2")  # as the message says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        opened = de.Storage.open_or_restore(path, checkpoints, memory="16MiB", threads=1, replace_damaged=True)
    with opened as storage:
        assert storage.last_commit == (1, b"")


@pytest.mark.parametrize("missing", ["MANIFEST", "rocksdb/CURRENT"])
def test_a_checkpoint_that_does_not_list_what_it_needs_is_refused(path: Path, tmp_path: Path, missing: str) -> None:
    """Under a checksum that agrees: nothing a damaged disk does, but a restore must not trust it either."""
    checkpoint = tmp_path / "checkpoint"
    with de.Storage(path, memory="16MiB", threads=1) as storage:
        train(storage)
        storage.checkpoint(checkpoint)
    data = (checkpoint / "CHECKPOINT").read_bytes()
    entry = struct.pack("<I", len(missing)) + missing.encode()
    at = data.index(entry)
    renamed = data[: at + 4] + b"x" * len(missing) + data[at + len(entry) :]
    (checkpoint / "CHECKPOINT").write_bytes(sealed(renamed))
    (checkpoint / ("x" * len(missing))).write_bytes((checkpoint / missing).read_bytes())
    before = files_of(path)
    with pytest.raises(de.CorruptionError, match=f"does not list the file {missing}"):
        de.Storage.restore(checkpoint, path, memory="16MiB")
    assert files_of(path) == before
