# SPDX-License-Identifier: Apache-2.0
"""The optimizers: the core beside NumPy (bit for bit) and beside torch.optim, and their dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import damo_embedding.optimizers as optimizers_module
import reference
from damo_embedding import _core
from damo_embedding.optimizers import SGD, Adagrad, Adam, Optimizer

Floats = npt.NDArray[np.float32]

CLASSES: dict[str, Any] = {
    value.name: value
    for value in vars(optimizers_module).values()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
}
CONFIGURATIONS = [
    SGD(lr=0.1),
    SGD(lr=0.1, weight_decay=0.01),
    Adagrad(),
    Adagrad(lr=0.05, eps=1e-6, weight_decay=0.01, initial_accumulator_value=0.1),
    Adam(),
    Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01),
    Adam(bias_correction="global"),
    Adam(lr=0.01, betas=(0.0, 0.5), weight_decay=0.01, bias_correction="global"),
]


class CoreRow:
    """One row, updated by the core."""

    def __init__(self, optimizer: Any, weights: Floats) -> None:
        self.optimizer = optimizer
        self.weights = weights.copy()
        self.update_count = 0
        blocks = _core.optimizer_state(optimizer.name, optimizer._settings())
        assert all(per_weight for _, per_weight, _ in blocks)
        self.entries = [entry for entry, _, _ in blocks]
        starts = [np.full(weights.size, initial, np.float32) for _, _, initial in blocks]
        self.state = np.concatenate([np.empty(0, np.float32), *starts])

    def update(self, gradient: Floats, group_step: int) -> None:
        self.update_count += 1
        _core.optimizer_update(
            self.optimizer.name,
            self.optimizer._settings(),
            self.optimizer.lr,
            group_step,
            self.update_count,
            self.weights,
            self.state,
            gradient,
        )

    def blocks(self) -> dict[str, Floats]:
        parts = np.split(self.state, len(self.entries)) if self.entries else []
        return dict(zip(self.entries, parts, strict=True))


def test_every_optimizer_of_the_core_has_a_dataclass_and_a_reference() -> None:
    assert set(_core.optimizer_names()) == set(CLASSES) == set(reference.OPTIMIZERS)


def test_every_optimizer_is_in_the_configurations_tested_here() -> None:
    assert {optimizer.name for optimizer in CONFIGURATIONS} == set(_core.optimizer_names())


@pytest.mark.parametrize("optimizer", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("dimension", [1, 7, 8, 16, 33, 64])
def test_updates_equal_the_reference_bit_for_bit(optimizer: Any, dimension: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(1, dimension)).astype(np.float32)
    row = CoreRow(optimizer, weights[0])
    oracle = reference.optimizer(optimizer.name, optimizer._settings())
    state = oracle.initial_state(1, dimension)
    for update in range(1, 40):
        gradient = (rng.normal(size=(1, dimension)) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
        group_step = 3 * update
        row.update(gradient[0], group_step)
        oracle.update(weights, state, gradient, group_step=group_step, update_counts=update)
        np.testing.assert_array_equal(row.weights, weights[0])
        for entry, block in row.blocks().items():
            np.testing.assert_array_equal(block, state[entry][0], err_msg=entry)


@pytest.mark.parametrize("optimizer", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("update_count", [1, 2, 100, 17_320, 17_321, 40_000, 2**32 - 1])
def test_rows_of_any_age_equal_the_reference_bit_for_bit(optimizer: Any, update_count: int) -> None:
    rng = np.random.default_rng(1)
    weights, gradient = rng.normal(size=(2, 1, 16)).astype(np.float32)
    oracle = reference.optimizer(optimizer.name, optimizer._settings())
    state = {name: block + np.float32(0.25) for name, block in oracle.initial_state(1, 16).items()}
    row = CoreRow(optimizer, weights[0])
    row.state += np.float32(0.25)
    row.update_count = update_count - 1
    row.update(gradient[0], 2**40)
    oracle.update(weights, state, gradient, group_step=2**40, update_counts=update_count)
    np.testing.assert_array_equal(row.weights, weights[0])


@pytest.mark.parametrize("optimizer", CONFIGURATIONS, ids=str)
def test_an_optimizer_that_is_kept_makes_the_same_updates(optimizer: Any) -> None:
    rng = np.random.default_rng(4)
    kept = _core.RowOptimizer(optimizer.name, optimizer._settings())
    weights = rng.normal(size=16).astype(np.float32)
    row = CoreRow(optimizer, weights)
    state = np.full(kept.state_floats(16), np.nan, np.float32)
    kept.start(16, state)
    np.testing.assert_array_equal(state, row.state)
    for update in range(1, 20):
        gradient = rng.normal(size=16).astype(np.float32)
        row.update(gradient, 2 * update)
        kept.update(optimizer.lr, 2 * update, update, weights, state, gradient)
        np.testing.assert_array_equal(weights, row.weights)
        np.testing.assert_array_equal(state, row.state)


def test_arrays_of_an_update_that_share_memory_or_do_not_fit_are_refused() -> None:
    kept = _core.RowOptimizer("adagrad", {})
    floats = np.ones(12, np.float32)
    w, g, s = floats[:4], floats[4:8], floats[8:]
    for arrays, message in (
        ((w, s, w), "weights and gradient share memory"),
        ((w, w, g), "weights and state share memory"),
        ((w, g, g), "state and gradient share memory"),
        ((floats[:4], floats[3:7], g), "weights and state share memory"),
        ((w, s[:3], g), "state has 3 floats, expected 4"),
        ((w, s, g[:3]), "gradient has 3 floats, expected 4"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.update(0.1, 1, 1, *arrays)
    with pytest.raises(ValueError, match="group_step is 0 and update_count is 1"):
        kept.update(0.1, 0, 1, w, s, g)
    with pytest.raises(ValueError, match="state has 3 floats, expected 4"):
        kept.start(4, s[:3])
    assert (floats == 1).all()
    kept.update(0.1, 1, 1, w, s, g)
    assert (g == 1).all()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_state_has_the_entries_and_starts_of_the_reference(name: str) -> None:
    settings: dict[str, float] = {"initial_accumulator_value": 0.1} if name == "adagrad" else {}
    oracle = reference.optimizer(name, settings)
    blocks = _core.optimizer_state(name, settings)
    assert tuple(entry for entry, _, _ in blocks) == oracle.entries
    for entry, per_weight, initial in blocks:
        assert per_weight
        np.testing.assert_array_equal(oracle.initial_state(1, 1)[entry], np.float32(initial))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_defaults_of_the_dataclass_and_of_the_core_are_the_same(name: str) -> None:
    optimizer = CLASSES[name]()
    assert optimizer._settings() == reference.OPTIMIZERS[name].defaults
    gradient = np.linspace(-2, 2, 16, dtype=np.float32)
    results = []
    for settings in ({}, optimizer._settings()):
        weights, state = np.ones(16, np.float32), CoreRow(optimizer, np.ones(16, np.float32)).state
        _core.optimizer_update(name, settings, optimizer.lr, 5, 3, weights, state, gradient)
        results.append((weights, state))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


# Another value for each field. A new field needs a line here: an argument accepted is an argument used.
OTHER: dict[str, list[Any]] = {
    "lr": [0.5],
    "eps": [0.25],
    "weight_decay": [0.125],
    "initial_accumulator_value": [0.5],
    "betas": [(0.5, 0.999), (0.9, 0.5)],
    "bias_correction": ["global"],
}


@pytest.mark.parametrize(
    ("cls", "field"), [(cls, field.name) for cls in CLASSES.values() for field in dataclasses.fields(cls)]
)
def test_changing_any_field_changes_the_update(cls: type[Optimizer], field: str) -> None:
    def trained(optimizer: Any) -> Floats:
        row = CoreRow(optimizer, np.ones(4, np.float32))
        for group_step in (5, 8):
            row.update(np.linspace(0.5, 2, 4, dtype=np.float32) * np.float32(group_step), group_step)
        return row.weights

    usual = trained(cls())
    for value in OTHER[field]:
        changed = trained(cls(**{field: value}))
        assert np.all(changed != usual), f"{field}={value}"


# ------------------------------------------------------------- beside torch

ROWS, DIMENSION, STEPS = 3, 16, 1000


@pytest.fixture
def torch() -> Iterator[Any]:
    """torch on one thread: on a busy machine more of them spin at barriers for most of the time."""
    module = pytest.importorskip("torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


def random_steps(seed: int) -> tuple[Floats, list[tuple[list[int], Floats]]]:
    """First weights, and for each step the rows that have a gradient, with their gradients."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(STEPS):
        touched = [row for row in range(ROWS) if rng.random() < 0.4]
        steps.append((touched, rng.normal(size=(len(touched), DIMENSION)).astype(np.float32)))
    return rng.normal(size=(ROWS, DIMENSION)).astype(np.float32), steps


