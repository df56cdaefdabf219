# SPDX-License-Identifier: Apache-2.0
"""The optimizers: the core beside NumPy (bit for bit) and beside torch.optim, and their dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import damo_embedding as de
import damo_embedding.optimizers as optimizers_module
import reference
from damo_embedding import _core
from damo_embedding.optimizers import (
    FTRL,
    SGD,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    Optimizer,
    RMSprop,
    RowWiseAdagrad,
)
from optimizer_agreement import DIMENSION, KEYS, compare, relative
from optimizer_cases import CASES, VARIED

pytestmark = pytest.mark.core  # numbers

Floats = npt.NDArray[np.float32]

CLASSES: dict[str, Any] = {
    value.name: value
    for value in vars(optimizers_module).values()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
}
# What the core runs other loops for, beside the cases: no torch optimizer has them.
CONFIGURATIONS = [
    *CASES,
    Adam(lr=0.01, betas=(0.0, 0.5), weight_decay=0.01, bias_correction="global"),
    RMSprop(momentum=0.5, centered=True),
    RMSprop(momentum=0.5, weight_decay=0.01),
    RMSprop(centered=True, weight_decay=0.01),
    RowWiseAdagrad(lr_decay=0.5, weight_decay=0.01),
    FTRL(lambda1=3.0, lambda2=1.0),
]


class CoreRow:
    """One row, updated by the core."""

    def __init__(self, optimizer: Any, weights: Floats) -> None:
        self.optimizer = optimizer
        self.weights = weights.copy()
        self.update_count = 0
        blocks = _core.optimizer_state(optimizer.name, optimizer._settings())
        self.entries = [entry for entry, _, _ in blocks]
        self.sizes = [weights.size if per_weight else 1 for _, per_weight, _ in blocks]
        starts = [np.full(size, initial, np.float32) for size, (_, _, initial) in zip(self.sizes, blocks, strict=True)]
        self.state = np.concatenate([np.empty(0, np.float32), *starts])

    def update(self, gradient: Floats, group_step: int, lr: float | None = None) -> None:
        self.update_count += 1
        _core.optimizer_update(
            self.optimizer.name,
            self.optimizer._settings(),
            self.optimizer.lr if lr is None else lr,
            group_step,
            self.update_count,
            self.weights,
            self.state,
            gradient,
        )

    def blocks(self) -> dict[str, Floats]:
        parts = np.split(self.state, np.cumsum(self.sizes)[:-1]) if self.entries else []
        return dict(zip(self.entries, parts, strict=True))


def test_every_optimizer_of_the_core_has_a_dataclass_and_a_reference() -> None:
    assert set(_core.optimizer_names()) == set(CLASSES) == set(reference.OPTIMIZERS)


def test_every_parameter_of_every_optimizer_is_varied_in_the_cases() -> None:
    assert {cls.name for cls in VARIED} == set(_core.optimizer_names())
    for cls, varied in VARIED.items():
        assert {list(arguments)[-1] for arguments in varied} == {field.name for field in dataclasses.fields(cls)}


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
def test_state_has_the_entries_and_starts_of_the_reference(optimizer: Any) -> None:
    oracle = reference.optimizer(optimizer.name, optimizer._settings())
    row = CoreRow(optimizer, np.ones(5, np.float32))
    blocks, expected = row.blocks(), oracle.initial_state(1, 5)
    assert list(blocks) == list(expected) == list(oracle.entries)
    for entry, block in blocks.items():
        np.testing.assert_array_equal(block, expected[entry][0])


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


@pytest.mark.parametrize(
    ("cls", "arguments"), [(cls, arguments) for cls, varied in VARIED.items() for arguments in varied], ids=str
)
def test_changing_any_field_changes_the_update(cls: type[Optimizer], arguments: dict[str, Any]) -> None:
    def trained(optimizer: Any) -> Floats:
        row = CoreRow(optimizer, np.ones(4, np.float32))
        # Signs change, and a large gradient is followed by small ones: the sign in Lion would hide its betas else.
        for group_step, size in ((5, 3.0), (8, -0.1), (9, -1.0)):
            row.update(np.linspace(0.5, 2, 4, dtype=np.float32) * np.float32(size), group_step)
        return row.weights

    *without, varied = arguments
    usual = trained(cls(**{name: arguments[name] for name in without}))
    assert np.all(trained(cls(**arguments)) != usual), varied


# ------------------------------------------------------------- beside torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: on a busy machine more of them spin at barriers for most of the time."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", CASES, ids=str)
def test_a_thousand_random_steps_agree_with_torch_or_the_paper_to_1e_5(storage: de.Storage, optimizer: Any) -> None:
    agreement = compare(storage, optimizer, group=0)
    assert agreement.weights <= 1e-5
    assert agreement.state is None or agreement.state <= 1e-5
    has_state = bool(_core.optimizer_state(optimizer.name, optimizer._settings()))
    assert (agreement.state is not None) == has_state


def test_rows_are_compared_that_were_in_each_of_the_thousand_steps(storage: de.Storage) -> None:
    compare(storage, FTRL(), group=0)
    rows = de.Embedding(storage, FTRL(), de.Normal(), DIMENSION, 0)
    counts = [rows.inspect(int(key)).update_count for key in KEYS]  # type: ignore[union-attr]
    assert counts[:2] == [1000, 1000]
    assert 300 < counts[2] < 500


def test_the_measure_of_agreement_sees_what_differs() -> None:
    theirs = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    ours = theirs.astype(np.float32)
    assert relative(ours, theirs) == 0.0
    ours[0, 2] = 0.1  # a tenth of the row's largest
    assert relative(ours, theirs) == pytest.approx(1.0)
    ours[0] = [1.0, 0.56, 0.0]
    assert relative(ours, theirs) == pytest.approx(0.1)
    assert relative(ours, theirs, share=0.0) == pytest.approx(0.12)
    ours[1, 0] = 1e-30  # beside a row of zeros nothing is small
    assert relative(ours, theirs) > 0.0


# ------------------------------------------------------------------- ftrl


def descent(first: Floats, gradients: Floats, lr: float, beta: float) -> npt.NDArray[np.float64]:
    """Gradient descent at the rate lr / (beta + sqrt(sum of squared gradients)), in doubles."""
    w, n = first.astype(np.float64), np.zeros(first.shape)
    for gradient in gradients.astype(np.float64):
        n += gradient**2
        w -= lr / (beta + np.sqrt(n)) * gradient
    return w


@pytest.mark.parametrize(("beta", "scale"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_ftrl_without_penalties_is_gradient_descent_from_0_and_with_beta_0_from_anywhere(
    beta: float, scale: float
) -> None:
    random = np.random.default_rng(3)
    first = (scale * random.standard_normal(16)).astype(np.float32)
    gradients = random.standard_normal((200, 16)).astype(np.float32)
    row = CoreRow(FTRL(lr=0.1, beta=beta), first)
    for gradient in gradients:
        row.update(gradient, 1)
    np.testing.assert_allclose(row.weights, descent(first, gradients, 0.1, beta), rtol=1e-4, atol=1e-5)


def test_ftrl_draws_a_first_weight_towards_0_by_what_the_docs_say() -> None:
    lr, beta, first, gradient = 0.1, 1.0, 0.75, 0.5
    row = CoreRow(FTRL(lr=lr, beta=beta), np.full(1, first, np.float32))
    row.update(np.full(1, gradient, np.float32), 1)
    drawn = abs(gradient) / (beta + abs(gradient)) * first
    np.testing.assert_allclose(row.weights, drawn - lr * gradient / (beta + abs(gradient)), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [FTRL(), FTRL(beta=0.0), FTRL(lambda1=1.0, lambda2=1.0)], ids=str)
def test_ftrl_leaves_a_weight_alone_whose_gradients_were_all_0(optimizer: FTRL) -> None:
    first = np.array([0.5, -0.25, 1e-30, 3.0], np.float32)
    row = CoreRow(optimizer, first)
    for _ in range(3):
        row.update(np.array([0.0, -0.0, 1e-30, 1.0], np.float32), 1)  # the square of 1e-30 is 0 in float32
        np.testing.assert_array_equal(row.weights[:3], first[:3])
    assert row.weights[3] != first[3]


def test_ftrl_makes_weights_exactly_0_within_its_l1_penalty() -> None:
    random = np.random.default_rng(4)
    row = CoreRow(FTRL(lr=0.1, lambda1=20.0), np.zeros(64, np.float32))
    zeros = []
    for _ in range(300):
        row.update(random.standard_normal(64).astype(np.float32), 1)
        z = row.blocks()["z"]
        np.testing.assert_array_equal(row.weights == 0.0, np.abs(z) <= 20.0)
        zeros.append(int((row.weights == 0.0).sum()))
    assert zeros[0] == 64
    assert 10 < zeros[-1] < 60


def test_ftrl_at_rate_0_changes_neither_weights_nor_state() -> None:
    row = CoreRow(FTRL(lr=0.1), np.ones(4, np.float32))
    row.update(np.ones(4, np.float32), 1)
    before = row.weights.copy(), row.state.copy()
    for rate in (0.0, 1e-46):
        row.update(np.full(4, 2.0, np.float32), 2, lr=rate)
        np.testing.assert_array_equal(row.weights, before[0])
        np.testing.assert_array_equal(row.state, before[1])


# ---------------------------------------------------------------- rmsprop


def test_centered_rmsprop_of_equal_gradients_is_finite_where_torch_is_not() -> None:
    row = CoreRow(RMSprop(centered=True, alpha=0.5, eps=1e-3), np.zeros(64, np.float32))
    gradient = np.linspace(0.1, 1.7, 64, dtype=np.float32)
    for _ in range(200):
        row.update(gradient, 1)
    blocks = row.blocks()
    assert (blocks["square_avg"] - blocks["grad_avg"] ** 2 < 0).any()  # what torch takes the root of
    assert np.isfinite(row.weights).all()


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
    way_out = ".* at rate 0 .*" if field == "lr" else ""
    with pytest.raises(
        ValueError, match=rf"^\[{cls.__name__}\] {field} is .*, expected a number in \[[^]]*\]{way_out}$"
    ):
        cls(**{field: value})


@pytest.mark.parametrize("cls", list(CLASSES.values()))
@pytest.mark.parametrize("lr", [0, 0.0, -0.0, np.float32(0), 1e-46])
def test_a_rate_that_is_0_as_float32_is_refused_with_the_ways_to_have_it_for_a_step(cls: Any, lr: Any) -> None:
    message = (
        f"[{cls.__name__}] lr is {lr!r}, expected a number in [1.1754944e-38, 3.4028235e+38], a schedule or a function"
        " of the step; for steps at rate 0 give apply_gradients(lr=0), set embedding.lr = 0, or let a schedule give it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cls(lr=lr)


def test_a_rate_of_0_is_taken_for_a_step_and_of_a_schedule(path: Path) -> None:
    ones, schedule = np.ones((1, 4), np.float32), de.CosineDecay(lr=0.0, decay_steps=10)
    with de.Storage(path, memory="16MiB") as storage:
        embedding = de.Embedding(storage, SGD(lr=schedule), de.Zeros(), 4, group=0)
        embedding.apply_gradients([1], ones)
        embedding.lr = 0.5
        embedding.apply_gradients([1], ones, lr=0)
        embedding.lr = 0
        embedding.apply_gradients([1], ones)
        assert not embedding.lookup([1]).any()


def test_a_group_that_is_stored_with_a_rate_of_0_opens_with_another(path: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        de.Embedding(storage, SGD(lr=de.CosineDecay(lr=0.0, decay_steps=10)), de.Ones(), 4, group=0).lookup([1])
    manifest = path / "generation-000001" / "MANIFEST"
    with_0 = manifest.read_bytes()
    with de.Storage(path, memory="16MiB") as storage:
        embedding = de.Embedding(storage, SGD(lr=0.5), de.Ones(), 4, group=0)
        embedding.apply_gradients([1], np.ones((1, 4), np.float32))
        assert (embedding.lookup([1]) == 0.5).all()
    assert manifest.read_bytes() != with_0


@pytest.mark.parametrize(("cls", "field"), FLOAT_FIELDS)
@pytest.mark.parametrize("value", ["0.1", True, np.True_, None, 1j, Decimal("0.1"), [0.1], np.zeros(1)])
def test_what_is_not_a_number_is_a_type_error(cls: Any, field: str, value: Any) -> None:
    expected = "a number, a schedule or a function of the step" if field == "lr" else "a number"
    with pytest.raises(TypeError, match=rf"^\[{cls.__name__}\] {field} is .*, expected {expected}$"):
        cls(**{field: value})


FLAGS = [(cls, field.name) for cls in CLASSES.values() for field in dataclasses.fields(cls) if field.type == "bool"]


@pytest.mark.parametrize(("cls", "field"), FLAGS)
@pytest.mark.parametrize("value", [1, 0.0, "True", None])
def test_a_flag_is_a_bool(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^\[{cls.__name__}\] {field} is .*, expected True or False$"):
        cls(**{field: value})
    usual = cls(**{field: np.False_})
    assert usual == cls()
    assert type(getattr(usual, field)) is bool


@pytest.mark.parametrize("cls", [cls for cls in CLASSES.values() if hasattr(cls, "eps")])
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
@pytest.mark.parametrize("cls", [Adam, AMSGrad, AdamW, Lion])
def test_bad_betas_are_named(cls: Any, betas: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^\[{cls.__name__}\] {message}"):
        cls(betas=betas)


@pytest.mark.parametrize(("cls", "field"), [(SGD, "momentum"), (RMSprop, "momentum"), (RMSprop, "alpha")])
def test_what_would_never_forget_is_refused(cls: Any, field: str) -> None:
    for value in (1.0, 1.0 - 1e-9):
        with pytest.raises(ValueError, match=rf"^\[{cls.__name__}\] {field} is .*, expected a number in \[0, 0.999"):
            cls(**{field: value})
        with pytest.raises(ValueError, match=rf"^\[optimizer {cls.name}\] {field} is .*, expected a number in"):
            _core.optimizer_state(cls.name, {field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nesterov": True}, "nesterov is .* with momentum 0.* and dampening 0.*, expected momentum above 0 and"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov is .* and dampening 0.5, expected"),
        ({"dampening": 0.5}, "dampening is 0.5 with momentum 0, expected momentum above 0"),
        ({"momentum": 0.9, "dampening": 1.5}, r"dampening is 1.5, expected a number in \[0, 1\]"),
    ],
)
def test_settings_of_momentum_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^\[SGD\] {message}"):
        SGD(**arguments)
    with pytest.raises(ValueError, match=rf"^\[optimizer sgd\] {message}"):
        _core.optimizer_state("sgd", {name: float(value) for name, value in arguments.items()})


@pytest.mark.parametrize(("value", "error"), [("rows", ValueError), ("", ValueError), (True, TypeError)])
def test_bad_bias_correction_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r'^\[Adam\] bias_correction is .*, expected "row" or "global"$'):
        Adam(bias_correction=value)


LARGEST, SMALLEST, BELOW_ONE = 3.4028234663852886e38, 1.1754943508222875e-38, 1.0 - 2.0**-24
ENDS: dict[str, tuple[Any, Any]] = {
    "lr": (SMALLEST, LARGEST),
    "momentum": (0, BELOW_ONE),
    "dampening": (0, 0),  # 1 with momentum, 0 without
    "alpha": (0, BELOW_ONE),
    "betas": ((0, 0), (BELOW_ONE, BELOW_ONE)),
    "eps": (SMALLEST, LARGEST),
    "nesterov": (False, True),
    "centered": (False, True),
    "bias_correction": ("row", "global"),
}


@pytest.mark.parametrize("cls", list(CLASSES.values()))
@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
def test_the_core_accepts_the_ends_of_every_range(cls: Any, end: int) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    optimizer = cls(**{field: ENDS.get(field, (0, LARGEST))[end] for field in fields})
    CoreRow(optimizer, np.ones(2, np.float32)).update(np.zeros(2, np.float32), 1)


def test_full_dampening_keeps_the_first_gradient_alone() -> None:
    row = CoreRow(SGD(lr=1.0, momentum=0.5, dampening=1.0), np.zeros(1, np.float32))
    for gradient in (1.0, 8.0, 8.0):
        row.update(np.array([gradient], np.float32), 1)
    assert row.weights == -1.75
    assert row.state == 0.25


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
