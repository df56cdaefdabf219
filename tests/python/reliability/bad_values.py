# SPDX-License-Identifier: Apache-2.0
"""The values that the bad-input matrices try, and the rules: which of them are right for an argument."""

from __future__ import annotations

import datetime
import decimal
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de

DIMENSION = 4
MANY = 2**64


def values() -> list[Any]:
    """Wrong for most arguments, right for a few."""
    f32 = np.float32
    broken = np.ones((2, DIMENSION), f32)
    broken[1, 2] = np.nan
    locked = np.ones((2, DIMENSION), f32)
    locked.flags.writeable = False
    return [
        None, True, False, 0, 1, -1, 3, 255, 256, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, MANY - 1, MANY, -(2**63) - 1,
        10**40, 10**400, 0.0, 0.5, 1.0, 1.5, -0.5, 1e39, 1e308, math.nan, math.inf, -math.inf, 1j, decimal.Decimal(1),
        "", "x", "user", "\0", "a\0b", "1GiB", "-1GiB", "1e9", "one", "1 TiBs", "logged", "zeros", "é" * 200, "/" * 300,
        "n" * 5_000, "9" * 400, "/no/such/place/at/all", "\ud800", "True", "False",
        b"", b"x", b"\xff\xfe", bytearray(b"x"), memoryview(b"x"),
        [], [1, 2], [1.5], ["1"], [None], [[1], [2, 3]], [[1, 2]], (), (1,), {}, {"a": 1}, {1, 2}, range(2), iter([1]),
        object(), int, len, lambda: None, datetime.date(2020, 1, 1), Path("/no/such/place/at/all"), Path(""), ...,
        np.int8(1), np.int64(-1), np.uint64(MANY - 1), f32(0.5), np.float64(np.nan), np.bool_(True), np.str_("x"),
        np.datetime64("2020-01-01"), np.array(1), np.array([], np.float64), np.array([1.0]), np.array([1 + 1j]),
        np.array(True), np.array([True]), np.array([True, False]),
        np.array(["a", "b"]), np.array([b"a"]), np.array([object()]), np.array([1, None]),
        np.array([MANY], object), np.array([1, 2], ">i8"), np.array(["2020-01-01"], "M8[D]"),
        np.array([(1, 2)], "i4,i4"),
        np.ones((2, DIMENSION)), np.ones((2, DIMENSION), np.float16), np.ones((2, DIMENSION), np.int64),
        np.ones((2, DIMENSION), f32), np.ones((2, DIMENSION), ">f4"), np.ones((2, DIMENSION + 1), f32),
        np.ones((3, DIMENSION), f32), np.ones((DIMENSION, 2), f32).T, np.ones((2, 2 * DIMENSION), f32)[:, ::2],
        np.ones(2 * DIMENSION, f32), np.ones((2, DIMENSION, 1), f32), np.ones((0, DIMENSION), f32), broken,
            np.full_like(broken, -np.inf),
        locked, np.ma.masked_array([1, 2], [True, False]), np.ones((2, 2), np.int64).view(np.recarray),
        de.SGD(lr=0.1), de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), de.Zeros(), de.SGD, de.Zeros, de.StorageError("x"),
    ]  # fmt: skip


Rule = Callable[[Any], bool]

# ------------------------------------------------------------------ in general


def nothing(value: Any) -> bool:
    return False


def one_of(*right: Any) -> Rule:
    return lambda value: any(value is one or (type(value) is type(one) and value == one) for one in right)


def either(*rules: Rule) -> Rule:
    return lambda value: any(rule(value) for rule in rules)


def or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def is_integer(value: Any, low: int = -(10**400), high: int = 10**400) -> bool:
    if isinstance(value, bool) or getattr(value, "shape", ()) != () or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        return low <= operator.index(value) <= high
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return False


def integer(low: int, high: int) -> Rule:
    return lambda value: is_integer(value, low, high)


def number(low: float, high: float) -> Rule:
    def right(value: Any) -> bool:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            return False
        try:
            return low <= float(value) <= high
        except OverflowError:
            return False

    return right


at_least_0 = number(0, 3.4e38)
above_0 = number(1.2e-38, 3.4e38)  # as float32
below_1 = number(0, 1 - 2**-24)
any_float = number(-3.4e38, 3.4e38)
flag = one_of(True, False)
flag_of_any_library: Rule = lambda value: isinstance(value, bool | np.bool_)  # noqa: E731
any_text: Rule = lambda value: isinstance(value, str)  # noqa: E731
text_with_utf8: Rule = lambda value: isinstance(value, str) and value != "\ud800"  # noqa: E731


