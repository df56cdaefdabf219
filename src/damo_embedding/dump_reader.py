# SPDX-License-Identifier: Apache-2.0
"""The reader of the serving file that `Storage.dump` writes (docs/format.md has its bytes)."""

from __future__ import annotations

import io
import os
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from damo_embedding.errors import CorruptionError
from damo_embedding.storage import parse_path

Rows = tuple[NDArray[np.uint64], NDArray[np.float32]]
Words = NDArray[np.int32]

_GROUPS = 256
_HEADER = np.dtype([("dimensions", "<i4", _GROUPS), ("counts", "<u8", _GROUPS)])
_PREFIX_WORDS = 3  # a record is its key and group in three words of 4 bytes, then its weights
_CHUNK_WORDS = 1 << 20
_RUN = 256  # as many records of one group in a row are worth a view; fewer are walked, _WALK at a time
_WALK = 4096


def read_dump(path: str | os.PathLike[str]) -> dict[int, Rows]:
    """Read a serving file written by `Storage.dump`.

    Args:
        path: the file.

    Returns:
        For each group that has a dimension: its keys (uint64 [n]) and weights (float32 [n, dimension]), in
        the order of the file. It takes the memory of the result and a few MiB.

    Raises:
        CorruptionError: the file is cut off or too long, or its tables and records disagree; says at which
            offset.
        OSError: the file cannot be opened or read.
        TypeError, ValueError: `path` is not one.
    """
    name = parse_path("read_dump", "path", path)  # open() would take a number for an open file, and close that
    with open(name, "rb", buffering=0) as file:
        return _Reader(file, name).read()


class _Reader:
    # Read in chunks, not mapped: a mapped file that is cut off while it is read kills the process.

    def __init__(self, file: io.FileIO, path: str) -> None:
        self._file = file
        self._path = path
        self._rows: dict[int, Rows] = {}
        self._filled = [0] * _GROUPS
        self._record_words = [0] * _GROUPS  # 0: no record may be of this group

    def read(self) -> dict[int, Rows]:
        unread = self._read_header()
        buffer = np.empty(min(unread, max(_CHUNK_WORDS, *self._record_words)), "<i4")
        offset = _HEADER.itemsize  # of buffer[0] in the file
        held = 0
        while unread or held:
            size = min(buffer.size, held + unread)
            self._fill(buffer[held:size], offset + 4 * held)
            unread -= size - held
            used = self._take_records(buffer[:size], offset)
            if used == 0:  # nothing is left to read: a chunk has room for the longest record
                self._corrupt(f"ends inside of a record of {4 * size} bytes", offset)
            held = size - used
            buffer[:held] = buffer[used:size]
            offset += 4 * used
        for group, (keys, _) in self._rows.items():
            if self._filled[group] != keys.size:
                self._corrupt(f"group {group} has {self._filled[group]} of {keys.size} records", offset)
        if self._file.read(1):
            self._corrupt("goes on after its last record", offset)
        return self._rows

    def _read_header(self) -> int:
        """Check the tables against the file's length, then allocate; returns the number of words to come."""
        length = os.fstat(self._file.fileno()).st_size
        if length < _HEADER.itemsize:
            self._corrupt(f"is cut off: the tables of a dump have {_HEADER.itemsize} bytes", length)
        header = np.empty(1, _HEADER)
        self._fill(header.view("<i4"), 0)
        dimensions = [int(dimension) for dimension in header["dimensions"][0]]
        counts = [int(count) for count in header["counts"][0]]
        words = 0
        for group, (dimension, count) in enumerate(zip(dimensions, counts, strict=True)):
            if dimension < 0:
                self._corrupt(f"group {group} has the dimension {dimension}", 4 * group)
            if dimension == 0 and count:
                self._corrupt(f"group {group} has {count} rows and no dimension", 4 * group)
            if count:
                self._record_words[group] = _PREFIX_WORDS + dimension
                words += count * self._record_words[group]
        expected = _HEADER.itemsize + 4 * words
        if length != expected:
            what = "is cut off" if length < expected else "has bytes after its last record"
            self._corrupt(f"{what}: its tables ask for {expected} bytes", min(length, expected))
        for group, (dimension, count) in enumerate(zip(dimensions, counts, strict=True)):
            if dimension:
                self._rows[group] = np.empty(count, np.uint64), np.empty((count, dimension), np.float32)
        return words

    def _fill(self, words: NDArray[np.int32], offset: int) -> None:
        view = words.data.cast("B")
        while view:
            size = self._file.readinto(view)
            if not size:
                self._corrupt("became shorter while it was read", offset + 4 * words.size - len(view))
            view = view[size:]

    def _take_records(self, words: Words, offset: int) -> int:
        """Store the records that lie whole in `words`; returns the number of words they have."""
        at = 0
        while at + _PREFIX_WORDS <= words.size:
            group = int(words[at + 2])
            stride = self._stride(group, offset + 4 * at)
            whole = (words.size - at) // stride
            if whole == 0:
                break
            run = _leading(words[at + 2 :: stride][:whole], group)
            if run < min(_RUN, whole):
                at = self._walk(words, at, offset)
            else:
                starts = np.arange(at, at + run * stride, stride)
                self._store(group, words[at : at + run * stride].reshape(run, stride), starts, offset)
                at += run * stride
        return at

    def _walk(self, words: Words, at: int, offset: int) -> int:
        """Store up to _WALK records of any groups, the first one whole in `words`; returns where they end."""
        groups = words.data  # faster than the array, one number at a time
        starts: dict[int, list[int]] = {}
        for _ in range(_WALK):
            if at + _PREFIX_WORDS > words.size:
                break
            group = groups[at + 2]
            stride = self._stride(group, offset + 4 * at)
            if at + stride > words.size:
                break
            starts.setdefault(group, []).append(at)
            at += stride
        for group, positions in starts.items():
            first = np.array(positions)
            records = words[first[:, np.newaxis] + np.arange(self._record_words[group])]
            self._store(group, records, first, offset)
        return at

    def _stride(self, group: int, offset: int) -> int:
        stride = self._record_words[group] if 0 <= group < _GROUPS else 0
        if stride == 0:
            self._corrupt(f"has a record of group {group}, which has no rows in its tables", offset)
        return stride

    def _store(self, group: int, records: Words, starts: NDArray[np.intp], offset: int) -> None:
        keys, weights = self._rows[group]
        begin = self._filled[group]
        end = begin + len(records)
        if end > keys.size:
            extra = offset + 4 * int(starts[keys.size - begin])
            self._corrupt(f"has more records of group {group} than the {keys.size} of its table", extra)
        keys[begin:end] = np.ascontiguousarray(records[:, :2]).view("<u8")[:, 0]
        weights[begin:end] = records[:, _PREFIX_WORDS:].view("<f4")
        self._filled[group] = end

    def _corrupt(self, what: str, offset: int) -> NoReturn:
        raise CorruptionError(f"[read_dump] {self._path} {what} (offset {offset}); make the dump again")


def _leading(groups: NDArray[np.int32], group: int) -> int:
    """How many elements at the head of `groups` are `group`, found in time of their number."""
    done, window = 0, _RUN
    while done < groups.size:
        other = np.flatnonzero(groups[done : done + window] != group)
        if other.size:
            return done + int(other[0])
        done += min(window, groups.size - done)
        window *= 2
    return done
