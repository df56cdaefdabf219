# SPDX-License-Identifier: Apache-2.0
"""Embedding: what its verbs do, and that bad input changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import assert_equals_reference, assert_same_rows, files_of, reference_of, rows_of
from reference import ReferenceTable

DIMENSION = 4
LAST = 2**64 - 1
f32 = np.float32


def make(storage: de.Storage, group: int | str = 7, **settings: Any) -> de.Embedding:
    wanted: dict[str, Any] = {
        "optimizer": de.Adam(lr=0.1),
        "initializer": de.Uniform(-1.0, 1.0),
        "dimension": DIMENSION,
        "seed": 3,
    }
    return de.Embedding(storage, group=group, **{**wanted, **settings})


@pytest.fixture
def embedding(storage: de.Storage) -> de.Embedding:
    return make(storage)


def ones(*shape: int) -> np.ndarray:
    return np.ones((*shape, DIMENSION), f32)


# ------------------------------------------------------------------- keys


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3)])
def test_lookup_keeps_the_shape_of_the_keys(embedding: de.Embedding, shape: tuple[int, ...]) -> None:
    keys = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    weights = embedding.lookup(keys)
    assert weights.shape == (*shape, DIMENSION)
    np.testing.assert_array_equal(weights.reshape(-1, DIMENSION), reference_of(embedding).initial(keys.ravel()))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_apply_gradients_takes_keys_of_any_shape(embedding: de.Embedding, shape: tuple[int, ...]) -> None:
    table = reference_of(embedding)
    keys = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    gradients = np.linspace(-1, 1, keys.size * DIMENSION, dtype=f32).reshape(*shape, DIMENSION)
    embedding.apply_gradients(keys, gradients)
    table.apply_gradients(keys.ravel(), gradients.reshape(-1, DIMENSION))
    found = embedding.lookup(keys, insert=False).reshape(-1, DIMENSION)
    np.testing.assert_array_equal(found, table.lookup(keys.ravel()))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integers_of_every_width_name_the_same_keys(embedding: de.Embedding, dtype: type) -> None:
    expected = embedding.lookup(np.array([3, 100], np.int64))
    np.testing.assert_array_equal(embedding.lookup(np.array([3, 100], dtype)), expected)
    assert len(embedding) == 2


def test_narrow_negative_keys_are_sign_extended(embedding: de.Embedding) -> None:
    embedding.lookup(np.array([-2], np.int8))
    assert embedding.contains(np.array([2**64 - 2], np.uint64))[0]


def test_int64_and_uint64_of_the_same_bits_are_one_key(embedding: de.Embedding) -> None:
    embedding.apply_gradients(np.array([-1, -(2**63)]), ones(2))
    assert embedding.contains(np.array([LAST, 2**63], np.uint64)).tolist() == [True, True]
    np.testing.assert_array_equal(
        embedding.lookup(np.array([-1, -(2**63)])), embedding.lookup(np.array([LAST, 2**63], np.uint64))
    )
    assert len(embedding) == 2


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_every_key_is_a_key_like_any_other(embedding: de.Embedding, key: int) -> None:
    table = reference_of(embedding)
    keys = np.array([key])
    for _ in range(3):
        embedding.apply_gradients(keys, ones(1))
        table.apply_gradients(keys, ones(1))
    row = embedding.inspect(key)
    assert row is not None
    assert (row.key, row.update_count) == (key % 2**64, 3)
    np.testing.assert_array_equal(row.weights, table.rows[key % 2**64].weights)
    assert embedding.erase(keys) == 1
    assert embedding.inspect(key) is None


def test_keys_that_are_not_contiguous_are_taken(embedding: de.Embedding) -> None:
    keys = np.arange(12, dtype=np.int64).reshape(3, 4).T
    np.testing.assert_array_equal(embedding.lookup(keys), embedding.lookup(keys.copy()))
    np.testing.assert_array_equal(embedding.lookup(keys[::2]), embedding.lookup(keys)[::2])


def test_gradients_that_are_not_contiguous_are_taken(embedding: de.Embedding) -> None:
    table = reference_of(embedding)
    gradients = np.arange(8 * DIMENSION, dtype=f32).reshape(DIMENSION, 8).T
    embedding.apply_gradients(np.arange(8), gradients)
    table.apply_gradients(np.arange(8), gradients)
    np.testing.assert_array_equal(embedding.lookup(np.arange(8)), table.lookup(np.arange(8)))


def test_keys_and_gradients_stay_as_they_were(embedding: de.Embedding) -> None:
    keys, gradients = np.array([5, 5, 6]), ones(3)
    keys.flags.writeable = gradients.flags.writeable = False
    embedding.lookup(keys)
    embedding.apply_gradients(keys, gradients)
    assert keys.tolist() == [5, 5, 6]
    assert (gradients == 1).all()


# --------------------------------------------------------------- repeats


def test_repeated_keys_of_a_lookup_read_alike_and_make_one_row(embedding: de.Embedding) -> None:
    weights = embedding.lookup([9, 8, 9, 9])
    np.testing.assert_array_equal(weights[[0, 0, 0]], weights[[0, 2, 3]])
    assert len(embedding) == 2


@pytest.mark.parametrize("remembered", [False, True], ids=["without a lookup", "after a lookup of the same keys"])
def test_repeated_keys_are_summed_in_float32_in_order_of_appearance(storage: de.Storage, remembered: bool) -> None:
    embedding = make(storage, optimizer=de.SGD(lr=1.0), initializer=de.Zeros(), dimension=1)
    keys = np.array([5, 6, 5, 5, 5])
    if remembered:
        embedding.lookup(keys)
    # 1e8 + 1 is 1e8 in float32: another order would give -2 for key 5
    embedding.apply_gradients(keys, np.array([[1e8], [3.0], [1.0], [1.0], [-1e8]], f32))
    np.testing.assert_array_equal(embedding.lookup([5, 6]), [[0.0], [-3.0]])
    counts = [embedding.inspect(key).update_count for key in (5, 6)]  # type: ignore[union-attr]
    assert counts == [1, 1]


def test_large_batches_with_repeats_equal_the_reference(embedding: de.Embedding, random: np.random.Generator) -> None:
    table = reference_of(embedding)
    table.now = embedding.storage.now = 1_700_000_000_000  # ahead of any wall clock
    for _ in range(3):
        keys = random.integers(-300, 3_000, 6_000)
        gradients = random.standard_normal((6_000, DIMENSION)).astype(f32)
        np.testing.assert_array_equal(embedding.lookup(keys), table.lookup(keys))
        embedding.apply_gradients(keys, gradients)
        table.apply_gradients(keys, gradients)
    assert_equals_reference(embedding, table)


def test_an_apply_after_a_lookup_of_other_keys_is_of_its_own_keys(embedding: de.Embedding) -> None:
    table = reference_of(embedding)
    embedding.lookup([1, 2, 3])
    for keys in ([1, 2, 4], [1, 2], [3, 2, 1]):
        embedding.apply_gradients(keys, ones(len(keys)))
        table.apply_gradients(keys, ones(len(keys)))
    everything = np.array([1, 2, 3, 4])
    np.testing.assert_array_equal(embedding.lookup(everything, insert=False), table.lookup(everything, insert=False))


# ------------------------------------------------------------ empty batches


def test_an_empty_batch_is_no_step_and_no_row(embedding: de.Embedding) -> None:
    assert embedding.lookup([]).shape == (0, DIMENSION)
    embedding.apply_gradients([], np.empty((0, DIMENSION), f32))
    embedding.apply_gradients([], [])
    embedding.prefetch([])
    assert embedding.contains([]).shape == (0,)
    assert embedding.erase([]) == 0
    assert (embedding.step, len(embedding)) == (0, 0)


def test_an_embedding_without_rows_is_true(embedding: de.Embedding) -> None:
    assert embedding


def test_a_scan_of_nothing_is_empty(embedding: de.Embedding) -> None:
    assert list(embedding.scan()) == []


# ----------------------------------------------------------- insert=False


def test_a_lookup_without_insert_stores_and_counts_nothing(embedding: de.Embedding) -> None:
    before = files_of(Path(embedding.storage.path))
    stats = embedding.storage.stats()
    embedding.lookup(np.arange(1000), insert=False)
    after = embedding.storage.stats()
    assert len(embedding) == 0
    assert not embedding.contains(np.arange(1000)).any()
    assert {name for name in stats if stats[name] != after[name]} <= {"disk_keys_read", "disk_cache_bytes"}
    assert files_of(Path(embedding.storage.path)) == before


def test_a_lookup_without_insert_evicts_nothing(storage: de.Storage) -> None:
    embedding = make(storage, dimension=1024)
    for begin in range(0, 2_000, 100):
        embedding.apply_gradients(np.arange(begin, begin + 100), np.ones((100, 1024), f32))
    storage.dump(Path(storage.path).parent / "settle.bin")  # no row is left that eviction would have to write
    before = storage.stats()
    for begin in range(0, 2_000, 100):
        embedding.lookup(np.arange(begin, begin + 100), insert=False)
    after = storage.stats()
    assert before["evictions"] > 0
    assert after["evictions"] == before["evictions"]


def test_a_lookup_without_insert_returns_what_training_starts_from(embedding: de.Embedding) -> None:
    keys = np.array([0, -1, 5, 2**40])
    seen = embedding.lookup(keys, insert=False)
    assert len(embedding) == 0
    np.testing.assert_array_equal(embedding.lookup(keys), seen)


@pytest.mark.parametrize(
    "initializer",
    [
        de.Zeros(),
        de.Ones(),
        de.Constant(0.3),
        de.Uniform(-1, 2),
        de.Normal(1.0, 2.0),
        de.TruncatedNormal(0.0, 0.5),
    ],
    ids=lambda initializer: initializer.name,
)
def test_first_weights_are_the_reference_s(storage: de.Storage, initializer: de.Initializer) -> None:
    embedding = make(storage, initializer=initializer, dimension=33)
    keys = np.array([0, 1, -1, 2**62, 12345])
    np.testing.assert_array_equal(embedding.lookup(keys), reference_of(embedding).initial(keys))


def test_missing_zeros_are_for_keys_without_a_row_only(embedding: de.Embedding) -> None:
    known = embedding.lookup([1])
    read = embedding.lookup([1, 2], insert=False, missing="zeros")
    np.testing.assert_array_equal(read, [known[0], np.zeros(DIMENSION)])


def test_missing_zeros_are_of_no_consequence_to_a_training_lookup(embedding: de.Embedding) -> None:
    read = embedding.lookup([1], missing="zeros")
    np.testing.assert_array_equal(read, reference_of(embedding).initial([1]))


# --------------------------------------------------------------------- out


@pytest.mark.parametrize("insert", [True, False])
def test_out_is_filled_in_place_and_returned(embedding: de.Embedding, insert: bool) -> None:
    whole = np.full((4, 3, DIMENSION), 7.0, f32)
    out = whole[1:3]
    keys = np.arange(6).reshape(2, 3)
    assert embedding.lookup(keys, out, insert=insert) is out
    np.testing.assert_array_equal(whole[1:3], reference_of(embedding).initial(keys))
    assert (whole[[0, 3]] == 7.0).all()


# ------------------------------------------------------ contains, erase, len


def test_contains_says_which_keys_have_a_row(embedding: de.Embedding) -> None:
    embedding.lookup([1, 2])
    embedding.apply_gradients([3], ones(1))
    embedding.lookup([4], insert=False)
    found = embedding.contains([[1, 4], [3, 5], [2, 1]])
    assert found.dtype == np.bool_
    assert found.tolist() == [[True, False], [True, False], [True, True]]
    assert len(embedding) == 3


def test_len_counts_rows_of_lookups_and_of_updates_once(embedding: de.Embedding) -> None:
    embedding.lookup([1, 2, 2])
    embedding.apply_gradients([2, 3, 3], ones(3))
    assert len(embedding) == 3


def test_erase_says_how_many_rows_went(embedding: de.Embedding) -> None:
    embedding.lookup([1, 2, 3])
    assert embedding.erase([[1, 1], [3, 9]]) == 2
    assert embedding.erase([1, 3]) == 0
    assert len(embedding) == 1
    assert embedding.contains([1, 2, 3]).tolist() == [False, True, False]
    assert [part.keys.tolist() for part in embedding.scan()] == [[2]]


def _reopened(embedding: de.Embedding) -> de.Embedding:
    path = embedding.storage.path
    embedding.storage.close()
    return make(de.Storage(path, memory="16MiB", threads=2), dimension=embedding.dimension)


def _evicted(embedding: de.Embedding) -> de.Embedding:
    before = embedding.storage.stats()["evictions"]
    first = 10_000 + 10 * before  # keys of its own: new rows make room for themselves
    for begin in range(first, first + 2_000, 100):
        embedding.lookup(np.arange(begin, begin + 100))
    assert embedding.storage.stats()["evictions"] > before
    return embedding


def _unchanged(embedding: de.Embedding) -> de.Embedding:
    return embedding


Between = Callable[[de.Embedding], de.Embedding]


@pytest.mark.parametrize("before", [_unchanged, _evicted, _reopened])
@pytest.mark.parametrize("after", [_unchanged, _evicted, _reopened])
def test_an_erased_key_comes_back_as_new(path: Path, before: Between, after: Between) -> None:
    embedding = make(de.Storage(path, memory="16MiB", threads=2), dimension=1024)
    keys = np.array([1, 2])
    initial = embedding.lookup(keys)
    embedding.apply_gradients(keys, np.ones((2, 1024), f32))
    embedding = before(embedding)
    assert embedding.erase([1]) == 1
    embedding = after(embedding)
    try:
        np.testing.assert_array_equal(embedding.lookup([1], insert=False)[0], initial[0])
        assert embedding.inspect(1) is None
        np.testing.assert_array_equal(embedding.lookup([1])[0], initial[0])
        row = embedding.inspect(1)
        assert row is not None
        assert row.update_count == 0
        assert not any(block.any() for block in row.state.values())
        kept = embedding.inspect(2)
        assert kept is not None
        assert kept.update_count == 1
    finally:
        embedding.storage.close()


def test_a_lookup_of_new_and_erased_keys_is_one_operation(storage: de.Storage, embedding: de.Embedding) -> None:
    embedding.lookup([1, 2])
    embedding.erase([1])  # in memory, as a row that is no more
    before = storage.stats()["sequence"]
    embedding.lookup([3, 1, 2, 4])
    assert storage.stats()["sequence"] == before + 1  # a kill finds all of its rows made, or none
    assert len(embedding) == 4


def test_an_erased_key_that_is_updated_starts_from_its_first_weights(embedding: de.Embedding) -> None:
    for _ in range(3):
        embedding.apply_gradients([1], ones(1))
    embedding.erase([1])
    embedding.apply_gradients([1], ones(1))
    table = reference_of(embedding)
    table.apply_gradients([1], ones(1))
    row = embedding.inspect(1)
    assert row is not None
    assert row.update_count == 1
    np.testing.assert_array_equal(row.weights, table.rows[1].weights)


# ------------------------------------------------------ inspect, scan, step


def test_inspect_shows_the_whole_row(embedding: de.Embedding) -> None:
    table = reference_of(embedding)
    embedding.storage.now = 3_000_000_000
    embedding.apply_gradients([1], ones(1))
    embedding.storage.now = 4_000_000_000
    embedding.apply_gradients([1, 2], 2 * ones(2))
    table.apply_gradients([1], ones(1))
    table.apply_gradients([1, 2], 2 * ones(2))
    row = embedding.inspect(1)
    assert row is not None
    assert (row.key, row.update_count, row.step, row.last_update, row.tier) == (
        1,
        2,
        2,
        4_000_000_000,
        "memory",
    )
    assert list(row.state) == ["exp_avg", "exp_avg_sq"]
    np.testing.assert_array_equal(row.weights, table.rows[1].weights)
    for name, block in table.rows[1].state.items():
        np.testing.assert_array_equal(row.state[name], block)


def test_inspect_changes_nothing(embedding: de.Embedding) -> None:
    assert embedding.inspect(1) is None
    assert len(embedding) == 0


def test_a_row_that_was_only_looked_up_ages_from_then(embedding: de.Embedding) -> None:
    embedding.storage.now = 3_000_000_000
    embedding.lookup([1])
    embedding.storage.now = 4_000_000_000
    embedding.lookup([1])
    row = embedding.inspect(1)
    assert row is not None
    assert (row.update_count, row.step, row.last_update) == (0, 0, 3_000_000_000)


@pytest.mark.parametrize("batch", [1, 7, 100, 65_536])
def test_a_scan_gives_every_row_once_in_parts(embedding: de.Embedding, batch: int) -> None:
    embedding.apply_gradients(np.arange(50), ones(50))
    embedding.lookup(np.arange(40, 100))
    sizes = [len(part.keys) for part in embedding.scan(batch)]
    assert sum(sizes) == 100
    assert all(size == batch for size in sizes[:-1])
    assert_same_rows(rows_of(embedding, batch), rows_of(embedding))


def test_a_scan_is_of_the_moment_it_was_asked_for(embedding: de.Embedding) -> None:
    embedding.apply_gradients([1, 2], ones(2))
    before = rows_of(embedding)
    scan = embedding.scan(1)
    embedding.apply_gradients([1, 2, 3], ones(3))
    embedding.erase([2])
    keys = [int(key) for part in scan for key in part.keys]
    assert sorted(keys) == sorted(before)


def test_a_scan_that_is_left_in_the_middle_harms_nobody(embedding: de.Embedding) -> None:
    embedding.lookup(np.arange(100))
    scan = embedding.scan(10)
    next(scan)
    embedding.storage.close()
    with pytest.raises(de.ClosedError, match="scan"):
        next(scan)


def test_steps_count_updates_never_lookups(embedding: de.Embedding) -> None:
    embedding.lookup([1, 2, 3])
    assert embedding.step == 0
    embedding.apply_gradients([1, 1, 2], ones(3))
    embedding.apply_gradients([3], ones(1))
    embedding.erase([3])
    assert embedding.step == 2


def test_len_step_and_rows_outlive_the_storage_object(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        embedding = make(storage)
        embedding.apply_gradients([1, 2], ones(2))
        embedding.lookup([3])
        rows = rows_of(embedding)
    with de.Storage(path, memory="16MiB") as storage:
        embedding = make(storage)
        assert (embedding.step, len(embedding)) == (1, 3)
        assert_same_rows(rows_of(embedding), rows)


# ---------------------------------------------------------------------- lr


def test_lr_is_the_rate_of_the_next_updates(storage: de.Storage) -> None:
    embedding = make(storage, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
    assert embedding.lr == 1.0
    embedding.lr = 0.5
    embedding.apply_gradients([1], ones(1))
    assert embedding.lookup([1])[0, 0] == -0.5


def test_a_rate_given_for_a_step_is_for_that_step(storage: de.Storage) -> None:
    embedding = make(storage, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
    embedding.apply_gradients([1], ones(1), lr=0.25)
    assert (embedding.lr, embedding.lookup([1])[0, 0]) == (1.0, -0.25)


def test_a_rate_of_zero_is_a_step_that_moves_nothing(storage: de.Storage) -> None:
    embedding = make(storage, optimizer=de.SGD(lr=1.0), initializer=de.Ones())
    embedding.lr = 0.0
    embedding.apply_gradients([1], ones(1))
    assert (embedding.step, embedding.lookup([1])[0, 0]) == (1, 1.0)


def test_another_rate_may_be_given_in_the_next_run(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        make(storage, optimizer=de.SGD(lr=1.0), initializer=de.Zeros()).apply_gradients([1], ones(1))
    with de.Storage(path, memory="16MiB") as storage:
        embedding = make(storage, optimizer=de.SGD(lr=0.5), initializer=de.Zeros())
        assert embedding.lr == 0.5
        embedding.apply_gradients([1], ones(1))
        assert embedding.lookup([1])[0, 0] == -1.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (de.SGD(lr=0.1, momentum=0.9), de.SGD(lr=0.2, momentum=0.5, nesterov=True, weight_decay=0.1)),
        (de.Adagrad(lr=0.1), de.Adagrad(lr=0.2, lr_decay=0.5, eps=0.1)),
        (de.RowWiseAdagrad(lr=0.1), de.RowWiseAdagrad(lr=0.2, lr_decay=0.5, weight_decay=0.1)),
        (de.Adam(lr=0.1), de.Adam(lr=0.2, betas=(0.5, 0.5), bias_correction="global")),
        (de.AMSGrad(lr=0.1), de.AMSGrad(lr=0.2, betas=(0.5, 0.5))),
        (de.AdamW(lr=0.1), de.AdamW(lr=0.2, weight_decay=0.5)),
        (de.RMSprop(centered=True), de.RMSprop(centered=True, alpha=0.5)),
        (de.Lion(lr=0.1), de.Lion(lr=0.2, betas=(0.5, 0.5))),
        (de.FTRL(lr=0.1), de.FTRL(lr=0.2, beta=0.5, lambda1=0.1, lambda2=0.1)),
    ],
    ids=str,
)
def test_settings_may_change_from_run_to_run_while_the_state_entries_stay(
    path: Path, random: np.random.Generator, before: de.Optimizer, after: de.Optimizer
) -> None:
    table: ReferenceTable | None = None
    for optimizer in (before, after):
        with de.Storage(path, memory="16MiB") as storage:
            embedding = make(storage, optimizer=optimizer)
            oracle = reference_of(embedding)
            if table is None:
                table = oracle
            table.optimizer, table.lr = oracle.optimizer, oracle.lr
            storage.now = table.now = 5_000_000_000
            for _ in range(5):
                keys, values = random.integers(0, 9, 6), random.standard_normal((6, DIMENSION)).astype(f32)
                embedding.apply_gradients(keys, values)
                table.apply_gradients(keys, values)
            assert_equals_reference(embedding, table)


# ------------------------------------------------------------------ groups


def test_groups_of_other_sizes_and_optimizers_do_not_know_each_other(
    storage: de.Storage, random: np.random.Generator
) -> None:
    storage.now = 5_000_000_000
    embeddings = [
        make(storage, 0, dimension=1, optimizer=de.SGD(lr=0.5)),
        make(storage, 1, dimension=5, optimizer=de.Adagrad(lr=0.5)),
        make(storage, 255, dimension=16, optimizer=de.Adam(lr=0.5)),
        make(storage, 3, dimension=130, optimizer=de.Adam(lr=0.1, bias_correction="global", weight_decay=0.01)),
    ]
    tables = [reference_of(embedding) for embedding in embeddings]
    for table in tables:
        table.now = 5_000_000_000
    for _ in range(20):
        for embedding, table in zip(embeddings, tables, strict=True):
            keys = random.integers(0, 40, 30)  # the same keys in all groups
            gradients = random.standard_normal((30, embedding.dimension)).astype(f32)
            embedding.apply_gradients(keys, gradients)
            table.apply_gradients(keys, gradients)
    for embedding, table in zip(embeddings, tables, strict=True):
        assert_equals_reference(embedding, table)


def test_groups_draw_other_first_weights(storage: de.Storage) -> None:
    drawn = [make(storage, group).lookup([1, 2], insert=False).tobytes() for group in (0, 1, "user", "item")]
    assert len(set(drawn)) == 4


def test_a_named_group_draws_the_same_weights_whatever_its_number(tmp_path: Path) -> None:
    drawn = []
    for i, names in enumerate((["user", "item"], ["item", "user"])):
        with de.Storage(tmp_path / str(i), memory="16MiB") as storage:
            embeddings = {name: make(storage, name) for name in names}
            drawn.append([embeddings[name].lookup([1, 2]).tobytes() for name in ("user", "item")])
    assert drawn[0] == drawn[1]


def test_named_groups_take_numbers_from_the_top(storage: de.Storage) -> None:
    make(storage, 254)
    assert [make(storage, name).group for name in ("user", "item", "user")] == [255, 253, 255]
    assert storage.groups() == {253: "item", 254: "", 255: "user"}


def test_a_name_finds_its_group_again(path: Path) -> None:
    for _ in range(2):
        with de.Storage(path, memory="16MiB") as storage:
            embedding = make(storage, "naïve 名")
            assert (embedding.name, embedding.group) == ("naïve 名", 255)
            embedding.apply_gradients([1], ones(1))
    assert embedding.step == 2


def test_the_257th_group_is_refused(storage: de.Storage) -> None:
    for group in range(256):
        make(storage, group, dimension=1, optimizer=de.SGD())
    with pytest.raises(ValueError, match="256 groups"):
        make(storage, "one more", dimension=1, optimizer=de.SGD())
    assert len(storage.groups()) == 256


def test_two_embeddings_of_one_group_share_its_rows(storage: de.Storage) -> None:
    first, second = make(storage), make(storage)
    first.apply_gradients([1], ones(1))
    second.apply_gradients([1], ones(1))
    np.testing.assert_array_equal(first.lookup([1]), second.lookup([1]))
    assert (first.step, len(first)) == (second.step, len(second)) == (2, 1)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dimension": ({"dimension": 5}, "dimension 4, opened with 5"),
    "optimizer": ({"optimizer": de.SGD()}, "optimizer adam, opened with sgd"),
    "state": (
        {"optimizer": de.Adagrad(initial_accumulator_value=1.0), "group": 8},
        "starting at 1",
    ),
    "momentum": ({"optimizer": de.SGD(momentum=0.9), "group": 9}, r"state \[\], opened with \[momentum_buffer\]"),
    "centering": (
        {"optimizer": de.RMSprop(centered=True), "group": 10},
        r"\[square_avg\], opened with \[square_avg, grad_avg\]",
    ),
    "one accumulator a row": ({"optimizer": de.RowWiseAdagrad(), "group": 8}, "adagrad, opened with rowwise_adagrad"),
    "initializer": ({"initializer": de.Zeros()}, "initializer uniform.*opened with zeros"),
    "initializer's bounds": ({"initializer": de.Uniform(-1.0, 2.0)}, "high=1.*opened with.*high=2"),
    "seed": ({"seed": 4}, "seed 3, opened with 4"),
    "a number for a name": ({"group": 255}, 'stored with the name "user"'),
}


@pytest.mark.parametrize("reopened", [False, True], ids=["in one run", "in the next run"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_group_opened_with_other_settings_is_refused_and_stays(path: Path, what: str, reopened: bool) -> None:
    settings, message = OTHERS[what]
    storage = de.Storage(path, memory="16MiB")
    groups = [
        {"group": 7},
        {"group": 8, "optimizer": de.Adagrad()},
        {"group": 9, "optimizer": de.SGD()},
        {"group": 10, "optimizer": de.RMSprop()},
        {"group": "user"},
    ]
    for group in groups:
        make(storage, **group).apply_gradients([1], ones(1))
    if reopened:
        storage.close()
        storage = de.Storage(path, memory="16MiB")
    manifest = (path / "generation-000001" / "MANIFEST").read_bytes()
    with pytest.raises(de.SchemaMismatchError, match=message):
        make(storage, **{"group": 7, **settings})
    assert (path / "generation-000001" / "MANIFEST").read_bytes() == manifest
    for group in groups:
        assert make(storage, **group).step == 1
    storage.close()


def test_other_rates_in_one_run_are_refused(storage: de.Storage) -> None:
    make(storage)
    with pytest.raises(de.SchemaMismatchError, match="other optimizer settings"):
        make(storage, optimizer=de.Adam(lr=0.2))


# --------------------------------------------------- gradients not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_names_its_key_and_nothing_is_applied(
    embedding: de.Embedding, bad: float, place: int
) -> None:
    embedding.apply_gradients([1, 2], ones(2))
    before, step = rows_of(embedding), embedding.step
    gradients = ones(4)
    gradients[2, place] = bad
    with pytest.raises(ValueError, match=r"\[apply_gradients\].* key 18446744073709551614 .*group 7") as raised:
        embedding.apply_gradients(np.array([1, 2, -2, 9]), gradients)
    assert "nothing was applied" in str(raised.value)
    assert (embedding.step, len(embedding)) == (step, 2)
    assert_same_rows(rows_of(embedding), before)


def test_the_first_bad_key_of_a_large_batch_is_named_on_any_number_of_threads(path: Path) -> None:
    for threads in (1, 8):
        with de.Storage(path, memory="16MiB", threads=threads) as storage:
            gradients = ones(20_000)
            gradients[[19_000, 7_000, 7_001]] = np.nan
            with pytest.raises(ValueError, match=r"key 7000 "):
                make(storage).apply_gradients(np.arange(20_000), gradients)


def test_a_sum_that_overflows_is_refused_like_an_infinite_gradient(embedding: de.Embedding) -> None:
    with pytest.raises(ValueError, match="key 1 "):
        embedding.apply_gradients([1, 1], 3e38 * ones(2))
    assert len(embedding) == 0


# --------------------------------------------------------------- bad input


def _noncontiguous() -> np.ndarray:
    return np.zeros((3, 2 * DIMENSION), f32)[:, ::2]


def _read_only() -> np.ndarray:
    out = ones(3)
    out.flags.writeable = False
    return out


def _unaligned() -> np.ndarray:
    return np.zeros(3 * DIMENSION * 4 + 1, np.uint8)[1:].view(f32).reshape(3, DIMENSION)


K = np.array([1, 2, 3])

BAD_KEYS: dict[str, tuple[Any, type[Exception], str]] = {
    "float": (np.array([1.0]), TypeError, "float64"),
    "float, empty array": (np.array([]), TypeError, "float64"),
    "float in a list": ([1, 2.5], TypeError, "float64"),
    "float32": (np.array([1.0], f32), TypeError, "float32"),
    "bool": (np.array([True]), TypeError, "bool"),
    "bool in a list": ([True, False], TypeError, "bool"),
    "object": (np.array([1], object), TypeError, "object"),
    "beyond 64 bits": ([2**64], TypeError, "object"),
    "both sides of 2**63 in a list": ([-1, 2**63], TypeError, "float64"),
    "text": (["a"], TypeError, "<U1"),
    "bytes": (np.array([b"a"]), TypeError, "S1"),
    "big-endian": (np.array([1], ">i8"), TypeError, ">i8"),
    "big-endian, unsigned": (np.array([1], ">u8"), TypeError, ">u8"),
    "complex": (np.array([1j]), TypeError, "complex"),
    "times": (np.array(["2024-01-01"], "M8[s]"), TypeError, "datetime64"),
    "None": (None, TypeError, "object"),
    "structured": (np.zeros(1, [("a", "i8")]), TypeError, "expected int64"),
}

VERBS: dict[str, Callable[[de.Embedding, Any], object]] = {
    "lookup": lambda e, keys: e.lookup(keys),
    "apply_gradients": lambda e, keys: e.apply_gradients(keys, np.ones((*np.shape(keys), DIMENSION), f32)),
    "contains": lambda e, keys: e.contains(keys),
    "erase": lambda e, keys: e.erase(keys),
    "prefetch": lambda e, keys: e.prefetch(keys),
}

Call = Callable[[de.Embedding], object]
BAD_CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "out of float64": (
        lambda e: e.lookup(K, np.zeros((3, 4))),
        TypeError,
        r"\[lookup\] out is float64.*float32",
    ),
    "out a list": (lambda e: e.lookup(K, [[0.0] * 4] * 3), TypeError, r"\[lookup\] out is list"),  # type: ignore[arg-type]
    "out big-endian": (lambda e: e.lookup(K, np.zeros((3, 4), ">f4")), TypeError, r"\[lookup\] out is >f4"),
    "out too short": (
        lambda e: e.lookup(K, ones(2)),
        ValueError,
        r"out has shape \(2, 4\), expected \(3, 4\)",
    ),
    "out too wide": (
        lambda e: e.lookup(K, np.zeros((3, 5), f32)),
        ValueError,
        r"\(3, 5\), expected \(3, 4\)",
    ),
    "out flat": (lambda e: e.lookup(K, np.zeros(12, f32)), ValueError, r"\(12,\), expected \(3, 4\)"),
    "out not contiguous": (lambda e: e.lookup(K, _noncontiguous()), ValueError, "not contiguous"),
    "out in Fortran order": (
        lambda e: e.lookup(K, np.zeros((3, 4), f32, order="F")),
        ValueError,
        "contiguous",
    ),
    "out read-only": (lambda e: e.lookup(K, _read_only()), ValueError, "not writable"),
    "out unaligned": (lambda e: e.lookup(K, _unaligned()), ValueError, "not contiguous"),
    "missing": (lambda e: e.lookup(K, missing="ones"), ValueError, r"\[lookup\] missing is 'ones'"),  # type: ignore[arg-type]
    "insert a text": (
        lambda e: e.lookup([9], insert="False"),  # type: ignore[arg-type]
        TypeError,
        r"\[lookup\] insert is 'False' \(str\), expected True or False",
    ),
    "insert a number": (lambda e: e.lookup([9], insert=1), TypeError, r"\[lookup\] insert is 1 \(int\)"),  # type: ignore[arg-type]
    "gradients of float64": (lambda e: e.apply_gradients(K, np.ones((3, 4))), TypeError, "float64.*float32"),
    "gradients of float16": (lambda e: e.apply_gradients(K, np.ones((3, 4), "f2")), TypeError, "float16"),
    "gradients of integers": (lambda e: e.apply_gradients(K, np.ones((3, 4), int)), TypeError, "int64"),
    "gradients big-endian": (lambda e: e.apply_gradients(K, np.ones((3, 4), ">f4")), TypeError, ">f4"),
    "gradients a list": (lambda e: e.apply_gradients(K, [[1.0] * 4] * 3), TypeError, "float64"),
    "keys ragged": (lambda e: e.lookup([[1], [2, 3]]), TypeError, r"\[lookup\] keys are list, expected an array"),  # type: ignore[list-item]
    "gradients ragged": (
        lambda e: e.apply_gradients(K, [[1.0], [1.0, 2.0], [1.0]]),  # type: ignore[arg-type]
        TypeError,
        r"\[apply_gradients\] gradients are list, expected an array",
    ),
    "gradients None": (lambda e: e.apply_gradients(K, None), TypeError, "object"),  # type: ignore[arg-type]
    "gradients too short": (
        lambda e: e.apply_gradients(K, ones(2)),
        ValueError,
        r"\(2, 4\), expected \(3, 4\)",
    ),
    "gradients too long": (
        lambda e: e.apply_gradients(K, ones(4)),
        ValueError,
        r"\(4, 4\), expected \(3, 4\)",
    ),
    "gradients flat": (
        lambda e: e.apply_gradients(K, np.ones(12, f32)),
        ValueError,
        r"\(12,\), expected \(3, 4\)",
    ),
    "gradients too wide": (lambda e: e.apply_gradients(K, np.ones((3, 5), f32)), ValueError, r"\(3, 5\)"),
    "gradients of another rank": (lambda e: e.apply_gradients(K, ones(3, 1)), ValueError, r"\(3, 1, 4\)"),
    "gradients missing": (
        lambda e: e.apply_gradients(K, ones(0)),
        ValueError,
        r"\(0, 4\), expected \(3, 4\)",
    ),
    "gradients for no keys": (
        lambda e: e.apply_gradients([], ones(2)),
        ValueError,
        r"\(2, 4\), expected \(0, 4\)",
    ),
    "step rate negative": (lambda e: e.apply_gradients(K, ones(3), lr=-1.0), ValueError, "lr is -1"),
    "step rate NaN": (lambda e: e.apply_gradients(K, ones(3), lr=np.nan), ValueError, "lr is nan"),
    "step rate infinite": (lambda e: e.apply_gradients(K, ones(3), lr=np.inf), ValueError, "lr is inf"),
    "step rate beyond float32": (lambda e: e.apply_gradients(K, ones(3), lr=1e39), ValueError, "lr is 1e"),
    "step rate a text": (lambda e: e.apply_gradients(K, ones(3), lr="1"), TypeError, "lr is '1'"),  # type: ignore[arg-type]
    "step rate a bool": (lambda e: e.apply_gradients(K, ones(3), lr=True), TypeError, "lr is True"),
    "rate negative": (lambda e: setattr(e, "lr", -0.5), ValueError, "lr is -0.5"),
    "rate NaN": (lambda e: setattr(e, "lr", np.nan), ValueError, "lr is nan"),
    "rate infinite": (lambda e: setattr(e, "lr", np.inf), ValueError, "lr is inf"),
    "rate beyond float32": (lambda e: setattr(e, "lr", 1e39), ValueError, "lr is 1e"),
    "rate a text": (lambda e: setattr(e, "lr", "fast"), TypeError, "lr is 'fast'"),
    "rate None": (lambda e: setattr(e, "lr", None), TypeError, "lr is None"),
    "inspect a float": (lambda e: e.inspect(1.0), TypeError, r"\[inspect\] key is 1.0"),  # type: ignore[arg-type]
    "inspect a bool": (lambda e: e.inspect(True), TypeError, r"\[inspect\] key is True"),
    "inspect a text": (lambda e: e.inspect("1"), TypeError, r"\[inspect\] key is '1'"),  # type: ignore[arg-type]
    "inspect beyond 64 bits": (lambda e: e.inspect(2**64), ValueError, "expected -9223372036854775808 to"),
    "inspect below 64 bits": (lambda e: e.inspect(-(2**63) - 1), ValueError, "to 18446744073709551615"),
    "scan in no parts": (lambda e: e.scan(0), ValueError, r"\[scan\] batch is 0"),
    "scan in a float": (lambda e: e.scan(1.5), TypeError, r"\[scan\] batch is 1.5"),  # type: ignore[arg-type]
    "group 256": (lambda e: make(e.storage, 256), ValueError, "group is 256, expected 0 to 255"),
    "group -1": (lambda e: make(e.storage, -1), ValueError, "group is -1"),
    "group a float": (lambda e: make(e.storage, 1.0), TypeError, "group is 1.0"),  # type: ignore[arg-type]
    "group None": (lambda e: make(e.storage, None), TypeError, "group is None"),  # type: ignore[arg-type]
    "group a bool": (lambda e: make(e.storage, True), TypeError, "group is True"),
    "group without a name": (lambda e: make(e.storage, ""), ValueError, "0 bytes, expected 1 to 255"),
    "group with a long name": (lambda e: make(e.storage, "é" * 128), ValueError, "256 bytes"),
    "dimension 0": (lambda e: make(e.storage, 9, dimension=0), ValueError, "dimension is 0"),
    "dimension 4097": (lambda e: make(e.storage, 9, dimension=4097), ValueError, "dimension is 4097"),
    "dimension a float": (lambda e: make(e.storage, 9, dimension=4.0), TypeError, "dimension is 4.0"),
    "dimension a bool": (lambda e: make(e.storage, 9, dimension=True), TypeError, "dimension is True"),
    "seed -1": (lambda e: make(e.storage, 9, seed=-1), ValueError, "seed is -1"),
    "seed 2**64": (lambda e: make(e.storage, 9, seed=2**64), ValueError, "seed is 18446744073709551616"),
    "seed a float": (lambda e: make(e.storage, 9, seed=1.0), TypeError, "seed is 1.0"),
    "optimizer a class": (lambda e: make(e.storage, 9, optimizer=de.Adam), TypeError, "optimizer is <class"),
    "optimizer a name": (lambda e: make(e.storage, 9, optimizer="adam"), TypeError, "optimizer is 'adam'"),
    "initializer a number": (lambda e: make(e.storage, 9, initializer=0.0), TypeError, "initializer is 0.0"),
    "storage a path": (lambda e: make(e.storage.path, 9), TypeError, "storage is str"),  # type: ignore[arg-type]
    "pickle": (lambda e: pickle.dumps(e), TypeError, "cannot be pickled"),
    "copy": (lambda e: copy.copy(e), TypeError, "cannot be pickled or copied"),
}


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[de.Embedding]:
    """For calls that must not change anything: one storage for all of them."""
    with de.Storage(tmp_path_factory.mktemp("settled") / "table.damo", memory="16MiB", threads=2) as storage:
        embedding = make(storage)
        embedding.lookup([1, 2, 5])
        embedding.apply_gradients([1, 2], ones(2))
        yield embedding


def refuses(embedding: de.Embedding, call: Call, error: type[Exception], message: str) -> None:
    directory = Path(embedding.storage.path)
    files, rows = files_of(directory), embedding.lookup([1, 2, 3, 5], insert=False).tobytes()
    numbers = (len(embedding), embedding.step, embedding.lr, embedding.storage.groups())
    with pytest.raises(error, match=message):
        call(embedding)
    assert (len(embedding), embedding.step, embedding.lr, embedding.storage.groups()) == numbers
    assert embedding.lookup([1, 2, 3, 5], insert=False).tobytes() == rows
    assert files_of(directory) == files


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("keys", BAD_KEYS)
def test_keys_that_are_no_64_bit_integers_are_refused(settled: de.Embedding, verb: str, keys: str) -> None:
    bad, error, message = BAD_KEYS[keys]
    refuses(settled, lambda e: VERBS[verb](e, bad), error, rf"\[{verb}\] keys have dtype .*{message}")


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_input_is_refused_in_words_and_changes_nothing(settled: de.Embedding, what: str) -> None:
    refuses(settled, *BAD_CALLS[what])


def test_a_row_that_is_too_large_for_the_memory_is_refused(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        make(storage, dimension=4096)  # the largest there is fits into the least memory there is
        assert len(storage.groups()) == 1


# ------------------------------------------------------------------- close

AFTER_CLOSE: dict[str, Call] = {
    "lookup": lambda e: e.lookup(K),
    "lookup without insert": lambda e: e.lookup(K, insert=False),
    "apply_gradients": lambda e: e.apply_gradients(K, ones(3)),
    "contains": lambda e: e.contains(K),
    "erase": lambda e: e.erase(K),
    "inspect": lambda e: e.inspect(1),
    "prefetch": lambda e: e.prefetch(K),
    "scan": lambda e: list(e.scan()),
    "embedding": lambda e: make(e.storage),
}


@pytest.mark.parametrize("verb", AFTER_CLOSE)
def test_use_after_close_is_refused(embedding: de.Embedding, verb: str) -> None:
    embedding.storage.close()
    with pytest.raises(de.ClosedError, match=rf"\[{verb.split()[0]}\].*is closed"):
        AFTER_CLOSE[verb](embedding)


def test_repr_names_what_it_is(embedding: de.Embedding) -> None:
    embedding.lookup([1])
    assert repr(embedding).startswith("Embedding(group=7, dimension=4, optimizer=Adam(lr=0.1")


def test_the_oracle_of_these_tests_sees_a_wrong_row(embedding: de.Embedding) -> None:
    """The comparison itself: one update more in the oracle does not pass."""
    table: ReferenceTable = reference_of(embedding)
    table.now = embedding.storage.now = 5_000_000_000
    embedding.apply_gradients([1], ones(1))
    table.apply_gradients([1], ones(1))
    assert_equals_reference(embedding, table)
    table.rows[1].state["exp_avg"][0] = np.nextafter(table.rows[1].state["exp_avg"][0], f32(9))
    with pytest.raises(AssertionError, match=r"1 of 1 rows differ; key 1 in .'state'"):
        assert_equals_reference(embedding, table)
