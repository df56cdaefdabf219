# SPDX-License-Identifier: Apache-2.0
"""Rows that go away: ttl by time and by steps, erased groups, and rows that come from outside (import_rows)."""

from __future__ import annotations

import datetime
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import damo_embedding as de
from storage_server import Group, fork_server

DAY = 86_400


def embedding(storage: de.Storage, group: int | str = 0, **options: Any) -> de.Embedding:
    return de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=2, group=group, **options)


def update(table: de.Embedding, *keys: int) -> None:
    table.apply_gradients(list(keys), -np.ones((len(keys), 2), np.float32))


def keys_of(table: de.Embedding) -> set[int]:
    return {int(key) for part in table.scan() for key in part.keys}


@pytest.mark.parametrize(
    ("ttl", "shown"),
    [
        (90, 90),
        ("90", 90),
        ("1.5m", 90),
        ("12h", 12 * 3600),
        ("30d", 30 * DAY),
        ("2w", 14 * DAY),
        (datetime.timedelta(hours=1), 3600),
        (np.int64(5), 5),
        (de.Steps(7), de.Steps(7)),
        ("never", "never"),
    ],
)
def test_a_ttl_is_said_in_many_ways(tmp_path: Path, ttl: Any, shown: Any) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="1d") as storage:
        assert embedding(storage, ttl=ttl).ttl == shown
        assert embedding(storage, 1).ttl == DAY
        assert [group["ttl"] for group in storage.stats()["groups"]] == [shown, DAY]
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        assert embedding(storage).ttl == shown


@pytest.mark.parametrize("ttl", [0, -1, "", "d", "1 year", "-3d", 2**41, "9" * 400, "nan", datetime.timedelta(0)])
def test_a_ttl_out_of_range_is_a_value_error_and_makes_nothing(tmp_path: Path, ttl: Any) -> None:
    with pytest.raises(ValueError, match="ttl is"):
        de.Storage(tmp_path / "s", ttl=ttl)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("ttl", [True, 1.5, [30], b"30d"])
def test_a_ttl_of_another_type_is_a_type_error(tmp_path: Path, ttl: Any) -> None:
    with pytest.raises(TypeError, match=r"ttl is .*expected"):
        de.Storage(tmp_path / "s", ttl=ttl)


