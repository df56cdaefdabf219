# SPDX-License-Identifier: Apache-2.0
"""How a row's weights follow its gradients: SGD, Adagrad, Adam and their kin, RMSprop, Lion, FTRL.

An optimizer here is a description, a frozen dataclass with `torch.optim`'s names. The core keeps the state
beside each row and does the arithmetic, in float32, on the rows a batch touched and on no others.
docs/optimizers.md has the formulas to the last rounding.
"""

from damo_embedding.optimizers.adagrad import Adagrad, RowWiseAdagrad
from damo_embedding.optimizers.adam import Adam, AdamW, AMSGrad, BiasCorrection
from damo_embedding.optimizers.ftrl import FTRL
from damo_embedding.optimizers.lion import Lion
from damo_embedding.optimizers.optimizer import Optimizer
from damo_embedding.optimizers.rmsprop import RMSprop
from damo_embedding.optimizers.sgd import SGD

__all__ = [
    "FTRL",
    "SGD",
    "AMSGrad",
    "Adagrad",
    "Adam",
    "AdamW",
    "BiasCorrection",
    "Lion",
    "Optimizer",
    "RMSprop",
    "RowWiseAdagrad",
]
