# SPDX-License-Identifier: Apache-2.0
"""The counting Bloom filter in memory: its counts, its rate, its arguments."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import damo_embedding as de
from damo_embedding import _core
from reference_filter import PAGE_BYTES, ReferenceFilter, layout


def filter_of(capacity: int = 1000, count: int = 3, **options: Any) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(capacity=capacity, count=count, **options)


ADDS = st.lists(
    st.tuples(st.lists(st.integers(0, 60).map(lambda i: i * 2**58 + i), max_size=40), st.integers(0, 18)), max_size=20
)


@settings(max_examples=150, deadline=None)
@given(adds=ADDS, count=st.integers(1, 15), capacity=st.sampled_from([1, 700]))
def test_a_key_is_never_counted_less_than_it_was_added(
    adds: list[tuple[list[int], int]], count: int, capacity: int
) -> None:
    with filter_of(capacity, count) as seen:
        exact: Counter[int] = Counter()
        for keys, num in adds:
            seen.add(np.array(keys, np.uint64), num)
            exact.update({key: times * num for key, times in Counter(keys).items()})
            for key, times in exact.items():
                assert seen.estimate(key) >= min(times, 15)
                assert seen.check(key) or times < count
        assert seen.adds == exact.total()


@settings(max_examples=100, deadline=None)
@given(adds=ADDS, halve_every=st.sampled_from([None, 1, 7, 100]), fpr=st.sampled_from([0.5, 1e-2, 1e-3, 1e-8]))
def test_the_counters_are_those_of_the_documented_definition(
    adds: list[tuple[list[int], int]], halve_every: int | None, fpr: float
) -> None:
    with filter_of(1, 4, fpr=fpr, halve_every=halve_every) as seen:
        pages, per_line = seen.memory_bytes // PAGE_BYTES, seen._core.counters_per_key // 2
        model = ReferenceFilter(pages, per_line, halve_every or 0)
        asked = [i * 2**58 + i for i in range(63)]
        for keys, num in adds:
            seen.add(np.array(keys, np.uint64), num)
            model.add(keys, num)
            expected = [model.estimate(key) for key in asked]
            assert seen.estimate(np.array(asked, np.uint64)).tolist() == expected
            assert seen.check(np.array(asked, np.uint64)).tolist() == [n >= 4 for n in expected]
        assert seen.adds == model.adds
        assert seen.fill == np.count_nonzero(model.counters) / model.counters.size
        shares = (model.counters >= 4).mean(axis=2) ** per_line
        of_pairs = (shares.sum(axis=1) ** 2 - (shares**2).sum(axis=1)) / (64 * 63)
        assert seen.estimated_fpr == pytest.approx(of_pairs.mean(), rel=1e-9)


@pytest.mark.parametrize("fpr", [0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
def test_the_layout_is_that_of_the_documented_expectation(fpr: float) -> None:
    seen = filter_of(50_000_000, fpr=fpr)
    pages, per_line = layout(50_000_000, fpr)
    assert seen._core.counters_per_key == 2 * per_line
    assert seen.memory_bytes == pytest.approx(pages * PAGE_BYTES, rel=1e-5)


@pytest.mark.parametrize("fpr", [1e-2, 1e-3])
@pytest.mark.parametrize("pattern", ["random", "sequential", 64, 2**32, 2**40, 1_000_003])
def test_at_capacity_the_false_positive_rate_is_the_stated_one(
    fpr: float, pattern: str | int, random: np.random.Generator
) -> None:
    capacity, asked = 100_000, 1_000_000
    if pattern == "random":
        keys = random.integers(-(2**63), 2**63, capacity + asked)
    else:
        keys = np.arange(capacity + asked, dtype=np.uint64) * np.uint64(1 if isinstance(pattern, str) else pattern)
    with filter_of(capacity, 3, fpr=fpr) as seen:
        seen.add(keys[:capacity], 3)
        assert np.all(seen.check(keys[:capacity]))
        measured = np.mean(seen.check(keys[capacity:]))
        assert fpr / 1.15 < measured < fpr * 1.15  # five standard deviations of so many, and more
        assert seen.estimated_fpr == pytest.approx(fpr, rel=0.05)
        assert len(seen) == pytest.approx(capacity, rel=0.01)


def test_memory_stays_near_the_published_number_of_counters() -> None:
    for fpr, most in ((1e-2, 1.03), (1e-3, 1.08), (1e-4, 1.14)):
        counters = 2**28 * math.log(1 / fpr) / math.log(2) ** 2
        assert counters / 2 < filter_of(2**28, fpr=fpr).memory_bytes < most * counters / 2


def test_one_key_gives_one_answer_and_an_array_gives_its_shape() -> None:
    seen = filter_of(count=2)
    seen.add(7)
    seen.add(np.int64(7))
    seen.add(-1, num=5)
    assert seen.check(7) is True
    assert seen.check(np.uint64(8)) is False
    assert seen.estimate(7) == 2
    assert type(seen.estimate(7)) is int
    assert seen.estimate(2**64 - 1) == 5  # the bits count
    found = seen.check([[7, 8], [9, -1]])
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.bool_
    assert found.tolist() == [[True, False], [False, True]]
    counts = seen.estimate(np.array([[7, 8], [9, -1]])[:, ::-1])  # not contiguous
    assert isinstance(counts, np.ndarray)
    assert counts.dtype == np.uint8
    assert counts.tolist() == [[0, 2], [5, 0]]
    assert seen.estimate(np.array([7, 8], np.int16)).tolist() == [2, 0]


def test_empty_batches_and_num_zero_count_nothing() -> None:
    seen = filter_of()
    for empty in ([], np.empty((0, 3), np.int64), np.empty(0, np.uint64)):
        seen.add(empty, 5)
        assert np.shape(seen.check(empty)) == np.shape(empty)
        assert np.shape(seen.estimate(empty)) == np.shape(empty)
    seen.add([1, 2], num=0)
    assert (seen.adds, len(seen), seen.fill, seen.estimated_fpr) == (0, 0, 0.0, 0.0)


def test_counting_ends_at_fifteen() -> None:
    seen = filter_of(count=15)
    seen.add(1, 14)
    assert not seen.check(1)
    seen.add(1, 16)
    seen.add(2, 2**32 - 1)
    seen.add([2, 2], 2**32 - 1)
    assert seen.estimate([1, 2]).tolist() == [15, 15]
    assert seen.check([1, 2]).all()
    assert seen.adds == 30 + 3 * (2**32 - 1)


def test_halving_makes_rare_keys_forgotten_and_frequent_ones_kept() -> None:
    seen = filter_of(5000, 3, halve_every=10_000)
    fresh = iter(range(10**6, 10**9))
    for _ in range(50):  # fifty times the capacity of keys that come once, one key that comes all the time
        seen.add([7, 7, 7, 7])
        seen.add([next(fresh) for _ in range(4996)])
        assert seen.check(7)
    assert len(seen) < 15_000
    assert seen.estimated_fpr < 5e-3
    never = filter_of(5000, 3)
    never.add(np.arange(250_000))
    assert never.estimated_fpr > 0.5


BAD_SETTINGS = [
    ({"capacity": 0}, ValueError, r"capacity is 0, expected 1 to 1099511627776"),
    ({"capacity": -5}, ValueError, r"capacity is -5"),
    ({"capacity": 2**70}, ValueError, r"capacity is"),
    ({"capacity": 10.0}, TypeError, r"capacity is 10.0, expected an int"),
    ({"capacity": True}, TypeError, r"capacity is True"),
    ({"capacity": "10"}, TypeError, r"capacity is '10'"),
    ({"count": 0}, ValueError, r"count is 0, expected 1 to 15"),
    ({"count": 16}, ValueError, r"count is 16, expected 1 to 15"),
    ({"count": 1.5}, TypeError, r"count is 1.5"),
    ({"fpr": 0.0}, ValueError, r"fpr is 0.0, expected a number in \[1e-09, 0.5\]"),
    ({"fpr": 0.6}, ValueError, r"fpr is 0.6"),
    ({"fpr": math.nan}, ValueError, r"fpr is nan"),
    ({"fpr": "1e-3"}, TypeError, r"fpr is '1e-3'"),
    ({"halve_every": 0}, ValueError, r"halve_every is 0, expected 1 to"),
    ({"halve_every": -1}, ValueError, r"halve_every is -1"),
    ({"halve_every": 1e6}, TypeError, r"halve_every is 1000000.0"),
    ({"path": 5}, TypeError, r"path is int, expected a str or a Path"),
    ({"path": ""}, ValueError, r"path is ''"),
    ({"path": b"x"}, TypeError, r"path is bytes"),
    ({"reload": 1}, TypeError, r"reload is 1, expected True or False"),
]


@pytest.mark.parametrize(("bad", "error", "text"), BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused_by_name(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=r"\[CountingBloomFilter\] " + text):
        de.CountingBloomFilter(**{"capacity": 10, **bad})


def test_an_unknown_setting_and_a_missing_capacity_are_type_errors() -> None:
    with pytest.raises(TypeError, match="capcity"):
        de.CountingBloomFilter(capacity=10, capcity=10)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="capacity"):
        de.CountingBloomFilter()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("num", "error"), [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_a_num_that_is_no_count_is_refused_and_nothing_is_added(num: Any, error: type[Exception]) -> None:
    seen = filter_of()
    with pytest.raises(error, match=r"\[add\] num is"):
        seen.add([1, 2], num)
    assert seen.adds == 0


@pytest.mark.parametrize(
    "keys",
    [1.5, "7", None, [1.0, 2.0], [True], ["a"], [None], np.zeros(3, np.float32), np.zeros(2, ">i8"), [2**64], 2**64],
)
def test_keys_that_are_no_integers_are_refused_and_nothing_is_added(keys: Any) -> None:
    seen = filter_of()
    for call in (seen.add, seen.check, seen.estimate):
        with pytest.raises(TypeError, match=r"keys have dtype .*, expected int64 or uint64"):
            call(keys)
    assert seen.adds == 0


def test_the_core_refuses_arrays_that_do_not_fit() -> None:
    core = filter_of()._core
    keys = np.arange(3, dtype=np.uint64)
    with pytest.raises(ValueError, match=r"\[check\] out has 2 places, expected one for each of 3 keys"):
        core.check(keys, np.empty(2, np.bool_))
    with pytest.raises(TypeError):
        core.check(keys, np.empty(3, np.uint8))
    with pytest.raises(TypeError, match="keys must be int64 or uint64"):
        core.add(np.zeros(3, np.float64), 1)


def test_it_is_its_settings_until_it_is_used() -> None:
    seen = de.CountingBloomFilter(capacity=2**40, count=2, fpr=1e-9, halve_every=5)  # 40 TB, if it were used
    assert (seen.capacity, seen.count, seen.fpr, seen.halve_every) == (2**40, 2, 1e-9, 5)
    assert (seen.path, seen.closed, seen.check(1), seen.estimate(1), len(seen)) == (None, False, False, 0, 0)
    assert seen.memory_bytes > 2**44
    assert repr(seen) == "CountingBloomFilter(capacity=1099511627776, count=2, fpr=1e-09, halve_every=5)"
    assert seen._settings() == {"capacity": 2**40, "count": 2, "fpr": 1e-9, "halve_every": 5}
    for twin in (copy.deepcopy(seen), copy.copy(seen), pickle.loads(pickle.dumps(seen))):
        assert repr(twin) == repr(seen)
        assert twin._core is not seen._core


def test_one_that_holds_counts_is_not_copied() -> None:
    seen = filter_of()
    seen.add(1)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(seen)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(seen)


def test_after_close_it_says_so() -> None:
    with filter_of() as seen:
        seen.add(1)
        assert not seen.closed
    assert seen.closed
    seen.close()
    for call in (lambda: seen.add(1), lambda: seen.check(1), lambda: seen.estimate(1), lambda: len(seen), seen.sync):
        with pytest.raises(de.ClosedError, match="the filter is closed"):
            call()
    for name in ("adds", "fill", "estimated_fpr"):
        with pytest.raises(de.ClosedError):
            getattr(seen, name)


LIMITED = """
import resource
import damo_embedding as de
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
seen = de.CountingBloomFilter(capacity=2**33)
try:
    seen.add(1)
