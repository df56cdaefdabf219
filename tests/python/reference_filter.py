# SPDX-License-Identifier: Apache-2.0
"""The oracle of the counting Bloom filter, its layout and its counters in NumPy, and of a group that has one.

Written from docs/format.md; shares no code with the core and imports nothing of the package.
"""

from __future__ import annotations

import functools
import math
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from reference import Floats, ReferenceTable, as_uint64

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
LINE, LINES, PAGE_BYTES, CHUNK_BYTES = 128, 64, 4096, 65_536


def xxh3(seed: int, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def mix(key: int) -> int:
    key &= MASK64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key ^= key >> 33
        key = key * factor & MASK64
    return key ^ key >> 33


def _poisson(mean: float, size: int) -> npt.NDArray[np.float64]:
    at = np.arange(size)
    return np.exp(at * math.log(mean) - mean - np.array([math.lgamma(i + 1) for i in at]))


@functools.cache
def _keys_of_a_line(per_line: int, fpr: float) -> float:
    """u(h): the most keys a line may have on average."""
    filled = np.arange(LINE + 1) / LINE
    share = np.zeros(LINE + 1)
    share[0] = 1.0
    hit = []
    for _ in range(600):
        hit.append(float(share @ filled**per_line))
        for _ in range(per_line):
            moved = share[:-1] * (1 - filled[:-1])
            share = share * filled
            share[1:] += moved
    f = np.array(hit)

    def rate(u: float) -> float:
        apart = _poisson(u - u / 63, len(f))
        both = _poisson(u / 63, 40)
        return sum(p * float(apart[: len(f) - z] @ f[z:]) ** 2 for z, p in enumerate(both))

    low, high = 0.0, 200.0 / per_line
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) <= fpr else (low, middle)
    return low


def layout(capacity: int, fpr: float) -> tuple[int, int]:
    """(pages, counters per line)."""
    per_line = 1
    while 4.0**-per_line > fpr:
        per_line += 1
    best, found = 0.0, (0.0, 0)
    for h in range(per_line, 0, -1):
        keys = _keys_of_a_line(h, fpr)
        if keys < best * 0.99:
            break
        best, found = max(best, keys), (keys, h)
    return math.ceil(2 * capacity / (LINES * found[0])), found[1]


@functools.lru_cache(10_000)
def _places(key: int, pages: int, per_line: int) -> tuple[tuple[int, int, int], ...]:
    hashed = mix(key)
    page, first = hashed * pages >> 64, hashed % 64
    second = first ^ (1 + ((hashed >> 6) % 65_536 * 63 >> 16))
    numbers: list[int] = []
    word = hashed
    while len(numbers) < 2 * per_line:
        word = (word + GOLDEN) & MASK64
        nine = mix(word)
        numbers += [nine >> 7 * i & 127 for i in range(9)]
    lines = [first] * per_line + [second] * per_line
    return tuple((page, line, number) for line, number in zip(lines, numbers[: len(lines)], strict=True))