@pytest.mark.parametrize(
    ("count", "error"), [(0, ValueError), (2**31, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_steps_are_checked(count: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"\[ttl\] count is"):
        de.Steps(count)


def test_an_expired_row_is_absent_everywhere_and_starts_anew(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="1d") as storage:
        users = embedding(storage)
        storage.now = 1_000
        update(users, 1, 2)
        storage.now = 1_000 + DAY
        update(users, 2)
        assert len(users) == 2
        storage.now = 1_001 + DAY
        assert len(users) == storage.stats()["rows"] == 1
        assert keys_of(users) == {2}
        assert users.contains([1, 2]).tolist() == [False, True]
        assert users.inspect(1) is None
        assert users.erase([1]) == 0
        assert storage.dump(tmp_path / "dump") == 1
        assert users.lookup([1, 2], insert=False)[:, 0].tolist() == [0.0, 2.0]
        update(users, 1)
        assert users.lookup([1])[0, 0] == 1.0
        row = users.inspect(1)
        assert row is not None
        assert row.update_count == 1


@pytest.mark.parametrize("longer", [1_000_000, "never", de.Steps(1000)])
def test_what_has_expired_stays_so_under_a_longer_life(tmp_path: Path, longer: Any) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        storage.now = 10_000
        table = embedding(storage, ttl=100)
        update(table, *range(30))
        storage.now = 10_090
        update(table, *range(100, 105))
        storage.now = 10_120
        assert keys_of(table) == set(range(100, 105))
    for _ in range(2):
        with de.Storage(tmp_path / "s", memory="16MiB") as storage:
            storage.now = 10_130
            table = embedding(storage, ttl=longer)
            assert len(table) == 5
            assert keys_of(table) == set(range(100, 105))
            assert not table.contains(np.arange(30)).any()
            assert not table.lookup(np.arange(30), insert=False).any()


OLD = int(time.time()) - 30 * DAY  # of events that are replayed


def of_old_events(path: Path, ttl: str) -> None:
    with de.Storage(path, memory="16MiB", ttl=ttl) as storage:
        storage.now = OLD
        update(embedding(storage), *range(100))


@pytest.mark.parametrize("ttl", ["14d", "3d"])
def test_another_life_at_an_opening_does_not_ask_the_wall_clock(tmp_path: Path, ttl: str) -> None:
    """Before the time of the events could be set, all rows had expired by the wall clock, and were erased."""
    of_old_events(tmp_path / "s", "7d")
    for kind in ("storage", "embedding"):
        path = tmp_path / kind
        shutil.copytree(tmp_path / "s", path)
        with de.Storage(path, memory="16MiB", **({"ttl": ttl} if kind == "storage" else {})) as storage:
            group = embedding(storage, **({"ttl": ttl} if kind == "embedding" else {}))
            storage.now = OLD + 1
            assert storage.now == OLD + 1
            assert len(group) == 100
            storage.now = OLD + 5 * DAY
            assert len(group) == (100 if ttl == "14d" else 0)
            assert storage.verify().damages == ()


def test_rows_of_old_events_are_salvaged(tmp_path: Path) -> None:
    """All had expired by the wall clock: none came along, and none was listed as lost."""
    of_old_events(tmp_path / "s", "7d")
    assert de.Storage.salvage(tmp_path / "s", tmp_path / "out").rows == 100
    with de.Storage(tmp_path / "out", memory="16MiB") as storage:
        storage.now = OLD + 1
        assert len(embedding(storage)) == 100


def test_what_keeps_the_disk_does_not_move_the_clock(tmp_path: Path) -> None:
    """Rows were forgotten by the wall clock, which stood in the storage from then on: the oldest had expired by it."""
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="45d") as storage:
        table = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=64, group=0)
        for place, when in enumerate((OLD - 40 * DAY, OLD)):
            storage.now = when
            for part in np.split(np.arange(80_000) + place * 80_000, 4):
                table.apply_gradients(part, np.ones((len(part), 64), np.float32))
    with de.Storage(tmp_path / "s", memory="16MiB", disk="64MiB") as storage:
        deadline = time.monotonic() + 60
        while storage.stats()["forgotten"] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert storage.stats()["forgotten"] > 0
        storage.now = OLD + 1
        assert storage.now == OLD + 1


def test_what_was_forgotten_stays_so_after_a_kill_and_what_was_kept_is_as_it_was(path: Path) -> None:
    """Rows that have to go for a limit on disk go as erased ones do: with a record."""
    group = Group(0, de.SGD(lr=1.0), de.Zeros(), dimension=64)
    every = np.arange(150_000)
    with fork_server() as server:
        session = server.session()
        session("open", path, [group], 2**40, memory="16MiB", disk="64MiB")
        for part in np.split(every, 15):
            session("embedding_call", 0, "apply_gradients", part, np.ones((len(part), 64), np.float32))
        deadline = time.monotonic() + 60
        while (forgotten := session("storage_call", "stats")["forgotten"]) == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert forgotten > 0
        before = session("rows", 0)
        session.kill()
        session = server.session()
        session("open", path, [group], 2**40, memory="16MiB")
        after = session("rows", 0)
        ((rows, _),) = session("numbers").values()
        session.kill()
    assert len(before) < len(every)
    assert 0 < len(after) == rows
    assert after.items() <= before.items()


def test_a_clock_a_year_ahead_warns_at_commit_and_expires_nothing_before_it_is_confirmed(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="1d") as storage:
        users = embedding(storage)
        storage.now = 1_000
        update(users, 1)
        with pytest.raises(ValueError, match=r"\[now\] .* days after the last operation .*expire\(now="):
            storage.now = 1_000 + 400 * DAY
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        users = embedding(storage)
        with pytest.warns(RuntimeWarning, match="days ahead of the last operation"):
            storage.commit()
        assert len(users) == 1
        assert storage.stats()["clock_held_seconds"] > 366 * DAY
        assert storage.expire() == 1
        assert len(users) == 0
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        assert len(embedding(storage)) == 0


def test_expire_takes_a_time_of_yours(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="1d") as storage:
        users = embedding(storage)
        storage.now = 1_000
        update(users, 1, 2)
        assert storage.expire(now=1_000 + 500 * DAY) == 2
        assert storage.now == 1_000 + 500 * DAY
        assert storage.expire(now=5) == 0


def test_expire_takes_a_time_of_old_events_as_the_clock(tmp_path: Path) -> None:
    """It took the wall clock, where that was later and nothing had been done yet."""
    with de.Storage(tmp_path / "s", memory="16MiB", ttl="30d") as storage:
        users = embedding(storage, "user")
        storage.expire(1_400_000_000)
        update(users, 1)
        assert storage.now == 1_400_000_000
        assert storage.expire(1_400_000_000 + 29 * 86_400) == 0
        assert storage.expire(1_400_000_000 + 31 * 86_400) == 1


def test_a_dropped_group_says_so_and_its_name_is_free(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        users = embedding(storage, "user")
        update(users, 1)
        with pytest.raises(ValueError, match=r"\[drop_group\] there is no group 'item'; the storage has 'user'"):
            storage.drop_group("item")
        storage.drop_group("user")
        assert storage.groups() == {}
        for call in (lambda: len(users), lambda: users.lookup([1]), lambda: update(users, 1), lambda: users.erase([1])):
            with pytest.raises(ValueError, match='group "user" was dropped'):
                call()
        assert len(embedding(storage, "user")) == 0
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        assert len(embedding(storage, "user")) == 0


def test_imported_rows_carry_weights_state_and_counts_to_another_storage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with de.Storage(tmp_path / "a", memory="16MiB") as a, de.Storage(tmp_path / "b", memory="16MiB") as b:
        old, new = (de.Embedding(s, de.Adam(lr=0.1), de.Uniform(-1, 1), dimension=4, group="x") for s in (a, b))
        keys = np.arange(1000)
        for _ in range(3):
            some = rng.choice(keys, 600, replace=False)
            old.apply_gradients(some, rng.standard_normal((600, 4)).astype(np.float32))
        for part in old.scan(batch=300):
            new.import_rows(part.keys, part.weights, part.state, part.update_counts)
        assert len(new) == len(old)
        gradients = rng.standard_normal((1000, 4)).astype(np.float32)
        for table in (old, new):  # the same rows go on in the same way
            table.apply_gradients(keys, gradients)
        np.testing.assert_array_equal(old.lookup(keys), new.lookup(keys))


def test_imported_weights_start_with_the_state_of_a_new_row(tmp_path: Path) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        optimizer = de.Adagrad(lr=1.0, initial_accumulator_value=0.5)
        table = de.Embedding(storage, optimizer, de.Zeros(), dimension=2, group=0)
        table.import_rows([4], np.full((1, 2), 3, np.float32))
        row = table.inspect(4)
        assert row is not None
        assert row.weights.tolist() == [3, 3]
        assert row.state["sum"].tolist() == [0.5, 0.5]
        assert row.update_count == 0
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        table = de.Embedding(storage, optimizer, de.Zeros(), dimension=2, group=0)
        assert table.lookup([4]).tolist() == [[3, 3]]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([1, 1], np.zeros((2, 2), np.float32)), ValueError, "key 1 stands twice"),
        (([1], np.full((1, 2), np.nan, np.float32)), ValueError, "key 1 has a NaN or an infinity"),
        (([1], np.zeros((1, 3), np.float32)), ValueError, r"weights has shape \(1, 3\), expected \(1, 2\)"),
        (([1], np.zeros((1, 2))), TypeError, "weights has dtype float64"),
        (([[1]], np.zeros((1, 2), np.float32)), ValueError, "expected one dimension"),
        (([1.0], np.zeros((1, 2), np.float32)), TypeError, "keys have dtype float64"),
        (
            ([1], np.zeros((1, 2), np.float32), {"sum": np.zeros((1, 2), np.float32)}),
            ValueError,
            r"state has \['sum'\]",
        ),
        (([1], np.zeros((1, 2), np.float32), None, [-1]), ValueError, "counts are -1"),
        (([1], np.zeros((1, 2), np.float32), None, [2**32]), ValueError, "counts are"),
        (([1], np.zeros((1, 2), np.float32), None, [1.5]), TypeError, "counts have dtype float64"),
        (([1], np.zeros((1, 2), np.float32), None, [1, 2]), ValueError, "counts have shape"),
    ],
)
def test_bad_rows_are_refused_whole(tmp_path: Path, arguments: Any, error: type[Exception], match: str) -> None:
    with de.Storage(tmp_path / "s", memory="16MiB") as storage:
        table = embedding(storage)
        before = storage.stats()["sequence"]
        with pytest.raises(error, match=match):
            table.import_rows(*arguments)
        assert len(table) == 0
        assert storage.stats()["sequence"] == before


