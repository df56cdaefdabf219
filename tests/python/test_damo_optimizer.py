# SPDX-License-Identifier: Apache-2.0
"""damo.PyOptimizer and its schedules: the formulas of the documented names, computed here in doubles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import damo
from damo_scripts import embedding, look_up, optimizer, parameters

STEPS = 6
GROUPS = itertools.count()


def follow(name: str, p: dict[str, float], w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The weights after the gradients, by the textbook."""
    r = p[rate_of(name)]
    m = np.zeros_like(w)
    v = np.zeros_like(w)
    top = np.zeros_like(w)
    for n, g in enumerate(gradients, start=1):
        if name == "sgd":
            w = w - r * (g + p["lambda"] * w)
        elif name == "adagrad":
            g = g + p["lambda"] * w
            v = v + g**2
            w = w - r / (1 + (n - 1) * p["eta"]) * g / (np.sqrt(v) + p["epsilon"])
        elif name in ("adam", "amsgrad", "adamw"):
            if name == "adamw":
                w = w - r * p["lambda"] * w
            else:
                g = g + p["lambda"] * w
            m = p["beta1"] * m + (1 - p["beta1"]) * g
            v = p["beta2"] * v + (1 - p["beta2"]) * g**2
            top = np.maximum(top, v)
            root = np.sqrt((top if name == "amsgrad" else v) / (1 - p["beta2"] ** n)) + p["epsilon"]
            w = w - r * m / (1 - p["beta1"] ** n) / root
        elif name == "lion":
            w = w - r * (np.sign(p["beta1"] * m + (1 - p["beta1"]) * g) + p["lambda"] * w)
            m = p["beta2"] * m + (1 - p["beta2"]) * g
        else:
            sigma = (np.sqrt(v + g**2) - np.sqrt(v)) / r
            m = m + g - sigma * w
            v = v + g**2
            w = -(m - np.sign(m) * p["lambda1"]) / ((p["beta"] + np.sqrt(v)) / r + p["lambda2"])
            w = np.where(np.abs(m) <= p["lambda1"], 0, w)
    return w


ADAM = {"gamma": 1e-3, "beta1": 0.9, "beta2": 0.999, "lambda": 0.0, "epsilon": 1e-8}
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"gamma": 1e-3, "lambda": 0.0},
    "ftrl": {"gamma": 5e-3, "beta": 0.0, "lambda1": 0.0, "lambda2": 0.0},
    "adagrad": {"gamma": 1e-2, "lambda": 0.0, "eta": 0.0, "epsilon": 1e-10},
    "adam": ADAM,
    "amsgrad": ADAM,
    "adamw": {**ADAM, "lambda": 1e-2},
    "lion": {"eta": 3e-4, "beta1": 0.9, "beta2": 0.99, "lambda": 0.01},
}
OTHERS = {
    "gamma": 0.07,
    "lambda": 0.3,
    "beta": 0.8,
    "lambda1": 0.4,
    "lambda2": 0.6,
    "eta": 0.2,
    "epsilon": 0.05,
    "beta1": 0.6,
    "beta2": 0.7,
}
CASES = [(name, {}) for name in DEFAULTS]
CASES += [(name, {given: OTHERS[given]}) for name, defaults in DEFAULTS.items() for given in defaults]
CASES += [(name, {given: OTHERS[given] for given in defaults}) for name, defaults in DEFAULTS.items()]


BETAS = [(name, beta) for name in ("adam", "amsgrad", "adamw", "lion") for beta in ("beta1", "beta2")]


