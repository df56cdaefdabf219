# SPDX-License-Identifier: Apache-2.0
"""read_dump, and the readers of examples/, against files made by a writer of its own, whole and damaged."""

from __future__ import annotations

import ast
import io
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damo_embedding import dump_reader, read_dump
from damo_embedding.errors import CorruptionError
from strangers import COMPILER, ENVIRONMENT, EXAMPLES, RefusedError, c_reader, rows_in_c, rows_in_python

HEADER_BYTES = 256 * 4 + 256 * 8
Record = tuple[int, int, list[float]]  # group, key, weights


def dump_bytes(records: list[Record], dimensions: dict[int, int], counts: dict[int, int] | None = None) -> bytes:
    if counts is None:
        counts = {group: sum(record[0] == group for record in records) for group in dimensions}
    out = io.BytesIO()
    out.write(struct.pack("<256i", *(dimensions.get(group, 0) for group in range(256))))
    out.write(struct.pack("<256Q", *(counts.get(group, 0) for group in range(256))))
    for group, key, weights in records:
        out.write(struct.pack(f"<Qi{len(weights)}f", key, group, *weights))
    return out.getvalue()


def random_records(rng: np.random.Generator, groups: list[int], dimensions: dict[int, int]) -> list[Record]:
    return [
        (
            group,
            int(rng.integers(0, 2**64, dtype=np.uint64)),
            rng.standard_normal(dimensions[group], np.float32).tolist(),
        )
        for group in groups
    ]


def check(path: Path, records: list[Record], dimensions: dict[int, int]) -> None:
    read = read_dump(path)
    assert list(read) == sorted(dimensions)
    for group, (keys, weights) in read.items():
        own = [record for record in records if record[0] == group]
        assert keys.dtype == np.uint64
        assert keys.tolist() == [record[1] for record in own]
        expected = np.array([record[2] for record in own], np.float32).reshape(len(own), dimensions[group])
        np.testing.assert_array_equal(weights, expected, strict=True)
    in_order = [(group, key, tuple(weights)) for group, key, weights in records]
    assert list(rows_in_python(path)) == in_order
    if COMPILER is not None:
        assert [(group, key, floats(weights)) for group, key, weights in rows_in_c(path)] == in_order


def floats(printed: tuple[float, ...]) -> tuple[float, ...]:
    """The float32 whose nine digits were read as a double."""
    return tuple(np.array(printed, np.float32).tolist())


def test_a_number_is_no_path_and_its_file_stays_open(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(TypeError, match="path is int"):
            read_dump(file.fileno())  # type: ignore[arg-type]
        file.read()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_records_in_any_order_of_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    # Small chunks and runs, so that few records cross every border.
    monkeypatch.setattr(dump_reader, "_CHUNK_WORDS", data.draw(st.integers(1, 60)))
    monkeypatch.setattr(dump_reader, "_RUN", data.draw(st.integers(1, 6)))
    monkeypatch.setattr(dump_reader, "_WALK", data.draw(st.integers(1, 6)))
    dimensions = data.draw(st.dictionaries(st.integers(0, 255), st.integers(1, 20), max_size=4))
    groups: list[int] = []
    if dimensions:
        runs = st.lists(st.tuples(st.sampled_from(sorted(dimensions)), st.integers(1, 12)), max_size=8)
        groups = [group for group, length in data.draw(runs) for _ in range(length)]
    records = random_records(np.random.default_rng(data.draw(st.integers(0, 99))), groups, dimensions)
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes(records, dimensions))
    check(path, records, dimensions)


@pytest.mark.parametrize("order", ["sorted", "shuffled", "alternating"])
def test_a_file_of_many_chunks_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr(dump_reader, "_CHUNK_WORDS", 100_000)
    rng = np.random.default_rng(1)
    dimensions = {0: 4, 7: 16, 255: 1}
    groups = rng.choice([0, 7, 255], 40_000)
    groups = {"sorted": np.sort(groups), "shuffled": groups, "alternating": np.resize([0, 7, 255], 40_000)}[order]
    records = random_records(rng, groups.tolist(), dimensions)
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes(records, dimensions))
    check(path, records, dimensions)


def test_a_record_larger_than_a_chunk_is_read(tmp_path: Path) -> None:
    dimensions = {3: 3_000_000}
    path = tmp_path / "dump.bin"
    weights = np.arange(6_000_000, dtype=np.float32).reshape(2, -1)
    prefix = [struct.pack("<Qi", key, 3) for key in (1, 2**64 - 1)]
    path.write_bytes(
        dump_bytes([], dimensions, {3: 2}) + b"".join(p + w.tobytes() for p, w in zip(prefix, weights, strict=True))
    )
    keys, read = read_dump(path)[3]
    assert keys.tolist() == [1, 2**64 - 1]
    np.testing.assert_array_equal(read, weights)


def test_bits_of_weights_are_kept(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0x80000000, 0x00000001, 0xFF800000], np.uint32)
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes([], {1: 4}, {1: 1}) + struct.pack("<Qi", 9, 1) + bits.tobytes())
    np.testing.assert_array_equal(read_dump(path)[1][1].view(np.uint32)[0], bits)


