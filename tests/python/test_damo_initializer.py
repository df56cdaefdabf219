# SPDX-License-Identifier: Apache-2.0
"""damo.PyInitializer: the distributions of the documented names, and arrays that are filled in place."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import damo
from damo_scripts import initializer, parameters

N = 40_000


def draw(name: str, size: int = N, **values: Any) -> np.ndarray:
    out = np.full(size, np.nan, np.float32)
    assert initializer(name, **values).call(out) is None
    return out


def test_zeros_and_ones() -> None:
    assert not draw("zeros").any()
    assert (draw("ones") == 1).all()


@pytest.mark.parametrize(
    ("name", "values", "low", "high", "size"),
    [
        ("random_uniform", {}, -1, 1, N),
        ("random_uniform", {"min": 2, "max": 5.0}, 2, 5, N),
        ("uniform", {}, -math.sqrt(1 / N), math.sqrt(1 / N), N),
        ("xavier", {}, -math.sqrt(6 / N), math.sqrt(6 / N), N),
    ],
)
def test_uniform_ones_fill_their_range_evenly(name: str, values: Any, low: float, high: float, size: int) -> None:
    drawn = draw(name, size, **values).astype(np.float64)
    width = high - low
    assert low * (1 + 1e-6) <= drawn.min() < low + 1e-3 * width or low <= drawn.min() < low + 1e-3 * width
    assert high - 1e-3 * width < drawn.max() <= high + 1e-6 * width
    counts = np.histogram(drawn, 10, (low, high))[0]
    assert abs(counts - size / 10).max() < 5 * math.sqrt(size / 10)  # five standard deviations


@pytest.mark.parametrize(("name", "bound"), [("uniform", 1.0), ("xavier", 6.0)])
@pytest.mark.parametrize("dimension", [1, 4, 64])
def test_the_bound_follows_the_dimension(name: str, bound: float, dimension: int) -> None:
    made = initializer(name)
    rows = np.empty((2000, dimension), np.float32)
    for row in rows:
        made.call(row)
    largest = np.float32(math.sqrt(bound / dimension))
    assert 0.98 * largest < np.abs(rows).max() <= largest


@pytest.mark.parametrize("name", ["random_normal", "random"])
@pytest.mark.parametrize(("values", "mean", "stddev"), [({}, 0, 1), ({"mean": 3, "stddev": 0.5}, 3, 0.5)])
def test_normal_ones_have_their_moments(name: str, values: Any, mean: float, stddev: float) -> None:
    drawn = (draw(name, **values).astype(np.float64) - mean) / stddev
    assert abs(drawn.mean()) < 5 / math.sqrt(N)
    assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * N)
    assert abs((np.abs(drawn) > 2).mean() - 0.0455) < 0.006


@pytest.mark.parametrize(("values", "mean", "stddev"), [({}, 0, 1), ({"mean": -1, "stddev": 2}, -1, 2)])
def test_truncated_normal_has_nothing_beyond_two_standard_deviations(values: Any, mean: float, stddev: float) -> None:
    drawn = (draw("truncate_normal", **values).astype(np.float64) - mean) / stddev
    assert 1.98 < np.abs(drawn).max() <= 2 + 1e-6
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 0.8796) < 0.02


def test_no_two_calls_draw_the_same_numbers_and_no_two_objects() -> None:
    made = initializer("random_normal")
    first, second = np.empty(8, np.float32), np.empty(8, np.float32)
    made.call(first)
    made.call(second)
    third = draw("random_normal", 8)
    assert len(set(first.tolist() + second.tolist() + third.tolist())) == 24


def test_the_same_program_draws_the_same_numbers_again() -> None:
    script = (
        "import damo, numpy as np\n"
        "p = damo.Parameters(); p.insert('name', 'random_normal')\n"
        "a = np.empty(4, np.float32); damo.PyInitializer(p).call(a); print(a.tobytes().hex())"
    )
    printed = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(printed) == 1


def test_an_array_is_filled_where_it_is() -> None:
    whole = np.zeros(10, np.float32)
    initializer("ones").call(whole[3:6])
    assert whole.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    initializer("ones").call(np.empty(0, np.float32))


@pytest.mark.parametrize(
    ("array", "error", "says"),
    [
        (np.zeros(4), TypeError, "float64, expected float32"),
        (np.zeros(4, ">f4"), TypeError, "expected float32"),
        ([0.0], TypeError, "is list"),
        (np.zeros((2, 2), np.float32), ValueError, r"shape \(2, 2\), expected one dimension"),
        (np.zeros(8, np.float32)[::2], ValueError, "strided"),
        (np.broadcast_to(np.float32(0), (1,)), ValueError, "read-only"),
    ],
)
def test_what_cannot_be_filled_is_refused(array: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=rf"\[call\] array .*{says}"):
        initializer("ones").call(array)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "'name' is missing, expected one of zeros, ones, random_uniform"),
        ({"name": ""}, "name is '', expected one of zeros"),
        ({"name": "Zeros"}, "name is 'Zeros'"),
        ({"name": "zeros", "mean": 0.0}, "PyInitializer zeros. takes no parameter 'mean', and none at all"),
        ({"name": "random_uniform", "stddev": 1.0}, "takes no parameter 'stddev', expected min, max"),
        ({"name": "random_uniform", "min": 1.0}, "min is 1.0 and max is 1.0"),
        ({"name": "random_uniform", "min": 2.0, "max": 1}, "expected min < max"),
        ({"name": "random_normal", "stddev": -1.0}, "stddev is -1.0"),
        ({"name": "truncate_normal", "mean": 1e38}, r"mean is 1e\+38"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        damo.PyInitializer(parameters(values))
