# SPDX-License-Identifier: Apache-2.0
"""Any order of the verbs, beside the oracle: a storage with so little memory that rows come and go at every step.

The storage lives in a process of its own, which closing ends politely and a kill does not. Every row, its state, count
and time are compared bit for bit after each reopening.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    get_state_machine_test,
    initialize,
    precondition,
    rule,
)

import damo_embedding as de
from comparing import Row, assert_same_rows, rows_of_reference
from reference import ReferenceRow, ReferenceTable
from reliability.suite import Suite, memory_directory
from storage_server import ForkServer, Group, Session, fork_server

# Rows of 16, 32 and 48 KB, of which some 8 MiB are in memory at once: fewer than a third of all keys. The larger the
# rows, the fewer it takes, and an example is over sooner.
GROUPS = [
    Group(0, de.SGD(lr=0.1, weight_decay=0.01), de.Uniform(-1.0, 1.0), dimension=4096, seed=1),
    Group(7, de.Adagrad(lr=0.1), de.Uniform(0.0, 0.5), dimension=4090, seed=2),
    Group(255, de.Adam(lr=0.1), de.XavierUniform(), dimension=4000, seed=3),
]
NUMBERS = [group.group for group in GROUPS]
POOL = 300
START = 2**40  # ahead of any wall clock: time is the test's


def pool_of(group: int) -> np.ndarray:
    """Keys all over the 64 bits, with the special ones among them."""
    random = np.random.default_rng(group)
    keys = random.integers(-(2**63), 2**63, POOL, dtype=np.int64)
    keys[:5] = [0, -1, 1, 2**63 - 1, -(2**63)]
    return keys


POOLS = {group: pool_of(group) for group in NUMBERS}
groups = st.sampled_from(NUMBERS)
modes = st.sampled_from(["commit", "logged", "durable"])


@st.composite
def batches(draw: st.DrawFn, most: int = 30) -> tuple[int, int, int]:
    """A seed, a size, and how many keys of the pool it is from: few make repeats, all make cold rows."""
    return (
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(0, most)),
        draw(st.sampled_from([3, 20, 100, POOL])),
    )


# Of several groups, each once.
together = st.lists(st.tuples(groups, batches(most=120)), min_size=2, max_size=3, unique_by=lambda update: update[0])


def keys_of(group: int, batch: tuple[int, int, int]) -> np.ndarray:
    seed, size, width = batch
    random = np.random.default_rng(seed)
    begin = int(random.integers(0, POOL - width + 1))
    return POOLS[group][random.integers(begin, begin + width, size)]


def gradients_of(group: int, batch: tuple[int, int, int]) -> np.ndarray:
    dimension = next(known.dimension for known in GROUPS if known.group == group)
    return np.random.default_rng([batch[0], 1]).standard_normal((batch[1], dimension)).astype(np.float32)


def updates_of(group: int, batch: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    return group, keys_of(group, batch), gradients_of(group, batch)


def table_of(group: Group) -> ReferenceTable:
    return ReferenceTable(group.optimizer, group.initializer, group.dimension, seed=group.seed, stream=group.group)


class Oracle:
    """What the storage should be: the tables, the clock, the last commit."""

    def __init__(self) -> None:
        self.tables = {group.group: table_of(group) for group in GROUPS}
        self.last_commit: tuple[int | None, bytes] | None = None

    def set_now(self, now: int) -> None:
        for table in self.tables.values():
            table.now = now

    def drop(self, number: int, now: int) -> None:
        self.tables[number] = table_of(next(group for group in GROUPS if group.group == number))
        self.tables[number].now = now

    def copied(self) -> Oracle:
        other = copy.copy(self)
        other.tables = {number: copy.copy(table) for number, table in self.tables.items()}
        for table in other.tables.values():
            assert type(table) is ReferenceTable  # an AdmittedTable has a filter, too
            table.rows = {key: row.copied() for key, row in table.rows.items()}
        return other

    def rows(self, group: int) -> dict[int, Row]:
        return rows_of_reference(self.tables[group])


def fill_of(group: int) -> tuple[np.ndarray, np.ndarray]:
    """What each example begins with: more rows than memory holds."""
    return POOLS[group][:100], gradients_of(group, (group, 100, 0))


@cache
def filled() -> Oracle:
    """After that; it takes as long as all that follows, and is the same each time."""
    oracle = Oracle()
    oracle.set_now(START)
    for group, table in oracle.tables.items():
        table.apply_gradients(*fill_of(group))
    return oracle


class StorageMachine(RuleBasedStateMachine):
    server: ForkServer  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="damo-any-order-", dir=memory_directory()))
        self.path = self.directory / "table.damo"
        self.oracle = Oracle()
        self.now = START
        self.oracle.set_now(self.now)
        self.checkpoints: list[tuple[Path, Oracle]] = []
        self.dumps = 0
        self.durability = "logged"
        self.session: Session = self.server.session()
        self.open()

    def teardown(self) -> None:
        try:
            self.session("storage_call", "close")
            self.open()
            self.compare()
            self.session("storage_call", "close")
        finally:
            self.session.kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def open(self, checkpoint: Path | None = None, or_restore: Path | None = None) -> None:
        options = {"memory": "16MiB", "threads": 2, "log_bytes": "4MiB", "durability": self.durability}
        self.session("open", self.path, GROUPS, self.now, checkpoint, or_restore, **options)
        self.keep()

    def keep(self) -> None:
        """What a kill in mode commit goes back to."""
        self.kept = self.oracle.copied() if self.durability == "commit" else None

    def go_back(self) -> None:
        """After a kill."""
        if self.kept is not None:
            self.oracle = self.kept
            self.oracle.set_now(self.now)

    def compare(self) -> None:
        self.compare_numbers()
        for group in NUMBERS:
            assert_same_rows(self.session("rows", group), self.oracle.rows(group))
        assert self.session("last_commit") == self.oracle.last_commit

    def compare_numbers(self) -> None:
        expected = {group: (len(table), table.step) for group, table in self.oracle.tables.items()}
        assert self.session("numbers") == expected

    @initialize()
    def fill(self) -> None:
        for group in NUMBERS:
            self.session("embedding_call", group, "apply_gradients", *fill_of(group))
        self.oracle = filled().copied()
        assert self.session("storage_call", "stats")["evictions"] > 20

    # -------------------------------------------------------------- verbs

    @rule(group=groups, batch=batches())
    def lookup(self, group: int, batch: tuple[int, int, int]) -> None:
        keys = keys_of(group, batch)
        found = self.session("embedding_call", group, "lookup", keys)
        np.testing.assert_array_equal(found, self.oracle.tables[group].lookup(keys))

    @rule(group=groups, batch=batches(), missing=st.sampled_from(["initial", "zeros"]))
    def lookup_without_insert(self, group: int, batch: tuple[int, int, int], missing: str) -> None:
        keys = keys_of(group, batch)
        found = self.session("embedding_call", group, "lookup", keys, insert=False, missing=missing)
        np.testing.assert_array_equal(found, self.oracle.tables[group].lookup(keys, insert=False, missing=missing))

    @rule(group=groups, batch=batches(), lr=st.sampled_from([None, 0.0, 0.5]), looked_up=st.booleans())
    def apply_gradients(self, group: int, batch: tuple[int, int, int], lr: float | None, looked_up: bool) -> None:
        keys, gradients = keys_of(group, batch), gradients_of(group, batch)
        if looked_up:
            self.session("embedding_call", group, "lookup", keys)
            self.oracle.tables[group].lookup(keys)
        self.session("embedding_call", group, "apply_gradients", keys, gradients, lr=lr)
        self.oracle.tables[group].apply_gradients(keys, gradients, lr)

    @rule(chosen=together)
    def apply_together(self, chosen: list[tuple[int, tuple[int, int, int]]]) -> None:
        self.session("apply_together", [updates_of(*update) for update in chosen])
        self.learn_together(chosen)

    def learn_together(self, chosen: list[tuple[int, tuple[int, int, int]]]) -> None:
        for group, batch in chosen:
            self.oracle.tables[group].apply_gradients(keys_of(group, batch), gradients_of(group, batch))

    @rule(group=groups, batch=batches(most=250))
    def look_up_more_than_memory_takes_at_once(self, group: int, batch: tuple[int, int, int]) -> None:
        keys = keys_of(group, batch)
        found = self.session("embedding_call", group, "lookup", keys)
        np.testing.assert_array_equal(found, self.oracle.tables[group].lookup(keys))

    @rule(group=groups, batch=batches(most=250))
    def apply_more_than_memory_takes_at_once(self, group: int, batch: tuple[int, int, int]) -> None:
        keys, gradients = keys_of(group, batch), gradients_of(group, batch)
        self.session("embedding_call", group, "apply_gradients", keys, gradients)
        self.oracle.tables[group].apply_gradients(keys, gradients)

    @rule(group=groups, batch=batches())
    def erase(self, group: int, batch: tuple[int, int, int]) -> None:
        keys = keys_of(group, batch)
        gone = self.session("embedding_call", group, "erase", keys)
        assert gone == self.oracle.tables[group].erase(keys)

    @rule(group=groups, batch=batches())
    def contains(self, group: int, batch: tuple[int, int, int]) -> None:
        keys = keys_of(group, batch)
        found = self.session("embedding_call", group, "contains", keys)
        np.testing.assert_array_equal(found, self.oracle.tables[group].contains(keys))

    @rule(group=groups, batch=batches())
    def prefetch(self, group: int, batch: tuple[int, int, int]) -> None:
        self.session("embedding_call", group, "prefetch", keys_of(group, batch))

    @rule(group=groups, place=st.integers(0, POOL - 1))
    def inspect(self, group: int, place: int) -> None:
        key = int(POOLS[group][place])
        found = self.session("embedding_call", group, "inspect", key)
        expected = self.oracle.tables[group].rows.get(key % 2**64)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert (found.key, found.update_count, found.step, found.last_update) == (
                key % 2**64,
                expected.update_count,
                expected.step,
                expected.time,
            )
            np.testing.assert_array_equal(found.weights, expected.weights)
            for name, block in expected.state.items():
                np.testing.assert_array_equal(found.state[name], block)

    @rule(group=groups, batch=batches())
    def import_rows(self, group: int, batch: tuple[int, int, int]) -> None:
        keys, at = np.unique(keys_of(group, batch), return_index=True)
        weights = gradients_of(group, batch)[at]
        table = self.oracle.tables[group]
        self.session("embedding_call", group, "import_rows", keys, weights, counts=np.arange(len(keys)))
        state = table.optimizer.initial_state(1, table.dimension)
        for count, (key, row) in enumerate(zip(keys.tolist(), weights, strict=True)):
            blocks = {name: block[0].copy() for name, block in state.items()}
            table.rows[key % 2**64] = ReferenceRow(row.copy(), blocks, count, table.step, table.now)

    @rule(group=groups)
    def scan(self, group: int) -> None:
        assert_same_rows(self.session("rows", group), self.oracle.rows(group))

    @rule(group=groups)
    def drop_group(self, group: int) -> None:
        """And a new one of that number."""
        self.session("storage_call", "drop_group", group)
        self.oracle.drop(group, self.now)
        self.session("open_group", next(known for known in GROUPS if known.group == group))

    @rule()
    def compact(self) -> None:
        self.session("storage_call", "compact")

    @rule()
    def expire(self) -> None:
        assert self.session("storage_call", "expire") == 0  # no group has a lifetime

    @rule()
    def verify(self) -> None:
        report = self.session("storage_call", "verify")
        assert report.rows == sum(len(table) for table in self.oracle.tables.values())

    @rule(seconds=st.integers(1, 10**6))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.oracle.set_now(self.now)
        self.session("set_now", self.now)

    # ------------------------------------------------------ dump, commit, checkpoint

    @rule(group=st.sampled_from([None, *NUMBERS]), min_count=st.integers(0, 3))
    def dump(self, group: int | None, min_count: int) -> None:
        self.dumps += 1
        wanted = NUMBERS if group is None else [group]
        count, dumped = self.session(
            "read_dump", self.directory / f"dump-{self.dumps}", group=group, min_count=min_count
        )
        expected = {
            number: {
                key: row.weights.tobytes()
                for key, row in self.oracle.tables[number].rows.items()
                if row.update_count >= min_count
            }
            for number in wanted
        }
        assert {
            number: {int(key): row.tobytes() for key, row in zip(keys, weights, strict=True)}
            for number, (keys, weights) in dumped.items()
        } == expected
        assert count == sum(map(len, expected.values()))

    @rule(step=st.one_of(st.none(), st.integers(0, 2**63 - 1)), extra=st.binary(max_size=20))
    def commit(self, step: int | None, extra: bytes) -> None:
        self.session("storage_call", "commit", step, extra)
        self.oracle.last_commit = (step, extra)
        self.keep()

    @precondition(lambda self: len(self.checkpoints) < 3)
    @rule()
    def checkpoint(self) -> None:
        directory = self.directory / f"checkpoint-{len(self.checkpoints)}"
        self.session("storage_call", "checkpoint", directory)
        self.checkpoints.append((directory, self.oracle.copied()))

    @precondition(lambda self: self.checkpoints)
    @rule(which=st.integers(0, 2))
    def restore(self, which: int) -> None:
        directory, oracle = self.checkpoints[which % len(self.checkpoints)]
        self.session("storage_call", "close")
        self.oracle = oracle.copied()
        self.oracle.set_now(self.now)
        self.open(directory)
        self.compare()

    @precondition(lambda self: self.checkpoints)
    @rule()
    def lose_the_storage(self) -> None:
        """What open_or_restore puts in its place is the newest checkpoint."""
        self.session("storage_call", "close")
        shutil.rmtree(self.path)
        directory, oracle = self.checkpoints[-1]
        self.oracle = oracle.copied()
        self.oracle.set_now(self.now)
        self.open(or_restore=directory.parent)
        self.compare()

    @rule()
    def salvage(self) -> None:
        """Of a storage that is whole everything is salvaged."""
        self.session("storage_call", "close")
        rescued = self.directory / "rescued.damo"
        report = de.Storage.salvage(self.path, rescued)
        assert (report.rows, report.lost) == (sum(len(table) for table in self.oracle.tables.values()), ())
        shutil.rmtree(self.path)
        rescued.rename(self.path)
        self.open()
        self.compare()

    # ---------------------------------------------------------- close and kill

    @rule(durability=modes)
    def reopen(self, durability: str) -> None:
        self.session("storage_call", "close")
        self.durability = durability
        self.open()
        self.compare()

    @rule(durability=modes)
    def kill(self, durability: str) -> None:
        self.session.kill()
        self.session = self.server.session()
        self.go_back()
        self.durability = durability
        self.open()
        self.compare()

    def kill_soon(self, delay: float) -> tuple[bool, bool]:
        """And opens again: whether the call in flight had returned, and whether the mode was commit."""
        time.sleep(delay)
        acknowledged = any(what == "returned" for what, _ in self.session.kill())
        self.session = self.server.session()
        self.go_back()
        in_mode_commit = self.kept is not None
        self.open()
        return acknowledged, in_mode_commit

    @rule(group=groups, batch=batches(), delay=st.sampled_from([0.0, 0.001, 0.003, 0.01]))
    def kill_during_an_apply(self, group: int, batch: tuple[int, int, int], delay: float) -> None:
        """It happened or it did not; half of it never. In mode commit it did not."""
        keys, gradients = keys_of(group, batch), gradients_of(group, batch)
        self.session.start("embedding_call", group, "apply_gradients", keys, gradients)
        acknowledged, in_mode_commit = self.kill_soon(delay)
        if in_mode_commit:  # to before the update, whether it happened or not
            self.compare()
            return
        table = self.oracle.tables[group]
        rows, step = self.session("numbers")[group]
        assert step in ({table.step + 1} if acknowledged and len(keys) else {table.step, table.step + 1})
        if step == table.step + 1:
            table.apply_gradients(keys, gradients)
        assert rows == len(table)
        self.compare()

    @rule(chosen=together, delay=st.sampled_from([0.0, 0.001, 0.003, 0.01]))
    def kill_during_a_call_on_several_groups(
        self, chosen: list[tuple[int, tuple[int, int, int]]], delay: float
    ) -> None:
        """All of them have learnt, or none has."""
        self.session.start("apply_together", [updates_of(*update) for update in chosen])
        acknowledged, in_mode_commit = self.kill_soon(delay)
        numbers = self.session("numbers")
        learnt = {
            numbers[group][1] > self.oracle.tables[group].step for group, batch in chosen if keys_of(group, batch).size
        }
        assert len(learnt) <= 1, f"some groups have learnt and some have not: {numbers}"
        if not in_mode_commit:
            if acknowledged:
                assert False not in learnt
            if True in learnt:
                self.learn_together(chosen)
        self.compare()

    @rule(group=groups, batch=batches(most=250), delay=st.sampled_from([0.0, 0.001, 0.003, 0.01]))
    def kill_during_a_lookup(self, group: int, batch: tuple[int, int, int], delay: float) -> None:
        """It made all of its rows, or none. In mode commit none."""
        keys = keys_of(group, batch)
        self.session.start("embedding_call", group, "lookup", keys)
        acknowledged, in_mode_commit = self.kill_soon(delay)
        table = self.oracle.tables[group]
        rows, _ = self.session("numbers")[group]
        if not in_mode_commit and (acknowledged or rows != len(table)):
            table.lookup(keys)
        assert rows == len(table)
        self.compare()

    @rule(group=groups, delay=st.sampled_from([0.0, 0.001, 0.003, 0.01]))
    def kill_during_a_drop(self, group: int, delay: float) -> None:
        """All of the group is gone, or nothing of it. In mode commit nothing is."""
        self.session.start("storage_call", "drop_group", group)
        acknowledged, in_mode_commit = self.kill_soon(delay)
        if not in_mode_commit and (acknowledged or self.session("numbers")[group] == (0, 0)):
            self.oracle.drop(group, self.now)
        self.compare()


class AnyOrder(Suite):
    name = "any-order"
    title = "hypothesis: all verbs in any order, reopenings and kills among them, with the least memory there is"
    promise = "every call returns what the oracle returns; after each reopening every row is the oracle's"
    unit = "examples"
    small = 300
    full = 10_000

    EXAMPLES = 10  # of a seed
    STEPS = 8

    def __enter__(self) -> AnyOrder:
        self._server = fork_server()
        StorageMachine.server = self._server.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.__exit__(*exception)

    def case(self, number: int) -> None:
        test = get_state_machine_test(
            StorageMachine,
            settings=settings(
                max_examples=self.EXAMPLES,
                stateful_step_count=self.STEPS,
                # Examples are long, and a failure is shown as it came: the steps that led to it.
                phases=[Phase.generate],
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        seed(number)(test)()
        self.done["examples"] += self.EXAMPLES
