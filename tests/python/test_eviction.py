# SPDX-License-Identifier: Apache-2.0
"""Tables larger than memory, threads beside each other, cuts while others train.

Rows of dimension 1,024 with Adam take 12 KB, so that some 800 of them fill the least memory there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
from comparing import assert_equals_reference, assert_same_rows, reference_of, rows_of, rows_of_reference
from optimizer_cases import CASES
from reference import ReferenceTable
from storage_server import Group, fork_server

pytestmark = pytest.mark.core

DIMENSION = 1024
LATE = 2**40  # ahead of any wall clock
f32 = np.float32


def make(
    storage: de.Storage,
    group: int = 1,
    optimizer: de.Optimizer = de.Adam(lr=0.1),  # noqa: B008
    dimension: int = DIMENSION,
) -> de.Embedding:
    storage.now = LATE
    return de.Embedding(storage, optimizer, de.Uniform(-1.0, 1.0), dimension=dimension, group=group)


def oracle_of(embedding: de.Embedding) -> ReferenceTable:
    table = reference_of(embedding)
    table.now = LATE
    return table


def gradients(random: np.random.Generator, keys: np.ndarray, dimension: int = DIMENSION) -> np.ndarray:
    return random.standard_normal((len(keys), dimension)).astype(f32)


def push_out(embedding: de.Embedding, first: int = 10**6) -> None:
    """Has so many others looked up that nothing of before is left in memory."""
    before = embedding.storage.stats()["evictions"]
    for begin in range(first, first + 3_000, 200):
        embedding.lookup(np.arange(begin, begin + 200))
    assert embedding.storage.stats()["evictions"] - before > 1_000


# ------------------------------------------------------------ one by one


def test_evicted_rows_come_back_bit_identical(storage: de.Storage, random: np.random.Generator) -> None:
    embedding = make(storage)
    table = oracle_of(embedding)
    keys = np.arange(100)
    for _ in range(3):
        values = gradients(random, keys)
        embedding.apply_gradients(keys, values)
        table.apply_gradients(keys, values)
    push_out(embedding)
    tiers = []
    for key in keys.tolist():
        row = embedding.inspect(key)
        assert row is not None
        expected = table.rows[key]
        assert (row.update_count, row.step, row.last_update) == (3, 3, LATE)
        np.testing.assert_array_equal(row.weights, expected.weights)
        for name, block in expected.state.items():
            np.testing.assert_array_equal(row.state[name], block)
        tiers.append(row.tier)
    assert tiers.count("disk") > 90
    cold = storage.stats()["cold_hits"]
    np.testing.assert_array_equal(embedding.lookup(keys), table.lookup(keys))
    assert storage.stats()["cold_hits"] - cold > 90


def test_rows_that_were_only_looked_up_are_rows_after_eviction(storage: de.Storage) -> None:
    embedding = make(storage)
    keys = np.arange(100)
    first = embedding.lookup(keys)
    push_out(embedding)
    assert embedding.contains(keys).all()
    np.testing.assert_array_equal(embedding.lookup(keys, insert=False), first)
    row = embedding.inspect(7)
    assert row is not None
    assert (row.update_count, row.last_update) == (0, LATE)


def test_erased_rows_stay_erased_after_eviction(storage: de.Storage, random: np.random.Generator) -> None:
    embedding = make(storage)
    keys = np.arange(100)
    embedding.apply_gradients(keys, gradients(random, keys))
    push_out(embedding)
    assert embedding.erase(keys[::2]) == 50
    push_out(embedding, 2 * 10**6)
    assert embedding.contains(keys).tolist() == [False, True] * 50


def test_training_over_ten_times_the_memory_equals_the_reference(
    storage: de.Storage, random: np.random.Generator
) -> None:
    embedding = make(storage)
    table = oracle_of(embedding)
    everything = 8_700  # rows of 12 KB: ten times the 10 MiB that rows have
    for begin in range(0, everything, 300):
        keys = np.concatenate([np.arange(begin, begin + 300), random.integers(0, everything, 60)])
        values = gradients(random, keys)
        np.testing.assert_array_equal(embedding.lookup(keys), table.lookup(keys))
        embedding.apply_gradients(keys, values)
        table.apply_gradients(keys, values)
    assert storage.stats()["hot_bytes_in_use"] <= storage.stats()["hot_bytes"]
    assert len(embedding) * (3 * DIMENSION * 4) > 10 * storage.stats()["hot_bytes"] > 0
    assert_equals_reference(embedding, table)


def test_a_batch_larger_than_memory_is_one_step(storage: de.Storage, random: np.random.Generator) -> None:
    embedding = make(storage)
    table = oracle_of(embedding)
    for keys in (np.arange(1_500), np.arange(500, 2_500), random.integers(0, 3_000, 2_500)):
        values = gradients(random, keys)
        embedding.apply_gradients(keys, values)
        table.apply_gradients(keys, values)
    assert_equals_reference(embedding, table)
    assert embedding.step == 3
    np.testing.assert_array_equal(embedding.lookup(np.arange(-500, 4_000)), table.lookup(np.arange(-500, 4_000)))
    assert embedding.erase(np.arange(-500, 2_000)) == table.erase(np.arange(-500, 2_000))
    assert_equals_reference(embedding, table)


def test_a_lookup_of_more_new_keys_than_memory_holds_is_one_operation(storage: de.Storage) -> None:
    """A record for each part of it was several: a kill between them left some of its rows."""
    embedding = make(storage)
    table = oracle_of(embedding)
    for number, keys in enumerate((np.arange(2_500), np.arange(1_000, 5_000), np.arange(5_000))):
        np.testing.assert_array_equal(embedding.lookup(keys), table.lookup(keys))
        assert storage.stats()["sequence"] == min(number + 1, 2)  # the last one finds all of them
    assert_equals_reference(embedding, table)


def test_rows_of_every_optimizer_come_back_from_the_disk_and_from_the_log(
    tmp_path: Path, random: np.random.Generator
) -> None:
    """Every layout of a state: evicted, read back, and redone after a kill."""
    groups = [Group(number, optimizer, de.Normal(), 1_000 + number) for number, optimizer in enumerate(CASES)]
    tables = [ReferenceTable(g.optimizer, g.initializer, g.dimension, stream=g.group) for g in groups]
    with fork_server() as server:
        session = server.session()
        session("open", tmp_path / "table.damo", groups, LATE, memory="16MiB", threads=2)
        for _ in range(4):
            for group, table in zip(groups, tables, strict=True):
                keys = random.integers(0, 40, 30)
                values = gradients(random, keys, group.dimension)
                session("embedding_call", group.group, "apply_gradients", keys, values)
                table.now = LATE
                table.apply_gradients(keys, values)
        assert session("storage_call", "stats")["evictions"] > 0
        session.kill()
        session = server.session()
        session("open", tmp_path / "table.damo", groups, LATE, memory="16MiB", threads=2)
        assert session("storage_call", "stats")["redone_records"] > 0
        for group, table in zip(groups, tables, strict=True):
            assert_same_rows(session("rows", group.group), rows_of_reference(table))
        session.leave()


def test_cold_rows_find_room_among_rows_of_other_sizes(tmp_path: Path) -> None:
    """More of them at once than their size's fair share of memory: seen to wait for one another for ever."""
    optimizers = [de.SGD(lr=0.1), de.Adagrad(lr=0.1), de.Adam(lr=0.1)]
    groups = [Group(number, optimizers[number], de.Zeros(), dimension=1000) for number in range(3)]
    ones = np.ones((400, 1000), f32)
    random = np.random.default_rng(3)
    with fork_server() as server:
        session = server.session()  # which is given up when it hangs
        session("open", tmp_path / "table.damo", groups, LATE, memory="16MiB", threads=2)
        for size in (50, 100, 150, 190) * 3:
            for group in (0, 1):
                keys = random.integers(0, 4_000, 400)
                session("embedding_call", group, "apply_gradients", keys, ones)
            for _ in range(4):
                keys = random.permutation(1_000)[:size]
                session("embedding_call", 2, "apply_gradients", keys, ones[:size])
        assert session("numbers")[2] == (len(session("rows", 2)), 48)
        session.leave()