def rate_of(name: str) -> str:
    return "eta" if name == "lion" else "gamma"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[damo.PyStorage]:
    """One for all tests here, each of which takes groups of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAMO_MEMORY", "16MiB")
        yield damo.PyStorage(str(tmp_path_factory.mktemp("storage")), 0)


@pytest.fixture
def group() -> int:
    """One that no other test has."""
    return next(GROUPS)


@pytest.fixture
def gradients(random: np.random.Generator) -> list[np.ndarray]:
    return [random.normal(size=8).astype(np.float32) for _ in range(STEPS)]


@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{name}-{'-'.join(given)}" for name, given in CASES])
def test_call_follows_the_formula_and_every_parameter_counts(
    name: str, given: dict[str, float], gradients: list[np.ndarray], random: np.random.Generator
) -> None:
    settings = {**DEFAULTS[name], **given}
    weights = random.normal(size=8).astype(np.float32)
    expected = follow(name, settings, weights.astype(np.float64), gradients)
    made = optimizer(name, given)
    for step, gradient in enumerate(gradients):
        assert made.call(weights, gradient, step) is None
    np.testing.assert_allclose(weights, expected, rtol=2e-5, atol=1e-6)
    start = np.full(8, 0.5)
    with_all = follow(name, settings, start, gradients)
    for ignored in given:  # the formula without it gives something else
        without = follow(name, {**settings, ignored: DEFAULTS[name][ignored]}, start, gradients)
        assert not np.allclose(with_all, without, rtol=1e-4)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_embedding_updates_its_rows_as_call_does_an_array(
    name: str, gradients: list[np.ndarray], storage: damo.PyStorage, group: int
) -> None:
    rows = embedding(storage, 8, group, optimizer=optimizer(name))
    look_up(rows, [7], 8)
    made, weights = optimizer(name), np.zeros(8, np.float32)
    for step, gradient in enumerate(gradients):
        rows.apply_gradients(np.array([7]), gradient)
        made.call(weights, gradient, step)
    assert np.array_equal(look_up(rows, [7], 8)[0], weights)
    assert weights.any()


def test_ftrl_takes_alpha_for_gamma_and_refuses_both() -> None:
    one, other = np.ones(3, np.float32), np.ones(3, np.float32)
    for array, given in ((one, "gamma"), (other, "alpha")):
        optimizer("ftrl", {given: 0.25}).call(array, np.full(3, 0.5, np.float32), 0)
    assert np.array_equal(one, other)
    with pytest.raises(ValueError, match=r"\[PyOptimizer ftrl\] gamma and alpha are both given"):
        optimizer("ftrl", gamma=0.1, alpha=0.1)
    with pytest.raises(ValueError, match="takes no parameter 'alpha'"):
        optimizer("sgd", alpha=0.1)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        *[(name, {rate_of(name): rate}, "expected a number in") for name in DEFAULTS for rate in (0, 0.0, -1e-3)],
        *[(name, {beta: 1}, rf"\[PyOptimizer {name}\] {beta} is") for name, beta in BETAS],
        *[(name, {beta: -0.1}, f"{beta} is") for name, beta in BETAS],
        ("ftrl", {"alpha": -1}, "alpha is"),
        ("ftrl", {"beta": -1}, "beta is"),
        ("sgd", {"lambda": -1e-9}, "lambda is"),
        ("adam", {"epsilon": 0}, "epsilon is"),
        ("adagrad", {"eta": -1}, "eta is"),
        ("sgd", {"beta1": 0.9}, "takes no parameter 'beta1', expected gamma, lambda"),
        ("lion", {"gamma": 0.9}, "takes no parameter 'gamma', expected eta, beta1, beta2, lambda"),
        ("momentum", {}, "name is 'momentum', expected one of sgd, ftrl, adagrad, adam, amsgrad, adamw, lion"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name: str, given: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        optimizer(name, given)


def test_a_missing_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'name' is missing, expected one of sgd"):
        damo.PyOptimizer(parameters(gamma=0.1))


def test_call_refuses_bad_arrays_and_changes_nothing() -> None:
    made, good = optimizer("adam"), np.ones(4, np.float32)
    strided = np.ones(8, np.float32)[::2]
    for weights, grads, step, error in (
        (good.astype(np.float64), good, 0, TypeError),
        (good, good.astype(np.float64), 0, TypeError),
        (good, good.tolist(), 0, TypeError),
        (strided, good, 0, ValueError),
        (good.reshape(2, 2), good, 0, ValueError),
        (good, good[:3], 0, ValueError),
        (good, np.array([0, np.nan, 0, 0], np.float32), 0, ValueError),
        (good, np.array([0, np.inf, 0, 0], np.float32), 0, ValueError),
        (good, good.copy(), -1, ValueError),
        (good, good.copy(), 0.5, TypeError),
        (good, good.copy(), True, TypeError),
    ):
        with pytest.raises(error, match=r"^\[call\]"):
            made.call(weights, grads, step)  # type: ignore[arg-type]
    assert (good == 1).all()
    made.call(good, strided, 0)  # what is only read may be strided
    assert np.allclose(good, 1 - 1e-3)
    with pytest.raises(ValueError, match=r"weights has shape \(5,\), expected \(4,\)"):
        made.call(np.ones(5, np.float32), np.ones(5, np.float32), 1)


# ------------------------------------------------------------------ schedules

R, S = 0.5, 10


def _cosine(m: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * m))


def _linear_cosine(periods: float, alpha: float, beta: float) -> Callable[[int], float]:
    return lambda s: R * ((alpha + (S - min(s, S)) / S) * _cosine(2 * periods * min(s, S) / S) + beta)


SCHEDULES: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("exponential_decay", {"decay_rate": 0.9}, lambda s: R * 0.9 ** (s / S)),
    ("polynomial_decay", {}, lambda s: (R - 1e-4) * (1 - min(s, S) / S) + 1e-4),
    (
        "polynomial_decay",
        {"end_learning_rate": 0.1, "power": 2},
        lambda s: (R - 0.1) * (1 - min(s, S) / S) ** 2 + 0.1,
    ),
    ("nature_exponential_decay", {"decay_rate": 0.7}, lambda s: R * math.exp(-0.7 * s / S)),
    ("inverse_time_decay", {"decay_rate": 3}, lambda s: R / (1 + 3 * s / S)),
    ("cosine_decay", {}, lambda s: R * _cosine(min(s, S) / S)),
    *(
        (name, given, _linear_cosine(periods, alpha, beta))
        for name in ("liner_cosine_decay", "linear_cosine_decay")
        for given, periods, alpha, beta in (
            ({}, 0.5, 0.0, 1e-3),
            ({"num_periods": 2.0, "alpha": 0.1, "beta": 0.01}, 2.0, 0.1, 0.01),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "given", "formula"), SCHEDULES, ids=[f"{name}-{given}" for name, given, _ in SCHEDULES]
)
def test_rates_equal_the_table_s_formula(
    name: str, given: dict[str, Any], formula: Callable[[int], float], storage: damo.PyStorage, group: int
) -> None:
    chosen = damo.PyOptimizer(parameters(name="sgd", gamma=R), parameters(given, name=name, decay_steps=S))
    steps = [0, 1, 5, 9, 10, 11, 25]
    rates = []
    for step in steps:
        weights = np.zeros(1, np.float32)
        chosen.call(weights, np.ones(1, np.float32), step)
        rates.append(-float(weights[0]))
    np.testing.assert_allclose(rates, [formula(step) for step in steps], rtol=1e-6, atol=1e-9)
    assert min(rates) >= 0

    # In an embedding the step is the group's count of apply_gradients calls, whichever key it was.
    rows = embedding(storage, 1, group, optimizer=chosen)
    for step in range(12):
        look_up(rows, [1000 + step], 1)  # no step
        rows.apply_gradients(np.array([step, step]), np.full(2, 0.5, np.float32))
    found = -look_up(rows, range(12), 1)[:, 0]
    np.testing.assert_allclose(found, [formula(step) for step in range(12)], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "scheduler",
    [None, parameters(), parameters(name=""), parameters(name="", decay_steps=3), parameters(decay_steps=3)],
)
def test_no_name_is_no_schedule(scheduler: damo.Parameters | None) -> None:
    made, weights = damo.PyOptimizer(parameters(name="sgd", gamma=R), scheduler), np.zeros(1, np.float32)
    made.call(weights, np.ones(1, np.float32), 1_000_000)
    assert weights[0] == -R


def test_a_schedule_starts_from_whatever_the_rate_is_called() -> None:
    decay = parameters(name="cosine_decay", decay_steps=100)
    for name, given in (("lion", {"eta": 0.5}), ("ftrl", {"alpha": 0.5}), ("adagrad", {"gamma": 0.5})):
        weights = np.zeros(1, np.float32)
        damo.PyOptimizer(parameters(given, name=name), decay).call(weights, np.ones(1, np.float32), 50)
        assert weights[0] == pytest.approx(-0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "step_decay"}, "name is 'step_decay', expected one of exponential_decay, polynomial_decay"),
        ({"name": "cosine_decay"}, "'decay_steps' is missing"),
        ({"name": "cosine_decay", "decay_steps": 0}, "decay_steps is 0"),
        ({"name": "cosine_decay", "decay_steps": 1, "power": 1.0}, "'power', expected decay_steps"),
        ({"name": "exponential_decay", "decay_steps": 1}, "'decay_rate' is missing"),
        ({"name": "exponential_decay", "decay_steps": 1, "decay_rate": -1}, "decay_rate is -1"),
        ({"name": "polynomial_decay", "decay_steps": 1, "power": 0}, "power is 0"),
        ({"name": "polynomial_decay", "decay_steps": 1, "end_learning_rate": -1}, "end_learning_rate is -1"),
        ({"name": "cosine_decay", "decay_steps": 1, "gamma": 1}, "takes no parameter 'gamma'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        damo.PyOptimizer(parameters(name="sgd"), parameters(given))


def test_a_schedule_goes_on_with_the_group_s_step_in_the_next_object(storage: damo.PyStorage, group: int) -> None:
    chosen = damo.PyOptimizer(
        parameters(name="sgd", gamma=1.0), parameters(name="inverse_time_decay", decay_steps=1, decay_rate=1.0)
    )
    for step in range(3):
        rows = embedding(storage, 1, group, optimizer=chosen)
        rows.apply_gradients(np.array([step]), np.ones(1, np.float32))
    np.testing.assert_allclose(-look_up(rows, range(3), 1)[:, 0], [1, 1 / 2, 1 / 3], rtol=1e-6)


def test_schedules_are_no_parameters_of_something_else() -> None:
    with pytest.raises(TypeError, match="scheduler_parameters is 'cosine_decay'"):
        damo.PyOptimizer(parameters(name="sgd"), "cosine_decay")  # type: ignore[arg-type]
