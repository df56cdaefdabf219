# SPDX-License-Identifier: Apache-2.0
"""Admission: which keys of a group get a row. The oracle is the filter of reference_filter.py, bit for bit."""

from __future__ import annotations

import copy
import os
import shutil
import struct
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import damo_embedding as de
import reference_filter
from comparing import Row, assert_same_rows, files_of, rows_of, rows_of_reference
from reference_filter import AdmittedTable, ReferenceFilter
from storage_server import ForkServer, Group, Session, fork_server

pytestmark = pytest.mark.core

f32 = np.float32
NOW = 2**40  # ahead of any wall clock: time is the test's
OPTIMIZER, INITIALIZER = de.SGD(lr=0.5), de.Uniform(-1.0, 1.0)


def open_group(
    storage: de.Storage, admission: Any = None, dimension: int = 4, group: int | str = 7, **named: Any
) -> de.Embedding:
    return de.Embedding(storage, OPTIMIZER, INITIALIZER, dimension, group=group, admission=admission, **named)


def counting(count: int = 3, capacity: int = 1000, **named: Any) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(capacity=capacity, count=count, **named)


def filter_of(embedding: de.Embedding) -> de.Admission:
    assert embedding.admission is not None
    return embedding.admission


def oracle_of(embedding: de.Embedding, filter: de.CountingBloomFilter) -> AdmittedTable:
    return AdmittedTable(
        embedding.optimizer, embedding.initializer, embedding.dimension, filter, seed=embedding.seed,
        stream=embedding.group,
    )  # fmt: skip


def filter_files(path: Path) -> list[str]:
    return sorted(file.name for file in next(path.glob("generation-*")).glob("filter-*"))


# ------------------------------------------------------------------ meaning


def test_a_key_gets_its_row_in_the_training_lookup_in_which_it_comes_to_the_count(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(3))
    embedding.lookup([1, 2])
    embedding.lookup([1])
    assert len(embedding) == 0
    embedding.lookup([1, 2])
    assert embedding.contains([1, 2]).tolist() == [True, False]
    row = embedding.inspect(1)
    assert row is not None
    assert row.update_count == 0
    embedding.lookup([1] * 10)  # it has its row and is counted no more
    assert filter_of(embedding).estimate([1, 2]).tolist() == [3, 2]
    assert filter_of(embedding).adds == 5


def test_a_key_that_stands_twice_in_a_lookup_is_seen_twice(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(3))
    embedding.lookup([5, 6, 5, 5, 6])
    assert embedding.contains([5, 6]).tolist() == [True, False]
    assert filter_of(embedding).estimate([5, 6]).tolist() == [3, 2]


def test_evaluation_counts_nothing(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(1))
    sequence = storage.stats()["sequence"]
    for _ in range(3):
        embedding.lookup([1, 2], insert=False)
        embedding.prefetch([1, 2])
        embedding.contains([1])
    assert filter_of(embedding).adds == 0
    assert storage.stats()["sequence"] == sequence


@pytest.mark.parametrize("insert", [True, False])
def test_a_key_without_a_row_reads_as_missing_says(storage: de.Storage, insert: bool) -> None:
    embedding = open_group(storage, counting(3))
    plain = open_group(storage, dimension=4, group=8)
    first = oracle_of(embedding, counting(3)).initial(np.array([4, 4, 9]))
    np.testing.assert_array_equal(embedding.lookup([4, 4, 9], insert=insert), first)
    assert len(embedding) == 0
    assert not embedding.lookup([11, 12], insert=insert, missing="zeros").any()
    read = embedding.lookup([4, 9, 4], missing="zeros")  # key 4 comes in by this lookup, if the one before counted
    assert read[0].any() == read[2].any()
    assert embedding.contains(4) == read[0].any() == insert
    assert not read[1].any()
    np.testing.assert_array_equal(read[0], first[0] if insert else 0)
    assert plain.lookup([4], missing="zeros").any()  # without a filter it comes in at once


