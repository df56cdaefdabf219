# SPDX-License-Identifier: Apache-2.0
"""The oracle: optimizers, schedules, initializers and a table in plain NumPy.

Written from docs/optimizers.md, docs/schedules.md and docs/initializers.md; shares no code with the core and
imports nothing of the package. Float32 steps are done in the documented order, so results can be compared bit
for bit; rates are doubles of `math`.

- `optimizer(name, settings)` / `initializer(name, settings)`: by the names and settings of the core.
- `SCHEDULES`: by the names of the core, a function of the step and the settings.
- `ReferenceTable`: one group as a dict of rows, the model beside Storage + Embedding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
State = Mapping[str, Floats]
f32 = np.float32

MASK64 = (1 << 64) - 1


# ------------------------------------------------------------------ powers


def power(base: float, exponent: int) -> float:
    """base ** exponent in doubles, by squaring from the lowest bit of the exponent up."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


# -------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class Step:
    """What an update knows beside the rows."""

    lr: float
    group: int  # the group's number of updates, this one included
    counts: Counts  # each row's


class ReferenceOptimizer:
    """One optimizer over rows [n, d]: `update` changes weights and state in place."""

    entries: tuple[str, ...] = ()  # names of the state blocks, in their order in the row
    one_a_row: ClassVar[bool] = False  # a block is [n, 1], not [n, d]
    defaults: ClassVar[dict[str, float]] = {}

    def __init__(self, settings: Mapping[str, float]) -> None:
        unknown = set(settings) - set(self.defaults)
        assert not unknown, unknown
        self.settings = {**self.defaults, **settings}

    @property
    def lr(self) -> float:
        return self.settings["lr"]

    def initial_state(self, rows: int, dimension: int) -> dict[str, Floats]:
        start = self.settings.get("initial_accumulator_value", 0.0)
        return {name: np.full((rows, 1 if self.one_a_row else dimension), start, f32) for name in self.entries}

    def update(
        self,
        weights: Floats,
        state: State,
        gradients: Floats,
        *,
        lr: float | None = None,
        group_step: int,
        update_counts: int | Iterable[int],
    ) -> None:
        """One update of each row. `update_counts`, one for all or one a row, count it: first is 1."""
        assert weights.dtype == gradients.dtype == f32
        assert weights.shape == gradients.shape
        counts = np.broadcast_to(np.asarray(update_counts, dtype=np.int64), weights.shape[:1])
        rate = self.lr if lr is None else lr
        with np.errstate(over="ignore", under="ignore"):
            self._update(weights, state, gradients, Step(rate, group_step, counts))

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        raise NotImplementedError

    def _decayed(self, weights: Floats, gradients: Floats) -> Floats:
        decay = self.settings["weight_decay"]
        return gradients + f32(decay) * weights if decay != 0.0 else gradients


class ReferenceSGD(ReferenceOptimizer):
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": 0.0,
    }

    def __init__(self, settings: Mapping[str, float]) -> None:
        super().__init__(settings)
        self.entries = ("momentum_buffer",) if self.settings["momentum"] != 0.0 else ()

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        g = self._decayed(weights, gradients)
        momentum = f32(self.settings["momentum"])
        if self.entries:
            taken = np.where(step.counts == 1, f32(1.0), f32(1.0 - self.settings["dampening"]))[:, np.newaxis]
            b = state["momentum_buffer"]
            b[...] = momentum * b + taken * g
            g = g + momentum * b if self.settings["nesterov"] == 1.0 else b
        weights -= f32(step.lr) * g


class ReferenceAdagrad(ReferenceOptimizer):
    entries = ("sum",)
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
    }

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        g = self._decayed(weights, gradients)
        state["sum"][...] += self._squares(g)
        rate = (step.lr / (1.0 + (step.counts - 1) * self.settings["lr_decay"])).astype(f32)[:, np.newaxis]
        weights -= (rate * g) / (np.sqrt(state["sum"]) + f32(self.settings["eps"]))

    def _squares(self, g: Floats) -> Floats:
        return g * g


