# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: their formulas, the step they are asked for, and functions of the caller's."""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import gc
import inspect
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import damo_embedding as de
import damo_embedding.optimizers as optimizers_module
import damo_embedding.schedules as schedules_module
import reference
from comparing import assert_equals_reference, reference_of
from damo_embedding import _core
from storage_server import Group, fork_server

f32 = np.float32
K = np.array([1, 2])
ONES = np.ones((2, 1), f32)

CLASSES: dict[str, Any] = {
    value.name: value
    for value in vars(schedules_module).values()
    if inspect.isclass(value) and issubclass(value, de.Schedule) and value is not de.Schedule
}
DECAYS = {name: cls for name, cls in CLASSES.items() if name != "linear_warmup"}
OPTIMIZERS = [
    value
    for value in vars(optimizers_module).values()
    if inspect.isclass(value) and issubclass(value, de.Optimizer) and value is not de.Optimizer
]
# One of each, with every setting of its own.
SCHEDULES: list[Any] = [
    de.ExponentialDecay(lr=0.5, decay_steps=7, decay_rate=0.7),
    de.PolynomialDecay(lr=0.5, decay_steps=12, end_lr=0.1, power=2.0),
    de.NaturalExponentialDecay(lr=0.5, decay_steps=7, decay_rate=0.7),
    de.InverseTimeDecay(lr=0.5, decay_steps=7, decay_rate=0.7),
    de.CosineDecay(lr=0.5, decay_steps=12),
    de.LinearCosineDecay(lr=0.5, decay_steps=13, num_periods=1.5, alpha=0.1, beta=0.01),
    de.LinearWarmup(warmup_steps=5, then=de.CosineDecay(lr=0.5, decay_steps=12), start_lr=0.1),
]


def kind(value: Any) -> str:
    """A name for a parameter: functions show their address, and every worker must give the same names."""
    return str(value) if isinstance(value, str | float) else type(value).__name__


def sgd(storage: de.Storage, lr: Any, group: int = 7) -> de.Embedding:
    """One weight a row that starts at 0, so that it is minus the sum of the rates of its updates by 1."""
    return de.Embedding(storage, de.SGD(lr=lr), de.Zeros(), dimension=1, group=group)


def trained(embedding: de.Embedding, updates: int) -> float:
    """How far that many updates move a weight."""
    before = embedding.lookup(K, insert=False)[0, 0]
    for _ in range(updates):
        embedding.apply_gradients(K, ONES)
    return float(before - embedding.lookup(K)[0, 0])


# ---------------------------------------------------------------- formulas


def test_every_schedule_of_the_core_has_a_dataclass_and_a_reference() -> None:
    assert set(_core.schedule_names()) == {*CLASSES, "constant"} == {*reference.SCHEDULES, "linear_warmup"}


def test_every_schedule_is_among_those_tested_here() -> None:
    assert {schedule.name for schedule in SCHEDULES} == set(CLASSES)


RATES = st.floats(0.0, 10.0)
FACTORS = st.floats(0.0, 4.0)
FIELDS = {
    "lr": RATES,
    "end_lr": RATES,
    "decay_steps": st.integers(1, 10_000),
    "decay_rate": FACTORS,
    "power": st.floats(0.125, 4.0),
    "num_periods": FACTORS,
    "alpha": FACTORS,
    "beta": FACTORS,
}


@pytest.mark.parametrize("name", DECAYS)
@given(data=st.data())
def test_rates_equal_the_formula(name: str, data: st.DataObject) -> None:
    cls = DECAYS[name]
    settings = {field.name: data.draw(FIELDS[field.name], field.name) for field in dataclasses.fields(cls)}
    schedule = cls(**settings)
    # The decays without an end are drawn where 4 ** (step / decay_steps) is a double.
    steps = st.integers(0, 100 * settings["decay_steps"]) | st.sampled_from([0, 1, settings["decay_steps"]])
    step = data.draw(steps, "step")
    expected = reference.SCHEDULES[name](step, **settings)
    assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert schedule(step) >= 0.0


@pytest.mark.parametrize("name", DECAYS)
def test_defaults_equal_those_of_the_formula(name: str) -> None:
    needed = {"lr": 0.5, "decay_steps": 10, "decay_rate": 0.5}
    settings = {
        field.name: needed[field.name]
        for field in dataclasses.fields(DECAYS[name])
        if field.default is dataclasses.MISSING
    }
    for step in (0, 3, 10, 11):
        expected = reference.SCHEDULES[name](step, **settings)
        assert DECAYS[name](**settings)(step) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", ["polynomial_decay", "cosine_decay", "linear_cosine_decay"])
