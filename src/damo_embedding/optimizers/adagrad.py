# SPDX-License-Identifier: Apache-2.0
"""Adagrad, with an accumulator for each weight or one for a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from damo_embedding.optimizers.optimizer import Optimizer
from damo_embedding.schedules import LearningRate
from damo_embedding.settings import _MAX_FLOAT, _MIN_FLOAT

__all__ = ["Adagrad", "RowWiseAdagrad"]


@dataclass(frozen=True, kw_only=True)
class _AdagradSettings(Optimizer):
    """The settings of both, checked."""

    lr: LearningRate = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        self._take_lr()
        self._take("lr_decay", 0.0, _MAX_FLOAT)
        self._take("weight_decay", 0.0, _MAX_FLOAT)
        self._take("initial_accumulator_value", 0.0, _MAX_FLOAT)
        self._take("eps", _MIN_FLOAT, _MAX_FLOAT)

    def _settings(self) -> dict[str, float]:
        return {
            "lr": self._rate(),
            "lr_decay": self.lr_decay,
            "weight_decay": self.weight_decay,
            "initial_accumulator_value": self.initial_accumulator_value,
            "eps": self.eps,
        }


@dataclass(frozen=True, kw_only=True)
class Adagrad(_AdagradSettings):
    """Adagrad: a weight's rate falls with the gradients it has seen, so a rare row goes on taking large steps.

    With `g` the gradient plus `weight_decay * w`, and n = how often this row was updated, this time included:

        sum += g**2
        w   -= lr / (1 + (n - 1) * lr_decay) * g / (sqrt(sum) + eps)

    The formula of `torch.optim.Adagrad` applied to every row as if it were a parameter of its own: `lr_decay`
    counts the row's updates, where torch counts those of the whole table.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        lr_decay: how much each update of a row lowers its rate, at least 0.
        weight_decay: L2 penalty, at least 0, added to the gradient.
        initial_accumulator_value: what `sum` starts from, at least 0.
        eps: added to the root, above 0 (torch takes 0 as well, and makes NaN of a gradient that is 0).

    State: `sum`, 4 bytes a weight.

    Paper: Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization,
    JMLR 2011.

    Example:
        >>> Adagrad(lr=0.05)
        Adagrad(lr=0.05, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10)
    """

    name: ClassVar[str] = "adagrad"


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(_AdagradSettings):
    """Adagrad with one accumulator for a row, the mean over its weights: the state of a row is 4 bytes.

    With `g` the gradient plus `weight_decay * w`, and n = how often this row was updated, this time included:

        sum += mean(g**2)                          (the mean over the row's weights)
        w   -= lr / (1 + (n - 1) * lr_decay) * g / (sqrt(sum) + eps)

    The formula of TorchRec's `RowWiseAdagrad` and of FBGEMM's `EXACT_ROWWISE_ADAGRAD` (`torch.optim` has none),
    the usual choice for tables so large that a second float for each weight is too much. `lr_decay` counts the
    row's updates.

    Args:
        lr: learning rate, above 0; or a schedule, or a function of the group's step.
        lr_decay: how much each update of a row lowers its rate, at least 0.
        weight_decay: L2 penalty, at least 0, added to the gradient.
        initial_accumulator_value: what `sum` starts from, at least 0.
        eps: added to the root, above 0.

    State: `sum`, 4 bytes a row.

    Paper: Mudigere et al.: Software-hardware co-design for fast and scalable training of deep learning
    recommendation models, ISCA 2022.

    Example:
        >>> RowWiseAdagrad(lr=0.05)
        RowWiseAdagrad(lr=0.05, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10)
    """

    name: ClassVar[str] = "rowwise_adagrad"
