# SPDX-License-Identifier: Apache-2.0
"""Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from damo_embedding.optimizers.optimizer import _MAX_FLOAT, _MIN_FLOAT, Optimizer, _beta_pair

__all__ = ["Adam", "BiasCorrection"]

BiasCorrection = Literal["row", "global"]


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
        lr: learning rate, at least 0.
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
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: BiasCorrection = "row"

    def __post_init__(self) -> None:
        self._take("lr", 0.0, _MAX_FLOAT)
        object.__setattr__(self, "betas", _beta_pair("Adam", self.betas))
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        mode: object = self.bias_correction
        if not isinstance(mode, str):
            raise TypeError(f'[Adam] bias_correction is {mode!r} ({type(mode).__name__}), expected "row" or "global"')
        if mode not in get_args(BiasCorrection):
            raise ValueError(f'[Adam] bias_correction is {mode!r}, expected "row" or "global"')

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self.lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "bias_correction": float(get_args(BiasCorrection).index(self.bias_correction)),
        }