def test_groups_without_rows_keep_their_dimension(tmp_path: Path) -> None:
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes([], {}))
    assert read_dump(path) == {}
    path.write_bytes(dump_bytes([], {5: 8}))
    keys, weights = read_dump(str(path))[5]
    assert keys.shape == (0,)
    assert weights.shape == (0, 8)


# -------------------------------------------------------------------------------- damage

RECORDS: list[Record] = [
    (2, 10, [1.0, 2.0]),
    (2, 11, [3.0, 4.0]),
    (9, 12, [5.0, 6.0, 7.0]),
    (2, 13, [8.0, 9.0]),
]
DIMENSIONS = {2: 2, 9: 3, 20: 5}


def corruption(path: Path, offset: int | None = None) -> None:
    pattern = re.escape(f"[read_dump] {path} ") + (
        rf".*\(offset {offset}\)" if offset is not None else r".*\(offset \d+\)"
    )
    with pytest.raises(CorruptionError, match=pattern):
        read_dump(path)
    with pytest.raises(RefusedError, match=re.escape(str(path))):
        list(rows_in_python(path))
    if COMPILER is not None:
        with pytest.raises(RefusedError, match=re.escape(str(path)) + r": .*\(offset \d+\)"):
            rows_in_c(path)


def test_a_file_cut_at_any_length_is_corruption(tmp_path: Path) -> None:
    whole = dump_bytes(RECORDS, DIMENSIONS)
    path = tmp_path / "dump.bin"
    for length in [*range(0, 3072, 97), *range(3060, len(whole))]:
        path.write_bytes(whole[:length])
        corruption(path, length)


def test_bytes_after_the_last_record_are_corruption(tmp_path: Path) -> None:
    whole = dump_bytes(RECORDS, DIMENSIONS)
    path = tmp_path / "dump.bin"
    for extra in (b"\0", b"1234", struct.pack("<Qi2f", 14, 2, 0.0, 0.0)):
        path.write_bytes(whole + extra)
        corruption(path, len(whole))


@pytest.mark.parametrize(
    ("dimensions", "counts"),
    [
        ({2: 2, 9: 3}, {2: 2, 9: 1}),
        ({2: 2, 9: 3}, {2: 4, 9: 1}),
        ({2: 2, 9: 3}, {2: 3}),
        ({2: 2, 9: 3}, {2: 2**63, 9: 1}),
        ({2: 2, 9: 3}, {2: 2**64 - 1, 9: 2**64 - 1}),
        ({2: 2}, {2: 3, 9: 1}),
        ({2: 3, 9: 3}, {2: 3, 9: 1}),
        ({2: -2, 9: 3}, {2: 3, 9: 1}),
        ({2: 2**31 - 1, 9: 3}, {2: 3, 9: 1}),
        ({2: 2, 9: 3, 11: -1}, {2: 3, 9: 1}),
        ({2: 2, 9: 0}, {2: 3, 9: 1}),
    ],
)
def test_tables_that_disagree_with_the_file_are_corruption(
    tmp_path: Path, dimensions: dict[int, int], counts: dict[int, int]
) -> None:
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes(RECORDS, dimensions, counts))
    tracemalloc.start()
    corruption(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_tables_that_fit_the_length_but_not_the_records_are_corruption(tmp_path: Path) -> None:
    path = tmp_path / "dump.bin"
    same = [(group, key, [0.0, 0.0]) for key, group in enumerate([1, 1, 2, 2])]
    path.write_bytes(dump_bytes(same, {1: 2, 2: 2}, {1: 3, 2: 1}))
    corruption(path, HEADER_BYTES + 3 * 20)
    path.write_bytes(dump_bytes(same, {1: 2, 2: 2}, {1: 1, 2: 3}))
    corruption(path, HEADER_BYTES + 1 * 20)


def test_a_record_of_a_group_without_rows_is_corruption(tmp_path: Path) -> None:
    whole = dump_bytes(RECORDS, DIMENSIONS)
    path = tmp_path / "dump.bin"
    for group in (-1, 3, 20, 256, 2**31 - 1, -(2**31)):
        bad = bytearray(whole)
        struct.pack_into("<i", bad, HEADER_BYTES + 20 + 8, group)
        path.write_bytes(bad)
        corruption(path, HEADER_BYTES + 20)


def test_a_record_that_does_not_fit_before_the_end_is_corruption(tmp_path: Path) -> None:
    # Lengths that add up by chance: 2 * (12 + 8) + 2 * (12 + 28) = 3 * (12 + 8) + (12 + 28) + 20.
    records = [(1, 1, [0.0] * 2), (2, 2, [0.0] * 7), (1, 3, [0.0] * 2), (1, 4, [0.0] * 2), (1, 5, [0.0] * 2)]
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes(records, {1: 2, 2: 7}, {1: 2, 2: 2}))
    corruption(path)
    last = [(1, 1, [0.0] * 2), (1, 2, [0.0] * 2), (2, 3, [0.0] * 2)]
    path.write_bytes(dump_bytes(last, {1: 2, 2: 3, 3: 1}, {1: 1, 2: 1, 3: 1}))  # 60 = 20 + 24 + 16
    corruption(path)