def test_a_schedule_with_an_end_stays_there(name: str) -> None:
    schedule = DECAYS[name](lr=0.5, decay_steps=10)
    assert schedule(10) == schedule(11) == schedule(2**64 - 1)


def test_three_of_them_are_schedulers_of_torch() -> None:
    torch = pytest.importorskip("torch")
    steps = 40
    for ours, name, arguments in (
        (de.CosineDecay(lr=0.5, decay_steps=steps), "CosineAnnealingLR", {"T_max": steps}),
        (de.ExponentialDecay(lr=0.5, decay_steps=1, decay_rate=0.9), "ExponentialLR", {"gamma": 0.9}),
        (
            de.PolynomialDecay(lr=0.5, decay_steps=steps, end_lr=0.0, power=2.0),
            "PolynomialLR",
            {"total_iters": steps, "power": 2.0},
        ),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
        for step in range(steps):
            assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), (name, step)
            optimizer.step()
            scheduler.step()


THENS: list[Any] = [
    *SCHEDULES,
    0.25,
    lambda step: 0.5 / (1 + step),
    de.LinearWarmup(warmup_steps=3, then=lambda step: 0.5 / (1 + step)),
]


@pytest.mark.parametrize("then", THENS, ids=kind)
@pytest.mark.parametrize("start_lr", [0.0, 0.125, 2.0])
def test_a_warm_up_leads_to_where_the_next_schedule_begins(then: Any, start_lr: float) -> None:
    warmed = de.LinearWarmup(warmup_steps=8, then=then, start_lr=start_lr)
    following = then if callable(then) else lambda step: then
    for step in range(40):
        expected = reference.linear_warmup(step, 8, following, start_lr)
        assert warmed(step) == pytest.approx(expected, rel=1e-12)
    assert [warmed(8 + step) for step in range(20)] == [following(step) for step in range(20)]


OTHER = {
    "lr": 0.75,
    "end_lr": 0.25,
    "decay_steps": 8,
    "decay_rate": 0.25,
    "power": 3.0,
    "num_periods": 0.75,
    "alpha": 0.5,
    "beta": 0.5,
    "warmup_steps": 9,
    "start_lr": 0.25,
    "then": 0.25,
}


@pytest.mark.parametrize(
    ("schedule", "field"),
    [(schedule, field.name) for schedule in SCHEDULES for field in dataclasses.fields(schedule)],
    ids=str,
)
def test_changing_any_field_changes_the_rate(schedule: Any, field: str) -> None:
    assert dataclasses.replace(schedule, **{field: OTHER[field]})(4) != schedule(4)


@pytest.mark.parametrize(
    ("step", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)]
)
def test_a_step_that_is_none_is_refused(step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^\[schedule\] step is .*, expected"):
        SCHEDULES[0](step)


# ------------------------------------------------------- the step it is asked


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda step: 0.5 / (1 + step)], ids=kind)
def test_updates_follow_the_schedule_by_the_group_s_step_which_outlives_the_storage(path: Path, schedule: Any) -> None:
    optimizer = de.Adam(lr=schedule, weight_decay=0.01)
    table = None
    random = np.random.default_rng(5)
    for _ in range(3):
        with de.Storage(path, memory="16MiB", threads=2) as storage:
            embedding = de.Embedding(storage, optimizer, de.Uniform(-1.0, 1.0), dimension=4, group=7)
            if table is None:
                table = reference_of(embedding)
                table.lr = schedule
                table.now = storage.now = 1_700_000_000_000
            storage.now = table.now
            for _ in range(7):
                keys = random.integers(0, 20, 30)
                gradients = random.standard_normal((30, 4)).astype(f32)
                assert embedding.lr == schedule(table.step)
                embedding.apply_gradients(keys, gradients)
                table.apply_gradients(keys, gradients)
            assert_equals_reference(embedding, table)
    assert table.step == 21


