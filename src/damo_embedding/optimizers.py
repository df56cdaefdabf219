# SPDX-License-Identifier: Apache-2.0
"""How a row's weights follow its gradients: SGD, Adagrad, Adam.

An optimizer here is a description, a frozen dataclass with `torch.optim`'s names. The core keeps the state
beside each row and does the arithmetic, in float32, on the rows a batch touched and on no others.
docs/optimizers.md has the formulas to the last rounding. A rate may be a schedule: see schedules.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from damo_embedding.schedules import LearningRate, _base_lr, _learning_rate
from damo_embedding.settings import _BELOW_ONE, _MAX_FLOAT, _MIN_FLOAT, Described, _number

__all__ = ["SGD", "Adagrad", "Adam", "Optimizer"]

BiasCorrection = Literal["row", "global"]


class Optimizer(Described):
    """What the optimizers of this module have in common. Take one of them; this class is for `isinstance`."""

    lr: LearningRate

    def _take_lr(self) -> None:
        object.__setattr__(self, "lr", _learning_rate(type(self).__name__, "lr", self.lr))

    def _settings(self) -> dict[str, float]:
        """What the core takes: of a schedule the rate it starts from, of a function of the step the default."""
        return {**super()._settings(), "lr": _base_lr(self.lr, otherwise=cast(float, type(self).lr))}


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: `w -= lr * (g + weight_decay * w)`.

    The formula of `torch.optim.SGD` without momentum. `weight_decay` acts when a row is updated, not between.

    Args:
        lr: learning rate, at least 0; or a schedule, or a function of the group's step.
        weight_decay: L2 penalty, at least 0, added to the gradient.

    State: none, 0 bytes a row.

    Example:
        >>> SGD(lr=0.1)
        SGD(lr=0.1, weight_decay=0.0)
    """

    name: ClassVar[str] = "sgd"
    lr: LearningRate = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("weight_decay", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad: `sum += g**2; w -= lr * g / (sqrt(sum) + eps)`, with `g` the gradient plus `weight_decay * w`.

    The formula of `torch.optim.Adagrad` without `lr_decay`. A weight's rate falls with the gradients it has
    seen, so a rare row goes on taking large steps.

    Args:
        lr: learning rate, at least 0; or a schedule, or a function of the group's step.
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).
        weight_decay: L2 penalty, at least 0, added to the gradient.
        initial_accumulator_value: what `sum` starts from, at least 0.

    State: `sum`, 4 bytes a weight.

    Paper: Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization,
    JMLR 2011.

    Example:
        >>> Adagrad(lr=0.05)
        Adagrad(lr=0.05, eps=1e-10, weight_decay=0.0, initial_accumulator_value=0.0)
    """

    name: ClassVar[str] = "adagrad"
    lr: LearningRate = 1e-2
    eps: float = 1e-10
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        self._take("initial_accumulator_value", 0.0, _MAX_FLOAT)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam, corrected for its start by each row's own age, or by the group's.

    With `g` the gradient plus `weight_decay * w`:

        exp_avg    += (1 - beta1) * (g - exp_avg)
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g**2
        bias_correction="row", n = how often this row was updated, this time included:
            w -= lr / (1 - beta1**n) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2**n)) + eps)
        bias_correction="global", t = how often the group was:
            w -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * exp_avg / (sqrt(exp_avg_sq) + eps)

    "row" is `torch.optim.Adam` applied to every row as if it were a parameter of its own: a key first seen
    after a month starts with the same careful steps as one seen on the first day. "global" is
    `torch.optim.SparseAdam`, under which a late row's first steps are several times larger than `lr`. A row
    without a gradient does not move in either.

    Args:
        lr: learning rate, at least 0; or a schedule, or a function of the group's step.
        betas: how much of the averages of g and g**2 an update keeps, each in [0, 1).
        eps: added to the root, above 0 (`torch.optim.Adam` takes 0 as well, and makes NaN of a gradient that
            is 0).
        weight_decay: L2 penalty, at least 0, added to the gradient (`SparseAdam` has none).
        bias_correction: "row" or "global".

    State: `exp_avg` and `exp_avg_sq`, 8 bytes a weight. The row's update count is kept for every row anyway.

    Paper: Kingma, Ba: Adam: a method for stochastic optimization, ICLR 2015.

    Example:
        >>> Adam(lr=0.01)
        Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, bias_correction='row')
    """

    name: ClassVar[str] = "adam"
    lr: LearningRate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: BiasCorrection = "row"

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        betas: object = self.betas
        if not isinstance(betas, tuple | list):
            raise TypeError(f"[Adam] betas is {betas!r} ({type(betas).__name__}), expected two numbers (beta1, beta2)")
        if len(betas) != 2:
            raise ValueError(f"[Adam] betas is {betas!r}, expected two numbers (beta1, beta2)")
        taken = tuple(_number("Adam", f"betas[{i}]", beta, 0.0, _BELOW_ONE) for i, beta in enumerate(betas))
        object.__setattr__(self, "betas", taken)
        mode: object = self.bias_correction
        if not isinstance(mode, str):
            raise TypeError(f'[Adam] bias_correction is {mode!r} ({type(mode).__name__}), expected "row" or "global"')
        if mode not in get_args(BiasCorrection):
            raise ValueError(f'[Adam] bias_correction is {mode!r}, expected "row" or "global"')

    def _settings(self) -> dict[str, float]:
        settings = super()._settings()
        del settings["betas"]
        mode = float(get_args(BiasCorrection).index(self.bias_correction))
        return {**settings, "beta1": self.betas[0], "beta2": self.betas[1], "bias_correction": mode}