class ReferenceFilter:
    """The counters, one a byte: [pages, lines, counters of a line]."""

    def __init__(self, pages: int, per_line: int, halve_every: int = 0) -> None:
        self.pages, self.per_line, self.halve_every = pages, per_line, halve_every
        self.counters = np.zeros((pages, LINES, LINE), np.uint8)
        self.adds = 0

    def places(self, key: int) -> tuple[tuple[int, int, int], ...]:
        """Page, line and number of each of the key's counters."""
        return _places(key, self.pages, self.per_line)

    def estimate(self, key: int) -> int:
        return min(int(self.counters[place]) for place in self.places(key))

    def add(self, keys: Iterable[int], num: int = 1) -> None:
        for key in keys:
            wanted = min(self.estimate(key) + num, 15)
            for place in self.places(key):
                self.counters[place] = max(self.counters[place], wanted)
            before, self.adds = self.adds, min(self.adds + num, MASK64)
            if self.halve_every:
                for _ in range(min(self.adds // self.halve_every - before // self.halve_every, 8)):
                    self.counters >>= 1

    def tobytes(self) -> bytes:
        flat = self.counters.reshape(-1, 2)
        return (flat[:, 0] | flat[:, 1] << 4).tobytes()


def load(data: bytes) -> tuple[dict[str, float], ReferenceFilter]:
    """A whole filter file: its settings, and the filter with its log done. Every byte is accounted for."""
    assert data[:16] == b"DAMOFILT" + struct.pack("<II", 1, 0)
    capacity, count, per_line, fpr, halve_every, pages, adds, sealed = struct.unpack_from("<QIIdQQQQ", data, 16)
    assert sealed == xxh3(0, data[:64])
    assert not any(data[72:512])
    end, synced, boot, sealed = struct.unpack_from("<QQQQ", data, 512)
    assert sealed == xxh3(0, data[512:536])
    assert not any(data[544:4096])
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        assert boot == xxh3(0, file.read())
    result = ReferenceFilter(pages, per_line, halve_every)
    result.adds = adds
    at = 4096 + pages * PAGE_BYTES
    counters = data[4096:at]
    for offset in range(0, len(counters), CHUNK_BYTES):
        (sealed,) = struct.unpack_from("<Q", data, at)
        assert sealed == xxh3(4096 + offset, counters[offset : offset + CHUNK_BYTES])
        at += 8
    packed = np.frombuffer(counters, np.uint8)
    result.counters = np.stack([packed & 15, packed >> 4], axis=1).reshape(pages, LINES, LINE)
    assert at <= synced <= end == len(data)
    while at < end:
        keys, num, reserved, sealed = struct.unpack_from("<QIIQ", data, at)
        body = data[at + 24 : at + 24 + 8 * keys]
        assert 1 <= keys <= 65_536
        assert num >= 1
        assert reserved == 0
        assert sealed == xxh3(at, data[at : at + 16] + body)
        result.add(np.frombuffer(body, "<u8").tolist(), num)
        at += 24 + len(body)
    assert at == end
    return {"capacity": capacity, "count": count, "fpr": fpr, "halve_every": halve_every}, result


def seal_head(data: bytes) -> bytes:
    """The file with the checksum of its head put right."""
    return data[:64] + struct.pack("<Q", xxh3(0, data[:64])) + data[72:]


def seal_mark(data: bytes, *, end: int | None = None, synced: int | None = None, boot: int | None = None) -> bytes:
    """The file with other fields in its mark, and the mark's checksum put right."""
    old = struct.unpack_from("<QQQ", data, 512)
    fields = [have if given is None else given for have, given in zip(old, (end, synced, boot), strict=True)]
    mark = struct.pack("<QQQ", *fields)
    return data[:512] + mark + struct.pack("<Q", xxh3(0, mark)) + data[544:]


def seal_record(data: bytes, at: int, keys: int, num: int, reserved: int) -> bytes:
    """The file with other fields in the record at `at`, which has 20 keys, and its checksum put right."""
    head, body = struct.pack("<QII", keys, num, reserved), data[at + 24 : at + 24 + 160]
    return data[:at] + head + struct.pack("<Q", xxh3(at, head + body)) + data[at + 24 :]


class AdmittedTable(ReferenceTable):
    """The oracle of a group with a filter."""

    def __init__(self, optimizer: Any, initializer: Any, dimension: int, filter: Any, **named: int):
        super().__init__(optimizer, initializer, dimension, **named)
        pages, per_line = layout(filter.capacity, filter.fpr)
        self.count = filter.count
        self.filter = ReferenceFilter(pages, per_line, filter.halve_every or 0)
        self.refused = self.ignored = 0

    def lookup(self, keys: Any, *, insert: bool = True, missing: str = "initial") -> Floats:
        if insert:
            stands = Counter(key for key in as_uint64(keys).ravel().tolist() if key not in self.rows)
            admitted = []
            for key, times in stands.items():  # in order of first appearance
                if self.filter.estimate(key) + times >= self.count:
                    admitted.append(key)
                self.filter.add([key], times)
            self.refused += len(stands) - len(admitted)
            self._insert(admitted)
        return super().lookup(keys, insert=False, missing=missing)

    def apply_gradients(self, keys: Any, gradients: Any, lr: float | None = None) -> None:
        flat = as_uint64(keys).ravel()
        there = np.array([key in self.rows for key in flat.tolist()], np.bool_)
        self.ignored += len(set(flat[~there].tolist()))
        if there.any():
            super().apply_gradients(flat[there], np.asarray(gradients).reshape(-1, self.dimension)[there], lr)
        elif flat.size:
            self.step += 1
