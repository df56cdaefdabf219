# SPDX-License-Identifier: Apache-2.0
"""damo.PyEmbedding: arrays that are filled in place, groups that are shared, settings that change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo
import damo_embedding as de
from damo_scripts import apply, embedding, initializer, look_up, optimizer, parameters, read_dump


@pytest.fixture
def storage(path: Path, monkeypatch: pytest.MonkeyPatch) -> damo.PyStorage:
    monkeypatch.setenv("DAMO_MEMORY", "16MiB")
    return damo.PyStorage(str(path), 0)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[damo.PyStorage]:
    """One for all tests of what is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAMO_MEMORY", "16MiB")
        yield damo.PyStorage(str(tmp_path_factory.mktemp("storage")), 0)


def num_rows(rows: damo.PyEmbedding) -> int:
    return len(rows._group.rows)


def test_a_lookup_fills_the_array_and_saves_the_new_rows(storage: damo.PyStorage) -> None:
    rows = embedding(storage, initializer=initializer("random_normal"))
    whole = np.full(16, 7.0, np.float32)
    assert rows.lookup(np.array([1, 2]), whole[4:12]) is None  # a view is filled where it is
    assert (whole[:4] == 7).all()
    assert (whole[12:] == 7).all()
    assert len(set(whole[4:12].tolist())) == 8
    assert np.array_equal(look_up(rows, [2, 1]), whole[4:12].reshape(2, 4)[::-1])


def test_all_64_bits_of_a_key_count_and_0_is_a_key(storage: damo.PyStorage) -> None:
    keys = np.array([0, *(1 << bit for bit in range(64))], np.uint64)
    for group in (0, 255):
        rows = embedding(storage, group=group, initializer=initializer("random_normal"))
        first = look_up(rows, keys)
        assert len({row.tobytes() for row in first}) == 65
        assert np.array_equal(look_up(rows, keys.view(np.int64)), first)  # int64 of the same bits
    assert look_up(rows, keys[::2]).shape == (33, 4)  # keys may be strided


def test_repeated_keys_are_summed_and_updated_once(storage: damo.PyStorage) -> None:
    rows = embedding(storage, 2, optimizer=optimizer("adagrad", gamma=1.0))
    gradients = np.array([1, 1, 5, 5, 2, 3], np.float32)
    assert rows.apply_gradients(np.array([8, 9, 8], np.uint64), gradients) is None
    assert np.allclose(look_up(rows, [8, 9], 2), -1)  # one step of adagrad is the rate, whatever the sum
    once = embedding(storage, 2, 1)
    once.apply_gradients(np.array([8, 9, 8]), gradients)
    assert look_up(once, [8, 9], 2).tolist() == [[-3, -4], [-5, -5]]


def test_groups_do_not_share_rows_and_objects_of_one_group_do(storage: damo.PyStorage) -> None:
    one, again, other = embedding(storage), embedding(storage), embedding(storage, 8, group=1)
    apply(one, [1])
    apply(again, [1])
    assert (look_up(one, [1]) == -2).all()
    assert not look_up(other, [1], 8).any()


def test_nothing_is_no_work(storage: damo.PyStorage, tmp_path: Path) -> None:
    rows = embedding(storage)
    empty = np.empty(0, np.float32)
    rows.lookup(np.empty(0, np.int64), empty)
    rows.apply_gradients(np.empty(0, np.uint64), empty)
    storage.dump(str(tmp_path / "dump"))
    assert read_dump(tmp_path / "dump")[2] == {}


KEYS = np.array([1, 2])


