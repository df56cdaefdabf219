# SPDX-License-Identifier: Apache-2.0
"""Files cut off at every length and flipped at random places: all refused by name and offset, and nothing changed.

CHECKPOINT and MANIFEST are cut at every length in every run, the others at some; flips are a sample. All lengths of all
files and 10,000 flips of each take some minutes, and print what they did:

    DAMO_DAMAGE=full pytest -rP tests/python/test_checkpoint_damage.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
from comparing import files_of

pytestmark = pytest.mark.core

FULL = os.environ.get("DAMO_DAMAGE") == "full"
f32 = np.float32


def truncations(good: bytes, all_lengths: bool) -> Iterator[bytes]:
    lengths = range(len(good))
    if not all_lengths and len(good) > 100:
        lengths = [
            *range(20),
            *np.linspace(20, len(good) - 20, 60).astype(int).tolist(),
            *range(len(good) - 20, len(good)),
        ]
    for length in lengths:
        yield good[:length]


def flips(good: bytes, count: int) -> Iterator[bytes]:
    """One bit, one byte or up to eight bytes in a row changed, anywhere."""
    random = np.random.default_rng(len(good))
    for number in range(count):
        bad = np.frombuffer(good, np.uint8).copy()
        at = int(random.integers(bad.size))
        size = 1 if number % 4 else int(random.integers(1, 9))
        change = random.integers(1, 256, size, dtype=np.uint8) if number % 2 else np.uint8(1 << random.integers(8))
        bad[at : at + size] ^= change[: bad.size - at] if change.ndim else change
        yield bad.tobytes()


def stamps(directory: Path, but: Path) -> list[tuple[str, int, int, int]]:
    """Each file and directory with what changes when it is written: cheap enough for each of thousands of attempts."""
    paths = [os.path.join(root, name) for root, names, files in os.walk(directory) for name in (*names, *files)]
    found = [(path, os.stat(path)) for path in paths if path != str(but) and not path.endswith("/LOCK")]
    return sorted((path, info.st_ino, info.st_size, info.st_mtime_ns) for path, info in found)


def all_are_refused(
    file: Path, untouched: Path, use: Callable[[], de.Storage], *, all_lengths: bool, num_flips: int
) -> None:
    """`use` meets the file damaged in every way, and leaves everything else below `untouched` as it is."""
    good = file.read_bytes()
    contents, before = files_of(untouched), stamps(untouched, file)
    tried = []
    for kind, damages in (
        ("truncation", truncations(good, all_lengths or FULL)),
        ("flip", flips(good, 10_000 if FULL else num_flips)),
    ):
        tried.append(0)
        for bad in damages:
            file.write_bytes(bad)
            tried[-1] += 1
            try:
                use().close()
            except de.CorruptionError as error:
                message = str(error)
                assert str(file) in message
                assert "offset" in message, message
            else:
                raise AssertionError(f"taken: {file.name} with a {kind}, {bad!r}")
            assert stamps(untouched, file) == before
    for longer in (good + b"\0", good + good):
        file.write_bytes(longer)
        with pytest.raises(de.CorruptionError, match="offset"):
            use()
    file.write_bytes(good)
    assert files_of(untouched) == contents
    print(f"{file.name}: {len(good)} bytes; {tried[0]} truncations and {tried[1]} flips, all refused")


def train(storage: de.Storage) -> None:
    storage.now = 2**40
    random = np.random.default_rng(0)
    for group, optimizer in ((7, de.Adam(lr=0.1)), ("user", de.SGD())):
        embedding = de.Embedding(storage, optimizer, de.Uniform(-1, 1), dimension=3, group=group)
        for _ in range(3):
            keys = random.integers(0, 60, 40)
            embedding.apply_gradients(keys, random.standard_normal((40, 3)).astype(f32))
        embedding.lookup([1_000])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("damage")
    with de.Storage(place / "source.damo", memory="16MiB", threads=1) as storage:
        train(storage)
        storage.commit(4, b"where the reader stands")
        storage.checkpoint(place / "checkpoint", step=5, extra="a note")
    return place / "checkpoint"


@pytest.fixture
def target(path: Path) -> Path:
    """A storage that a restore would replace."""
    with de.Storage(path, memory="16MiB", threads=1) as storage:
        train(storage)
        storage.commit(9)
    return path


def names_in(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())


KINDS = [
    "CHECKPOINT",
    "MANIFEST",
    "rocksdb/CURRENT",
    "rocksdb/COMMITTED",
    "rocksdb/MANIFEST-",
    "rocksdb/OPTIONS-",
    ".sst",
]


def test_every_file_of_a_checkpoint_is_of_a_kind_that_is_damaged_here(checkpoint: Path) -> None:
    names = names_in(checkpoint)
    assert all(any(kind in name for kind in KINDS) for name in names), names
    assert all(any(kind in name for name in names) for kind in KINDS), names


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_damaged_anywhere_is_refused_and_the_storage_stays_as_it_is(
    checkpoint: Path, target: Path, kind: str
) -> None:
    for name in names_in(checkpoint):
        if kind in name and (kind != "MANIFEST" or name == kind):
            all_are_refused(
                checkpoint / name,
                target,
                lambda: de.Storage.restore(checkpoint, target, memory="16MiB"),
                all_lengths="/" not in name,
                num_flips=100 if "/" in name else 1_000,
            )
    with de.Storage(target, memory="16MiB", threads=1) as storage:
        assert storage.last_commit == (9, b"")
    with de.Storage.restore(checkpoint, target, memory="16MiB", threads=1) as storage:
        assert storage.last_commit == (5, b"a note")  # whole again, it is taken


@pytest.mark.parametrize("name", ["CURRENT", "generation-000001/MANIFEST"])
def test_a_storage_whose_manifest_is_damaged_anywhere_is_refused_and_stays_as_it_is(target: Path, name: str) -> None:
    all_are_refused(
        target / name,
        target,
        lambda: de.Storage(target, memory="16MiB", threads=1),
        all_lengths=True,
        num_flips=300,
    )
    with de.Storage(target, memory="16MiB", threads=1) as storage:
        assert storage.last_commit == (9, b"")


def test_a_file_of_another_checkpoint_is_refused(checkpoint: Path, target: Path, tmp_path: Path) -> None:
    with de.Storage(target, memory="16MiB", threads=1) as storage:
        storage.checkpoint(tmp_path / "other")
    before = files_of(target)
    for name in ("CHECKPOINT", "MANIFEST"):
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(de.CorruptionError):
            de.Storage.restore(checkpoint, target, memory="16MiB")
        (checkpoint / name).write_bytes(good)
    assert files_of(target) == before