def is_relative(value: Any) -> bool:
    """A path that could be made where the test stands. One that is of other places is wrong, for none is there."""
    try:
        path = os.fspath(value)
    except TypeError:
        return False
    return (
        text_with_utf8(path)
        and path != ""
        and "\0" not in path
        and len(os.path.basename(path)) < 256
        and "/" not in path
    )


def is_place(value: Any) -> bool:
    """The name of a place, at which there need be nothing."""
    return isinstance(value, str | Path) and text_with_utf8(str(value)) and str(value) != "" and "\0" not in str(value)


# ------------------------------------------------------------------- of options


def size(value: Any) -> bool:
    """Bytes of a budget that is refused neither as too small nor as too large."""
    if isinstance(value, str):
        return value == "1GiB"
    return is_integer(value, 2**24, 2**48 - 1)


def ttl(value: Any) -> bool:
    """None, seconds, a length of time."""
    return value is None or is_integer(value, 1, 2**40) or isinstance(value, datetime.timedelta)


def rate(value: Any) -> bool:
    """A number, or what can be called with a step: what it gives is looked at when it is asked."""
    return at_least_0(value) or (callable(value) and not isinstance(value, type))


def rate_of_optimizer(value: Any) -> bool:
    """A rate, but not 0 as float32: that is for single steps."""
    return rate(value) and (callable(value) or above_0(value))


