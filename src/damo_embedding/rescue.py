# SPDX-License-Identifier: Apache-2.0
"""What `Storage.verify` finds damaged, and what `Storage.salvage` brings back."""

from __future__ import annotations

from dataclasses import dataclass

from damo_embedding.integers import parse_int

__all__ = ["Damage", "SalvageReport", "VerifyReport"]


@dataclass(frozen=True)
class Damage:
    """One thing that is damaged or lost, as narrowly as it can be told."""

    file: str  # or the directory, when it is not known which of its files
    what: str  # in words, with the offset where there is one
    group: int | None  # of the rows in question
    key: int | None  # of one row, as an unsigned number
    mixed: tuple[int, int] | None  # of a range of rows: `mix(key)` (docs/format.md) from the first to the last

    def contains(self, group: int, key: int) -> bool:
        """Whether the row of `key` (int64 or uint64) is among those in question; `group` is the group's number."""
        number = parse_int("contains", "group", group, 0, 255, "the group's number")
        bits = parse_int("contains", "key", key, -(2**63), 2**64 - 1) % 2**64
        if self.group != number or self.mixed is None:
            return False
        return self.mixed[0] <= _mix(bits) <= self.mixed[1]


@dataclass(frozen=True)
class VerifyReport:
    """What `Storage.verify` read, and what of it is damaged. The other files of ours are among `files`, too."""

    rows: int
    files: int  # table files and segments of the log
    bytes: int
    records: int  # of the log
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class SalvageReport:
    """What `Storage.salvage` brought into the new storage, and what is lost."""

    rows: int
    records: int  # of the log, done again
    lost: tuple[Damage, ...]


def _mix(key: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ key >> 33) * factor % 2**64
    return key ^ key >> 33