def test_a_thousand_training_lookups_without_a_backward_hold_the_budget(storage: de.Storage) -> None:
    embedding = make(storage)
    for begin in range(0, 20_000, 20):
        embedding.lookup(np.arange(begin, begin + 20))
    stats = storage.stats()
    assert len(embedding) == 20_000
    assert stats["hot_bytes_in_use"] <= stats["hot_bytes"]
    assert stats["hot_rows"] + stats["evictions"] == 20_000


def test_prefetched_rows_are_found_in_memory(storage: de.Storage, random: np.random.Generator) -> None:
    embedding = make(storage)
    keys = np.arange(50)
    embedding.apply_gradients(keys, gradients(random, keys))
    push_out(embedding)
    embedding.prefetch(keys)
    for _ in range(1_000):
        tiers = [row.tier for row in map(embedding.inspect, keys.tolist()) if row is not None]
        if tiers.count("memory") == 50:
            break
        threading.Event().wait(0.01)
    assert tiers == ["memory"] * 50


def test_prefetch_of_unknown_keys_creates_nothing(storage: de.Storage) -> None:
    embedding = make(storage)
    embedding.prefetch(np.arange(100))
    embedding.lookup([1])
    assert len(embedding) == 1


# ------------------------------------------------- threads, memory: no matter


