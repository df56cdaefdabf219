# SPDX-License-Identifier: Apache-2.0
"""How rows follow their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

import damo_embedding as de
from damo.arrays import Floats, floats
from damo.parameters import Parameters, choose, refuse_others, values_of
from damo.schedules import learning_rate
from damo_embedding import _core
from damo_embedding.integers import parse_int
from damo_embedding.settings import _BELOW_ONE, _MAX_FLOAT, _MIN_FLOAT, _number

__all__ = ["PyOptimizer"]

_ADAM = {
    "gamma": ("lr", 1e-3),
    "beta1": ("beta1", 0.9),
    "beta2": ("beta2", 0.999),
    "lambda": ("weight_decay", 0.0),
    "epsilon": ("eps", 1e-8),
}

# By name: the optimizer, and by the parameter's name (the optimizer's, its default).
_OPTIMIZERS: dict[str, tuple[type[de.Optimizer], dict[str, tuple[str, float]]]] = {
    "sgd": (de.SGD, {"gamma": ("lr", 1e-3), "lambda": ("weight_decay", 0.0)}),
    "ftrl": (
        de.FTRL,
        {
            "gamma": ("lr", 5e-3),
            "beta": ("beta", 0.0),
            "lambda1": ("lambda1", 0.0),
            "lambda2": ("lambda2", 0.0),
        },
    ),
    "adagrad": (
        de.Adagrad,
        {
            "gamma": ("lr", 1e-2),
            "lambda": ("weight_decay", 0.0),
            "eta": ("lr_decay", 0.0),
            "epsilon": ("eps", 1e-10),
        },
    ),
    "adam": (de.Adam, _ADAM),
    "amsgrad": (de.AMSGrad, _ADAM),
    "adamw": (de.AdamW, {**_ADAM, "lambda": ("weight_decay", 1e-2)}),
    "lion": (
        de.Lion,
        {
            "eta": ("lr", 3e-4),
            "beta1": ("beta1", 0.9),
            "beta2": ("beta2", 0.99),
            "lambda": ("weight_decay", 0.01),
        },
    ),
}

# By the optimizer's own name; 0 to the largest float32 for the others.
_RANGES = {
    "lr": (_MIN_FLOAT, _MAX_FLOAT),
    "eps": (_MIN_FLOAT, _MAX_FLOAT),
    "beta1": (0.0, _BELOW_ONE),
    "beta2": (0.0, _BELOW_ONE),
}


class PyOptimizer:
    """How rows follow their gradients, chosen by `name`; docs/optimizers.md has the formulas.

    | name | parameters (default) |
    |---|---|
    | `sgd` | `gamma` learning rate (1e-3), `lambda` weight decay (0) |
    | `ftrl` | `gamma` or `alpha` (5e-3), `beta` (0), `lambda1` (0), `lambda2` (0) |
    | `adagrad` | `gamma` (1e-2), `lambda` (0), `eta` learning-rate decay (0), `epsilon` (1e-10) |
    | `adam`, `amsgrad` | `gamma` (1e-3), `beta1` (0.9), `beta2` (0.999), `lambda` (0), `epsilon` (1e-8) |
    | `adamw` | the same, `lambda` (1e-2), taken from the weight, not added to the gradient |
    | `lion` | `eta` learning rate (3e-4), `beta1` (0.9), `beta2` (0.99), `lambda` (0.01) |

    Rates and epsilon are above 0, betas of the averages in [0, 1), all other numbers at least 0.

    Args:
        parameters: `name`, and what that optimizer takes.
        scheduler_parameters: A schedule that starts from the learning rate: `name`, `decay_steps`, and what it
            takes. None, or without a name or with an empty one: the rate is constant.

    Raises:
        ValueError: A name is missing or unknown, it does not take a parameter that was inserted, or a number is out
            of range.
        TypeError: An argument is no Parameters.
    """

    def __init__(self, parameters: Parameters, scheduler_parameters: Parameters | None = None) -> None:
        values = values_of("PyOptimizer", "parameters", parameters)
        name = choose("PyOptimizer", values, _OPTIMIZERS)
        kind, accepted = _OPTIMIZERS[name]
        owner = f"PyOptimizer {name}"
        if kind is de.FTRL and "alpha" in values:
            if "gamma" in values:
                raise ValueError(f"[{owner}] gamma and alpha are both given, expected one: they are the same rate")
            accepted = {"alpha" if given == "gamma" else given: to for given, to in accepted.items()}
        refuse_others(owner, values, accepted)
        settings: dict[str, Any] = {
            to: _number(owner, given, values.get(given, default), *_RANGES.get(to, (0.0, _MAX_FLOAT)))
            for given, (to, default) in accepted.items()
        }
        settings["lr"] = learning_rate(scheduler_parameters, settings["lr"])
        if "beta1" in settings:
            settings["betas"] = settings.pop("beta1"), settings.pop("beta2")
        self._optimizer = kind(**settings)
        self._row: tuple[_core.RowOptimizer, Floats] | None = None  # and its state, from the first call on
        self._size = self._updates = 0

    def call(self, weights: Floats, gradients: Floats, step: int) -> None:
        """One update of one array of weights, in place. The state is kept in this object: one object, one array.

        Rows of an embedding do not go by calls, and share no state with them.

        Args:
            weights: float32 of one dimension, of the same size in every call.
            gradients: float32 of the same size.
            step: What the schedule is asked with, at least 0. The correction of adam and its kin goes by the
                number of calls.

        Raises:
            ValueError: A gradient is NaN or infinite, a shape is wrong, or `weights` has another size than before;
                nothing was changed.
            TypeError: An array is not float32.
        """
        out = floats("call", "weights", weights, self._size if self._row else None, filled=True)
        grads = floats("call", "gradients", gradients, out.size, filled=False)
        number = parse_int("call", "step", step, 0, 2**63 - 1)
        if not np.isfinite(grads).all():
            raise ValueError(f"[call] gradients has {grads[~np.isfinite(grads)][0]}, expected finite numbers")
        if out.size == 0:
            return
        lr = self._optimizer.lr
        rate = lr(number) if callable(lr) else lr
        if self._row is None:
            row = _core.RowOptimizer(self._optimizer.name, self._optimizer._settings())
            state = np.empty(row.state_floats(out.size), np.float32)
            row.start(out.size, state)
            self._row, self._size = (row, state), out.size
        self._row[0].update(rate, self._updates + 1, self._updates + 1, out, self._row[1], grads)
        self._updates += 1

    def __repr__(self) -> str:
        return f"PyOptimizer({self._optimizer!r})"
