# SPDX-License-Identifier: Apache-2.0
"""The initializers: the core beside NumPy (bit for bit), their statistics, and their dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

import damo_embedding.initializers as initializers_module
import reference
from damo_embedding import _core
from damo_embedding.initializers import (
    Constant,
    Initializer,
    KaimingNormal,
    KaimingUniform,
    Normal,
    Ones,
    TruncatedNormal,
    Uniform,
    XavierNormal,
    XavierUniform,
    Zeros,
)

pytestmark = pytest.mark.core  # numbers

Floats = npt.NDArray[np.float32]

CLASSES: dict[str, Any] = {
    value.name: value
    for value in vars(initializers_module).values()
    if inspect.isclass(value) and issubclass(value, Initializer) and value is not Initializer
}
CONFIGURATIONS = [
    Zeros(),
    Ones(),
    Constant(0.1),
    Uniform(-0.01, 0.01),
    Uniform(1.0, 1.0000001192092896),
    Uniform(-3e38, 3e38),
    Normal(),
    Normal(mean=-2.0, std=1e-3),
    Normal(std=0.0),
    TruncatedNormal(),
    TruncatedNormal(mean=100.0, std=3.0),
    XavierUniform(),
    XavierUniform(gain=0.1),
    XavierUniform(gain=1e37),
    XavierNormal(),
    XavierNormal(gain=5 / 3),
    KaimingUniform(),
    KaimingUniform(a=math.sqrt(5)),
    KaimingUniform(a=1e37),
    KaimingNormal(),
    KaimingNormal(a=0.01),
]
# Their weights' spread follows the dimension.
SPREAD = (XavierUniform, XavierNormal, KaimingUniform, KaimingNormal)
EDGE_KEYS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def core_weights(initializer: Any, seed: int, stream: int, keys: npt.ArrayLike, dimension: int) -> Floats:
    rows = []
    for key in reference.as_uint64(keys).tolist():
        out = np.full(dimension, np.nan, np.float32)
        _core.initializer_fill(initializer.name, initializer._settings(), seed, stream, key, out)
        rows.append(out)
    return np.array(rows)


def test_every_initializer_of_the_core_has_a_dataclass_and_a_reference() -> None:
    assert set(_core.initializer_names()) == set(CLASSES) == set(reference.INITIALIZERS)


def test_every_initializer_is_in_the_configurations_tested_here() -> None:
    assert {initializer.name for initializer in CONFIGURATIONS} == set(_core.initializer_names())


@pytest.mark.parametrize("initializer", CONFIGURATIONS, ids=str)
def test_first_weights_equal_the_reference_bit_for_bit(initializer: Any) -> None:
    rng = np.random.default_rng(0)
    keys = np.concatenate([np.array(EDGE_KEYS, np.uint64), rng.integers(0, 2**64, 2000, np.uint64)])
    oracle = reference.initializer(initializer.name, initializer._settings())
    for seed, stream, dimension in ((0, 0, 16), (42, 7, 5), (2**64 - 1, 2**64 - 1, 1), (2**63, 2**40, 8)):
        ours = core_weights(initializer, seed, stream, keys, dimension)
        theirs = oracle.weights(seed, stream, keys, dimension)
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_philox_of_the_reference_gives_the_known_answers() -> None:
    # kat_vectors of the authors' Random123 library: philox4x32, 10 rounds.
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        c0, c1, c2, c3 = (np.array([word], np.uint64) for word in counter)
        assert tuple(int(word[0]) for word in reference.philox4x32((c0, c1, c2, c3), key)) == expected


def test_quantiles_of_the_reference_are_those_of_the_standard_library() -> None:
    edges = [2.0**-33, 1e-8, 0.075, 0.5, 0.925, 1 - 2.0**-33]
    p = np.concatenate([np.random.default_rng(1).random(5000), edges])
    expected = np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    np.testing.assert_allclose(reference.inverse_normal(p), expected, rtol=1e-14, atol=1e-16)


# --------------------------------------------------------------- statistics


def drawn(initializer: Any, keys: int = 20_000, dimension: int = 16) -> npt.NDArray[np.float64]:
    """Many weights; equal to the core's by the test above."""
    oracle = reference.initializer(initializer.name, initializer._settings())
    return oracle.weights(3, 1, np.arange(keys, dtype=np.uint64), dimension).astype(np.float64)