def test_a_flip_in_tables_or_groups_is_corruption_and_one_elsewhere_changes_one_number(
    tmp_path: Path,
) -> None:
    whole = dump_bytes(RECORDS, DIMENSIONS)
    path = tmp_path / "dump.bin"
    group_bytes = {HEADER_BYTES + start + 8 + i for start in (0, 20, 40, 64) for i in range(4)}
    tables = {4 * 2, 4 * 9 + 1, 4 * 77, 1024 + 8 * 2, 1024 + 8 * 9 + 7, 1024 + 8 * 200 + 3}
    unused_dimensions = {4 * 77}  # a dimension of a group without rows is as good as another
    for at in sorted(tables | set(range(HEADER_BYTES, len(whole)))):
        bad = bytearray(whole)
        bad[at] ^= 1
        path.write_bytes(bad)
        if at in (group_bytes | tables) - unused_dimensions:
            corruption(path)
        else:
            read_dump(path)
            assert len(list(rows_in_python(path))) == len(RECORDS)


def test_a_file_that_changes_while_it_is_read_is_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dump_bytes(RECORDS, DIMENSIONS)
    path = tmp_path / "dump.bin"
    take = dump_reader._Reader._take_records
    monkeypatch.setattr(dump_reader, "_CHUNK_WORDS", 7)

    for changed in (whole[: HEADER_BYTES + 20], whole + b"more"):

        def take_and_change(self: dump_reader._Reader, words: np.ndarray, offset: int, changed: bytes = changed) -> int:
            path.write_bytes(changed)
            return take(self, words, offset)

        path.write_bytes(whole)
        with monkeypatch.context() as patch:
            patch.setattr(dump_reader._Reader, "_take_records", take_and_change)
            corruption(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_dump(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        read_dump(tmp_path)


def test_the_reader_takes_little_more_memory_than_its_result(tmp_path: Path) -> None:
    dimension, rows = 16, 400_000
    records = np.zeros(rows, np.dtype([("key", "<u8"), ("group", "<i4"), ("weights", "<f4", dimension)]))
    records["key"] = np.arange(rows)
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes([], {0: dimension}, {0: rows}) + records.tobytes())
    tracemalloc.start()
    read = read_dump(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * (8 + 4 * dimension) + (16 << 20)
    assert read[0][0][-1] == rows - 1


# -------------------------------------------------------------------- the readers of examples/

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler (looked for $CC, cc, gcc, clang)")


def test_the_reader_in_python_is_40_lines_and_imports_nothing_but_struct_and_sys() -> None:
    text = (EXAMPLES / "read_dump.py").read_text()
    assert len(text.splitlines()) <= 40
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.name for node in imports for name in node.names} == {"struct", "sys"}


@needs_compiler
def test_both_readers_print_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "dump.bin"
    path.write_bytes(dump_bytes([*RECORDS, (9, 2**64 - 1, [-0.0, 1e-45, 3.4028235e38])], DIMENSIONS))
    in_python = subprocess.run(
        [sys.executable, "-I", EXAMPLES / "read_dump.py", path], capture_output=True, text=True, check=True
    )
    assert in_python.stdout.splitlines()[-1] == "9 18446744073709551615 -0 1.40129846e-45 3.40282347e+38"
    in_c = subprocess.run([c_reader(), path], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert in_c.stdout == in_python.stdout


@needs_compiler
def test_the_reader_in_c_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, Path("/dev/null")):
        with pytest.raises(RefusedError, match=re.escape(str(path))):
            rows_in_c(path)
    assert subprocess.run([c_reader()], capture_output=True, check=False, env=ENVIRONMENT).returncode == 2


@needs_compiler
def test_all_readers_agree_on_files_damaged_at_random_and_none_crashes(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    whole = np.frombuffer(dump_bytes(RECORDS, DIMENSIONS), np.uint8)
    starts = [4 * 2, 4 * 9, 4 * 20, 1024 + 8 * 2, 1024 + 8 * 9, 1024 + 8 * 20, HEADER_BYTES + 8, HEADER_BYTES + 28]
    path = tmp_path / "dump.bin"
    refused = 0
    for number in range(200):
        bad = whole.copy()
        # A few wild bytes: anywhere, or where the numbers are that a reader believes.
        start = int(random.choice(starts)) if number % 2 else int(random.integers(bad.size - 8))
        size = int(random.integers(1, 9))
        bad[start : start + size] = random.choice([0, 1, 0x7F, 0xFF, random.integers(256)], size)
        path.write_bytes(bad[: random.choice([bad.size, random.integers(bad.size)], p=[0.8, 0.2])].tobytes())
        verdicts = []
        for reader in (read_dump, lambda path: list(rows_in_python(path)), rows_in_c):
            try:
                reader(path)
                verdicts.append(True)
            except (CorruptionError, RefusedError):
                verdicts.append(False)
        assert len(set(verdicts)) == 1, path.read_bytes()
        refused += not verdicts[0]
    assert 50 < refused < 200
