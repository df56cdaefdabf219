# SPDX-License-Identifier: Apache-2.0
"""The bytes of a storage, read from docs/format.md alone: shares no code with the core."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import damo_embedding as de
from damo_embedding import _core

pytestmark = pytest.mark.core

KEYS = np.array([7, -1, 0, 2**40, 7], np.int64)  # four keys, one twice
DIMENSION = 3
MASK = (1 << 64) - 1


def xxh3(seed: int, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def mix(key: int) -> int:
    key &= MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key ^= key >> 33
        key = key * factor & MASK
    return key ^ key >> 33


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class Reader:
    """Takes a file apart from its start to its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def bytes(self, size: int) -> bytes:
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at]

    def string(self) -> bytes:
        return self.bytes(self.take("I"))

    def settings(self) -> dict[str, float]:
        return {self.string().decode(): self.take("d") for _ in range(self.take("I"))}

    def sealed(self, magic: bytes) -> Reader:
        assert self.bytes(8) == magic
        assert self.take("I") == 1
        assert struct.unpack("<Q", self.data[-8:])[0] == xxh3(0, self.data[:-8])
        return self

    def end(self, tail: int = 0) -> None:
        assert self.at == len(self.data) - tail


def manifest(path: Path) -> tuple[bytes, int, dict[int, dict[str, Any]]]:
    reader = Reader(path.read_bytes()).sealed(b"DAMOMANI")
    storage_id, next_id, ttl, count = reader.bytes(16), reader.take("I"), reader.take("IQ"), reader.take("I")
    groups = {}
    for _ in range(count):
        number, table_id = reader.take("II")
        groups[number] = {
            "table": table_id,
            "name": reader.string(),
            "dimension": reader.take("I"),
            "optimizer": reader.string(),
            "optimizer_settings": reader.settings(),
            "state": [(reader.string(), *reader.take("Bf")) for _ in range(reader.take("I"))],
            "initializer": reader.string(),
            "initializer_settings": reader.settings(),
            "seed": reader.take("Q"),
            "stream": reader.take("Q"),
            "ttl": reader.take("IQ"),
            "own_ttl": reader.take("B"),
        }
    assert ttl == (1, 500)
    reader.end(tail=8)
    return storage_id, next_id, groups


def counters(data: bytes) -> dict[str, Any]:
    reader = Reader(data)
    version, tables = reader.take("II")
    assert version == 1
    found: dict[str, Any] = {"sequence": reader.take("Q"), "clock": reader.take("q")}
    found["tables"] = [
        (*reader.take("IIQQ"), [reader.take("qQ") for _ in range(reader.take("Q"))]) for _ in range(tables)
    ]
    found["commit"] = (reader.take("q"), reader.string()) if reader.take("B") else None
    reader.end()
    return found


def log(path: Path, storage_id: bytes) -> tuple[dict[str, Any], list[tuple[int, int, Reader]]]:
    """The counters at a segment's head, and (sequence, type, body) of its records."""
    data = path.read_bytes()
    reader = Reader(data)
    assert reader.bytes(8) == b"DAMO-LOG"
    assert reader.take("II") == (1, 0)
    assert reader.bytes(16) == storage_id
    number, first, length, checksum = reader.take("QQQQ")
    assert path.name == f"{number:010}.log"
    state = data[128 : 128 + length]
    assert checksum == xxh3(0, data[:56] + state)
    seed = xxh3(0, storage_id + struct.pack("<Q", number))
    marks = []
    for slot in (64, 96):
        offset, sequence, zero, mark = struct.unpack_from("<QQQQ", data, slot)
        if mark == xxh3(seed, data[slot : slot + 24]):
            assert zero == 0
            marks.append((offset, sequence))
    assert marks
    reader.at = 128 + length + -length % 8
    records = []
    while reader.at < len(data):
        start = reader.at
        size, sequence, kind = reader.take("QQQ")
        stored = reader.take("Q")
        body = reader.bytes(size)
        assert stored == xxh3(seed, data[start : start + 24] + body)
        assert not any(reader.bytes(-size % 8))
        assert sequence == first + len(records)
        records.append((sequence, kind, Reader(body)))
        if reader.at == max(marks)[0]:
            assert sequence == max(marks)[1]
    return counters(state), records


@pytest.fixture
def open_storage(tmp_path: Path) -> Iterator[tuple[de.Storage, de.Embedding]]:
    """Operations 1 to 5: insert, apply, erase, commit, insert."""
    with de.Storage(tmp_path / "s", memory="16MiB", threads=1, ttl=500) as storage:
        storage.now = 1_000
        table = de.Embedding(storage, de.Adagrad(lr=0.5, eps=0.25), de.Uniform(-1, 1), DIMENSION, group="user", seed=3)
        table.lookup(KEYS)
        storage.now = 1_400
        table.apply_gradients(KEYS, np.arange(15, dtype=np.float32).reshape(5, 3))
        table.erase([0])
        storage.commit(step=9, extra=b"where")
        table.lookup([5])
        yield storage, table


