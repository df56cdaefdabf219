# SPDX-License-Identifier: Apache-2.0
"""The oracle's own table, by hand: what the tests of Storage and Embedding lean on."""

from __future__ import annotations

import numpy as np

from damo_embedding.initializers import Constant, Normal, Zeros
from damo_embedding.optimizers import SGD, Adagrad, Adam, BiasCorrection
from reference import ReferenceTable, as_uint64, power


def test_keys_are_their_64_bits() -> None:
    expected = [2**64 - 1, 2**63, 0]
    assert as_uint64(np.array([-1, -(2**63), 0])).tolist() == expected
    assert as_uint64(np.array(expected, np.uint64)).tolist() == expected
    assert as_uint64([-1, 2**63, 0]).tolist() == expected
    assert as_uint64([]).tolist() == []


def test_powers_are_powers() -> None:
    assert [power(0.5, n) for n in (0, 1, 2, 3, 10)] == [1.0, 0.5, 0.25, 0.125, 2.0**-10]


def test_lookup_inserts_rows_only_when_asked() -> None:
    table = ReferenceTable(SGD(), Normal(), 3)
    read = table.lookup([[1, 2], [1, 3]], insert=False)
    assert read.shape == (2, 2, 3)
    assert len(table) == 0
    np.testing.assert_array_equal(table.lookup([[1, 2], [1, 3]]), read)
    assert list(table.rows) == [1, 2, 3]
    np.testing.assert_array_equal(read[0, 0], read[1, 0])
    np.testing.assert_array_equal(table.lookup([9], insert=False, missing="zeros"), np.zeros((1, 3)))


def test_repeated_keys_are_summed_in_float32_in_order_and_make_one_update() -> None:
    table = ReferenceTable(SGD(lr=1.0), Zeros(), 1)
    gradients = np.array([1e8, 1.0, 1.0, -1e8], np.float32).reshape(4, 1)  # 1e8 + 1 is 1e8 in float32
    table.apply_gradients([5, 5, 5, 5], gradients)
    assert table.lookup([5]) == 0.0
    assert table.rows[5].update_count == 1
    table.apply_gradients([5, 5, 5, 5], gradients[[0, 3, 1, 2]])
    assert table.lookup([5]) == -2.0
    assert table.rows[5].update_count == 2


def test_counts_steps_and_times_belong_to_updates() -> None:
    table = ReferenceTable(Adam(), Zeros(), 2)
    table.now = 100
    table.lookup([1])
    assert (table.rows[1].update_count, table.rows[1].step, table.rows[1].time) == (0, 0, 100)
    table.now = 200
    table.apply_gradients([2], np.ones((1, 2)))
    table.now = 300
    table.apply_gradients([1, 2], np.ones((2, 2)))
    table.apply_gradients([], np.ones((0, 2)))
    assert (table.rows[1].update_count, table.rows[1].step, table.rows[1].time) == (1, 2, 300)
    assert (table.rows[2].update_count, table.rows[2].step, table.rows[2].time) == (2, 2, 300)
    assert table.step == 2


def test_adam_by_row_and_by_group_differ_for_a_late_row() -> None:
    late = []
    modes: tuple[BiasCorrection, ...] = ("row", "global")
    for mode in modes:
        table = ReferenceTable(Adam(lr=0.5, bias_correction=mode), Zeros(), 1)
        for _ in range(1000):
            table.apply_gradients([1], np.ones((1, 1)))
        table.apply_gradients([2], np.ones((1, 1)))
        late.append(float(table.lookup([2])[0, 0]))
    np.testing.assert_allclose(late, [-0.5, -0.5 * 0.1 * np.sqrt((1 - 0.999**1001) / 0.001)], rtol=1e-4)


def test_a_rate_given_for_a_step_is_for_that_step() -> None:
    table = ReferenceTable(SGD(lr=1.0), Constant(4.0), 1)
    table.apply_gradients([1], np.ones((1, 1)), lr=0.5)
    table.apply_gradients([1], np.ones((1, 1)))
    assert table.lookup([1]) == 2.5


def test_erased_rows_start_again() -> None:
    table = ReferenceTable(Adagrad(initial_accumulator_value=0.5), Constant(1.0), 2)
    table.apply_gradients([1, 2], np.ones((2, 2)))
    assert table.contains([1, 2, 3]).tolist() == [True, True, False]
    assert table.erase([1, 1, 3]) == 1
    assert table.contains([[1], [2]]).tolist() == [[False], [True]]
    np.testing.assert_array_equal(table.lookup([1]), np.ones((1, 2)))
    np.testing.assert_array_equal(table.rows[1].state["sum"], np.full(2, 0.5))
    assert table.rows[1].update_count == 0