@pytest.mark.parametrize(
    ("keys", "weights", "error", "says"),
    [
        (KEYS, np.zeros(8), TypeError, r"weights has dtype float64, expected float32: make it with np.empty\(8"),
        (KEYS, np.zeros(8, np.int32), TypeError, "int32, expected float32"),
        (KEYS, [0.0] * 8, TypeError, "weights is list, expected a float32 array"),
        (KEYS, np.zeros(16, np.float32)[::2], ValueError, "weights is strided.* fill a contiguous array"),
        (KEYS, np.zeros((2, 4), np.float32), ValueError, r"shape \(2, 4\), expected \(8,\): give .reshape"),
        (KEYS, np.zeros(7, np.float32), ValueError, r"shape \(7,\), expected \(8,\)"),
        (KEYS, np.zeros(9, np.float32), ValueError, r"shape \(9,\), expected \(8,\)"),
        (KEYS, np.broadcast_to(np.float32(0), (8,)), ValueError, "strided"),
        (KEYS.astype(float), np.zeros(8, np.float32), TypeError, "keys have dtype float64"),
        (KEYS.astype(object), np.zeros(8, np.float32), TypeError, "keys have dtype object"),
        (KEYS == 1, np.zeros(8, np.float32), TypeError, "keys have dtype bool"),
        (KEYS.reshape(1, 2), np.zeros(8, np.float32), ValueError, r"keys have shape \(1, 2\)"),
        (np.int64(1), np.zeros(4, np.float32), ValueError, r"keys have shape \(\)"),
    ],
)
def test_a_lookup_refuses_other_arrays_and_makes_no_row(
    keys: Any, weights: Any, error: type[Exception], says: str, lasting: damo.PyStorage
) -> None:
    rows = embedding(lasting, initializer=initializer("ones"))
    with pytest.raises(error, match=rf"^\[lookup\] .*{says}"):
        rows.lookup(keys, weights)
    assert not np.any(weights)
    assert num_rows(rows) == 0


def test_a_read_only_array_is_refused(lasting: damo.PyStorage) -> None:
    weights = np.zeros(8, np.float32)
    weights.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        embedding(lasting).lookup(KEYS, weights)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("gradients", "error", "says"),
    [
        (np.zeros(8), TypeError, r"gradients has dtype float64, expected float32: convert it with .astype"),
        (np.zeros(7, np.float32), ValueError, r"shape \(7,\), expected \(8,\)"),
        (np.zeros((2, 4), np.float32), ValueError, "expected"),
        (None, TypeError, "gradients is NoneType"),
        (np.array([0, 0, 0, 0, 0, np.nan, 0, 0], np.float32), ValueError, "key 2"),
        (np.array([0, 0, 0, np.inf, 0, 0, 0, 0], np.float32), ValueError, "key 1"),
    ],
)
def test_gradients_that_make_no_sense_are_refused_and_nothing_is_applied(
    gradients: Any, error: type[Exception], says: str, mixed: bool, lasting: damo.PyStorage
) -> None:
    rows = embedding(lasting, group=1, initializer=initializer("zeros"))
    if mixed:
        rows = embedding(lasting, group=1, initializer=initializer("ones"))
    with pytest.raises(error, match=rf"^\[apply_gradients\] .*{says}"):
        rows.apply_gradients(KEYS, gradients)
    assert num_rows(rows) == 0


def test_strided_gradients_are_read_as_they_stand(storage: damo.PyStorage) -> None:
    rows = embedding(storage, 2)
    rows.apply_gradients(KEYS, np.arange(8, dtype=np.float32)[::2])
    assert look_up(rows, KEYS, 2).tolist() == [[0, -2], [-4, -6]]


# ---------------------------------------------------------------- other settings


@pytest.mark.parametrize("alive", [True, False])
def test_another_dimension_or_optimizer_is_an_error_that_says_which(
    path: Path, storage: damo.PyStorage, alive: bool
) -> None:
    rows = embedding(storage, 4, 3)
    apply(rows, [1])
    if not alive:  # the same from one opening to the next
        del rows, storage
        storage = damo.PyStorage(str(path), 0)
    with pytest.raises(de.SchemaMismatchError, match=r"group 3 .*dimension 4, opened with 8"):
        embedding(storage, 8, 3)
    with pytest.raises(de.SchemaMismatchError, match=r"group 3 .*optimizer sgd, opened with adam"):
        embedding(storage, 4, 3, optimizer=optimizer("adam"))
    assert (look_up(embedding(storage, 4, 3), [1]) == -1).all()


@pytest.mark.parametrize("alive", [True, False])
def test_another_rate_or_penalty_counts_from_the_newest_object_on(
    path: Path, storage: damo.PyStorage, alive: bool
) -> None:
    rows = embedding(storage)
    other = embedding(storage, group=1)
    apply(rows, [1])
    apply(other, [1])
    for given, expected in (
        ({"gamma": 0.5}, -1.5),  # the rate
        ({"gamma": 0.5, "lambda": 1.0}, -1.5 - 0.5 * (1 - 1.5)),  # and what a rate alone cannot express
        ({"gamma": 1.0}, -1.5 - 0.5 * (1 - 1.5) - 1),
    ):
        if not alive:
            del rows, other, storage
            storage = damo.PyStorage(str(path), 0)
            other = embedding(storage, group=1)
        older = None if not alive else rows
        rows = embedding(storage, optimizer=optimizer("sgd", given))
        apply(older or rows, [1])  # all objects of the group go by the newest
        assert look_up(rows, [1])[0, 0] == expected
        assert look_up(other, [1])[0, 0] == -1