except de.StorageError as error:
    assert "no address space" in str(error) and "capacity 8589934592" in str(error), error
    assert seen.adds == 0 and not seen.check(1)
else:
    raise AssertionError
"""


def test_a_filter_too_large_for_the_memory_is_a_storage_error() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=60)


def test_adds_from_many_threads_are_all_counted() -> None:
    seen = filter_of(100_000, 8)
    keys = np.arange(20_000)
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for part in np.split(keys, 20):
            seen.add(part, 2)
            seen.check(part)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.adds == 4 * 2 * len(keys)
    assert np.all(seen.check(keys))
    assert np.mean(seen.estimate(keys)) == pytest.approx(8, abs=0.01)


FORKED = """
import os
import damo_embedding as de
used, fresh = (de.CountingBloomFilter(capacity=100, count=1) for _ in range(2))
used.add(1)
if (child := os.fork()) == 0:
    fresh.add(2)
    assert fresh.check(2)
    for call in (lambda: used.add(2), lambda: used.check(1), used.close):
        try:
            call()
            os._exit(1)
        except de.ForkedHandleError as error:
            assert str(os.getppid()) in str(error)
    del used
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert used.check(1) and not fresh.check(2)
"""


def test_a_forked_child_makes_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


def test_the_limits_are_the_cores() -> None:
    core = _core.StandaloneFilter
    assert (core.MAX_CAPACITY, core.MAX_COUNT, core.MIN_FPR, core.MAX_FPR) == (2**40, 15, 1e-9, 0.5)
