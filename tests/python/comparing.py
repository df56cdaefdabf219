# SPDX-License-Identifier: Apache-2.0
"""What the tests of Storage and Embedding share: a storage beside the oracle, a directory beside itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import damo_embedding as de
from reference import Floats, ReferenceTable


@dataclass(frozen=True)
class Row:
    """A row to the last bit, in a form that == compares and pytest shows."""

    weights: bytes
    state: tuple[tuple[str, bytes], ...]
    update_count: int
    last_update: int


def _row(weights: Floats, state: dict[str, Floats], update_count: int, last_update: int) -> Row:
    assert weights.dtype == np.float32
    blocks = tuple(sorted((name, block.tobytes()) for name, block in state.items()))
    return Row(weights.tobytes(), blocks, int(update_count), int(last_update))


def rows_of(embedding: de.Embedding, batch: int = 512) -> dict[int, Row]:
    """All rows, by a scan."""
    rows: dict[int, Row] = {}
    for part in embedding.scan(batch):
        for i, key in enumerate(part.keys.tolist()):
            assert key not in rows, f"the scan gave key {key} twice"
            state = {name: block[i] for name, block in part.state.items()}
            rows[key] = _row(part.weights[i], state, part.update_counts[i], part.last_updates[i])
    return rows


def rows_of_reference(table: ReferenceTable) -> dict[int, Row]:
    return {key: _row(row.weights, row.state, row.update_count, row.time) for key, row in table.rows.items()}


def assert_same_rows(found: dict[int, Row], expected: dict[int, Row]) -> None:
    """Equality that says what differs, not how thousands of rows look."""
    assert len(found) == len(expected)
    assert found.keys() == expected.keys()
    wrong = [key for key, row in expected.items() if found[key] != row]
    if wrong:
        key = wrong[0]
        got, want = found[key], expected[key]
        what = [name for name in ("weights", "state", "update_count", "last_update")
                if getattr(got, name) != getattr(want, name)]  # fmt: skip
        first = np.frombuffer(got.weights, np.float32)[:4], np.frombuffer(want.weights, np.float32)[:4]
        raise AssertionError(
            f"{len(wrong)} of {len(expected)} rows differ; key {key} in {what}: update count {got.update_count}, "
            f"expected {want.update_count}; time {got.last_update}, expected {want.last_update}; "
            f"weights {first[0]}, expected {first[1]}"
        )


def assert_equals_reference(embedding: de.Embedding, table: ReferenceTable) -> None:
    """Bit for bit: rows, state, counts, times, the number of rows, the group's step."""
    assert len(embedding) == len(table)
    assert embedding.step == table.step
    assert_same_rows(rows_of(embedding), rows_of_reference(table))


def reference_of(embedding: de.Embedding) -> ReferenceTable:
    """The oracle of a group that is known by its number."""
    assert embedding.name == ""
    return ReferenceTable(
        embedding.optimizer,
        embedding.initializer,
        embedding.dimension,
        seed=embedding.seed,
        stream=embedding.group,
    )


def files_of(directory: Path, ignore_directories: Iterable[str] = ()) -> dict[str, str]:
    """Each file below `directory` with a hash of its bytes, without what names the holder and RocksDB's chatter."""
    skipped = set(ignore_directories)
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and file.name not in ("LOCK", "LOG")
        and not file.name.startswith("LOG.old")
        and not skipped & set(file.relative_to(directory).parts)
    }