@pytest.mark.parametrize("how", ["killed", "restored"])
def test_a_killed_or_restored_training_goes_on_with_its_schedule(tmp_path: Path, how: str) -> None:
    halving = de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5)
    groups = [Group(7, de.SGD(lr=halving), de.Zeros(), dimension=1)]
    with fork_server() as server:
        session = server.session()
        session("open", tmp_path / "s", groups, 0, memory="16MiB")
        for _ in range(3):
            session("embedding_call", 7, "apply_gradients", K, ONES)
        if how == "restored":
            session("storage_call", "checkpoint", tmp_path / "checkpoint")
            session("embedding_call", 7, "apply_gradients", K, ONES)
        session.kill()
        session = server.session()
        checkpoint = tmp_path / "checkpoint" if how == "restored" else None
        session("open", tmp_path / "s", groups, 0, checkpoint=checkpoint, memory="16MiB")
        session("embedding_call", 7, "apply_gradients", K, ONES)
        assert session("embedding_call", 7, "lookup", K).tolist() == [[-1.875], [-1.875]]
        session.leave()


def test_lookups_and_empty_batches_are_no_steps_of_a_schedule(storage: de.Storage) -> None:
    asked: list[int] = []
    embedding = sgd(storage, lambda step: asked.append(step) or 1.0)
    embedding.lookup(K)
    embedding.apply_gradients([], np.empty((0, 1), f32))
    assert asked == []
    embedding.apply_gradients(K, ONES)
    with pytest.raises(ValueError, match="NaN or infinite"):
        embedding.apply_gradients(K, ONES * np.nan)
    embedding.apply_gradients(K, ONES)
    assert asked == [0, 1]


def test_a_rate_given_for_a_step_goes_before_the_schedule_and_counts(storage: de.Storage) -> None:
    asked: list[int] = []
    embedding = sgd(storage, lambda step: asked.append(step) or 2.0**step)
    embedding.apply_gradients(K, ONES, lr=0.25)
    assert asked == []
    embedding.apply_gradients(K, ONES)
    assert asked == [1]
    assert embedding.lookup(K)[0, 0] == -2.25


def test_what_lr_was_set_to_goes_before_the_optimizer_s_and_can_be_taken_back(storage: de.Storage) -> None:
    schedule = de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5)
    embedding = sgd(storage, schedule)
    assert embedding.schedule == schedule
    assert trained(embedding, 2) == 1.5
    embedding.lr = 0.125
    assert (embedding.lr, embedding.schedule) == (0.125, None)
    assert trained(embedding, 2) == 0.25
    embedding.lr = lambda step: float(step)
    assert embedding.lr == 4.0
    assert trained(embedding, 2) == 9.0
    embedding.lr = embedding.optimizer.lr
    assert (embedding.lr, embedding.schedule) == (2.0**-6, schedule)
    assert trained(embedding, 1) == 2.0**-6


def test_a_number_may_be_set_to_a_schedule(storage: de.Storage) -> None:
    embedding = sgd(storage, 1.0)
    assert embedding.schedule is None
    embedding.lr = de.LinearWarmup(warmup_steps=2, then=0.5)
    assert trained(embedding, 4) == 0.25 + 0.5 + 0.5


def test_groups_count_their_own_steps(storage: de.Storage) -> None:
    first, second = (sgd(storage, lambda step: 2.0**step, group) for group in (1, 2))
    assert trained(first, 3) == 7.0
    assert trained(second, 1) == 1.0
    assert (first.lr, second.lr) == (8.0, 2.0)


# ------------------------------------------------------------------ sharing


def test_embeddings_of_one_group_share_the_rate(storage: de.Storage) -> None:
    schedule = de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5)
    first = sgd(storage, schedule)
    first.lr = 0.25
    second = sgd(storage, de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5))
    assert (second.lr, second.schedule) == (0.25, None)  # what was set stays
    second.lr = schedule
    assert trained(first, 1) == 1.0
    assert first.schedule == schedule


def rate(step: int) -> float:
    return 1.0 / (1 + step)


class Model:
    def rate(self, step: int) -> float:
        return 1.0 / (1 + step)


MODEL = Model()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rate, rate),
        (MODEL.rate, MODEL.rate),
        (de.LinearWarmup(warmup_steps=2, then=rate), de.LinearWarmup(warmup_steps=2, then=rate)),
        (1, 1.0),
    ],
    ids=kind,
)
def test_equal_rates_are_equal_settings(storage: de.Storage, first: Any, second: Any) -> None:
    assert sgd(storage, first).lr == sgd(storage, second).lr


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1e-3, rate),  # the default, which is what is stored for a function
        (rate, lambda step: 1.0 / (1 + step)),
        (MODEL.rate, Model().rate),
        (0.5, de.CosineDecay(lr=0.5, decay_steps=10)),
        (de.CosineDecay(lr=0.5, decay_steps=10), de.CosineDecay(lr=0.5, decay_steps=11)),
        (de.LinearWarmup(warmup_steps=2, then=0.5), de.LinearWarmup(warmup_steps=3, then=0.5)),
    ],
    ids=kind,
)
def test_another_schedule_in_one_run_is_refused(storage: de.Storage, first: Any, second: Any) -> None:
    embedding = sgd(storage, first)
    before = embedding.lr
    with pytest.raises(de.SchemaMismatchError, match=r"^\[embedding\] group 7 is open with"):
        sgd(storage, second)
    assert embedding.lr == before
    assert sgd(storage, first).lr == before