def test_current_is_a_name_and_its_checksum(open_storage: Any, tmp_path: Path) -> None:
    name = b"generation-000001"
    assert (tmp_path / "s" / "CURRENT").read_bytes() == name + b" %016x\n" % xxh3(0, name)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"CURRENT", "LOCK", name.decode()}


def test_the_manifest_holds_the_groups(open_storage: Any, tmp_path: Path) -> None:
    _, next_id, groups = manifest(tmp_path / "s" / "generation-000001" / "MANIFEST")
    assert next_id == 2
    assert groups == {
        255: {
            "table": 1,
            "name": b"user",
            "dimension": DIMENSION,
            "optimizer": b"adagrad",
            "optimizer_settings": {
                "lr": 0.5,
                "eps": 0.25,
                "weight_decay": 0.0,
                "initial_accumulator_value": 0.0,
                "lr_decay": 0.0,
            },
            "state": [(b"sum", 1, 0.0)],
            "initializer": b"uniform",
            "initializer_settings": {"low": -1.0, "high": 1.0},
            "seed": 3,
            "stream": xxh3(0, b"user") | 1 << 63,
            "ttl": (1, 500),
            "own_ttl": 0,
        }
    }


def test_the_log_holds_the_operations(open_storage: Any, tmp_path: Path) -> None:
    generation = tmp_path / "s" / "generation-000001"
    storage_id, _, _ = manifest(generation / "MANIFEST")
    start, records = log(generation / "log" / "0000000001.log", storage_id)
    assert start == {"sequence": 0, "clock": 0, "tables": [], "commit": None}
    assert [kind for _, kind, _ in records] == [2, 1, 3, 11, 2]
    insert, apply, erase, commit, _ = (body for _, _, body in records)

    # table, age unit, time, alive since, keys; then the changes: bucket 1,000 gets four rows
    assert insert.take("IIqqQ") == (1, 1, 1_000, 500, 4)
    assert insert.take("Qqq") == (1, 1_000, 4)
    assert set(insert.take("4Q")) == {7, MASK, 0, 2**40}
    insert.end()

    # table, optimizer, kernel, dimension, group step, time, alive since, keys, numbers, age unit
    assert apply.take("IIIIQqqQII") == (1, 2, 1, DIMENSION, 1, 1_400, 900, 4, 4, 1)
    assert apply.take("4d") == (0.5, 0.25, 0.0, 0.0)
    assert apply.take("Q4q") == (2, 1_000, -4, 1_400, 4)
    assert apply.take("4Q") == (7, MASK, 0, 2**40)  # in order of appearance
    assert apply.take("12f") == (12, 14, 16, 3, 4, 5, 6, 7, 8, 9, 10, 11)  # key 7 stands twice
    apply.end()

    assert erase.take("IIqqQ") == (1, 1, 1_400, 900, 1)
    assert erase.take("Qqq") == (1, 1_400, -1)
    assert erase.take("Q") == 0
    erase.end()
    assert (commit.take("q"), commit.string()) == (9, b"where")
    commit.end()


