# SPDX-License-Identifier: Apache-2.0
"""Adam, AMSGrad and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from damo_embedding.optimizers.optimizer import Optimizer, _beta_pair
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _MAX_FLOAT, _MIN_FLOAT

__all__ = ["AMSGrad", "Adam", "AdamW", "BiasCorrection"]

BiasCorrection = Literal["row", "global"]


@dataclass(frozen=True, kw_only=True)
class _AdamSettings(Optimizer):
    """The settings that all three have, checked."""

    lr: LearningRate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self._take_lr()
        object.__setattr__(self, "betas", _beta_pair(type(self).__name__, self.betas))
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self._rate(),
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True, kw_only=True)
class Adam(_AdamSettings):
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
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
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
    bias_correction: BiasCorrection = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        mode: object = self.bias_correction
        if not isinstance(mode, str):
            raise TypeError(f'[Adam] bias_correction is {mode!r} ({type(mode).__name__}), expected "row" or "global"')
        if mode not in get_args(BiasCorrection):
            raise ValueError(f'[Adam] bias_correction is {mode!r}, expected "row" or "global"')

    def _settings(self) -> dict[str, float]:
        correction = float(get_args(BiasCorrection).index(self.bias_correction))
        return {**super()._settings(), "bias_correction": correction}


@dataclass(frozen=True, kw_only=True)
class AMSGrad(_AdamSettings):
    """Adam with the largest average of squared gradients so far, so that a weight's rate never grows again.

    With `g` the gradient plus `weight_decay * w`, and n = how often this row was updated, this time included:

        exp_avg       += (1 - beta1) * (g - exp_avg)
        exp_avg_sq     = beta2 * exp_avg_sq + (1 - beta2) * g**2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
        w -= lr / (1 - beta1**n) * exp_avg / (sqrt(max_exp_avg_sq / (1 - beta2**n)) + eps)

    The formula of `torch.optim.Adam(amsgrad=True)` applied to every row as if it were a parameter of its own.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        betas: how much of the averages of g and g**2 an update keeps, each in [0, 1).
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).
        weight_decay: L2 penalty, at least 0, added to the gradient.

    State: `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`, 12 bytes a weight.

    Paper: Reddi, Kale, Kumar: On the convergence of Adam and beyond, ICLR 2018.

    Example:
        >>> AMSGrad(lr=0.01)
        AMSGrad(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)
    """

    name: ClassVar[str] = "amsgrad"


@dataclass(frozen=True, kw_only=True)
class AdamW(_AdamSettings):
    """Adam with weight decay beside its step, not inside of the gradient.

    With n = how often this row was updated, this time included:

        exp_avg    += (1 - beta1) * (g - exp_avg)
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g**2
        w  = (1 - lr * weight_decay) * w
        w -= lr / (1 - beta1**n) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2**n)) + eps)

    The formula of `torch.optim.AdamW` applied to every row as if it were a parameter of its own: a row decays
    when it is updated, not between, so a rare row decays less than a frequent one.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        betas: how much of the averages of g and g**2 an update keeps, each in [0, 1).
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).
        weight_decay: what an update takes of each weight, times lr; at least 0.

    State: `exp_avg` and `exp_avg_sq`, 8 bytes a weight.

    Paper: Loshchilov, Hutter: Decoupled weight decay regularization, ICLR 2019.

    Example:
        >>> AdamW(lr=0.01)
        AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)
    """

    name: ClassVar[str] = "adamw"
    weight_decay: float = 1e-2