def test_gradients_of_keys_without_a_row_are_ignored_and_counted(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(2))
    embedding.lookup([1, 1, 2])
    before = embedding.lookup([1, 2], insert=False)
    gradients = np.ones((4, 4), f32)
    embedding.apply_gradients([2, 1, 1, 3], gradients)  # 3 was never looked up
    after = embedding.lookup([1, 2], insert=False)
    np.testing.assert_array_equal(after[0], before[0] - 1.0)
    np.testing.assert_array_equal(after[1], before[1])
    assert len(embedding) == 1
    assert embedding.step == 1
    embedding.apply_gradients([2, 3], gradients[:2])
    assert (len(embedding), embedding.step) == (1, 2)  # a step, though of nothing
    stats = storage.stats()["groups"][0]["admission"]
    assert stats["ignored_gradients"] == 4
    assert stats["refused"] == 1
    assert stats["adds"] == 3
    assert stats["fill"] == filter_of(embedding).fill > 0
    with pytest.raises(ValueError, match="gradient of key 3"):
        embedding.apply_gradients([1, 3], np.array([[0.0] * 4, [np.nan] * 4], f32))


def test_what_was_erased_or_has_expired_is_let_in_by_the_next_lookup(storage: de.Storage) -> None:
    storage.now = NOW
    embedding = open_group(storage, counting(3), ttl=100)
    embedding.lookup([1, 1, 1])
    embedding.lookup([2, 2, 2])
    embedding.erase([1])
    embedding.apply_gradients([1], np.ones((1, 4), f32))
    assert embedding.contains([1, 2]).tolist() == [False, True]
    storage.now = NOW + 101
    assert embedding.contains([1, 2]).tolist() == [False, False]
    embedding.lookup([1, 2, 3])
    assert embedding.contains([1, 2, 3]).tolist() == [True, True, False]
    assert len(embedding) == 2
    assert filter_of(embedding).estimate([1, 2]).tolist() == [4, 4]


def test_imported_rows_need_no_admission(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(3))
    embedding.import_rows([1], np.full((1, 4), 2.0, f32))
    embedding.lookup([1, 2])
    embedding.apply_gradients([1], np.ones((1, 4), f32))
    assert embedding.lookup([1], insert=False)[0, 0] == 1.5
    assert filter_of(embedding).estimate([1, 2]).tolist() == [0, 1]


def test_the_filter_may_be_looked_at_but_not_changed(storage: de.Storage) -> None:
    embedding = open_group(storage, counting(3, halve_every=500))
    admission = filter_of(embedding)
    assert bool(admission)  # empty, but there
    assert (len(admission), admission.adds, admission.fill, admission.estimated_fpr) == (0, 0, 0.0, 0.0)
    embedding.lookup(np.arange(200))
    embedding.lookup(np.arange(100).repeat(2))
    assert (admission.capacity, admission.count, admission.fpr, admission.halve_every) == (1000, 3, 1e-3, 500)
    assert repr(admission) == "Admission(capacity=1000, count=3, fpr=0.001, halve_every=500)"
    assert admission.check(0) is True
    assert admission.check(150) is False
    assert admission.estimate(150) == 1
    assert admission.estimate([[0, 150]]).tolist() == [[3, 1]]
    assert 195 < len(admission) < 205
    assert 0 < admission.estimated_fpr < 1e-3
    assert admission.memory_bytes % 4096 == 0
    assert not hasattr(admission, "add")
    assert open_group(storage, group=8).admission is None
    storage.close()
    with pytest.raises(de.ClosedError):
        admission.estimate([1])


def test_counters_are_halved_and_a_key_has_to_come_often_enough_in_time(path: Path) -> None:
    for _ in range(2):
        with de.Storage(path, memory="16MiB") as storage:
            embedding = open_group(storage, counting(2, halve_every=10))
            embedding.lookup([1])
            embedding.lookup(np.arange(100, 108))
            assert filter_of(embedding).estimate(1) == 1
            embedding.lookup([200])  # the tenth, or the twentieth
            assert filter_of(embedding).estimate([1, 200]).tolist() == [0, 0]
            assert len(embedding) == 0


# ------------------------------------------------------- opening a group again