class ReferenceRowWiseAdagrad(ReferenceAdagrad):
    one_a_row: ClassVar[bool] = True

    def _squares(self, g: Floats) -> Floats:
        """The mean of the squares: sixteen sums of every sixteenth weight, added up by halves."""
        rows, dimension = g.shape
        padded = np.zeros((rows, -(-dimension // 16) * 16), f32)
        padded[:, :dimension] = g * g
        sums = np.zeros((rows, 16), f32)
        for begin in range(0, padded.shape[1], 16):
            sums += padded[:, begin : begin + 16]
        for half in (8, 4, 2, 1):
            sums = sums[:, :half] + sums[:, half:]
        return sums / f32(dimension)


class ReferenceAdam(ReferenceOptimizer):
    entries = ("exp_avg", "exp_avg_sq")
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": 0.0,
    }

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        g = self._decayed(weights, gradients)
        if self.settings["bias_correction"] == 1.0:
            weights -= self._moved_by_group(state, g, step)
        else:
            weights -= self._moved(state, g, step)

    def _moved_by_group(self, state: State, g: Floats, step: Step) -> Floats:
        """How far each weight goes, corrected by the group's count."""
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m += f32(1.0 - beta1) * (g - m)
        v += f32(1.0 - beta2) * (g * g - v)
        size = f32(step.lr * math.sqrt(1.0 - power(beta2, step.group)) / (1.0 - power(beta1, step.group)))
        return size * (m / (np.sqrt(v) + f32(self.settings["eps"])))

    def _moved(self, state: State, g: Floats, step: Step) -> Floats:
        """How far each weight goes, corrected by the row's own count."""
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m += f32(1.0 - beta1) * (g - m)
        v[...] = f32(beta2) * v + (f32(1.0 - beta2) * g) * g
        distinct, where = np.unique(step.counts, return_inverse=True)
        first = [f32(1.0 / (1.0 - power(beta1, int(n)))) for n in distinct]
        second = [f32(1.0 / math.sqrt(1.0 - power(beta2, int(n)))) for n in distinct]
        rate = (f32(step.lr) * np.array(first, f32))[where][:, np.newaxis]
        root = np.array(second, f32)[where][:, np.newaxis]
        return (rate * m) / (np.sqrt(self._under_the_root(state)) * root + f32(self.settings["eps"]))

    def _under_the_root(self, state: State) -> Floats:
        return state["exp_avg_sq"]


class ReferenceAMSGrad(ReferenceAdam):
    entries = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        weights -= self._moved(state, self._decayed(weights, gradients), step)

    def _under_the_root(self, state: State) -> Floats:
        largest = state["max_exp_avg_sq"]
        largest[...] = np.maximum(largest, state["exp_avg_sq"])
        return largest


class ReferenceAdamW(ReferenceAdam):
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-2,
    }

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        kept = f32(1.0 - step.lr * self.settings["weight_decay"])
        weights[...] = kept * weights - self._moved(state, gradients, step)


class ReferenceLion(ReferenceOptimizer):
    entries = ("exp_avg",)
    defaults: ClassVar[dict[str, float]] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        m = state["exp_avg"]
        direction = np.sign(f32(beta1) * m + f32(1.0 - beta1) * gradients)
        m[...] = f32(beta2) * m + f32(1.0 - beta2) * gradients
        weights -= f32(step.lr) * direction + f32(step.lr * self.settings["weight_decay"]) * weights


class ReferenceRMSprop(ReferenceOptimizer):
    defaults: ClassVar[dict[str, float]] = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": 0.0,
    }

    def __init__(self, settings: Mapping[str, float]) -> None:
        super().__init__(settings)
        self.entries = ("square_avg",)
        self.entries += ("grad_avg",) if self.settings["centered"] == 1.0 else ()
        self.entries += ("momentum_buffer",) if self.settings["momentum"] != 0.0 else ()

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        alpha = self.settings["alpha"]
        g = self._decayed(weights, gradients)
        v = state["square_avg"]
        v[...] = f32(alpha) * v + (f32(1.0 - alpha) * g) * g
        variance = v
        if "grad_avg" in state:
            m = state["grad_avg"]
            m += f32(1.0 - alpha) * (g - m)
            variance = np.maximum(v - m * m, f32(0.0))
        root = np.sqrt(variance) + f32(self.settings["eps"])
        if "momentum_buffer" in state:
            b = state["momentum_buffer"]
            b[...] = f32(self.settings["momentum"]) * b + g / root
            weights -= f32(step.lr) * b
        else:
            weights -= (f32(step.lr) * g) / root