def test_another_schedule_may_be_given_in_the_next_run(path: Path) -> None:
    total = 0.0
    for lr in (
        0.5,
        de.ExponentialDecay(lr=0.5, decay_steps=1, decay_rate=2.0),
        rate,
        de.CosineDecay(lr=1, decay_steps=9),
    ):
        with de.Storage(path, memory="16MiB") as storage:
            embedding = sgd(storage, lr)
            expected = lr(embedding.step) if callable(lr) else lr
            assert embedding.lr == expected
            total += expected
            embedding.apply_gradients(K, ONES)
            assert embedding.lookup(K)[0, 0] == pytest.approx(-total, rel=1e-6)


def test_a_group_made_anew_after_it_was_dropped_has_the_rate_it_is_opened_with(storage: de.Storage) -> None:
    old = sgd(storage, de.CosineDecay(lr=1.0, decay_steps=10))
    old.apply_gradients(K, ONES)
    storage.drop_group(7)
    new = sgd(storage, rate)
    assert (new.lr, new.step, new.schedule) == (1.0, 0, rate)
    assert trained(new, 2) == 1.5
    with pytest.raises(ValueError, match=r"group 7 was dropped"):
        old.apply_gradients(K, ONES)


def test_what_is_stored_is_the_rate_a_schedule_starts_from(path: Path) -> None:
    manifest = path / "generation-000001" / "MANIFEST"

    def stored(lr: Any) -> bytes:
        with de.Storage(path, memory="16MiB") as storage:
            sgd(storage, lr)
        return manifest.read_bytes()

    half, default = stored(0.5), stored(1e-3)
    assert half != default
    assert stored(de.CosineDecay(lr=0.5, decay_steps=10)) == half
    assert stored(de.LinearWarmup(warmup_steps=3, then=de.LinearWarmup(warmup_steps=3, then=0.5))) == half
    assert stored(rate) == default
    assert stored(de.LinearWarmup(warmup_steps=3, then=rate)) == default


# ---------------------------------------------------------------- functions


class Surprise(Exception):
    pass


def raises(step: int) -> float:
    raise Surprise(f"no rate for step {step}")


BAD_RATES: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (math.nan, ValueError, "group 7 gives nan for step 0, expected a number in"),
    "infinite": (math.inf, ValueError, "gives inf for step 0"),
    "negative": (-1e-9, ValueError, "gives -1e-09 for step 0"),
    "beyond float32": (1e39, ValueError, r"gives 1e\+39 for step 0"),
    "beyond a double": (10**400, ValueError, "gives inf for step 0"),
    "a NumPy NaN": (f32("nan"), ValueError, "gives nan for step 0"),
    "None": (None, TypeError, r"gives None \(NoneType\) for step 0, expected a number"),
    "a text": ("0.1", TypeError, r"gives '0.1' \(str\) for step 0"),
    "a bool": (True, TypeError, r"gives True \(bool\) for step 0"),
    "a NumPy bool": (np.True_, TypeError, r"\(bool.*\) for step 0"),
    "complex": (1j, TypeError, r"gives 1j \(complex\) for step 0"),
    "a list": ([0.1], TypeError, r"gives \[0.1\] \(list\) for step 0"),
    "two numbers": (np.zeros(2), TypeError, "0-dimensional|length-1"),
}