def test_without_admission_a_group_keeps_the_filter_it_has(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        open_group(storage, counting(3)).lookup([1, 1])
    with de.Storage(path, memory="16MiB") as storage:
        embedding = open_group(storage)
        assert filter_of(embedding).count == 3
        assert open_group(storage, counting(3)).admission is not None
        embedding.lookup([1, 2])
        assert embedding.contains([1, 2]).tolist() == [True, False]


def test_a_filter_of_other_settings_is_refused_with_what_differs_and_the_way_out(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        open_group(storage, counting(3)).lookup([1])
    before = files_of(path, ["rocksdb"])
    for other, says in [
        (counting(4), r"count=3 \(opened with 4\)"),
        (counting(3, 999), r"capacity=1000 \(opened with 999\)"),
        (counting(3, fpr=1e-2), r"fpr=0.001 \(opened with 0.01\)"),
        (counting(2, halve_every=5), r"count=3 \(opened with 2\), halve_every=None \(opened with 5\)"),
    ]:
        with (
            de.Storage(path, memory="16MiB") as storage,
            pytest.raises(de.SchemaMismatchError, match=says + '.*leave admission out.*admission="all"'),
        ):
            open_group(storage, other)
    assert files_of(path, ["rocksdb"]).keys() == before.keys()
    with de.Storage(path, memory="16MiB") as storage:
        assert filter_of(open_group(storage)).estimate(1) == 1


def test_a_group_without_a_filter_may_get_one_and_its_rows_stay(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        embedding = open_group(storage)
        embedding.lookup([1, 2])
        with pytest.raises(de.SchemaMismatchError, match="open without an admission filter"):
            open_group(storage, counting(2))
    for _ in range(2):
        with de.Storage(path, memory="16MiB") as storage:
            embedding = open_group(storage, counting(3))
            embedding.lookup([1, 2, 3])
            embedding.apply_gradients([1, 3], np.ones((2, 4), f32))
            assert embedding.contains([1, 2, 3]).tolist() == [True, True, False]


def test_all_drops_the_filter_with_its_counts(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        embedding = open_group(storage, counting(3))
        other = open_group(storage, counting(2), group=8)
        embedding.lookup([1, 1, 1, 2])
        other.lookup([1])
        with pytest.raises(de.SchemaMismatchError, match="open with an admission filter"):
            open_group(storage, "all")
    assert len(filter_files(path)) == 2
    with de.Storage(path, memory="16MiB") as storage:
        embedding = open_group(storage, "all")
        assert embedding.admission is None
        assert len(filter_files(path)) == 1
        assert open_group(storage, "all") is not None
        embedding.lookup([2])
        assert embedding.contains([1, 2]).tolist() == [True, True]
    with de.Storage(path, memory="16MiB") as storage:
        embedding = open_group(storage, counting(2))
        embedding.lookup([3])
        assert filter_of(embedding).estimate([1, 2, 3]).tolist() == [0, 0, 1]
        assert filter_of(open_group(storage, group=8)).estimate(1) == 1


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (3, TypeError, r"admission is 3, expected a CountingBloomFilter"),
        ("never", TypeError, 'expected a CountingBloomFilter.*"all"'),
        (de.CountingBloomFilter, TypeError, "expected a CountingBloomFilter"),
        ("with a path", ValueError, "among its own files; give one without a path"),
        ("used", ValueError, "has counted 2 adds.*give a new one of the same settings"),
        ("closed", ValueError, "was closed.*give a new one"),
    ],
)
def test_what_is_no_description_of_a_filter_is_refused(
    storage: de.Storage, tmp_path: Path, given: Any, error: type[Exception], says: str
) -> None:
    if given == "with a path":
        given = counting(path=tmp_path / "filter")
    elif given in ("used", "closed"):
        closed, given = given == "closed", counting()
        if closed:
            given.close()
        else:
            given.add([1, 1])
    with pytest.raises(error, match=says):
        open_group(storage, given)
    assert storage.groups() == {}


def test_filters_are_paid_from_the_memory_budget(path: Path) -> None:
    with de.Storage(path, memory="64MiB") as storage:
        before = storage.stats()["hot_bytes"]
        embedding = open_group(storage, counting(3, 1_000_000))
        taken = filter_of(embedding).memory_bytes
        assert storage.stats()["hot_bytes"] == before - taken
        with pytest.raises(ValueError, match=r'filters take \d+ bytes.*memory="\d+MiB" or more, or give .* smaller'):
            open_group(storage, counting(3, 2_000_000), group=8)
        assert storage.groups() == {7: ""}
        embedding.lookup([1])
    with pytest.raises(ValueError, match=r'\[open\] .*open the storage with memory="\d+MiB" or more$') as refused:
        de.Storage(path, memory="16MiB")
    enough = str(refused.value).split('memory="')[1].split('"')[0]
    with pytest.raises(ValueError, match="or more"):
        de.Storage(path, memory=f"{int(enough[:-3]) - 1}MiB")
    with de.Storage(path, memory=enough) as storage:
        storage.drop_group(7)
        assert storage.stats()["hot_bytes"] > int(enough[:-3]) * 2**20 // 3
    with de.Storage(path, memory="16MiB"):
        pass


def test_dropping_a_group_removes_its_filters_file(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        open_group(storage, counting(3)).lookup([1])
        open_group(storage, counting(3), group=8).lookup([1])
    with de.Storage(path, memory="16MiB") as storage:
        assert len(filter_files(path)) == 2
        gone = open_group(storage)
        storage.drop_group(7)
        assert len(filter_files(path)) == 1
        with pytest.raises(ValueError, match="was dropped"):
            gone.lookup([1])
        assert gone.admission is None
        assert filter_of(open_group(storage, counting(3))).adds == 0
        assert filter_of(open_group(storage, group=8)).adds == 1


def test_256_groups_may_each_have_a_filter(path: Path) -> None:
    keys = np.arange(10)
    with de.Storage(path, memory="16MiB") as storage:
        groups = [open_group(storage, counting(2, 100), 2, group=group) for group in range(256)]
        for group in groups[::2]:
            group.lookup(keys)
    assert len(filter_files(path)) == 128  # those that have counted nothing need none
    with de.Storage(path, memory="16MiB") as storage:
        groups = [open_group(storage, dimension=2, group=group) for group in range(256)]
        for group in groups:
            group.lookup(keys)
        assert [len(group) for group in groups] == [10, 0] * 128


# ---------------------------------------------------------------- exactness


def test_results_do_not_depend_on_threads_or_memory(tmp_path: Path, random: np.random.Generator) -> None:
    filter = counting(2, 300, fpr=0.2, halve_every=777)
    batches = [random.integers(0, 3000, 700) for _ in range(12)]
    found = []
    for threads, memory in ((1, "16MiB"), (4, "64MiB")):
        with de.Storage(tmp_path / f"s{threads}", memory=memory, threads=threads) as storage:
            storage.now = NOW
            embedding = open_group(storage, filter, dimension=1000)
            for keys in batches:
                weights = embedding.lookup(keys)
                embedding.apply_gradients(keys, weights)
            admission = filter_of(embedding)
            found.append((rows_of(embedding), admission.adds, admission.estimate(np.arange(3000)).tobytes()))
    assert found[0] == found[1]
    assert len(found[0][0]) > 500


def test_a_checkpoint_made_while_training_goes_on_has_the_filter_of_its_moment(tmp_path: Path) -> None:
    filter = counting(3, 100_000, fpr=1e-2)  # in eight chunks, of which a lookup changes all
    checkpoints = [tmp_path / f"c{i}" for i in range(3)]

    def batch(number: int) -> np.ndarray:
        return np.random.default_rng([3, number]).integers(0, 2_000, 60)

    with de.Storage(tmp_path / "s", memory="32MiB", threads=2) as storage:
        storage.now = NOW
        embedding = open_group(storage, filter, dimension=2)
        done, numbers = threading.Event(), iter(range(10**6))

        def train() -> None:
            while not done.is_set():
                embedding.lookup(batch(next(numbers)))
                time.sleep(0.0002)

        thread = threading.Thread(target=train)
        thread.start()
        for checkpoint in checkpoints:
            time.sleep(0.01)
            storage.checkpoint(checkpoint)
        done.set()
        thread.join()
    last = next(numbers) - 1
    model, lookups = oracle_of(embedding, filter), 0
    model.now = NOW
    sequence, some = 0, np.arange(0, 2_000, 11)
    for checkpoint in checkpoints:
        with de.Storage.restore(checkpoint, tmp_path / "r", memory="32MiB") as storage:
            restored = open_group(storage, dimension=2)
            # A lookup is an operation, unless all of its keys have rows.
            while sequence < storage.stats()["sequence"]:
                before = model.filter.adds
                model.lookup(batch(lookups))
                lookups += 1
                sequence += model.filter.adds > before
            admission = filter_of(restored)
            assert admission.adds == model.filter.adds
            assert admission.estimate(some).tolist() == [model.filter.estimate(key) for key in some.tolist()]
            assert_same_rows(rows_of(restored), rows_of_reference(model))
    assert 0 < lookups <= last + 1


# Rows of 4 and 8 KB, of which some 7 MiB are in memory at once. The second filter is much too small for its keys, so it
# lets many in that came too rarely, and forgets: the oracle is one filter of the same bits.
GROUPS = [
    Group(0, de.SGD(lr=0.1), de.Uniform(-1.0, 1.0), dimension=1024, seed=1, admission=counting(3, 5_000)),
    Group(
        9, de.Adagrad(lr=0.1), de.Normal(0.0, 0.5), dimension=1020, seed=2,
        admission=counting(4, 150, fpr=0.3, halve_every=331),
    ),
]  # fmt: skip
NUMBERS = [group.group for group in GROUPS]
POOL = np.random.default_rng(5).integers(-(2**63), 2**63, 2_500, dtype=np.int64)
POOL[:4] = [0, -1, 2**63 - 1, -(2**63)]
groups = st.sampled_from(NUMBERS)
batches = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([1, 40, 300]), st.sampled_from([5, 150, 2_500]))


def keys_of(batch: tuple[int, int, int]) -> np.ndarray:
    seed, size, width = batch
    random = np.random.default_rng(seed)
    begin = int(random.integers(0, len(POOL) - width + 1))
    return POOL[random.integers(begin, begin + width, size)]


class AdmissionMachine(RuleBasedStateMachine):
    """A storage in a process of its own, with the least memory there is, beside the oracle."""

    server: ForkServer  # set by the test
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="damo-admission-"))
        self.now = NOW
        self.tables: dict[int, AdmittedTable] = {}
        for group in GROUPS:
            assert group.admission is not None
            table = AdmittedTable(
                group.optimizer, group.initializer, group.dimension, group.admission, seed=group.seed,
                stream=group.group,
            )  # fmt: skip
            table.now = NOW
            self.tables[group.group] = table
        self.checkpoints: list[tuple[Path, dict[int, AdmittedTable]]] = []
        self.session: Session = self.server.session()
        self.open()

    def teardown(self) -> None:
        try:
            self.reopen()
        finally:
            self.session.kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def open(self, checkpoint: Path | None = None) -> None:
        path = self.directory / "table.damo"
        self.session("open", path, GROUPS, NOW, checkpoint, memory="16MiB", threads=2, log_bytes="2MiB")

    def note(self) -> None:
        """What the storage has had to do since it was opened."""
        stats = self.session("storage_call", "stats")
        self.seen["evictions"] += stats["evictions"]
        self.seen["cuts"] += stats["cuts"]
        self.seen["redone"] += stats["redone_records"]

    def compare(self) -> None:
        self.note()
        some = POOL[::7]
        for group, table in self.tables.items():
            adds, estimates = self.session("filter", group, some)
            assert adds == table.filter.adds
            expected = [table.filter.estimate(key) for key in some.tolist()]
            assert estimates.tolist() == expected
            rows: dict[int, Row] = self.session("rows", group)
            assert_same_rows(rows, rows_of_reference(table))
            assert self.session("numbers")[group] == (len(table), table.step)

    @initialize()
    def fill(self) -> None:
        """More rows than memory holds."""
        for begin in range(0, 1500, 300):
            for group in NUMBERS:
                keys = POOL[begin : begin + 300].repeat(4)
                self.session("embedding_call", group, "lookup", keys)
                self.tables[group].lookup(keys)

    @rule(group=groups, batch=batches, missing=st.sampled_from(["initial", "zeros"]), insert=st.booleans())
    def lookup(self, group: int, batch: tuple[int, int, int], missing: str, insert: bool) -> None:
        keys = keys_of(batch)
        found = self.session("embedding_call", group, "lookup", keys, missing=missing, insert=insert)
        np.testing.assert_array_equal(found, self.tables[group].lookup(keys, missing=missing, insert=insert))

    @rule(group=groups, batch=batches, looked_up=st.booleans())
    def apply_gradients(self, group: int, batch: tuple[int, int, int], looked_up: bool) -> None:
        keys, table = keys_of(batch), self.tables[group]
        gradients = np.random.default_rng([batch[0], 1]).standard_normal((len(keys), table.dimension)).astype(f32)
        if looked_up:
            self.session("embedding_call", group, "lookup", keys)
            table.lookup(keys)
        self.session("embedding_call", group, "apply_gradients", keys, gradients)
        table.apply_gradients(keys, gradients)

    @rule(group=groups, batch=batches)
    def erase(self, group: int, batch: tuple[int, int, int]) -> None:
        assert self.session("embedding_call", group, "erase", keys_of(batch)) == self.tables[group].erase(
            keys_of(batch)
        )

    @precondition(lambda self: len(self.checkpoints) < 2)
    @rule()
    def checkpoint(self) -> None:
        directory = self.directory / f"checkpoint-{len(self.checkpoints)}"
        self.session("storage_call", "checkpoint", directory)
        self.checkpoints.append((directory, copy.deepcopy(self.tables)))

    @precondition(lambda self: self.checkpoints)
    @rule(which=st.integers(0, 1))
    def restore(self, which: int) -> None:
        directory, tables = self.checkpoints[which % len(self.checkpoints)]
        self.note()
        self.session("storage_call", "close")
        self.tables = copy.deepcopy(tables)
        self.open(directory)
        self.compare()

    @rule()
    def reopen(self) -> None:
        self.note()
        self.session("storage_call", "close")
        self.open()
        self.compare()

    @rule()
    def kill(self) -> None:
        self.note()
        self.session.kill()
        self.session = self.server.session()
        self.open()
        self.compare()

    @rule(group=groups, batch=batches, delay=st.sampled_from([0.0, 0.0005, 0.001, 0.003]))
    def kill_during_a_lookup(self, group: int, batch: tuple[int, int, int], delay: float) -> None:
        """It happened, counts and rows, or it did not."""
        keys = keys_of(batch)
        self.session.start("embedding_call", group, "lookup", keys)
        time.sleep(delay)
        acknowledged = any(answer[0] == "returned" for answer in self.session.kill())
        self.session = self.server.session()
        self.open()
        before = self.tables[group].filter.adds
        after = copy.deepcopy(self.tables[group])
        after.lookup(keys)
        adds, _ = self.session("filter", group, POOL[:1])
        assert adds in ({after.filter.adds} if acknowledged else {before, after.filter.adds})
        if adds == after.filter.adds:
            self.tables[group] = after
        self.seen["cut short" if adds == before != after.filter.adds else "whole"] += 1
        self.compare()


