# SPDX-License-Identifier: Apache-2.0
"""verify finds every damaged byte and row; salvage brings the good rows into a new storage and lists the others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import Row, files_of, rows_of
from damo_embedding.rescue import _mix
from reliability import faults, trainee
from reliability.mounts import Tmpfs
from reliability.oracle import Operation
from reliability.suite import SkippedError, ask, listen, make_base
from reliability.workload import SMALL, START, Workload
from storage_server import fork_server

pytestmark = pytest.mark.core

f32 = np.float32
ROWS = 3000
NOW = 2**40


def small(path: Path, **options: Any) -> de.Storage:
    storage = de.Storage(path, memory="16MiB", threads=1, **options)
    storage.now = NOW
    return storage


def groups_of(storage: de.Storage) -> list[de.Embedding]:
    users = de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=16, group=7)
    items = de.Embedding(storage, de.SGD(lr=0.1), de.Normal(), dimension=8, group="item")
    return [users, items]


def train(storage: de.Storage, seed: int, keys: int = ROWS) -> None:
    random = np.random.default_rng(seed)
    for table in groups_of(storage):
        ids = random.integers(0, ROWS, keys) - ROWS // 2
        table.apply_gradients(ids, random.standard_normal((keys, table.dimension)).astype(f32))
        table.lookup([10**6 + seed])  # a row without floats


Found = list[dict[int, Row]]


def all_rows(storage: de.Storage) -> Found:
    return [rows_of(table) for table in groups_of(storage)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Found]:
    """A storage that was closed, a copy of one that was killed with a log, and the rows of both."""
    place = tmp_path_factory.mktemp("rescue")
    storage = small(place / "open")
    for seed in range(3):
        train(storage, seed)
        storage.checkpoint(place / f"checkpoint-{seed}")  # a table file each
    for table in groups_of(storage):
        table.erase(np.arange(40))
    train(storage, 3, 300)
    storage.commit(9, b"nine")
    rows = all_rows(storage)  # writes them, but not away from the log
    train(storage, 4, 300)
    storage.commit(10, b"ten")
    shutil.copytree(place / "open", place / "killed")
    rows = all_rows(storage)
    storage.close()
    return place / "open", place / "killed", rows


@pytest.fixture(params=["closed", "killed"])
def damaged(request: pytest.FixtureRequest, made: tuple[Path, Path, Found], tmp_path: Path) -> Path:
    shutil.copytree(made[request.param == "killed"], tmp_path / "damaged")
    return tmp_path / "damaged"


def generation(path: Path) -> Path:
    return next(path.glob("generation-*"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.unlink()
    file.write_bytes(data)


def tables(path: Path) -> list[Path]:
    return sorted((generation(path) / "rocksdb").glob("*.sst"))


def salvaged(path: Path, expected: Found, **options: Any) -> tuple[de.SalvageReport, Found]:
    """Salvages; checks that nothing has changed, that what came is right, and that what did not come is listed."""
    before = files_of(path)
    out = path.with_name("rescued")
    report = de.Storage.salvage(path, out, **options)
    assert files_of(path) == before
    assert not list(path.parent.glob("*.building-*"))
    with small(out) as storage:
        found = all_rows(storage)
        assert report.rows == sum(map(len, found)) == storage.stats()["rows"]
        storage.verify()
        numbers = [table.group for table in groups_of(storage)]
    for number, rows, wanted in zip(numbers, found, expected, strict=True):
        assert rows.items() <= wanted.items()
        for key in wanted.keys() - rows.keys():
            assert any(one.contains(number, key) for one in report.lost), f"group {number}, key {key} is not listed"
    return report, found


def test_a_whole_storage_is_verified_and_salvaged_whole(damaged: Path, made: tuple[Path, Path, Found]) -> None:
    report, found = salvaged(damaged, made[2])
    assert report.lost == ()
    assert found == made[2]
    with small(damaged) as storage:
        groups_of(storage)
        verified = storage.verify()
        assert verified.damages == ()
        assert verified.rows == storage.stats()["rows"] == sum(map(len, made[2]))
        assert verified.files > 1
        assert verified.bytes > verified.rows * 44
    with small(damaged.with_name("rescued")) as storage:  # it goes on as a storage does
        train(storage, 5)
        assert storage.last_commit == (10, b"ten")


def test_a_bit_in_a_block_costs_the_rows_of_that_block(damaged: Path, made: tuple[Path, Path, Found]) -> None:
    largest = max(tables(damaged), key=lambda file: file.stat().st_size)
    for at in (5_000, 60_000):
        flip(largest, at)
    report, _ = salvaged(damaged, made[2])
    assert all("checksum" in damage.what and damage.group is not None for damage in report.lost)
    assert 0 < sum(map(len, made[2])) - report.rows < 400


def test_verify_names_the_file_and_the_rows(made: tuple[Path, Path, Found], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "damaged")
    largest = max(tables(tmp_path / "damaged"), key=lambda file: file.stat().st_size)
    flip(largest, 5_000)
    with small(tmp_path / "damaged") as storage:
        groups_of(storage)
        report = storage.verify(strict=False)
        assert str(largest) in [damage.file for damage in report.damages]
        ranges = [damage for damage in report.damages if damage.mixed]
        assert ranges
        assert all("checksum" in damage.what and damage.group is not None for damage in ranges)
        with pytest.raises(de.CorruptionError, match=rf"\[verify\] .* is damaged: .*{largest.name}.*salvage"):
            storage.verify()


@pytest.mark.parametrize("at", ["middle", "end", "one byte"])
def test_a_truncated_table_costs_rows_and_never_gives_wrong_ones(
    damaged: Path, made: tuple[Path, Path, Found], at: str
) -> None:
    largest = max(tables(damaged), key=lambda file: file.stat().st_size)
    data = largest.read_bytes()
    largest.unlink()
    largest.write_bytes(data[: {"middle": len(data) // 2, "end": len(data) - 60, "one byte": len(data) - 1}[at]])
    report, _ = salvaged(damaged, made[2])
    assert report.lost


def test_every_flipped_bit_of_a_table_is_found(damaged: Path) -> None:
    random = np.random.default_rng(0)
    with small(damaged) as storage:
        groups_of(storage)
        file = tables(damaged)[-1]
        good = file.read_bytes()
        for _ in range(10):
            data = bytearray(good)
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            file.write_bytes(data)
            assert str(file) in [damage.file for damage in storage.verify(strict=False).damages]
            file.write_bytes(good)
        assert storage.verify().damages == ()


def test_a_damaged_log_costs_what_it_did_from_there_on(made: tuple[Path, Path, Found], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(made[1], path)
    segment = max((generation(path) / "log").glob("*.log"), key=lambda file: file.stat().st_size)
    flip(segment, segment.stat().st_size // 2)
    with pytest.raises(de.CorruptionError):
        small(path)
    before = files_of(path)
    report = de.Storage.salvage(path, tmp_path / "rescued")
    assert files_of(path) == before
    told = [damage for damage in report.lost if damage.file == str(segment)]
    assert any("offset" in damage.what for damage in told)
    assert any("operations from" in damage.what for damage in told)
    with small(tmp_path / "rescued") as storage:
        storage.verify()
        train(storage, 6)
        after = all_rows(storage)
        shutil.copytree(tmp_path / "rescued", tmp_path / "killed")  # what it did since is redone after a kill
    with small(tmp_path / "killed") as storage:
        assert all_rows(storage) == after


def test_without_its_manifest_a_checkpoint_tells_the_groups(damaged: Path, made: tuple[Path, Path, Found]) -> None:
    flip(generation(damaged) / "MANIFEST", 20)
    with pytest.raises(
        de.CorruptionError, match=r"\[salvage\] without its MANIFEST .* manifest_of.*MANIFEST is damaged"
    ):
        de.Storage.salvage(damaged, damaged.with_name("rescued"))
    assert not damaged.with_name("rescued").exists()
    report, found = salvaged(damaged, made[2], manifest_of=made[0].parent / "checkpoint-2")
    assert found == made[2]
    assert [damage.file for damage in report.lost] == [str(generation(damaged) / "MANIFEST")]


def test_without_current_the_only_generation_is_taken(damaged: Path, made: tuple[Path, Path, Found]) -> None:
    (damaged / "CURRENT").write_text("x")
    report, found = salvaged(damaged, made[2])
    assert found == made[2]
    assert [damage.file for damage in report.lost] == [str(damaged / "CURRENT")]


def test_without_the_list_of_tables_nothing_is_taken_for_right(damaged: Path) -> None:
    manifest = next((generation(damaged) / "rocksdb").glob("MANIFEST-*"))
    flip(manifest, manifest.stat().st_size - 20)
    with pytest.raises(de.CorruptionError, match=r"\[salvage\] which table files count is not known"):
        de.Storage.salvage(damaged, damaged.with_name("rescued"))
    assert not damaged.with_name("rescued").exists()


def test_verify_finds_damage_in_our_own_files(damaged: Path) -> None:
    with small(damaged) as storage:
        groups_of(storage)
        train(storage, 7, 10)
        for file in (damaged / "CURRENT", generation(damaged) / "MANIFEST"):
            good = file.read_bytes()
            file.write_bytes(good[:-3] + b"x" + good[-2:])
            found = storage.verify(strict=False).damages
            assert [damage.file for damage in found] == [str(file)]
            file.write_bytes(good)
        assert storage.verify().damages == ()


# A merged file and a few new ones; after more, RocksDB would still be merging while the test goes on.
CUTS = ("scan", "dump", "checkpoint", "verify", "reopen", "compact")


def test_verify_ends_however_much_cannot_be_read(tmp_path: Path) -> None:
    """An index that is partly in memory says where blocks begin, and that they begin everywhere."""
    origin = make_base(tmp_path / "origin")
    options = {"memory": "16MiB", "threads": 1, "durability": "logged"}
    verify = [Operation("verify")]
    read = 0
    with fork_server(faults.environment(), "reliability.trainee") as server:
        session = server.session()
        ask(session, trainee.open_storage, origin, "small", options)
        workload = Workload([1], SMALL)
        operations = [*workload.draw(100, without=CUTS), Operation("compact")]
        for _ in range(2):
            operations += [*workload.draw(20, without=CUTS), Operation("scan", 0)]
        session.start("call", trainee.train, operations, START)
        assert listen(session).ended
        ask(session, trainee.close)
        session.kill()
        for nth in range(1, 100):
            base = tmp_path / f"base-{nth}"
            shutil.copytree(origin, base)
            session = server.session()
            try:
                ask(session, trainee.watch, base)
                ask(session, trainee.open_storage, base, "small", options)
                ask(session, trainee.arm, faults.FAIL_FOR_GOOD, "read", "sst", nth)
                session.start("call", trainee.train, verify, START)
                told = listen(session)  # it fails when it takes too long
                hit = ask(session, trainee.disarm)[0]
            finally:
                session.kill()
            if not hit:
                assert told.ended
                assert not told.raised
                break
            assert [raised[0] for raised in told.raised.values()] == ["CorruptionError"]
            read += 1
    assert 5 < read < 99


def test_what_cannot_be_salvaged_to_is_refused(damaged: Path, made: tuple[Path, Path, Found], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(de.StorageError, match="exists already: give an absent or empty directory"):
        de.Storage.salvage(damaged, tmp_path / "full")
    with pytest.raises(de.StorageError, match="is not a directory"):
        de.Storage.salvage(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(TypeError, match=r"\[salvage\] out is int"):
        de.Storage.salvage(damaged, 3)  # type: ignore[arg-type]
    with small(damaged) as storage, pytest.raises(de.AlreadyOpenError):
        de.Storage.salvage(damaged, tmp_path / "out")
    with small(damaged) as storage, pytest.raises(TypeError, match=r"\[verify\] strict is 1"):
        storage.verify(strict=1)  # type: ignore[arg-type]
    for inside in (damaged / "rescued", next(damaged.glob("generation-*")) / "rescued"):
        with pytest.raises(de.StorageError, match=r"rescued is among the storage's own files.* give a place outside"):
            de.Storage.salvage(damaged, inside)
        assert not inside.exists()
    with small(damaged) as storage:
        storage.checkpoint(tmp_path / "checkpoint")
    with pytest.raises(de.StorageError, match=r"is a checkpoint: restore it"):
        de.Storage.salvage(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(de.StorageError, match=r"full is not a storage: it has no generation-"):
        de.Storage.salvage(tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert de.Storage.salvage(damaged, tmp_path / "empty").rows == sum(map(len, made[2]))


def test_what_is_no_row_is_not_looked_for_among_the_damages() -> None:
    damage = de.Damage("a file", "a block", 3, None, (0, 2**64 - 1))
    assert damage.contains(3, -1)
    assert damage.contains(3, np.uint64(2**64 - 1))
    assert not damage.contains(4, 1)
    with pytest.raises(TypeError, match=r"\[contains\] group is 'user', expected the group's number"):
        damage.contains("user", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\[contains\] key is 1.5"):
        damage.contains(3, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[contains\] key is 18446744073709551616"):
        damage.contains(3, 2**64)


def test_the_mix_is_that_of_the_format() -> None:
    assert _mix(0) == 0
    assert _mix(1) == 0xB456BCFC34C2CB2C


def filtered(storage: de.Storage, **options: Any) -> de.Embedding:
    admission = de.CountingBloomFilter(capacity=10_000, count=2, fpr=1e-3) if options.pop("filter", True) else None
    return de.Embedding(storage, de.SGD(lr=0.1), de.Normal(), dimension=2, group=3, admission=admission, **options)


@pytest.fixture
def with_filter(tmp_path: Path) -> tuple[Path, dict[int, Row], list[int]]:
    """A killed storage whose filter is in a file and whose log counts on from there; its rows and its counts."""
    random = np.random.default_rng(5)
    with small(tmp_path / "open", log_bytes="1MiB") as storage:
        table = filtered(storage)
        for _ in range(40):  # 4,000 of 5,000 keys, some twice and more
            keys = random.integers(0, 5_000, 100)
            table.lookup(keys)
            table.apply_gradients(keys, random.standard_normal((100, 2)).astype(f32))
    with small(tmp_path / "open") as storage:
        table = filtered(storage)
        for _ in range(5):
            keys = random.integers(0, 5_000, 100)
            table.lookup(keys)
            table.apply_gradients(keys, random.standard_normal((100, 2)).astype(f32))
        storage.commit()
        shutil.copytree(tmp_path / "open", tmp_path / "damaged")
        assert table.admission is not None
        counts = table.admission.estimate(np.arange(5_000)).tolist()
        return tmp_path / "damaged", rows_of(table), counts


def test_a_filter_is_verified_and_comes_along(with_filter: tuple[Path, dict[int, Row], list[int]]) -> None:
    path, rows, counts = with_filter
    report = de.Storage.salvage(path, path.with_name("rescued"))
    assert not report.lost
    with small(path.with_name("rescued")) as storage:
        table = filtered(storage, filter=False)
        assert rows_of(table) == rows
        assert table.admission is not None
        assert table.admission.estimate(np.arange(5_000)).tolist() == counts
        storage.verify()


def test_a_lost_filter_costs_the_log_and_is_listed(with_filter: tuple[Path, dict[int, Row], list[int]]) -> None:
    path, rows, _ = with_filter
    [file] = generation(path).glob("filter-*")
    with small(path) as storage:
        filtered(storage, filter=False)
        whole = file.read_bytes()
        flip(file, 5000)
        report = storage.verify(strict=False)
        assert [damage.file for damage in report.damages] == [str(file)]
        file.write_bytes(whole)
    [file] = generation(path).glob("filter-*")  # closing wrote it anew
    before = set(rows)
    flip(file, 5000)
    with pytest.raises(de.CorruptionError, match="filter-"):
        small(path)
    report = de.Storage.salvage(path, path.with_name("rescued"))
    assert report.lost[0].group == 3
    assert "filter-" in report.lost[0].file
    assert "counts anew" in report.lost[0].what
    with small(path.with_name("rescued")) as storage:
        table = filtered(storage, filter=False)
        assert table.admission is not None
        assert table.admission.estimate(np.arange(5_000)).max() == 0
        found = rows_of(table)
        assert found.keys() <= before
        assert all(found[key] == rows[key] for key in found)
        assert report.rows == len(found) > 0
        table.lookup([10**6, 10**6])
        assert table.contains([10**6]).all()
        storage.verify()


def test_filters_of_any_size_are_salvaged(tmp_path: Path) -> None:
    """Salvage worked with 64 MiB, of which filters may have 17."""
    large = de.CountingBloomFilter(capacity=3_000_000, count=1)
    with de.Storage(tmp_path / "s", memory="256MiB") as storage:
        group = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=4, group=1, admission=large)
        group.lookup(np.arange(100))
    assert de.Storage.salvage(tmp_path / "s", tmp_path / "out").rows == 100


def test_a_full_disk_is_no_damage(tmp_path: Path) -> None:
    """What could not be written to the new storage was listed as lost, and a part was returned as all."""
    with de.Storage(tmp_path / "s", memory="64MiB") as storage:
        group = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=64, group=1)
        for keys in (1_000, 20_000, 1_000):
            group.apply_gradients(np.arange(keys), np.ones((keys, 64), f32))
        shutil.copytree(tmp_path / "s", tmp_path / "killed")
    try:
        disk = Tmpfs(tmp_path / "disk", megabytes=4)
    except SkippedError as reason:
        pytest.skip(str(reason))
    try:
        with pytest.raises(de.StorageError, match="No space left"):
            de.Storage.salvage(tmp_path / "killed", disk.directory / "out")
        assert not list(disk.directory.iterdir())
    finally:
        disk.unmount()


def test_without_a_log_steps_and_filters_go_on(tmp_path: Path) -> None:
    """Groups began at step 0 again, and a filter that was whole forgot at each close what it had counted since."""
    counted = de.CountingBloomFilter(capacity=1_000, count=3)
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        plain = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=4, group=1)
        one, two = (
            de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=4, group=group, admission=counted)
            for group in (2, 3)
        )
        for step in range(400):
            plain.apply_gradients([step % 7], np.ones((1, 4), f32))
        one.lookup([1])
        two.lookup([1])
        storage.commit(400, b"reader at 17")
    damaged = [file for file in (tmp_path / "s").glob("generation-*/filter-*")]
    assert len(damaged) == 2
    flip(sorted(damaged)[-1], 200)
    report = de.Storage.salvage(tmp_path / "s", tmp_path / "out")
    assert report.lost
    for seen in (1, 2, 3):
        with de.Storage(tmp_path / "out", memory="16MiB") as storage:
            assert storage.last_commit == (400, b"reader at 17")
            groups = {group["group"]: group for group in storage.stats()["groups"]}
            assert groups[1]["step"] == 400
            table = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=4, group=2)
            table.lookup([9])
            assert len(table) == (seen == 3)