def refuses(embedding: de.Embedding, error: type[Exception], message: str) -> None:
    storage = embedding.storage
    before = embedding.step, len(embedding), storage.stats()["sequence"], storage.stats()["log_bytes"]
    weights = embedding.lookup(K, insert=False).tobytes()
    for call in (lambda: embedding.apply_gradients(K, ONES), lambda: embedding.lr):
        with pytest.raises(error, match=message):
            call()
        assert (embedding.step, len(embedding), storage.stats()["sequence"], storage.stats()["log_bytes"]) == before
        assert embedding.lookup(K, insert=False).tobytes() == weights


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "after a warm-up"])
@pytest.mark.parametrize("what", BAD_RATES)
def test_a_function_that_gives_no_rate_is_refused_and_nothing_is_applied(
    storage: de.Storage, what: str, inside: bool
) -> None:
    bad, error, message = BAD_RATES[what]
    function: Any = lambda step: bad  # noqa: E731
    embedding = sgd(storage, de.LinearWarmup(warmup_steps=1, then=function) if inside else function)
    if inside:
        embedding.apply_gradients(K, ONES, lr=1.0)  # the warm-up's one update
        message = message.replace("for step 0", "for step [01]")  # the function's own step 0, the group's step 1
    refuses(embedding, error, message)
    embedding.lr = 1.0
    assert trained(embedding, 1) == 1.0


def test_what_a_function_raises_comes_out_of_the_update_and_nothing_is_applied(storage: de.Storage) -> None:
    embedding = sgd(storage, raises)
    refuses(embedding, Surprise, "^no rate for step 0$")
    embedding.apply_gradients(K, ONES, lr=0.5)
    refuses(embedding, Surprise, "^no rate for step 1$")
    assert embedding.step == 1


def test_a_function_of_other_arguments_is_a_type_error_of_the_update(storage: de.Storage) -> None:
    refuses(sgd(storage, lambda: 1.0), TypeError, "takes 0 positional arguments but 1 was given")


@pytest.mark.parametrize(
    "number", [1, 0.5, f32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2), Decimal("0.5"), np.array(0.5)], ids=kind
)
def test_a_function_may_give_a_number_of_any_kind(storage: de.Storage, number: Any) -> None:
    assert trained(sgd(storage, lambda step: number), 2) == 2 * float(number)


def test_a_function_may_give_a_tensor(storage: de.Storage) -> None:
    torch = pytest.importorskip("torch")
    assert trained(sgd(storage, lambda step: torch.tensor(0.5)), 2) == 1.0


class Callables:
    def __call__(self, step: int) -> float:
        return 0.5

    def method(self, step: int) -> float:
        return 0.5

    @staticmethod
    def static(step: int) -> float:
        return 0.5


class Slotted:
    __slots__ = ()

    def __call__(self, step: int) -> float:
        return 0.5


class Own(de.Schedule):
    """A subclass is a function like any other."""

    def __call__(self, step: int) -> float:
        return 0.5


class Changed(de.CosineDecay):
    def __call__(self, step: int) -> float:
        return 2 * super().__call__(step)


@pytest.mark.parametrize(
    "function",
    [
        lambda step: 0.5,
        functools.partial(lambda lr, step: lr, 0.5),
        Callables(),
        Callables().method,
        Callables.static,
        Slotted(),
        [0.5, 0.5, 0.5].__getitem__,
        Own(),
        Changed(lr=0.25, decay_steps=10**9),
    ],
    ids=kind,
)
def test_anything_that_can_be_called_with_a_step_is_a_function(storage: de.Storage, function: Any) -> None:
    embedding = sgd(storage, function)
    assert embedding.schedule == function
    assert trained(embedding, 2) == 1.0


def test_a_function_is_called_with_an_int(storage: de.Storage) -> None:
    kinds: list[type] = []
    sgd(storage, lambda step: kinds.append(type(step)) or 1.0).apply_gradients(K, ONES)
    assert kinds == [int]


USES: dict[str, Callable[[de.Embedding], object]] = {
    "lookup": lambda e: e.lookup(K),
    "lookup without insert": lambda e: e.lookup(K, insert=False),
    "apply_gradients": lambda e: e.apply_gradients(K, ONES, lr=1.0),
    "stats": lambda e: e.storage.stats(),
    "now": lambda e: e.storage.now,
    "commit": lambda e: e.storage.commit(),
    "close": lambda e: e.storage.close(),
    "embedding": lambda e: sgd(e.storage, 1.0, 8),
}


@pytest.mark.parametrize("what", USES)
def test_a_function_that_uses_its_storage_is_told_and_nothing_is_applied(storage: de.Storage, what: str) -> None:
    embedding = sgd(storage, lambda step: USES[what](embedding) and 1.0)
    with pytest.raises(ValueError, match=rf"^\[{what.split()[0]}\] called by a learning-rate schedule"):
        embedding.apply_gradients(K, ONES)
    assert (embedding.step, len(embedding)) == (0, 0)
    embedding.lr = 1.0
    assert trained(embedding, 1) == 1.0