class ReferenceFTRL(ReferenceOptimizer):
    entries = ("z", "n")
    defaults: ClassVar[dict[str, float]] = {"lr": 5e-3, "beta": 1.0, "lambda1": 0.0, "lambda2": 0.0}

    def _update(self, weights: Floats, state: State, gradients: Floats, step: Step) -> None:
        if step.lr < np.finfo(f32).tiny:
            return
        lr, g, z, n = f32(step.lr), gradients, state["z"], state["n"]
        lambda1 = f32(self.settings["lambda1"])
        before = np.sqrt(n)
        n += g * g
        after = np.sqrt(n)
        sigma = (after - before) * (f32(1.0) / lr)
        z += g - sigma * weights
        divisor = (f32(self.settings["beta"]) + after) + lr * f32(self.settings["lambda2"])
        known = n != 0.0
        kept = np.abs(z) <= lambda1
        solved = np.zeros_like(z)
        np.divide(lr * (np.copysign(lambda1, z) - z), divisor, out=solved, where=known & ~kept)
        weights[...] = np.where(known, solved, weights)


OPTIMIZERS: dict[str, type[ReferenceOptimizer]] = {
    "sgd": ReferenceSGD,
    "adagrad": ReferenceAdagrad,
    "adam": ReferenceAdam,
    "rowwise_adagrad": ReferenceRowWiseAdagrad,
    "amsgrad": ReferenceAMSGrad,
    "adamw": ReferenceAdamW,
    "lion": ReferenceLion,
    "rmsprop": ReferenceRMSprop,
    "ftrl": ReferenceFTRL,
}


def optimizer(name: str, settings: Mapping[str, float]) -> ReferenceOptimizer:
    return OPTIMIZERS[name](settings)


# --------------------------------------------------------------- schedules


def exponential_decay(step: int, lr: float, decay_steps: int, decay_rate: float) -> float:
    return float(lr * decay_rate ** (step / decay_steps))


def polynomial_decay(step: int, lr: float, decay_steps: int, end_lr: float = 1e-4, power: float = 1.0) -> float:
    left = 1 - min(step, decay_steps) / decay_steps
    return float((lr - end_lr) * left**power + end_lr)


def natural_exponential_decay(step: int, lr: float, decay_steps: int, decay_rate: float) -> float:
    return lr * math.exp(-decay_rate * step / decay_steps)


def inverse_time_decay(step: int, lr: float, decay_steps: int, decay_rate: float) -> float:
    return lr / (1 + decay_rate * step / decay_steps)


def cosine_decay(step: int, lr: float, decay_steps: int) -> float:
    return lr * 0.5 * (1 + math.cos(math.pi * min(step, decay_steps) / decay_steps))


def linear_cosine_decay(
    step: int, lr: float, decay_steps: int, num_periods: float = 0.5, alpha: float = 0.0, beta: float = 1e-3
) -> float:
    done = min(step, decay_steps)
    cosine = 0.5 * (1 + math.cos(2 * math.pi * num_periods * done / decay_steps))
    return lr * ((alpha + (decay_steps - done) / decay_steps) * cosine + beta)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": lambda step, lr: lr,
    "exponential_decay": exponential_decay,
    "polynomial_decay": polynomial_decay,
    "natural_exponential_decay": natural_exponential_decay,
    "inverse_time_decay": inverse_time_decay,
    "cosine_decay": cosine_decay,
    "linear_cosine_decay": linear_cosine_decay,
}


def linear_warmup(step: int, warmup_steps: int, then: Callable[[int], float], start_lr: float = 0.0) -> float:
    """`then` is a function of its own steps, which begin when the warm-up is over."""
    if step >= warmup_steps:
        return then(step - warmup_steps)
    return start_lr + (then(0) - start_lr) * step / warmup_steps