def test_results_depend_neither_on_threads_nor_on_memory(tmp_path: Path) -> None:
    results = []
    for number, (threads, memory) in enumerate([(1, "16MiB"), (2, "256MiB"), (8, "16MiB"), (8, "64MiB")]):
        random = np.random.default_rng(7)
        with de.Storage(tmp_path / str(number), memory=memory, threads=threads) as storage:
            wide, narrow = make(storage), make(storage, 2, de.Adagrad(lr=0.1), dimension=17)
            for _ in range(8):
                keys = random.integers(0, 1_500, 250)
                wide.apply_gradients(keys, gradients(random, keys))
                keys = random.integers(0, 20_000, 12_000)
                narrow.lookup(keys)
                narrow.apply_gradients(keys, gradients(random, keys, 17))
            results.append((rows_of(wide), rows_of(narrow, 65_536)))
    for other in results[1:]:
        assert_same_rows(other[0], results[0][0])
        assert_same_rows(other[1], results[0][1])


# ------------------------------------------------------ beside each other


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Does `work` again and again in a thread; gives a function that says how often; raises what it raised."""
    stop = threading.Event()
    done = 0
    errors: list[BaseException] = []

    def loop() -> None:
        nonlocal done
        try:
            while not stop.is_set():
                work()
                done += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield lambda: done
    finally:
        stop.set()
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
        if errors:
            raise errors[0]


@pytest.mark.parametrize("insert", [True, False])
def test_lookups_beside_updates_see_each_row_at_one_moment(path: Path, insert: bool) -> None:
    everything = 2_500  # rows of 4 KB: as much as memory holds, so that some come and go
    with de.Storage(path, memory="16MiB", threads=2) as storage:
        storage.now = LATE
        embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=DIMENSION, group=1)
        torn: list[np.ndarray] = []

        def look() -> None:
            keys = local.integers(0, everything, 100)
            weights = embedding.lookup(keys, insert=insert)
            # All weights of a row are equal at all times: 0 minus the number of its updates.
            if (weights != weights[:, :1]).any():
                torn.append(weights)

        local = np.random.default_rng(1)
        with beside(look) as looked:
            random = np.random.default_rng(2)
            counts = np.zeros(everything)
            for _ in range(60):
                keys = np.unique(random.integers(0, everything, 250))
                embedding.apply_gradients(keys, np.ones((len(keys), DIMENSION), f32))
                counts[keys] += 1
            assert looked() > 0
        assert not torn
        np.testing.assert_array_equal(embedding.lookup(np.arange(everything), insert=False)[:, 0], -counts)


def test_two_threads_that_meet_a_new_key_make_one_row_and_lose_no_update(storage: de.Storage) -> None:
    embedding = make(storage, optimizer=de.SGD(lr=1.0), dimension=64)
    start = embedding.lookup(np.arange(3_000), insert=False)
    ready = threading.Barrier(4)

    def run() -> None:
        ready.wait()
        for begin in range(0, 3_000, 100):
            embedding.lookup(np.arange(begin, begin + 100))
            embedding.apply_gradients(np.arange(begin, begin + 100), np.ones((100, 64), f32))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(embedding), embedding.step) == (3_000, 120)
    expected = start - f32(1) - f32(1) - f32(1) - f32(1)
    np.testing.assert_array_equal(embedding.lookup(np.arange(3_000)), expected)


# ---------------------------------------------------------- cuts meanwhile

Cut = Callable[[de.Storage, de.Embedding, Path], np.ndarray]


def _scan(storage: de.Storage, embedding: de.Embedding, place: Path) -> np.ndarray:
    return np.concatenate([part.update_counts for part in embedding.scan(100)])


def _checkpoint(storage: de.Storage, embedding: de.Embedding, place: Path) -> np.ndarray:
    storage.checkpoint(place)
    with de.Storage.restore(place, place.with_suffix(".restored"), memory="16MiB", threads=1) as restored:
        found = make(restored)
        counts = _scan(restored, found, place)
        assert found.step == counts[0]
    return counts


def _dump(storage: de.Storage, embedding: de.Embedding, place: Path) -> np.ndarray:
    storage.dump(place)
    weights = de.read_dump(place)[embedding.group][1]
    start = embedding.lookup(de.read_dump(place)[embedding.group][0], insert=False)
    assert start.shape == weights.shape
    return weights[:, 0]


@pytest.mark.parametrize("cut", [_scan, _checkpoint, _dump], ids=["scan", "checkpoint", "dump"])
def test_a_cut_while_another_thread_trains_is_of_one_step(path: Path, tmp_path: Path, cut: Cut) -> None:
    keys = np.arange(900)  # of 12 KB: more than memory holds, so that rows come and go during the cut
    with de.Storage(path, memory="16MiB", threads=2, log_bytes="8MiB") as storage:
        storage.now = LATE
        if cut is _dump:  # all weights count the steps down from 0
            embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=3 * DIMENSION, group=1)
        else:
            embedding = make(storage)
        values = np.ones((len(keys), embedding.dimension), f32)

        def step() -> None:
            embedding.apply_gradients(keys, values)

        step()
        with beside(step):
            for number in range(4):
                before = embedding.step
                counts = np.abs(cut(storage, embedding, tmp_path / f"cut-{number}"))
                assert len(counts) == len(keys)
                assert len(np.unique(counts)) == 1, "rows of more than one step"
                assert before <= counts[0] <= embedding.step + 1