def rate_of_function(value: Any) -> bool:
    """What is as good as a number, for it says so."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__float__"):
        return False
    try:
        return 0 <= float(value) <= 3.4e38
    except (TypeError, ValueError, OverflowError):
        return False


number_of_group = integer(0, 255)
name_of_group: Rule = lambda value: text_with_utf8(value) and 1 <= len(value.encode()) <= 255  # noqa: E731
step_of_training = or_none(integer(0, 2**63 - 1))
extra = or_none(lambda value: isinstance(value, bytes) or text_with_utf8(value))
keep = or_none(integer(1, 2**31 - 1))
# Of the one group that the storages of the matrices have.
the_group = either(one_of("user"), integer(255, 255))

OPENING: dict[str, Rule] = {
    "memory": size,
    "durability": one_of("commit", "logged", "durable"),
    "threads": or_none(integer(1, 1024)),
    "log_bytes": either(one_of(None, "1GiB"), integer(2**20, 2**62 - 1)),
    "ttl": ttl,
    "disk": or_none(integer(2**32, 2**62 - 1)),
}

EMBEDDING: dict[str, Rule] = {
    "storage": nothing,
    "optimizer": lambda value: isinstance(value, de.SGD | de.Adam),
    "initializer": lambda value: isinstance(value, de.Uniform | de.Zeros),
    "dimension": integer(1, 4096),
    "group": either(number_of_group, name_of_group),
    "seed": integer(0, MANY - 1),
    "ttl": ttl,
    "admission": one_of(None, "all"),
}

# ------------------------------------------------- of optimizers and their kin

_STEPS = integer(1, 2**53)
_ADAM: dict[str, Rule] = {
    "lr": rate_of_optimizer,
    "betas": nothing,  # of the values above
    "eps": above_0,
    "weight_decay": at_least_0,
}
_ADAGRAD: dict[str, Rule] = {
    "lr": rate_of_optimizer,
    "lr_decay": at_least_0,
    "weight_decay": at_least_0,
    "initial_accumulator_value": at_least_0,
    "eps": above_0,
}
_NORMAL: dict[str, Rule] = {"mean": number(-1e37, 1e37), "std": number(0, 1e37)}
_RATED: dict[str, Rule] = {"lr": at_least_0, "decay_steps": _STEPS, "decay_rate": at_least_0}
_FROM = {"lr": 0.1, "decay_steps": 10}

# What each needs, and what is right for each of its arguments.
SETTINGS: dict[Any, tuple[dict[str, Any], dict[str, Rule]]] = {
    de.SGD: (
        {"momentum": 0.5},  # without it, dampening and nesterov are wrong
        {
            "lr": rate_of_optimizer,
            "momentum": below_1,
            "dampening": number(0, 1),
            "weight_decay": at_least_0,
            "nesterov": flag_of_any_library,
        },
    ),
    de.Adagrad: ({}, _ADAGRAD),
    de.RowWiseAdagrad: ({}, _ADAGRAD),
    de.Adam: ({}, {**_ADAM, "bias_correction": nothing}),
    de.AMSGrad: ({}, _ADAM),
    de.AdamW: ({}, _ADAM),
    de.Lion: ({}, {"lr": rate_of_optimizer, "betas": nothing, "weight_decay": at_least_0}),
    de.RMSprop: (
        {},
        {
            "lr": rate_of_optimizer,
            "alpha": below_1,
            "eps": above_0,
            "weight_decay": at_least_0,
            "momentum": below_1,
            "centered": flag_of_any_library,
        },
    ),
    de.FTRL: ({}, {"lr": rate_of_optimizer, "beta": at_least_0, "lambda1": at_least_0, "lambda2": at_least_0}),
    de.Constant: ({"value": 1.0}, {"value": any_float}),
    de.Uniform: ({"low": -1.0, "high": 1.0}, {"low": number(-3.4e38, 0.9), "high": number(-0.9, 3.4e38)}),
    de.Normal: ({}, _NORMAL),
    de.TruncatedNormal: ({}, _NORMAL),
    de.XavierUniform: ({}, {"gain": number(1.2e-38, 1e37)}),
    de.XavierNormal: ({}, {"gain": number(1.2e-38, 1e37)}),
    de.KaimingUniform: ({}, {"a": number(0, 1e37)}),
    de.KaimingNormal: ({}, {"a": number(0, 1e37)}),
    de.ExponentialDecay: ({**_FROM, "decay_rate": 0.5}, _RATED),
    de.NaturalExponentialDecay: ({**_FROM, "decay_rate": 0.5}, _RATED),
    de.InverseTimeDecay: ({**_FROM, "decay_rate": 0.5}, _RATED),
    de.PolynomialDecay: (_FROM, {"lr": at_least_0, "decay_steps": _STEPS, "end_lr": at_least_0, "power": above_0}),
    de.CosineDecay: (_FROM, {"lr": at_least_0, "decay_steps": _STEPS}),
    de.LinearCosineDecay: (
        _FROM,
        {"decay_steps": _STEPS} | {name: at_least_0 for name in ("lr", "num_periods", "alpha", "beta")},
    ),
    de.LinearWarmup: (
        {"warmup_steps": 10, "then": 0.1},
        {"warmup_steps": _STEPS, "then": rate, "start_lr": at_least_0},
    ),
    de.Steps: ({"count": 10}, {"count": integer(1, 2**30)}),
    de.CountingBloomFilter: (
        {"capacity": 100},
        {
            "capacity": integer(1, 2**40),
            "count": integer(1, 15),
            "fpr": number(1e-9, 0.5),
            "path": or_none(is_relative),
            "reload": flag,
            "halve_every": or_none(integer(1, 2**63 - 1)),
        },
    ),
}

# -------------------------------------------------------------------- of arrays


def keys(value: Any) -> bool:
    """What NumPy makes an array of integers of."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return False
    if array.size == 0 and not isinstance(value, np.ndarray) and array.dtype == np.float64:
        return True
    return array.dtype.kind in "iu" and array.dtype.isnative


def two_keys(value: Any) -> bool:
    return keys(value) and np.asarray(value).shape == (2,)


def two_counts(value: Any) -> bool:
    if value is None:
        return True
    array = np.asarray(value) if not isinstance(value, list) or value == [1, 2] else np.empty(0)
    return array.dtype.kind in "iu" and array.shape == (2,)


def gradients(value: Any) -> bool:
    """Of two keys; weights as well."""
    array = np.asarray(value) if isinstance(value, np.ndarray) else None
    return (
        array is not None
        and array.dtype == np.float32
        and array.shape == (2, DIMENSION)
        and bool(np.isfinite(array).all())
    )


def output(value: Any) -> bool:
    """Of two keys."""
    return value is None or (
        isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.dtype.isnative
        and value.shape == (2, DIMENSION)
        and value.flags.c_contiguous
        and value.flags.writeable
    )


def hashable(value: Any) -> bool:
    """One value of a column: text, bytes, an integer of 64 bits, or nothing."""
    return value is None or isinstance(value, str | bytes) or is_integer(value, -(2**63), MANY - 1)


def column(value: Any) -> bool:
    """What `hash_keys` takes."""
    if isinstance(value, list | tuple):
        return all(map(hashable, value))
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return False
    if value.dtype.kind == "O":
        return all(map(hashable, value.tolist()))
    return value.dtype.kind in "iuUS" or (value.dtype.kind == "f" and bool(np.isnan(value).all()))