def test_the_disk_limit_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disk is 1000 bytes, expected at least 67108864"):
        de.Storage(tmp_path / "s", disk=1000)
    with pytest.raises(ValueError, match="disk is 134217727 bytes and memory 33554432, expected disk to be at least 4"):
        de.Storage(tmp_path / "s", memory="32MiB", disk=2**27 - 1)
    assert not (tmp_path / "s").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("wait"), st.integers(0, 40)),
            st.tuples(st.just("update"), st.sets(st.integers(0, 30), min_size=1, max_size=8)),
            st.tuples(st.just("look"), st.sets(st.integers(0, 30), min_size=1, max_size=8)),
            st.tuples(st.just("erase"), st.sets(st.integers(0, 30), min_size=1, max_size=8)),
            st.tuples(st.just("reopen"), st.just(0)),
        ),
        max_size=40,
    ),
    ttl=st.integers(1, 60),
)
def test_rows_live_and_die_as_a_dict_with_times_does(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, Any]], ttl: int
) -> None:
    path = tmp_path_factory.mktemp("ttl") / "s"
    storage = de.Storage(path, memory="16MiB", ttl=ttl)
    try:
        now, rows = 1_000, dict[int, tuple[int, int]]()  # key: last update, count
        storage.now = now
        table = embedding(storage)
        for verb, value in operations:
            if verb == "wait":
                now += value
                storage.now = now
                rows = {key: row for key, row in rows.items() if now - row[0] <= ttl}
            elif verb == "update":
                update(table, *value)
                rows |= {key: (now, rows.get(key, (0, 0))[1] + 1) for key in value}
            elif verb == "look":
                found = table.lookup(list(value))[:, 0]
                assert found.tolist() == [rows.get(key, (0, 0))[1] for key in value]
                rows |= {key: (now, 0) for key in value if key not in rows}
            elif verb == "erase":
                assert table.erase(list(value)) == len(value & rows.keys())
                rows = {key: row for key, row in rows.items() if key not in value}
            else:
                storage.close()
                storage = de.Storage(path, memory="16MiB")
                storage.now = now
                table = embedding(storage)
            assert len(table) == len(rows)
        assert {
            int(key): int(count)
            for part in table.scan()
            for key, count in zip(part.keys, part.update_counts, strict=True)
        } == {key: count for key, (_, count) in rows.items()}
        assert math.isfinite(storage.stats()["clock_held_seconds"])
    finally:
        storage.close()
