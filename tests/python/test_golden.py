# SPDX-License-Identifier: Apache-2.0
"""What every version of the formats has written is opened by this one, with every bit of what was in it."""

from __future__ import annotations

import json
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import damo_embedding as de
from golden import ADDED, DATA, contents, groups_of, train
from test_format import log

pytestmark = pytest.mark.core

FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
ARCHIVES = sorted(path.name.removesuffix(".tar.xz") for path in DATA.glob("*.tar.xz"))


def test_there_is_an_archive_of_each_version_of_the_manifest(tmp_path: Path) -> None:
    versions = set()
    for name in ARCHIVES:
        path = Golden(name, tmp_path / name).base / "closed"
        manifest = next(path.glob("generation-*/MANIFEST"))
        data = manifest.read_bytes()
        versions.add(struct.unpack_from("<I", data, 8)[0])
    newer = data[:8] + struct.pack("<I", 1_000) + data[12:-8]
    manifest.write_bytes(newer + struct.pack("<Q", xxhash.xxh3_64_intdigest(newer, 0)))
    with pytest.raises(de.NewerVersionError) as refused:
        de.Storage(path, memory="16MiB")
    known = re.search(r"this one reads up to (\d+)", str(refused.value))
    assert known is not None
    assert versions == set(range(1, int(known[1]) + 1))


def test_the_archives_have_every_record_of_the_log(tmp_path: Path) -> None:
    bodies = FORMAT.read_text().partition("## Record bodies")[2].partition("\n## ")[0]
    documented = {int(number) for number in re.findall(r"^\| (\d+) \|", bodies, re.MULTILINE)}
    found: set[int] = set()
    for name in ARCHIVES:
        for segment in Golden(name, tmp_path / name).base.glob("*/generation-*/log/*.log"):
            storage_id = (segment.parents[1] / "MANIFEST").read_bytes()[12:28]
            found |= {kind for _, kind, _ in log(segment, storage_id)[1]}
    assert found == documented


class Golden:
    def __init__(self, name: str, base: Path) -> None:
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            # Python 3.11.2 has no filters yet, later ones want one.
            archive.extractall(base, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        self.base, self.filters, self.together = base, name != "plain", name == "together"
        with np.load(base / "rows.npz") as stored:
            self.arrays = dict(stored)
        self.numbers = json.loads((base / "numbers.json").read_text())

    def check(self, storage: de.Storage, name: str, **other: Any) -> None:
        arrays, numbers = contents(storage, self.filters)
        expected = {key: values for key, values in self.arrays.items() if key.startswith(f"{name}/")}
        assert {f"{name}/{key}" for key in arrays} == set(expected)
        for key, values in arrays.items():
            stored = expected[f"{name}/{key}"]
            assert (values.dtype, values.shape) == (stored.dtype, stored.shape), key
            assert values.tobytes() == stored.tobytes(), key
        assert numbers == {**self.numbers[name], **other}


@pytest.fixture(params=ARCHIVES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path)


@pytest.mark.parametrize("name", ["closed", "killed"])
def test_a_storage_opens_with_every_row_and_goes_on(golden: Golden, name: str) -> None:
    path = golden.base / name
    with de.Storage.open(path, memory="16MiB") as storage:
        assert (storage.stats()["redone_records"] > 0) == (name == "killed")
        golden.check(storage, name)
        assert not storage.verify().damages
    with de.Storage.open(path, memory="16MiB") as storage:
        golden.check(storage, name)
        train(storage, groups_of(storage, golden.filters), 60, 63, golden.together)
        after = contents(storage, golden.filters)
    with de.Storage.open(path, memory="16MiB") as storage:
        again = contents(storage, golden.filters)
    assert after[1] == again[1]
    assert after[1]["last_commit"] == [62, "step 62"]
    assert {key: values.tobytes() for key, values in after[0].items()} == {
        key: values.tobytes() for key, values in again[0].items()
    }
    assert not np.array_equal(after[0]["sgd/weights"], golden.arrays[f"{name}/sgd/weights"])


def test_a_checkpoint_is_restored(golden: Golden, tmp_path: Path) -> None:
    checkpoint = golden.base / "checkpoint"
    assert [found.step for found in de.Storage.checkpoints(golden.base)] == [77]
    with de.Storage.restore(checkpoint, tmp_path / "restored", memory="16MiB") as storage:
        golden.check(storage, "closed", last_commit=[77, "kept"])


def test_a_dump_is_read(golden: Golden) -> None:
    dumped = de.read_dump(golden.base / "dump.bin")
    groups = golden.numbers["closed"]["groups"]
    assert sorted(dumped) == sorted(map(int, groups))
    weights = {values.tobytes() for key, values in golden.arrays.items() if key.endswith("/weights")}
    for keys, found in dumped.values():
        assert found[np.argsort(keys)].tobytes() in weights


def test_the_file_of_a_filter_is_read_and_goes_on(golden: Golden) -> None:
    with de.CountingBloomFilter(capacity=500, count=3, path=golden.base / "filter") as bloom:
        assert bloom.adds == golden.numbers["filter"] == 2 * len(ADDED)
        assert (bloom.estimate(ADDED) >= 2).all()
        assert not bloom.check(ADDED).all()
        bloom.add(ADDED)
        assert bloom.check(ADDED).all()