def test_an_update_of_several_groups_is_one_record(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB", threads=1, ttl=500) as storage:
        storage.now = 1_000
        groups = [de.Embedding(storage, de.SGD(lr=0.5), de.Zeros(), DIMENSION, group=group) for group in (4, 9)]
        ones = np.ones((2, DIMENSION), np.float32)
        storage._core.backward_many(
            [(one._table, [(_core.Batch(np.array([one.group, 5])), ones * one.group)], None) for one in groups]
        )
        generation = tmp_path / "s" / "generation-000001"
        _, records = log(generation / "log" / "0000000001.log", manifest(generation / "MANIFEST")[0])
        assert [kind for _, kind, _ in records] == [12]
        body = records[0][2]
        assert body.take("Q") == 2
        for table, group in ((1, 4), (2, 9)):
            length = body.take("Q")
            end = body.at + length
            assert body.take("IIIIQqqQII")[:5] == (table, 1, 1, DIMENSION, 1)
            numbers = body.take("5d")
            assert numbers[0] == 0.5
            assert body.take("Qqq") == (1, 1_000, 2)
            assert body.take("2Q") == (group, 5)
            assert body.take("6f") == (group,) * 6
            assert body.at == end
        body.end()


def stored_row(table: de.Embedding, key: int) -> bytes:
    row = table.inspect(key)
    assert row is not None
    floats = b"" if row.update_count == 0 else row.weights.tobytes() + row.state["sum"].tobytes()
    head = struct.pack("<BBHI", 1, bool(floats), 0, 0)
    rest = struct.pack("<IIqQ", row.update_count, row.step, row.last_update, row.sequence) + floats
    stored_key = struct.pack(">IQ", 1, mix(key))
    checksum = xxh3(0, stored_key + head + rest) & 0xFFFFFFFF
    return head[:4] + struct.pack("<I", checksum) + rest


def test_rows_in_the_cold_tier_are_as_documented(open_storage: Any, tmp_path: Path) -> None:
    storage, table = open_storage
    expected = {key: stored_row(table, key) for key in (7, -1, 2**40, 5)}
    assert len(expected[5]) == 32  # only looked up: no floats
    storage.close()
    # Tables are not compressed, and values lie in them whole; keys lack what they share with the one before.
    tables = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*.sst"))
    for key, row in expected.items():
        assert struct.pack(">Q", mix(key))[-7:] in tables, key
        assert row in tables, key


def test_after_close_the_log_begins_at_the_cut(open_storage: Any, tmp_path: Path) -> None:
    storage, _ = open_storage
    storage.close()
    generation = tmp_path / "s" / "generation-000001"
    (segment,) = (generation / "log").iterdir()
    start, records = log(segment, manifest(generation / "MANIFEST")[0])
    assert records == []
    table = (1, 1, 500, 1, [(1_400, 4)])
    assert start == {"sequence": 5, "clock": 1_400, "tables": [table], "commit": (9, b"where")}


def test_the_presence_filter_knows_the_stored_keys(open_storage: Any, tmp_path: Path) -> None:
    storage, _ = open_storage
    storage.close()
    data = (tmp_path / "s" / "generation-000001" / "presence").read_bytes()
    reader = Reader(data)
    assert reader.bytes(8) == b"DAMOPRES"
    version, reserved, sequence, blocks = reader.take("IIQQ")
    assert (version, reserved, sequence) == (1, 0, 5)
    assert len(data) == 32 + 64 * blocks + 8
    words = np.frombuffer(data[32:-8], "<u8").reshape(blocks, 8)

    def may_contain(key: int) -> bool:
        h = mix(mix(key) ^ 1 * 0x9E3779B97F4A7C15)
        block, bits = words[h * blocks >> 64], mix(h)
        nines = [bits >> 9 * i & 511 for i in range(6)]
        return all(int(block[b // 64]) >> b % 64 & 1 for b in nines)

    assert all(map(may_contain, (7, -1, 2**40, 5)))
    assert sum(map(may_contain, range(1_000, 2_000))) < 20

    chained, at = 0, 0
    while at < len(data) - 8:
        size = min(4096 * 64 + (32 if at == 0 else 0), len(data) - 8 - at)
        chained = xxh3(chained, data[at : at + size])
        at += size
    assert struct.unpack("<Q", data[-8:])[0] == chained


def test_the_commit_mark_has_two_slots(open_storage: Any, tmp_path: Path) -> None:
    storage, _ = open_storage
    storage.close()
    data = (tmp_path / "s" / "generation-000001" / "rocksdb" / "COMMITTED").read_bytes()
    assert len(data) == 1024
    for at in (0, 512):
        magic, number, checksum = struct.unpack_from("<QQQ", data, at)
        assert magic == 0x316B72616D6D6164
        assert checksum == xxh3(magic, struct.pack("<Q", number))
        assert number == 0 or number % 2 == at // 512


def test_a_checkpoint_lists_its_files(open_storage: Any, tmp_path: Path) -> None:
    storage, _ = open_storage
    storage.checkpoint(tmp_path / "c", step=12, extra=b"note")
    reader = Reader((tmp_path / "c" / "CHECKPOINT").read_bytes()).sealed(b"DAMOCKPT")
    storage_id, step, _made = reader.bytes(16), *reader.take("qq")
    assert storage_id == manifest(tmp_path / "c" / "MANIFEST")[0]
    assert (step, reader.string()) == (12, b"note")
    assert counters(reader.string())["sequence"] == 5
    listed = set()
    for _ in range(reader.take("I")):
        name, size, checksum = reader.string().decode(), *reader.take("QI")
        data = (tmp_path / "c" / name).read_bytes()
        assert (len(data), crc32c(data)) == (size, checksum), name
        listed.add(name)
    reader.end(tail=8)
    there = {str(path.relative_to(tmp_path / "c")) for path in (tmp_path / "c").rglob("*") if path.is_file()}
    assert there == listed | {"CHECKPOINT"}


def test_a_dump_is_two_tables_and_records(open_storage: Any, tmp_path: Path) -> None:
    storage, table = open_storage
    assert storage.dump(tmp_path / "d") == 4
    data = (tmp_path / "d").read_bytes()
    dimensions, counts = np.frombuffer(data, "<i4", 256), np.frombuffer(data, "<u8", 256, 1024)
    assert dimensions[255] == DIMENSION
    assert counts[255] == 4
    assert dimensions.sum() == DIMENSION
    assert counts.sum() == 4
    records = np.frombuffer(data[3072:], [("key", "<u8"), ("group", "<i4"), ("weights", "<f4", DIMENSION)])
    assert [mix(int(key)) for key in records["key"]] == sorted(mix(key) for key in (7, -1, 2**40, 5))
    assert set(records["group"]) == {255}
    assert np.array_equal(records["weights"], table.lookup(records["key"], insert=False))