def test_any_order_of_the_verbs_equals_the_oracle_through_evictions_reopenings_and_kills() -> None:
    examples = int(os.environ.get("DAMO_STATEFUL_EXAMPLES", "0"))
    AdmissionMachine.seen = Counter()
    with fork_server() as server:
        AdmissionMachine.server = server
        run_state_machine_as_test(
            AdmissionMachine,
            settings=settings(
                max_examples=examples or 3,
                stateful_step_count=50 if examples else 12,
                derandomize=not examples,
                phases=list(Phase) if examples else [Phase.generate],
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert min(AdmissionMachine.seen[what] for what in ("evictions", "cuts", "redone")) > 0


# ------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed storage with one filter of one page, to be copied."""
    path = tmp_path_factory.mktemp("whole") / "table.damo"
    with de.Storage(path, memory="16MiB", threads=1) as storage:
        embedding = open_group(storage, counting(3, 100))
        for begin in range(0, 60, 20):
            embedding.lookup(np.arange(begin, 60))
    return path


@pytest.fixture
def closed(whole: Path, path: Path) -> Path:
    shutil.copytree(whole, path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(de.CorruptionError) as error:
        de.Storage(path, memory="16MiB", threads=1)
    return str(error.value)


def the_filter(path: Path) -> Path:
    (name,) = filter_files(path)
    return next(path.glob("generation-*")) / name


def test_a_filters_file_is_refused_cut_off_at_any_length_and_with_any_bit_changed(closed: Path) -> None:
    file = the_filter(closed)
    good = file.read_bytes()
    before = files_of(closed)
    # Every length and ten thousand flips: tests/core/saved_filter_test.cc. Here that an open storage hears of it.
    for size in [*range(0, len(good), 97), len(good) - 1]:
        file.write_bytes(good[:size])
        assert str(file) + f" is damaged at offset {size}" in refused(closed)
    random = np.random.default_rng(1)
    regions = [(0, 8), (8, 12), (12, 64), (64, 72), (72, 512), (512, 544), (544, 4096), (4096, 8192), (8192, 8200)]
    assert regions[-1][1] == len(good)
    for low, high in regions:
        for place in [low, high - 1, *random.integers(low, high, 20).tolist()]:
            bad = bytearray(good)
            bad[place] ^= 1 << int(random.integers(8))
            file.write_bytes(bad)
            said = refused(closed)
            assert str(file) in said
            assert "offset" in said
    file.write_bytes(good + b"\0")
    assert "has 8201 bytes, expected 8200" in refused(closed)
    file.write_bytes(good)
    assert files_of(closed) == before
    with de.Storage(closed, memory="16MiB") as storage:
        assert filter_of(open_group(storage)).estimate([5, 25, 55]).tolist() == [1, 2, 3]


def test_a_filters_file_that_is_missing_or_of_another_moment_or_storage_is_refused(
    closed: Path, tmp_path: Path
) -> None:
    file = the_filter(closed)
    good = file.read_bytes()
    file.unlink()
    assert str(file) in refused(closed)
    assert "is missing" in refused(closed)
    assert not file.exists()
    with de.Storage(tmp_path / "other", memory="16MiB", threads=1) as storage:  # of the same operations
        embedding = open_group(storage, counting(3, 100))
        for begin in range(0, 60, 20):
            embedding.lookup(np.arange(begin, 60))
    other = the_filter(tmp_path / "other")
    assert other.name == file.name
    shutil.copy(other, file)
    assert "checksum does not match" in refused(closed)
    file.write_bytes(good)
    with de.Storage(closed, memory="16MiB", threads=1) as storage:
        open_group(storage).lookup([1])
    later = the_filter(closed)
    assert later.name != file.name
    later.write_bytes(good)
    assert "checksum does not match" in refused(closed)


def test_a_stand_alone_filter_is_not_taken_for_that_of_a_storage(closed: Path, tmp_path: Path) -> None:
    with counting(3, 100, path=tmp_path / "alone") as alone:
        alone.add([1])
    shutil.copy(tmp_path / "alone", the_filter(closed))
    assert "checksum does not match" in refused(closed)


def test_leftovers_of_a_save_that_was_cut_short_are_removed(closed: Path) -> None:
    file = the_filter(closed)
    for name in ("filter-1-999", "filter-1-999.tmp", "filter-77-1"):
        (file.parent / name).write_bytes(b"what a kill left")
    with de.Storage(closed, memory="16MiB"):
        assert filter_files(closed) == [file.name]


def test_a_checkpoint_carries_the_filters_and_a_damaged_one_is_refused(closed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    with de.Storage(closed, memory="16MiB", threads=1) as storage:
        embedding, second = open_group(storage), open_group(storage, counting(2), group=8)
        open_group(storage, counting(2), group=9)
        storage.checkpoint(tmp_path / "unchanged")
        second.lookup([4])
        storage.checkpoint(checkpoint)
        embedding.lookup([5, 5])
    assert len(list((tmp_path / "unchanged").glob("filter-*"))) == 1
    assert len(list(checkpoint.glob("filter-*"))) == 2
    with de.Storage(tmp_path / "r", memory="16MiB") as storage:
        storage.commit(7)
    before = files_of(tmp_path / "r")
    for file in checkpoint.glob("filter-*"):
        good = file.read_bytes()
        for bad in (good[:-1], good[:4100] + bytes([good[4100] ^ 1]) + good[4101:], None):
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            with pytest.raises(de.CorruptionError, match=str(file)):
                de.Storage.restore(checkpoint, tmp_path / "r", memory="16MiB")
        file.write_bytes(good)
    assert files_of(tmp_path / "r") == before
    for _ in range(2):  # a checkpoint may be restored again
        with de.Storage.restore(checkpoint, tmp_path / "r", memory="16MiB") as storage:
            first, second = open_group(storage), open_group(storage, group=8)
            assert filter_of(first).estimate([5, 25, 55]).tolist() == [1, 2, 3]
            assert len(first) == 20
            assert filter_of(second).estimate(4) == 1
            assert filter_of(open_group(storage, group=9)).adds == 0
            second.lookup([4])
            assert len(second) == 1


# ------------------------------------------------------------------- format


def test_the_file_of_a_filter_in_a_storage_is_as_documented(closed: Path) -> None:
    file = the_filter(closed)
    data, manifest = file.read_bytes(), (file.parent / "MANIFEST").read_bytes()
    storage_id, sequence = manifest[12:28], 3  # three lookups
    assert file.name == f"filter-1-{sequence}"
    seed = reference_filter.xxh3(0, storage_id + struct.pack("<IQ", 1, sequence))
    xxh3 = reference_filter.xxh3
    capacity, count, per_line, fpr, halve_every, pages, adds, sealed = struct.unpack_from("<QIIdQQQQ", data, 16)
    assert (data[:8], struct.unpack_from("<II", data, 8)) == (b"DAMOFILT", (1, 0))
    assert (capacity, count, fpr, halve_every, adds) == (100, 3, 1e-3, 0, 120)
    assert (pages, per_line) == reference_filter.layout(100, 1e-3)
    assert sealed == xxh3(seed, data[:64])
    end, synced, boot, sealed = struct.unpack_from("<QQQQ", data, 512)
    assert end == synced == len(data) == 4096 + pages * 4096 + 8
    assert boot == 0
    assert sealed == xxh3(seed, data[512:536])
    assert struct.unpack_from("<Q", data, len(data) - 8)[0] == xxh3(seed + 4096, data[4096:-8])
    model = ReferenceFilter(pages, per_line)
    for begin in range(0, 60, 20):
        model.add(range(begin, 60))
    # A key that has its row is not counted any more; here each got it in the last lookup.
    assert data[4096:-8] == model.tobytes()
    # In the manifest: has a filter, its settings, the operation its file is of; then where the log begins.
    assert struct.unpack_from("<I", manifest, 8)[0] == 2
    assert struct.unpack_from("<BQIdQQQ", manifest, len(manifest) - 53) == (1, 100, 3, 1e-3, 0, sequence, sequence)


# -------------------------------------------------------------------- torch


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def test_a_torch_module_trains_what_was_let_in_and_nothing_else(storage: de.Storage, torch: Any) -> None:
    from damo_embedding.torch import Embedding

    item = Embedding(
        storage, group="item", dimension=4, optimizer=de.SGD(lr=1.0), missing="zeros", ttl="30d", admission=counting(2)
    )
    assert item.embedding.ttl == 30 * 86_400
    assert "admission=Admission(capacity=1000, count=2" in repr(item)
    ids = torch.tensor([1, 2, 1])
    out = item(ids)
    assert out[0].any()
    assert not out[1].any()
    out.sum().backward()
    np.testing.assert_array_equal(item.embedding.lookup([1], insert=False)[0], out[0].detach().numpy() - 2.0)
    assert len(item.embedding) == 1
    item.eval()
    assert not item(torch.tensor([2])).any()
    item.train()
    (item(torch.tensor([2])).sum() * 0.0).backward()
    assert len(item.embedding) == 2


def test_features_of_a_collection_have_filters_of_their_own_or_that_of_all(storage: de.Storage, torch: Any) -> None:
    from damo_embedding.torch import EmbeddingCollection, Feature, SparseOptimizer

    fields = EmbeddingCollection(
        storage,
        {
            "user": Feature(4),
            "tags": Feature(4, pooling="sum", admission=counting(3, 500), ttl=de.Steps(5)),
            "city": Feature(4, admission="all"),
        },
        optimizer=de.SGD(lr=1.0),
        missing="zeros",
        ttl="7d",
        admission=counting(2),
    )
    embeddings = fields.embeddings
    assert [embeddings[name].admission and filter_of(embeddings[name]).count for name in fields.features] == [
        2,
        3,
        None,
    ]
    assert [embeddings[name].ttl for name in fields.features] == [7 * 86_400, de.Steps(5), 7 * 86_400]
    rows = SparseOptimizer(fields)
    ids = torch.tensor([5, 6])
    for seen in range(1, 4):
        out = fields({"user": ids, "tags": (ids, torch.tensor([0])), "city": ids})
        assert [bool(out[name].any()) for name in fields.features] == [seen >= 2, seen >= 3, True]
        sum(vectors.sum() for vectors in out.values()).backward()
        rows.step()
        assert [len(embeddings[name]) for name in fields.features] == [2 * (seen >= 2), 2 * (seen >= 3), 2]
    with pytest.raises(TypeError, match=r"\[Feature\] admission is 3"):
        Feature(4, admission=3)  # type: ignore[arg-type]