# ---------------------------------------------------------- random numbers


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al. 2011), vectorized: 32-bit words held in uint64 arrays."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    x0, x1, x2, x3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * x0
        product1 = np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (product1 >> shift) ^ x1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ x3 ^ np.uint64(k1),
            product0 & low,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


def as_uint64(keys: npt.ArrayLike) -> Words:
    """Keys of either signedness (or Python ints of either) as their 64 bits."""
    # Through objects, or NumPy would make floats of a list with numbers on both sides of 2^63.
    array = keys if isinstance(keys, np.ndarray) else np.array(keys, dtype=object)
    if array.dtype == np.int64:
        return np.ascontiguousarray(array).view(np.uint64)
    if array.dtype == np.uint64:
        return array
    flat = [operator.index(key) & MASK64 for key in array.ravel()]
    return np.array(flat, dtype=np.uint64).reshape(array.shape)


def random_words(seed: int, stream: int, keys: npt.ArrayLike, count: int) -> Words:
    """The 32-bit words of positions 0 .. count - 1 of each key: [len(keys), count]."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    zero = np.zeros(1, np.uint64)
    stream_low, stream_high = (np.array([word], np.uint64) for word in (stream & 0xFFFFFFFF, stream >> 32))
    subkey = philox4x32((stream_low, stream_high, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    k = as_uint64(keys).reshape(-1, 1)
    blocks = np.arange((count + 3) // 4, dtype=np.uint64).reshape(1, -1)
    shape = (k.shape[0], blocks.shape[1])
    words = philox4x32(
        (
            np.broadcast_to(k & low, shape),
            np.broadcast_to(k >> shift, shape),
            np.broadcast_to(blocks, shape),
            np.zeros(shape, np.uint64),
        ),
        (int(subkey[0][0]), int(subkey[1][0])),
    )
    return np.stack(words, axis=-1).reshape(shape[0], 4 * shape[1])[:, :count]


def natural_log(x: Doubles) -> Doubles:
    """ln x for positive normal x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m-1)/(m+1))."""
    m, e = np.frexp(x)  # m in [0.5, 1)
    small = m < 0.7071067811865476
    m = np.where(small, m + m, m)
    e = np.where(small, e - 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = np.full_like(t, 1.0 / 23.0)
    for odd in (21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1):
        series = series * t + 1.0 / odd
    return e * 0.6931471805599453 + (2.0 * s) * series


def _horner(x: Doubles, coefficients: tuple[float, ...]) -> Doubles:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


# Wichura 1988, AS 241, PPND16: numerators and denominators, highest power first.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip


def inverse_normal(p: Doubles) -> Doubles:
    """The p-quantile of the standard normal for p in [2^-33, 1 - 2^-33]: AS 241."""
    q = p - 0.5
    r = 0.180625 - q * q
    centre = q * _horner(r, _CENTRE[0]) / _horner(r, _CENTRE[1])
    tail_p = np.where(q < 0.0, p, 1.0 - p)
    r = np.sqrt(-natural_log(tail_p)) - 1.6
    tail = _horner(r, _TAIL[0]) / _horner(r, _TAIL[1])
    return np.where(np.abs(q) <= 0.425, centre, np.where(q < 0.0, -tail, tail))


# ------------------------------------------------------------ initializers


class ReferenceInitializer:
    defaults: ClassVar[dict[str, float]] = {}
    required: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: Mapping[str, float]) -> None:
        assert set(settings) <= set(self.defaults) | self.required, settings
        self.settings = {**self.defaults, **settings}

    def weights(self, seed: int, stream: int, keys: npt.ArrayLike, dimension: int) -> Floats:
        """First weights of each key: [len(keys), dimension]."""
        raise NotImplementedError


class ReferenceConstant(ReferenceInitializer):
    required: ClassVar[frozenset[str]] = frozenset({"value"})
    value: ClassVar[float | None] = None

    def weights(self, seed: int, stream: int, keys: npt.ArrayLike, dimension: int) -> Floats:
        value = self.settings["value"] if self.value is None else self.value
        return np.full((as_uint64(keys).size, dimension), value, f32)


class ReferenceZeros(ReferenceConstant):
    required: ClassVar[frozenset[str]] = frozenset()
    value: ClassVar[float | None] = 0.0


class ReferenceOnes(ReferenceConstant):
    required: ClassVar[frozenset[str]] = frozenset()
    value: ClassVar[float | None] = 1.0


class ReferenceUniform(ReferenceInitializer):
    required: ClassVar[frozenset[str]] = frozenset({"low", "high"})

    def weights(self, seed: int, stream: int, keys: npt.ArrayLike, dimension: int) -> Floats:
        low, high = self.bounds(dimension)
        u = random_words(seed, stream, keys, dimension).astype(np.float64) * 2.0**-32
        drawn = (float(low) + (float(high) - float(low)) * u).astype(f32)
        return np.where(drawn < high, drawn, np.nextafter(high, low))

    def bounds(self, dimension: int) -> tuple[np.float32, np.float32]:
        return f32(self.settings["low"]), f32(self.settings["high"])


class ReferenceNormal(ReferenceInitializer):
    defaults: ClassVar[dict[str, float]] = {"mean": 0.0, "std": 1.0}

    def weights(self, seed: int, stream: int, keys: npt.ArrayLike, dimension: int) -> Floats:
        u = (random_words(seed, stream, keys, dimension).astype(np.float64) + 0.5) * 2.0**-32
        return (self.mean() + self.std(dimension) * self.quantile(u)).astype(f32)

    def mean(self) -> float:
        return self.settings["mean"]

    def std(self, dimension: int) -> float:
        return self.settings["std"]

    def quantile(self, u: Doubles) -> Doubles:
        return inverse_normal(u)


class ReferenceTruncatedNormal(ReferenceNormal):
    def quantile(self, u: Doubles) -> Doubles:
        p = 0.02275013194817921 + 0.9544997361036416 * u
        return np.clip(inverse_normal(p), -2.0, 2.0)


class ReferenceXavierUniform(ReferenceUniform):
    required: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[dict[str, float]] = {"gain": 1.0}

    def bounds(self, dimension: int) -> tuple[np.float32, np.float32]:
        bound = f32(self.settings["gain"] * math.sqrt(6.0 / dimension))
        return -bound, bound


class ReferenceXavierNormal(ReferenceNormal):
    defaults: ClassVar[dict[str, float]] = {"gain": 1.0}

    def mean(self) -> float:
        return 0.0

    def std(self, dimension: int) -> float:
        return self.settings["gain"] * math.sqrt(2.0 / dimension)


class ReferenceKaimingUniform(ReferenceUniform):
    required: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[dict[str, float]] = {"a": 0.0}

    def bounds(self, dimension: int) -> tuple[np.float32, np.float32]:
        a = self.settings["a"]
        bound = f32(math.sqrt(6.0 / ((1.0 + a * a) * dimension)))
        return -bound, bound


class ReferenceKaimingNormal(ReferenceNormal):
    defaults: ClassVar[dict[str, float]] = {"a": 0.0}

    def mean(self) -> float:
        return 0.0

    def std(self, dimension: int) -> float:
        a = self.settings["a"]
        return math.sqrt(2.0 / ((1.0 + a * a) * dimension))


INITIALIZERS: dict[str, type[ReferenceInitializer]] = {
    "zeros": ReferenceZeros,
    "ones": ReferenceOnes,
    "constant": ReferenceConstant,
    "uniform": ReferenceUniform,
    "normal": ReferenceNormal,
    "truncated_normal": ReferenceTruncatedNormal,
    "xavier_uniform": ReferenceXavierUniform,
    "xavier_normal": ReferenceXavierNormal,
    "kaiming_uniform": ReferenceKaimingUniform,
    "kaiming_normal": ReferenceKaimingNormal,
}


def initializer(name: str, settings: Mapping[str, float]) -> ReferenceInitializer:
    return INITIALIZERS[name](settings)


# ------------------------------------------------------------------- table


class Spec(Protocol):
    """What damo_embedding's optimizers and initializers have in common."""

    @property
    def name(self) -> str: ...

    def _settings(self) -> Mapping[str, float]: ...