def largest_gap(sample: npt.NDArray[np.float64], cdf: npt.NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov: sqrt(n) times the distance of two distributions; above 1.95 once in 1,000."""
    ranks = np.arange(1, sample.size + 1) / sample.size
    gap = max(np.max(ranks - cdf), np.max(cdf - ranks + 1 / sample.size))
    return float(gap * np.sqrt(sample.size))


def normal_cdf(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    normal = statistics.NormalDist()
    return np.array([normal.cdf(value) for value in z])


def test_uniform_is_uniform() -> None:
    sample = np.sort(drawn(Uniform(-1.0, 3.0)).ravel())
    assert largest_gap(sample, (sample + 1) / 4) < 1.95


def test_normal_is_normal() -> None:
    sample = np.sort(drawn(Normal(mean=1.0, std=2.0)).ravel())
    assert largest_gap(sample, normal_cdf((sample - 1) / 2)) < 1.95
    assert abs(sample.mean() - 1) < 4 * 2 / np.sqrt(sample.size)
    assert abs(sample.std() - 2) < 4 * 2 / np.sqrt(2 * sample.size)


def test_truncated_normal_is_normal_within_two_standard_deviations() -> None:
    sample = np.sort(drawn(TruncatedNormal(mean=1.0, std=2.0)).ravel())
    assert sample[0] >= -3
    assert sample[-1] <= 5
    low, high = normal_cdf(np.array([-2.0, 2.0]))
    assert largest_gap(sample, (normal_cdf((sample - 1) / 2) - low) / (high - low)) < 1.95
    assert abs(sample.std() / 2 - 0.8796) < 0.005


DIMENSIONS = [1, 2, 3, 7, 16, 64, 100, 1000, 4096]


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize(
    ("initializer", "square"),
    [
        (XavierUniform(), 6.0),
        (XavierUniform(gain=0.25), 6.0 / 16.0),
        (KaimingUniform(), 6.0),
        (KaimingUniform(a=1.0), 3.0),
        (KaimingUniform(a=math.sqrt(5)), 1.0),
    ],
    ids=str,
)
def test_xavier_and_kaiming_uniform_are_uniform_within_their_bound(
    initializer: Any, square: float, dimension: int
) -> None:
    sample = np.sort(drawn(initializer, keys=max(20, 200_000 // dimension), dimension=dimension).ravel())
    half = float(np.float32(math.sqrt(square / dimension)))
    assert -half <= sample[0] < -0.999 * half
    assert 0.999 * half < sample[-1] <= half
    assert largest_gap(sample, (sample / half + 1) / 2) < 2.3  # above it once in 20,000


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize(
    ("initializer", "square"),
    [
        (XavierNormal(), 2.0),
        (XavierNormal(gain=0.25), 2.0 / 16.0),
        (KaimingNormal(), 2.0),
        (KaimingNormal(a=1.0), 1.0),
    ],
    ids=str,
)
def test_xavier_and_kaiming_normal_are_normal_with_their_deviation(
    initializer: Any, square: float, dimension: int
) -> None:
    sample = np.sort(drawn(initializer, keys=max(10, 40_000 // dimension), dimension=dimension).ravel())
    std = math.sqrt(square / dimension)
    assert largest_gap(sample, normal_cdf(sample / std)) < 2.3
    assert abs(sample.std() / std - 1) < 4 / np.sqrt(2 * sample.size)


def test_spreads_are_those_of_torch_where_a_table_has_few_rows_beside_its_dimension() -> None:
    """torch counts the rows as fan_out. Kaiming leaves it out; Xavier of one row has it as one of 4,097."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(7)
    weight = torch.empty(1, 4096)
    for ours, fill, arguments in (
        (XavierUniform(), "xavier_uniform_", {}),
        (XavierNormal(gain=2.0), "xavier_normal_", {"gain": 2.0}),
        (KaimingUniform(a=math.sqrt(5)), "kaiming_uniform_", {"a": math.sqrt(5)}),
        (KaimingNormal(a=0.5), "kaiming_normal_", {"a": 0.5}),
    ):
        theirs = []
        for _ in range(50):
            getattr(torch.nn.init, fill)(weight, generator=generator, **arguments)
            theirs.append(weight.numpy().copy())
        sample = drawn(ours, keys=50, dimension=4096)
        assert sample.std() == pytest.approx(float(np.std(theirs)), rel=0.01), ours


def test_seed_names_uniform_and_xavier_are_kaiming_uniform_and_xavier_uniform_to_the_bit() -> None:
    """Bound sqrt(1 / dimension), and sqrt(6 / dimension); C++ tests go through every dimension."""
    for dimension in (*range(1, 130), 255, 256, 1000, 4095, 4096):
        for ours, square in ((KaimingUniform(a=math.sqrt(5)), 1.0), (XavierUniform(), 6.0)):
            bound = math.sqrt(square / dimension)
            expected = core_weights(Uniform(-bound, bound), 1, 2, [3, 2**63], dimension)
            np.testing.assert_array_equal(core_weights(ours, 1, 2, [3, 2**63], dimension), expected)


@pytest.mark.parametrize(
    "initializer",
    [
        Uniform(-1, 1),
        Normal(),
        TruncatedNormal(),
        XavierUniform(),
        XavierNormal(),
        KaimingUniform(),
        KaimingNormal(),
    ],
    ids=str,
)
def test_neighbouring_positions_keys_and_streams_are_uncorrelated(initializer: Any) -> None:
    weights = drawn(initializer)
    oracle = reference.initializer(initializer.name, initializer._settings())
    keys = np.arange(weights.shape[0], dtype=np.uint64)
    other_stream = oracle.weights(3, 2, keys, 16).astype(np.float64)
    other_seed = oracle.weights(4, 1, keys, 16).astype(np.float64)
    limit = 4 / np.sqrt(weights.size)
    for a, b in (
        (weights[:, 1:], weights[:, :-1]),
        (weights[:, 4:], weights[:, :-4]),
        (weights[1:], weights[:-1]),
        (weights, other_stream),
        (weights, other_seed),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit


# ----------------------------------------------------------- pure functions


@pytest.mark.parametrize("initializer", CONFIGURATIONS, ids=str)
def test_first_weights_do_not_depend_on_what_was_drawn_before(initializer: Any) -> None:
    first = core_weights(initializer, 1, 2, [10, 20, 30], 6)
    again = core_weights(initializer, 1, 2, [30, 10, 20], 6)
    np.testing.assert_array_equal(first, again[[1, 2, 0]])


@pytest.mark.parametrize("initializer", [each for each in CONFIGURATIONS if not isinstance(each, SPREAD)], ids=str)
def test_a_smaller_dimension_is_the_start_of_a_larger_one(initializer: Any) -> None:
    whole = core_weights(initializer, 1, 2, EDGE_KEYS, 37)
    for dimension in (1, 3, 4, 5, 36):
        start = core_weights(initializer, 1, 2, EDGE_KEYS, dimension)
        np.testing.assert_array_equal(start, whole[:, :dimension])


# What a process of its own makes of the keys, as training lookups and as lookups that insert nothing.
CHILD = """
import hashlib, sys
import numpy as np
import damo_embedding as de

path, initializer, threads, order, insert = sys.argv[1:]
keys = np.array([i * 0x9E3779B97F4A7C15 % 2**64 for i in range(-1500, 1500)], np.uint64)
ordered = np.random.default_rng(int(order)).permutation(keys)
with de.Storage(path, memory="16MiB", threads=int(threads)) as storage:
    table = de.Embedding(storage, de.SGD(), eval(initializer, vars(de)), dimension=7, group="user", seed=9)
    for part in np.array_split(ordered, 1 + int(order)):
        table.lookup(part, insert=insert == "True")
    print(hashlib.sha256(table.lookup(keys, insert=False).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("initializer", [Uniform(-1, 1), TruncatedNormal(), XavierNormal(), KaimingUniform()], ids=str)
def test_rows_start_alike_in_every_process_order_and_number_of_threads(tmp_path: Path, initializer: Any) -> None:
    def run(case: tuple[int, int, bool]) -> str:
        arguments = [str(tmp_path / "-".join(map(str, case))), repr(initializer), *map(str, case)]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    cases = [(1, 0, True), (2, 1, True), (5, 3, True), (3, 2, False)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, cases))
    stream = xxhash.xxh3_64_intdigest(b"user") | 1 << 63
    keys = np.array([i * 0x9E3779B97F4A7C15 % 2**64 for i in range(-1500, 1500)], np.uint64)
    expected = reference.initializer(initializer.name, initializer._settings()).weights(9, stream, keys, 7)
    assert found == [hashlib.sha256(expected.tobytes()).hexdigest()] * len(cases)


def test_signed_and_unsigned_keys_of_the_same_bits_start_alike() -> None:
    signed = core_weights(Normal(), 1, 2, np.array([-1, -(2**63)]), 4)
    unsigned = core_weights(Normal(), 1, 2, np.array([2**64 - 1, 2**63], np.uint64), 4)
    np.testing.assert_array_equal(signed, unsigned)


def test_uniform_never_draws_high() -> None:
    # Two floats wide, so that rounding alone would give high half of the time.
    assert np.all(core_weights(Uniform(1.0, 1.0000001192092896), 0, 0, range(100), 8) == 1.0)


# Another value for each field. A new field needs a line here: an argument accepted is an argument used.
USUAL: dict[str, dict[str, float]] = {"constant": {"value": 1.0}, "uniform": {"low": 0.0, "high": 1.0}}
OTHER = {"value": 2.0, "low": 0.5, "high": 3.0, "mean": 1.0, "std": 0.5, "gain": 2.0, "a": 1.0}


@pytest.mark.parametrize(
    ("cls", "field"), [(cls, field.name) for cls in CLASSES.values() for field in dataclasses.fields(cls)]
)
def test_changing_any_field_changes_the_weights(cls: Any, field: str) -> None:
    usual = USUAL.get(cls.name, {})
    before = core_weights(cls(**usual), 0, 0, [5], 8)
    after = core_weights(cls(**{**usual, field: OTHER[field]}), 0, 0, [5], 8)
    assert np.all(before != after)


# ------------------------------------------------------------ the dataclasses


@pytest.mark.parametrize("initializer", CONFIGURATIONS, ids=str)
def test_initializers_are_frozen_values(initializer: Any) -> None:
    assert initializer == dataclasses.replace(initializer)
    assert hash(initializer) == hash(dataclasses.replace(initializer))
    for field in dataclasses.fields(initializer):
        assert type(getattr(initializer, field.name)) is float
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(initializer, field.name, 1.0)


def test_arguments_may_be_positional() -> None:
    assert Uniform(-0.5, 0.5) == Uniform(low=-0.5, high=0.5)
    assert Normal(1, 2) == Normal(mean=1.0, std=2.0)


FIELDS = [(cls, field.name) for cls in CLASSES.values() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "field"), FIELDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39, -(10**400)])
def test_numbers_out_of_range_are_named_with_the_range(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^\[{cls.__name__}\] {field} is .*, expected a number in \[.*\]$"):
        cls(**{**USUAL.get(cls.name, {}), field: value})


@pytest.mark.parametrize(("cls", "field"), FIELDS)
@pytest.mark.parametrize("value", ["0.1", True, np.False_, None, 1j, [0.1]])
def test_what_is_not_a_number_is_a_type_error(cls: Any, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^\[{cls.__name__}\] {field} is .*, expected a number$"):
        cls(**{**USUAL.get(cls.name, {}), field: value})


@pytest.mark.parametrize("cls", [XavierUniform, XavierNormal])
@pytest.mark.parametrize("gain", [0.0, -1.0, 1e38])
def test_a_gain_out_of_range_is_refused(cls: Any, gain: float) -> None:
    with pytest.raises(ValueError, match=r"gain is .*, expected a number in \[1.1754944e-38, 1e\+37\]"):
        cls(gain)


@pytest.mark.parametrize("cls", [KaimingUniform, KaimingNormal])
def test_a_negative_slope_below_zero_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"a is -0.1, expected a number in \[0, 1e\+37\]"):
        cls(a=-0.1)


@pytest.mark.parametrize("cls", [Normal, TruncatedNormal])
def test_a_negative_std_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"std is -0.1, expected a number in \[0, 1e\+37\]"):
        cls(std=-0.1)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 0), (1, 1 + 1e-12)])
def test_uniform_bounds_must_differ_as_float32(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"^\[Uniform\] low is .* and high is .*, expected low < high"):
        Uniform(low, high)
    with pytest.raises(ValueError, match=r"^\[initializer uniform\] low is .*, expected low < high"):
        _core.initializer_fill("uniform", {"low": low, "high": high}, 0, 0, 0, np.zeros(1, np.float32))


def test_the_core_names_an_unknown_initializer_or_setting() -> None:
    out = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r'\[initializer\] unknown name "xavier", expected one of: zeros'):
        _core.initializer_fill("xavier", {}, 0, 0, 0, out)
    with pytest.raises(ValueError, match=r'\[initializer normal\] unknown setting "stddev", expected one of'):
        _core.initializer_fill("normal", {"stddev": 1.0}, 0, 0, 0, out)
    with pytest.raises(ValueError, match=r"\[initializer uniform\] low is missing, it has no default"):
        _core.initializer_fill("uniform", {"high": 1.0}, 0, 0, 0, out)