def assert_close(ours: Floats, theirs: Any) -> None:
    """1e-5 relative; where weights cross zero, relative to the row."""
    theirs = theirs.detach().numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("ours", "torch_name", "arguments"),
    [
        (SGD(lr=0.05), "SGD", {"lr": 0.05}),
        (SGD(lr=0.05, weight_decay=0.01), "SGD", {"lr": 0.05, "weight_decay": 0.01}),
        (Adagrad(), "Adagrad", {}),
        (
            Adagrad(lr=0.05, eps=1e-6, weight_decay=0.01, initial_accumulator_value=0.1),
            "Adagrad",
            {"lr": 0.05, "eps": 1e-6, "weight_decay": 0.01, "initial_accumulator_value": 0.1},
        ),
        (Adam(), "Adam", {}),
        (
            Adam(lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01),
            "Adam",
            {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.01},
        ),
    ],
    ids=str,
)
def test_each_row_follows_torch_as_a_parameter_of_its_own(
    torch: Any, ours: Any, torch_name: str, arguments: Any
) -> None:
    first, steps = random_steps(seed=2)
    rows = [CoreRow(ours, weights) for weights in first]
    parameters = [torch.nn.Parameter(torch.from_numpy(weights.copy())) for weights in first]
    theirs = [getattr(torch.optim, torch_name)([parameter], **arguments) for parameter in parameters]
    for group_step, (touched, gradients) in enumerate(steps, start=1):
        for index, gradient in zip(touched, gradients, strict=True):
            rows[index].update(gradient, group_step)
            parameters[index].grad = torch.from_numpy(gradient)
            theirs[index].step()
    for row, parameter, optimizer in zip(rows, parameters, theirs, strict=True):
        assert_close(row.weights, parameter)
        for entry, block in row.blocks().items():
            assert_close(block, optimizer.state[parameter][entry])


