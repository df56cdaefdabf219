# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedules: the second argument of PyOptimizer."""

from __future__ import annotations

import damo_embedding as de
from damo.parameters import Value, choose, refuse_others, values_of
from damo_embedding.settings import _MAX_FLOAT, _MIN_FLOAT, _number

_RATE = {"decay_rate": ("decay_rate", None)}
_LINEAR_COSINE = {"num_periods": ("num_periods", 0.5), "alpha": ("alpha", 0.0), "beta": ("beta", 1e-3)}

# By name: the schedule, and beside decay_steps, by the parameter's name (the schedule's, its default or None).
_SCHEDULES: dict[str, tuple[type[de.Schedule], dict[str, tuple[str, float | None]]]] = {
    "exponential_decay": (de.ExponentialDecay, {**_RATE}),
    "polynomial_decay": (de.PolynomialDecay, {"end_learning_rate": ("end_lr", 1e-4), "power": ("power", 1.0)}),
    "nature_exponential_decay": (de.NaturalExponentialDecay, {**_RATE}),
    "inverse_time_decay": (de.InverseTimeDecay, {**_RATE}),
    "cosine_decay": (de.CosineDecay, {}),
    "liner_cosine_decay": (de.LinearCosineDecay, {**_LINEAR_COSINE}),
    "linear_cosine_decay": (de.LinearCosineDecay, {**_LINEAR_COSINE}),
}


def learning_rate(parameters: object, lr: float) -> float | de.Schedule:
    """The schedule that the parameters describe, from `lr` on; `lr` itself if they are None or have no name."""
    if parameters is None:
        return lr
    values = values_of("PyOptimizer", "scheduler_parameters", parameters)
    if not values.get("name"):
        return lr
    name = choose("PyOptimizer scheduler", values, _SCHEDULES)
    kind, accepted = _SCHEDULES[name]
    owner = f"PyOptimizer {name}"
    refuse_others(owner, values, ["decay_steps", *accepted])
    settings: dict[str, float] = {"lr": lr, "decay_steps": _decay_steps(owner, values)}
    for given, (to, default) in accepted.items():
        value = values.get(given, default)
        if value is None:
            raise ValueError(f"[{owner}] the parameter {given!r} is missing, expected a number")
        settings[to] = _number(owner, given, value, _MIN_FLOAT if given == "power" else 0.0, _MAX_FLOAT)
    return kind(**settings)


def _decay_steps(owner: str, values: dict[str, Value]) -> int:
    if "decay_steps" not in values:
        raise ValueError(f"[{owner}] the parameter 'decay_steps' is missing, expected an int")
    return int(_number(owner, "decay_steps", values["decay_steps"], 1, 2**53))
