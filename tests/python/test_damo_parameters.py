# SPDX-License-Identifier: Apache-2.0
"""damo.Parameters: what it takes, what it refuses, and what it says then."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import damo
from damo_scripts import parameters


def test_values_come_out_as_json_in_the_order_of_their_first_insertion() -> None:
    made = damo.Parameters()
    for name, value in (("name", "adam"), ("gamma", 0.5), ("count", 3), ("reload", False), ("gamma", 1)):
        assert made.insert(name, value) is None
    assert json.loads(made.to_json()) == {"name": "adam", "gamma": 1.0, "count": 3, "reload": False}
    assert list(json.loads(made.to_json())) == ["name", "gamma", "count", "reload"]
    assert damo.Parameters().to_json() == "{}"
    assert parameters(name='a"ü').to_json() == '{"name": "a\\"\\u00fc"}'


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("gamma", 1, 1.0),
        ("gamma", np.float32(0.5), 0.5),
        ("gamma", np.int64(2), 2.0),
        ("count", np.uint8(7), 7),
        ("reload", np.bool_(True), True),
        ("decay_steps", 100.0, 100),
        ("decay_steps", np.float64(100.0), 100),
    ],
)
def test_numbers_of_numpy_and_ints_for_floats_are_welcome(name: str, value: Any, kept: object) -> None:
    (found,) = json.loads(parameters({name: value}).to_json()).values()
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("name", 3, "a str"),
        ("path", b"file", "a str"),
        ("reload", 1, "True or False"),
        ("reload", "true", "True or False"),
        ("count", True, "an int"),
        ("count", np.bool_(True), "an int"),
        ("count", 3.0, "an int"),
        ("count", "3", "an int"),
        ("decay_steps", 1.5, "an int"),
        ("decay_steps", True, "an int"),
        ("gamma", True, "a number"),
        ("gamma", "0.1", "a number"),
        ("gamma", None, "a number"),
        ("gamma", [0.1], "a number"),
        ("gamma", 1j, "a number"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, expected: str) -> None:
    made = damo.Parameters()
    with pytest.raises(TypeError, match=rf"^\[insert\] {name} is .*expected {expected}$"):
        made.insert(name, value)
    assert made.to_json() == "{}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, np.float32("nan")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[insert\] gamma is .*finite"):
        damo.Parameters().insert("gamma", value)


def test_a_name_that_nobody_takes_is_refused_with_the_names_that_are_taken() -> None:
    with pytest.raises(ValueError, match="'learning_rate'") as caught:
        damo.Parameters().insert("learning_rate", 0.1)
    for name in (
        "name gamma alpha lambda lambda1 lambda2 beta beta1 beta2 eta epsilon min max mean stddev decay_steps "
        "decay_rate end_learning_rate power num_periods expire_days group min_count capacity count path fpr reload"
    ).split():
        assert f" {name}" in str(caught.value)
    with pytest.raises(TypeError, match="expected a str"):
        damo.Parameters().insert(3, 0.1)  # type: ignore[arg-type]


def test_an_object_keeps_what_it_was_given() -> None:
    given = parameters(name="ones")
    made = damo.PyInitializer(given)
    given.insert("name", "zeros")
    out = np.empty(2, np.float32)
    made.call(out)
    assert out.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", [damo.PyInitializer, damo.PyOptimizer, damo.PyFilter])
@pytest.mark.parametrize("given", [None, {"name": "zeros"}, "zeros"])
def test_what_is_no_parameters_is_refused(kind: Any, given: Any) -> None:
    with pytest.raises(TypeError, match="expected a Parameters"):
        kind(given)