@pytest.mark.parametrize("arguments", [{}, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4}], ids=str)
def test_adam_with_global_bias_correction_follows_torch_sparse_adam(torch: Any, arguments: Any) -> None:
    first, steps = random_steps(seed=3)
    rows = [CoreRow(Adam(bias_correction="global", **arguments), weights) for weights in first]
    parameter = torch.nn.Parameter(torch.from_numpy(first.copy()))
    theirs = torch.optim.SparseAdam([parameter], **arguments)
    for group_step, (touched, gradients) in enumerate(steps, start=1):
        for index, gradient in zip(touched, gradients, strict=True):
            rows[index].update(gradient, group_step)
        parameter.grad = torch.sparse_coo_tensor(
            [touched], torch.from_numpy(gradients), first.shape, check_invariants=True
        )
        theirs.step()
    state = theirs.state[parameter]
    for index, row in enumerate(rows):
        assert_close(row.weights, parameter[index])
        assert_close(row.blocks()["exp_avg"], state["exp_avg"][index])
        assert_close(row.blocks()["exp_avg_sq"], state["exp_avg_sq"][index])


# --------------------------------------------------------- the dataclasses


@pytest.mark.parametrize("cls", list(CLASSES.values()))
def test_optimizers_are_frozen_values_with_keyword_arguments(cls: Any) -> None:
    optimizer = cls(lr=0.5)
    assert optimizer == cls(lr=0.5)
    assert hash(optimizer) == hash(cls(lr=0.5))
    assert optimizer != cls(lr=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.lr = 1.0
    with pytest.raises(TypeError, match="positional"):
        cls(0.5)
    with pytest.raises(TypeError, match="learning_rate"):
        cls(learning_rate=0.5)


def test_numbers_of_any_kind_become_floats() -> None:
    adam = Adam(lr=np.float32(0.5), betas=[np.float64(0.5), 0], weight_decay=1)  # type: ignore[arg-type]
    assert adam == Adam(lr=0.5, betas=(0.5, 0.0), weight_decay=1.0)
    assert type(adam.lr) is float
    assert [type(beta) for beta in adam.betas] == [float, float]


FLOAT_FIELDS = [
    (cls, field.name)
    for cls in CLASSES.values()
    for field in dataclasses.fields(cls)
    if field.type in ("float", "LearningRate")
]


@pytest.mark.parametrize(("cls", "field"), FLOAT_FIELDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9, -1, 1e39, 10**400, np.float32("nan")])
def test_numbers_out_of_range_are_named_with_the_range(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^\[{cls.__name__}\] {field} is .*, expected a number in \[.*\]$"):
        cls(**{field: value})


@pytest.mark.parametrize(("cls", "field"), FLOAT_FIELDS)
@pytest.mark.parametrize("value", ["0.1", True, np.True_, None, 1j, Decimal("0.1"), [0.1], np.zeros(1)])
def test_what_is_not_a_number_is_a_type_error(cls: Any, field: str, value: Any) -> None:
    expected = "a number, a schedule or a function of the step" if field == "lr" else "a number"
    with pytest.raises(TypeError, match=rf"^\[{cls.__name__}\] {field} is .*, expected {expected}$"):
        cls(**{field: value})


@pytest.mark.parametrize("cls", [Adagrad, Adam])
@pytest.mark.parametrize("eps", [0.0, 1e-46])
def test_eps_that_is_zero_as_float32_is_refused(cls: Any, eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps is .*, expected a number in \[1.1754944e-38, 3.4028235e"):
        cls(eps=eps)


@pytest.mark.parametrize(
    ("betas", "error", "message"),
    [
        (0.9, TypeError, r"betas is 0.9 \(float\), expected two numbers"),
        ("ab", TypeError, r"betas is 'ab' \(str\), expected two numbers"),
        ((0.9,), ValueError, r"betas is \(0.9,\), expected two numbers \(beta1, beta2\)"),
        ((0.9, 0.99, 0.999), ValueError, r"betas is \(0.9, 0.99, 0.999\), expected two numbers"),
        ((1.0, 0.999), ValueError, r"betas\[0\] is 1.0, expected a number in \[0, 0.99999994\]"),
        ((0.9, 1.0), ValueError, r"betas\[1\] is 1.0"),
        ((0.9, 1.0 - 1e-9), ValueError, r"betas\[1\] is 0.999999999"),
        ((-0.1, 0.999), ValueError, r"betas\[0\] is -0.1"),
        ((0.9, math.nan), ValueError, r"betas\[1\] is nan"),
        ((True, 0.999), TypeError, r"betas\[0\] is True \(bool\)"),
        (("0.9", 0.999), TypeError, r"betas\[0\] is '0.9' \(str\)"),
    ],
)
def test_bad_betas_are_named(betas: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^\[Adam\] {message}"):
        Adam(betas=betas)


@pytest.mark.parametrize(("value", "error"), [("rows", ValueError), ("", ValueError), (True, TypeError)])
def test_bad_bias_correction_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r'^\[Adam\] bias_correction is .*, expected "row" or "global"$'):
        Adam(bias_correction=value)


def test_the_core_accepts_the_ends_of_every_range() -> None:
    largest, smallest = 3.4028234663852886e38, 1.1754943508222875e-38
    for optimizer in (
        SGD(lr=0, weight_decay=0),
        SGD(lr=largest, weight_decay=largest),
        Adagrad(lr=0, eps=smallest, initial_accumulator_value=largest),
        Adagrad(eps=largest),
        Adam(lr=0, betas=(0, 0), eps=smallest),
        Adam(lr=largest, betas=(1 - 2**-24, 1 - 2**-24), eps=largest, weight_decay=largest),
    ):
        CoreRow(optimizer, np.ones(2, np.float32)).update(np.zeros(2, np.float32), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"\[optimizer adam\] lr is -1, expected a number in"),
        ({"beta2": 1.0}, r"\[optimizer adam\] beta2 is 1, expected a number in"),
        ({"bias_correction": 2.0}, r"\[optimizer adam\] bias_correction is 2, expected a number in \[0, 1\]"),
        ({"momentum": 0.9}, r'\[optimizer adam\] unknown setting "momentum", expected one of: lr, beta1'),
    ],
)
def test_the_core_checks_settings_itself(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.optimizer_state("adam", settings)


def test_the_core_names_an_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match=r'\[optimizer\] unknown name "rprop", expected one of: sgd, adagrad'):
        _core.optimizer_state("rprop", {})