@pytest.mark.parametrize("alive", [True, False])
def test_another_initializer_is_for_the_keys_that_are_new_then(
    path: Path, storage: damo.PyStorage, alive: bool, tmp_path: Path
) -> None:
    rows = embedding(storage, initializer=initializer("random_normal"))
    looked_up, updated = look_up(rows, [1]), look_up(rows, [2])
    apply(rows, [2])
    if not alive:
        del rows, storage
        storage = damo.PyStorage(str(path), 0)
    rows = embedding(storage, initializer=initializer("ones"))
    found = look_up(rows, [1, 2, 3, 3])
    assert np.array_equal(found, np.r_[looked_up, updated - 1, np.ones((2, 4), np.float32)])
    apply(rows, [3, 4])  # a row that was never looked up starts there as well
    assert not look_up(rows, [3, 4]).any()
    storage.checkpoint(str(tmp_path / "c"))
    storage.load_from_checkpoint(str(tmp_path / "c"))
    assert (look_up(rows, [5]) == 1).all()
    rows = embedding(storage, initializer=initializer("xavier"))
    assert len(set(look_up(rows, [6, 7]).ravel().tolist())) == 8
    rows = embedding(storage, initializer=initializer("random_normal"))
    assert not (look_up(rows, [8]) == 1).any()
    storage.dump(str(tmp_path / "dump"))
    assert len(read_dump(tmp_path / "dump")[2]) == 8


def test_no_update_is_lost_while_threads_meet_new_keys_under_another_initializer(storage: damo.PyStorage) -> None:
    embedding(storage, 1, initializer=initializer("zeros"))
    rows = embedding(storage, 1, initializer=initializer("ones"))
    keys = np.arange(200)

    def work() -> None:
        for part in np.split(keys, 20):
            rows.apply_gradients(part, np.ones(10, np.float32))
            look_up(rows, part, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (look_up(rows, keys, 1) == 1 - 4).all()


def test_a_directory_of_damo_embedding_is_opened_as_it_is(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as plain:
        made = de.Embedding(plain, de.SGD(lr=1.0), de.Constant(3.0), 4, group=2, seed=99)
        expected = made.lookup([1, 2])
    rows = embedding(damo.PyStorage(str(path), 0), 4, 2, initializer=initializer("zeros"))
    assert np.array_equal(look_up(rows, [1, 2, 3]), np.r_[expected, np.zeros((1, 4), np.float32)])


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"group": -1}, ValueError, "group is -1, expected 0 to 255"),
        ({"group": 256}, ValueError, "group is 256, expected 0 to 255"),
        ({"group": "user"}, TypeError, "group is 'user'"),
        ({"group": True}, TypeError, "group is True"),
        ({"group": 1.0}, TypeError, "group is 1.0"),
        ({"dimension": 0}, ValueError, "dimension is 0, expected 1 to 4096"),
        ({"dimension": 4097}, ValueError, "dimension is 4097"),
        ({"dimension": 4.0}, TypeError, "dimension is 4.0"),
        ({"storage": "dir"}, TypeError, "storage is str, expected a PyStorage"),
        ({"optimizer": parameters(name="sgd")}, TypeError, "optimizer is Parameters, expected a PyOptimizer"),
        ({"initializer": None}, TypeError, "initializer is NoneType, expected a PyInitializer"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    given: dict[str, Any], error: type[Exception], says: str, lasting: damo.PyStorage
) -> None:
    arguments = {"storage": lasting, "optimizer": optimizer(), "initializer": initializer(), "dimension": 4}
    with pytest.raises(error, match=rf"^\[PyEmbedding\] {says}"):
        damo.PyEmbedding(**{**arguments, **given})


def test_the_group_is_0_unless_it_is_given(storage: damo.PyStorage) -> None:
    apply(damo.PyEmbedding(storage, optimizer(gamma=1.0), initializer(), 4), [1])
    assert (look_up(embedding(storage, group=0), [1]) == -1).all()