@dataclass
class ReferenceRow:
    weights: Floats
    state: dict[str, Floats] = field(default_factory=dict)
    update_count: int = 0
    step: int = 0  # the group's step of the last update; of creation until the first
    time: int = 0  # of the last update; of creation until the first

    def copied(self) -> ReferenceRow:
        """With the same arrays, which are replaced and never written to."""
        return ReferenceRow(self.weights, self.state, self.update_count, self.step, self.time)


class ReferenceTable:
    """One group: a dict from the key's 64 bits to its row, in order of insertion.

    Duplicates of a key in one `apply_gradients` are summed in float32 in order of appearance, starting from
    the first, and make one update. Keys without a row get one. Every call with at least one key is one group
    step.
    """

    def __init__(
        self,
        optimizer_spec: Spec | Any,
        initializer_spec: Spec | Any,
        dimension: int,
        *,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        self.optimizer = optimizer(optimizer_spec.name, optimizer_spec._settings())
        self.initializer = initializer(initializer_spec.name, initializer_spec._settings())
        self.dimension = dimension
        self.seed = seed
        self.stream = stream  # the group's number, or the hash of its name
        self.lr: float | Callable[[int], float] = self.optimizer.lr  # a function of the step before the update
        self.step = 0
        self.now = 0
        self.rows: dict[int, ReferenceRow] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def initial(self, keys: npt.ArrayLike) -> Floats:
        """First weights, whether or not a row exists: [..., dimension]."""
        wanted = as_uint64(keys)
        fresh = self.initializer.weights(self.seed, self.stream, wanted.ravel(), self.dimension)
        return fresh.reshape(*wanted.shape, self.dimension)

    def _insert(self, keys: list[int]) -> None:
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if not new:
            return
        for key, weights in zip(new, self.initial(np.array(new, np.uint64)), strict=True):
            state = {name: block[0] for name, block in self.optimizer.initial_state(1, self.dimension).items()}
            self.rows[key] = ReferenceRow(weights.copy(), state, step=self.step, time=self.now)

    def lookup(self, keys: npt.ArrayLike, *, insert: bool = True, missing: str = "initial") -> Floats:
        wanted = as_uint64(keys)
        flat: list[int] = wanted.ravel().tolist()
        if insert:
            self._insert(flat)
        out = self.initial(wanted.ravel()) if missing == "initial" else np.zeros((len(flat), self.dimension), f32)
        for position, key in enumerate(flat):
            if key in self.rows:
                out[position] = self.rows[key].weights
        return out.reshape(*wanted.shape, self.dimension)

    def apply_gradients(self, keys: npt.ArrayLike, gradients: npt.ArrayLike, lr: float | None = None) -> None:
        wanted = as_uint64(keys)
        flat: list[int] = wanted.ravel().tolist()
        if not flat:
            return
        values = np.asarray(gradients, f32)
        assert values.shape == (*wanted.shape, self.dimension), values.shape
        sums: dict[int, Floats] = {}
        for key, gradient in zip(flat, values.reshape(len(flat), self.dimension), strict=True):
            if key in sums:
                sums[key] += gradient
            else:
                sums[key] = gradient.copy()
        self._insert(list(sums))
        rate = self.lr if lr is None else lr
        if callable(rate):
            rate = rate(self.step)
        self.step += 1
        touched = [self.rows[key] for key in sums]
        weights = np.stack([row.weights for row in touched])
        state = {name: np.stack([row.state[name] for row in touched]) for name in self.optimizer.entries}
        for row in touched:
            row.update_count += 1
            row.step = self.step
            row.time = self.now
        self.optimizer.update(
            weights,
            state,
            np.stack(list(sums.values())),
            lr=rate,
            group_step=self.step,
            update_counts=[row.update_count for row in touched],
        )
        for position, row in enumerate(touched):
            row.weights = weights[position].copy()
            row.state = {name: block[position].copy() for name, block in state.items()}

    def contains(self, keys: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        wanted = as_uint64(keys)
        found = [key in self.rows for key in wanted.ravel().tolist()]
        return np.array(found, np.bool_).reshape(wanted.shape)

    def erase(self, keys: npt.ArrayLike) -> int:
        """How many rows went away."""
        return sum(self.rows.pop(key, None) is not None for key in as_uint64(keys).ravel().tolist())
