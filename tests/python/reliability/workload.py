# SPDX-License-Identifier: Apache-2.0
"""What is done to a storage, from a seed: its groups, its options, its operations."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import damo_embedding as de
from reliability.oracle import Operation
from storage_server import Group

START = 2**40  # ahead of any wall clock: time is the workload's
# Of a replay: behind the wall clock, and so near that this is believed: 60 to 90 days. It is the same for a month, for
# this process and those that it starts; later again() sets it.
_MONTH = 30 * 86_400
REPLAY_START = int(os.environ.setdefault("DAMO_REPLAY_START", str((int(time.time()) // _MONTH - 2) * _MONTH)))
DURABILITIES = ("commit", "logged", "durable")


def again(suite: str, seed: int) -> str:
    """The command that does a case again, also when it is no longer this month."""
    return f"DAMO_REPLAY_START={REPLAY_START} scripts/soak {suite} --seed {seed}"


@dataclass(frozen=True)
class Shape:
    """A kind of storage. The last group is opened on the way."""

    name: str
    groups: tuple[Group, ...]
    pool: int  # keys of a group
    batch: int  # keys of a call, at most
    log_bytes: tuple[str, ...]
    memory: tuple[str, ...] = ("16MiB", "16MiB", "20MiB")
    start: int = START  # the time when it begins

    @property
    def first_groups(self) -> tuple[Group, ...]:
        return self.groups[:-1]

    def keys_of(self, group: int) -> np.ndarray:
        """All keys that a group may ever have: all over the 64 bits, with the special ones among them."""
        random = np.random.default_rng([self.pool, group])
        keys = random.integers(-(2**63), 2**63, self.pool, dtype=np.int64)
        keys[:5] = [0, -1, 1, 2**63 - 1, -(2**63)]
        return keys


def _filter(capacity: int, count: int, halve_every: int | None = None) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(capacity=capacity, count=count, fpr=0.01, halve_every=halve_every)


# Up to three days a bucket of lives is one second wide, and every row expires by itself.
HOURS = 3_600
LONGEST_WAIT = 20 * HOURS


# Thousands of operations a second, a log that fits into one segment, now and then a cut.
SMALL = Shape(
    "small",
    (
        Group(0, de.SGD(lr=0.1, weight_decay=0.01), de.Uniform(-1.0, 1.0), dimension=3, seed=1),
        Group(7, de.Adagrad(lr=0.1), de.Normal(0.0, 0.5), dimension=16, seed=2, ttl=40 * HOURS),
        # Of more than one chunk, in which a cut saves it, and so often halved that the key which halves it now and then
        # is the first since the cut began.
        Group(90, de.RMSprop(lr=0.01), de.Ones(), dimension=5, admission=_filter(20_000, 2, 10), ttl=de.Steps(9)),
        Group(200, de.Adam(lr=0.1), de.TruncatedNormal(0.0, 1.0), dimension=33, seed=3),
        Group(
            255,
            de.Adam(lr=0.01, bias_correction="global"),
            de.Zeros(),
            dimension=8,
            admission=_filter(100, 3),
            ttl=60 * HOURS,
        ),
    ),
    pool=300,
    batch=60,
    log_bytes=("1MiB", "64MiB"),
)
# Rows of 4, 8 and 12 KB: more than the least memory holds, a log that is cut again and again.
TIGHT = Shape(
    "tight",
    (
        Group(0, de.SGD(lr=0.1), de.Uniform(-1.0, 1.0), dimension=1024, seed=1),
        Group(7, de.Adagrad(lr=0.1), de.Normal(0.0, 0.5), dimension=1020, seed=2, ttl=70 * HOURS),
        Group(200, de.Adam(lr=0.1), de.TruncatedNormal(0.0, 1.0), dimension=1000, seed=3),
        Group(255, de.Adam(lr=0.01, bias_correction="global"), de.Zeros(), dimension=900, seed=4),
    ),
    pool=900,
    batch=90,
    log_bytes=("1MiB", "4MiB"),
)
# Rows of 48 KB that all change between two cuts: a cut fills more than one of RocksDB's table files.
LARGE = Shape(
    "large",
    (
        Group(0, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=4_096, seed=1),
        Group(255, de.SGD(lr=0.1), de.Zeros(), dimension=4_096, seed=4),
    ),
    pool=1_450,
    batch=10,
    log_bytes=("256MiB",),
    memory=("192MiB",),
)
# Events of last month: each opening is at the wall clock, where most rows have expired, until the time is set.
REPLAY = replace(SMALL, name="replay", start=REPLAY_START)
SHAPES = {shape.name: shape for shape in (SMALL, TIGHT, LARGE, REPLAY)}


def draw_shape(random: np.random.Generator, tight: float = 0.2, large: float = 0.0, replay: float = 0.15) -> Shape:
    shares = {TIGHT.name: tight, LARGE.name: large, REPLAY.name: replay}
    shares[SMALL.name] = 1 - sum(shares.values())
    return SHAPES[str(random.choice(list(shares), p=list(shares.values())))]


def draw_options(random: np.random.Generator, shape: Shape) -> dict[str, Any]:
    """Options of one opening. Nothing that is stored depends on them."""
    return {
        "memory": str(random.choice(shape.memory)),
        "threads": int(random.integers(1, 4)),
        "log_bytes": str(random.choice(shape.log_bytes)),
        "durability": str(random.choice(DURABILITIES)),
    }


# verb, weight
_VERBS = {
    "apply_gradients": 38, "apply_together": 10, "lookup": 16, "import_rows": 3, "erase": 8, "commit": 7, "set_now": 4,
    "lookup_only": 4, "contains": 2, "prefetch": 2, "scan": 2, "dump": 2, "checkpoint": 4, "reopen": 2, "open_group": 2,
    "expire": 2, "compact": 1, "verify": 1, "drop_group": 1,
}  # fmt: skip


class Workload:
    """Operations without end, each a function of the seed and its place alone."""

    def __init__(self, seed: list[int], shape: Shape, first_number: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self._pools = {group.group: shape.keys_of(group.group) for group in shape.groups}
        self._now = shape.start
        self._number = first_number
        self._open = list(shape.first_groups)

    def fill(self) -> list[Operation]:
        """A row for each key, for the shapes that are about many bytes."""
        if self.shape.name in (SMALL.name, REPLAY.name):
            return []
        step = 3 * self.shape.batch
        filled = [
            self._apply(group, self._pools[group.group][begin : begin + step])
            for begin in range(0, self.shape.pool, step)
            for group in self._open
        ]
        if self.shape is LARGE:  # a cut of all of it, and of the log
            filled.append(Operation("reopen"))
        return filled

    def draw(self, count: int, without: tuple[str, ...] = ()) -> list[Operation]:
        verbs = [verb for verb in _VERBS if verb not in without]
        weights = np.array([_VERBS[verb] for verb in verbs], np.float64)
        chosen = [verbs[which] for which in self.random.choice(len(verbs), count, p=weights / weights.sum())]
        # The first to confirm a new time: records of their own, that say nothing else.
        confirm = [verb for verb in ("expire", "compact") if verb in verbs]
        for place in range(1, count):
            if confirm and chosen[place - 1] == "set_now" and self.random.random() < 0.4:
                chosen[place] = str(self.random.choice(confirm))
        return [self._draw(verb) for verb in chosen]

    def _keys(self, group: Group, most: int) -> np.ndarray:
        """From few keys or all of them, so that some repeat and some are cold."""
        pool = self._pools[group.group]
        width = int(self.random.choice([3, len(pool) // 10, len(pool)]))
        begin = int(self.random.integers(0, len(pool) - width + 1))
        return pool[self.random.integers(begin, begin + width, self.random.integers(0, most + 1))]

    def _apply(self, group: Group, keys: np.ndarray) -> Operation:
        gradients = self.random.standard_normal((len(keys), group.dimension)).astype(np.float32)
        lr = (None, None, 0.0, 0.5)[int(self.random.integers(4))]
        return Operation("apply_gradients", group.group, keys, gradients, lr)

    def _draw(self, verb: str) -> Operation:
        group = self._open[int(self.random.integers(len(self._open)))]
        self._number += 1
        if verb == "apply_gradients":
            # Now and then more rows than may be in memory at once; where it is about bytes more often, to fill the log.
            most = self.shape.batch * (4 if self.random.random() < (0.2 if self.shape is TIGHT else 0.05) else 1)
            return self._apply(group, self._keys(group, most))
        if verb == "apply_together":
            count = int(self.random.integers(1, len(self._open) + 1))
            chosen = [self._open[place] for place in self.random.permutation(len(self._open))[:count]]
            parts = tuple(self._apply(group, self._keys(group, self.shape.batch)) for group in chosen)
            return Operation(verb, parts=parts)
        if verb in ("lookup", "lookup_only", "contains", "erase", "prefetch"):
            most = self.shape.batch if verb != "erase" else self.shape.batch // 2
            return Operation(verb, group.group, self._keys(group, most))
        if verb == "import_rows":
            keys = np.unique(self._keys(group, self.shape.batch // 2))
            weights = self.random.standard_normal((len(keys), group.dimension)).astype(np.float32)
            return Operation(verb, group.group, keys, weights, counts=self.random.integers(0, 9, len(keys)))
        if verb == "commit":
            extra = self.random.bytes(int(self.random.integers(0, 40)))
            return Operation(verb, number=self._number, extra=extra)
        if verb == "set_now":
            self._now += int(self.random.integers(1, LONGEST_WAIT))
            return Operation(verb, number=self._now)
        if verb == "open_group":
            last = self.shape.groups[-1]
            if last not in self._open:
                self._open.append(last)
            return Operation(verb, last.group)
        if verb in ("checkpoint", "reopen", "expire", "compact", "verify"):
            return Operation(verb, number=self._number)
        return Operation(verb, group.group, number=self._number)
