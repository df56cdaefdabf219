# SPDX-License-Identifier: Apache-2.0
"""What a new row starts with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

import damo_embedding as de
from damo.arrays import Floats, floats
from damo.parameters import Parameters, choose, refuse_others, values_of
from damo_embedding import _core
from damo_embedding.settings import _number

__all__ = ["PyInitializer"]

_MAX = 1e37  # what the core takes of a mean or a spread
_NORMAL = {"mean": ("mean", 0.0), "stddev": ("std", 1.0)}

# By name: the initializer, and by the parameter's name (the initializer's, its default).
_INITIALIZERS: dict[str, tuple[type[de.Initializer], dict[str, tuple[str, float]]]] = {
    "zeros": (de.Zeros, {}),
    "ones": (de.Ones, {}),
    "random_uniform": (de.Uniform, {"min": ("low", -1.0), "max": ("high", 1.0)}),
    "random_normal": (de.Normal, _NORMAL),
    "truncate_normal": (de.TruncatedNormal, _NORMAL),
    "uniform": (de.KaimingUniform, {}),
    "xavier": (de.XavierUniform, {}),
    "random": (de.Normal, _NORMAL),
}

_STORED: tuple[type[de.Initializer], ...] = (
    *(de.Zeros, de.Ones, de.Constant, de.Uniform, de.Normal, de.TruncatedNormal),
    *(de.XavierUniform, de.XavierNormal, de.KaimingUniform, de.KaimingNormal),
)

_CALL_STREAM = 256  # that of no group: a call's numbers are not some row's
_calls = itertools.count()  # of all objects, so that no two calls draw the same numbers


class PyInitializer:
    """What a new row starts with, chosen by `name`.

    | name | parameters (default) | weights |
    |---|---|---|
    | `zeros`, `ones` | | 0, 1 |
    | `random_uniform` | `min` (-1), `max` (1) | evenly distributed over [min, max) |
    | `random_normal`, `random` | `mean` (0), `stddev` (1) | normally distributed |
    | `truncate_normal` | `mean` (0), `stddev` (1) | the same, without what is beyond 2 stddev |
    | `uniform` | | evenly distributed within sqrt(1 / dimension) on both sides of 0 |
    | `xavier` | | evenly distributed within sqrt(6 / dimension) on both sides of 0 |

    Raises:
        ValueError: `name` is missing or unknown, it does not take a parameter that was inserted, or a number is out
            of range.
        TypeError: `parameters` is no Parameters.
    """

    def __init__(self, parameters: Parameters) -> None:
        values = values_of("PyInitializer", "parameters", parameters)
        name = choose("PyInitializer", values, _INITIALIZERS)
        kind, accepted = _INITIALIZERS[name]
        owner = f"PyInitializer {name}"
        refuse_others(owner, values, accepted)
        settings = {
            to: _number(owner, given, values.get(given, default), 0.0 if given == "stddev" else -_MAX, _MAX)
            for given, (to, default) in accepted.items()
        }
        if kind is de.Uniform and not np.float32(settings["low"]) < np.float32(settings["high"]):
            low, high = settings["low"], settings["high"]
            raise ValueError(f"[{owner}] min is {low!r} and max is {high!r}, expected min < max as float32")
        self._initializer = de.KaimingUniform(a=math.sqrt(5.0)) if kind is de.KaimingUniform else kind(**settings)

    def call(self, array: Floats) -> None:
        """Fills a float32 array of one dimension, in place, as the first weights of a row of that dimension.

        Each call in a process draws other numbers, and the same program draws the same ones when it runs again.
        Rows of an embedding do not go by calls: theirs follow from the group and the key.
        """
        out = floats("call", "array", array, filled=True)
        initializer = self._initializer
        if out.size:
            _core.initializer_fill(initializer.name, initializer._settings(), 0, _CALL_STREAM, next(_calls), out)

    def __repr__(self) -> str:
        return f"PyInitializer({self._initializer!r})"


def stored_initializer(name: str, settings: Mapping[str, float]) -> de.Initializer:
    """The initializer that a group is stored with, which may have been made without this package."""
    for kind in _STORED:
        if kind.name == name:
            return kind(**settings)
    raise de.SchemaMismatchError(
        f"[PyEmbedding] the group is stored with the initializer {name}, unknown here: upgrade"
    )