def test_a_function_may_look_at_the_step_and_set_the_rate(storage: de.Storage) -> None:
    seen: list[tuple[int, int, int]] = []

    def function(step: int) -> float:
        seen.append((step, embedding.step, len(embedding)))
        embedding.lr = 0.25  # of the next updates
        return 1.0

    embedding = sgd(storage, function)
    assert trained(embedding, 3) == 1.5
    assert seen == [(0, 0, 0)]


# ------------------------------------------------------------------ threads


def run_all(*works: Callable[[], None], patience: float = 30.0) -> None:
    """Runs them at once; who is not back in time hangs. With the interpreter lock, perhaps: then the watch, which
    does without, ends the process and shows where everybody is."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))
    faulthandler.dump_traceback_later(2 * patience, exit=True, file=sys.__stderr__)

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    faulthandler.cancel_dump_traceback_later()
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.fixture
def short_turns() -> Any:
    """The interpreter changes threads all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_that_update_at_once_get_one_step_each_and_nobody_hangs(storage: de.Storage, short_turns: None) -> None:
    asked: list[int] = []

    def function(step: int) -> float:
        asked.append(step)
        sum(range(500))  # long enough to be interrupted
        return 1.0 if step % 2 else 3.0

    followed, other = sgd(storage, function, 1), sgd(storage, 1.0, 2)
    updates, threads = 60, 4
    at_work = [object()] * threads

    def update() -> None:
        try:
            for _ in range(updates):
                followed.apply_gradients(K, ONES)
                other.apply_gradients(K, ONES)
        finally:
            at_work.pop()

    def create() -> None:  # waits for the operations without the interpreter lock, then wants it
        for key in range(1000, 1400):
            followed.lookup([key])

    def look() -> None:  # holds the interpreter lock and asks for what needs no operation
        while at_work:
            assert len(followed) >= 0
            assert followed.lr in (1.0, 3.0)
            assert 0 <= followed.step <= updates * threads
            storage.stats()

    run_all(*[update] * threads, create, look, look)
    total = updates * threads
    # `look` asks, too, so a step may come up more often. That each update got its own shows in the sum of the rates.
    assert set(asked) >= set(range(total))
    assert followed.step == other.step == total
    assert followed.lookup(K)[0, 0] == -2.0 * total


# While an update waits in its schedule with the order lock, another thread uses each verb, and must let go of the
# interpreter lock before it waits: else nobody could let the update go on.
CHILD = """
import sys, threading, time
import numpy as np
import damo_embedding as de

path, = sys.argv[1:]
keys, ones = np.array([1, 2]), np.ones((2, 1), np.float32)
storage = de.Storage(path + "/s", memory="16MiB")
embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=1, group=7)
other = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=1, group=8)
few = de.CountingBloomFilter(capacity=10, count=1)
filtered = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=1, group=10, admission=few)
batch = storage._core.forward_many([(other._table, keys, ones.copy(), None)], True, False)[0]
numbers = iter(range(10**6))

def leave(path):
    lost = de.Storage(path, memory="16MiB")
    de.Embedding(lost, de.SGD(), de.Zeros(), dimension=1, group=7).apply_gradients(keys, ones)

verbs = {
    "Embedding": lambda: de.Embedding(storage, de.SGD(), de.Zeros(), dimension=1, group=9),
    "lookup": lambda: other.lookup([next(numbers) + 1000]),
    "lookup without insert": lambda: other.lookup([next(numbers) + 1000], insert=False),
    "apply_gradients": lambda: other.apply_gradients(keys, ones),
    "apply_gradients of the same group": lambda: embedding.apply_gradients(keys, ones, lr=1.0),
    "backward_many": lambda: storage._core.backward_many([(other._table, [(batch, ones)], None)]),
    "backward": lambda: other._table.backward([(batch, ones)]),
    "merge": lambda: other._table.merge([(batch, ones)]),
    "erase": lambda: other.erase(keys),
    "contains": lambda: other.contains(keys),
    "inspect": lambda: other.inspect(1),
    "prefetch": lambda: other.prefetch(keys),
    "scan": lambda: list(other.scan()),
    "len": lambda: len(other),
    "repr": lambda: repr(embedding),
    "step": lambda: embedding.step,
    "schedule": lambda: embedding.schedule,
    "lr": lambda: setattr(embedding, "lr", 1.0) or embedding.lr,
    "commit": lambda: storage.commit(),
    "last_commit": lambda: storage.last_commit,
    "checkpoint": lambda: storage.checkpoint(path + "/checkpoint"),
    "dump": lambda: storage.dump(path + "/dump"),
    "groups": lambda: storage.groups(),
    "stats": lambda: storage.stats(),
    "now": lambda: setattr(storage, "now", storage.now),
    "ttl": lambda: embedding.ttl,
    "admission": lambda: embedding.admission,
    "filtered lookup": lambda: filtered.lookup([next(numbers) + 1000]),
    "check": lambda: filtered.admission.check(keys),
    "estimate": lambda: filtered.admission.estimate(keys),
    "fill": lambda: (filtered.admission.fill, filtered.admission.estimated_fpr, len(filtered.admission)),
    "expire": lambda: storage.expire(),
    "compact": lambda: storage.compact(),
    "import_rows": lambda: other.import_rows(keys, ones),
    "drop_group": lambda: storage.drop_group(9),
    "checkpoints": lambda: de.Storage.checkpoints(path),
    "verify": lambda: storage.verify(),
    "closed": lambda: storage.closed,
    "read_only": lambda: storage.read_only,
    "path": lambda: storage.path,
    "the end of another storage": lambda: leave(path + "/t"),
    "close": lambda: storage.close(),
}
members = {*vars(de.Storage), *vars(de.Embedding)}
fixed = {"create", "open", "restore", "open_or_restore", "restored_from", "salvage", "storage", "optimizer"}
fixed |= {"initializer", "dimension", "group", "name", "seed"}
forgotten = {name for name in members if not name.startswith("_")} - fixed - set(verbs)
assert not forgotten, forgotten

for verb, use in verbs.items():
    print(verb, end=" ", flush=True)
    inside, let_go = threading.Event(), threading.Event()

    def function(step):
        inside.set()
        let_go.wait()
        return 1.0

    embedding.lr = function
    threads = [threading.Thread(target=work) for work in (lambda: embedding.apply_gradients(keys, ones), use)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    time.sleep(0.05)
    let_go.set()
    for thread in threads:
        thread.join()
print("done", flush=True)
"""


def test_no_verb_waits_for_an_update_while_it_holds_the_interpreter_lock(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
        raise AssertionError(f"hangs at the last of: {output}") from None
    assert child.returncode == 0, errors
    assert not errors
    assert output.split()[-1] == "done"


def test_a_rate_set_while_updates_run_is_taken_by_one_of_them_and_nobody_hangs(
    storage: de.Storage, short_turns: None
) -> None:
    embedding = sgd(storage, lambda step: 1.0)
    done = threading.Event()

    def update() -> None:
        try:
            for _ in range(300):
                embedding.apply_gradients(K, ONES)
        finally:
            done.set()

    def change() -> None:
        while not done.is_set():
            embedding.lr = lambda step: 1.0
            embedding.lr = 1.0
            embedding.lr = de.LinearWarmup(warmup_steps=1, then=lambda step: 1.0, start_lr=1.0)

    run_all(update, change, change)
    assert embedding.lookup(K)[0, 0] == -300.0


def test_storages_that_are_collected_by_a_function_are_closed(tmp_path: Path) -> None:
    class Cycle:
        pass

    def collect(step: int) -> float:
        gc.collect()
        return 1.0

    with de.Storage(tmp_path / "a", memory="16MiB") as storage:
        embedding = sgd(storage, collect)
        lost = Cycle()
        lost.itself = lost  # type: ignore[attr-defined]
        lost.embedding = sgd(de.Storage(tmp_path / "b", memory="16MiB"), 1.0)  # type: ignore[attr-defined]
        trained(lost.embedding, 3)  # type: ignore[attr-defined]
        gc.disable()
        try:
            del lost
            embedding.apply_gradients(K, ONES)
        finally:
            gc.enable()
        with de.Storage(tmp_path / "b", memory="16MiB") as reopened:
            assert reopened.stats()["redone_records"] == 0
            assert sgd(reopened, 1.0).step == 3


# ---------------------------------------------------------------- lifetimes


class Trainer:
    """A function that knows its storage: collected with it, or nothing would ever close the storage."""

    def __init__(self, path: Path, warmed: bool) -> None:
        self.storage = de.Storage(path, memory="16MiB")
        lr = de.LinearWarmup(warmup_steps=1, then=self.rate) if warmed else self.rate
        self.embedding = sgd(self.storage, lr)

    def rate(self, step: int) -> float:
        return 0.5


@pytest.mark.parametrize("warmed", [False, True])
def test_a_storage_whose_function_knows_it_is_collected_and_closed(path: Path, warmed: bool) -> None:
    trainer = Trainer(path, warmed)
    trainer.embedding.apply_gradients(K, ONES)
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    with de.Storage(path, memory="16MiB") as storage:  # else: open already
        assert sgd(storage, 1.0).step == 1


def test_a_function_lives_until_another_rate_is_set(storage: de.Storage) -> None:
    class Function:
        def __call__(self, step: int) -> float:
            return 0.5

    function = Function()
    gone = weakref.ref(function)
    embedding = sgd(storage, 1.0)
    embedding.lr = function
    del function
    gc.collect()
    assert trained(embedding, 2) == 1.0
    embedding.lr = 1.0
    gc.collect()
    assert gone() is None


def test_a_function_outlives_its_embedding_but_not_the_storage(path: Path) -> None:
    class Function:
        def __call__(self, step: int) -> float:
            return 0.5

    storage = de.Storage(path, memory="16MiB")
    function = Function()
    gone = weakref.ref(function)
    embedding = sgd(storage, 1.0)
    embedding.lr = function
    del function, embedding
    gc.collect()
    again = sgd(storage, 1.0)
    assert trained(again, 2) == 1.0
    storage.close()
    del storage, again
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------ the dataclasses


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("lr", [SCHEDULES[0], SCHEDULES[-1], rate], ids=kind)
def test_every_optimizer_takes_a_schedule_where_a_number_would_stand(cls: Any, lr: Any) -> None:
    optimizer = cls(lr=lr)
    assert optimizer == cls(lr=lr)
    assert hash(optimizer) == hash(cls(lr=lr))
    assert optimizer != cls()
    assert optimizer.lr == lr
    assert repr(lr) in repr(optimizer)
    expected = cls()._settings() if lr is rate else cls(lr=0.5)._settings()
    assert optimizer._settings() == expected


@pytest.mark.parametrize(
    "lr", ["0.1", True, np.True_, None, 1j, Decimal("0.1"), [0.1], np.zeros(1), de.CosineDecay, float], ids=kind
)
@pytest.mark.parametrize("cls", [*OPTIMIZERS, de.LinearWarmup], ids=lambda cls: cls.__name__)
def test_what_is_no_rate_is_a_type_error(cls: Any, lr: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^\[{cls.__name__}\] (lr|then) is .*, expected a number, a schedule or a function"
    ):
        cls(warmup_steps=1, then=lr) if cls is de.LinearWarmup else cls(lr=lr)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_are_frozen_values_with_keyword_arguments(schedule: Any) -> None:
    assert schedule == dataclasses.replace(schedule)
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.lr = 1.0
    with pytest.raises(TypeError, match="positional"):
        type(schedule)(0.5)
    assert eval(repr(schedule), vars(de)) == schedule


NUMBERS = [
    (schedule, field.name)
    for schedule in SCHEDULES
    for field in dataclasses.fields(schedule)
    if field.name not in ("then", "decay_steps", "warmup_steps")
]


@pytest.mark.parametrize(("schedule", "field"), NUMBERS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, 1e39, 10**400])
def test_numbers_out_of_range_are_named_with_the_range(schedule: Any, field: str, value: Any) -> None:
    name = type(schedule).__name__
    with pytest.raises(ValueError, match=rf"^\[{name}\] {field} is .*, expected a number in \[.*\]$"):
        dataclasses.replace(schedule, **{field: value})


@pytest.mark.parametrize(("schedule", "field"), NUMBERS, ids=str)
@pytest.mark.parametrize("value", ["0.1", True, None, 1j])
def test_what_is_not_a_number_is_a_type_error(schedule: Any, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^\[{type(schedule).__name__}\] {field} is .*, expected a number$"):
        dataclasses.replace(schedule, **{field: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-5, ValueError), (2**53 + 1, ValueError), (1.0, TypeError), (True, TypeError), ("9", TypeError)],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_steps_are_whole_and_at_least_one(schedule: Any, value: Any, error: type[Exception]) -> None:
    field = "warmup_steps" if isinstance(schedule, de.LinearWarmup) else "decay_steps"
    with pytest.raises(error, match=rf"^\[{type(schedule).__name__}\] {field} is .*, expected"):
        dataclasses.replace(schedule, **{field: value})
    assert dataclasses.replace(schedule, **{field: np.int64(6)}) == dataclasses.replace(schedule, **{field: 6})
