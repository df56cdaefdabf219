# SPDX-License-Identifier: Apache-2.0
"""Our embedding and torch's, trained side by side from the same first weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import damo_embedding as de
from damo_embedding.torch import Embedding

VOCABULARY, DIMENSION = 40, 8

# Two threads that wait for each other in tensors this small take several times as long as one.
torch.set_num_threads(1)
# torch warns when a sparse optimizer makes a tensor and nobody has said whether to check it.
torch.sparse.check_sparse_tensor_invariants.disable()

Pair = tuple[de.Optimizer, Callable[..., torch.optim.Optimizer]]
# Ours, and what of torch.optim it equals on sparse gradients.
OPTIMIZERS: dict[str, Pair] = {
    "sgd": (de.SGD(lr=0.1), lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "adagrad": (de.Adagrad(lr=0.05), lambda parameters: torch.optim.Adagrad(parameters, lr=0.05)),
    "adam": (
        de.Adam(lr=0.01, bias_correction="global"),
        lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01),
    ),
}


def _pair(ours: Callable[..., de.Optimizer], theirs: Callable[..., torch.optim.Optimizer], **arguments: Any) -> Pair:
    return ours(**arguments), lambda parameters: theirs(parameters, **arguments)


# torch.optim's others take dense gradients alone, and then move every row in every step. When every batch has every
# row, ours are equal to them too, state that goes on between batches included.
DENSE_OPTIMIZERS: dict[str, Pair] = {
    "sgd with momentum": _pair(de.SGD, torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.25, weight_decay=0.01),
    "sgd with nesterov's": _pair(de.SGD, torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad with decays": _pair(de.Adagrad, torch.optim.Adagrad, lr=0.05, lr_decay=0.01, weight_decay=0.01),
    "adam by the row": _pair(de.Adam, torch.optim.Adam, lr=0.01, weight_decay=0.01),
    "amsgrad": (de.AMSGrad(lr=0.01), lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True)),
    "adamw": _pair(de.AdamW, torch.optim.AdamW, lr=0.01),
    # At a minimum the others' steps vanish; RMSprop's are as long as ever where eps is small, and their signs a matter
    # of the last bit.
    "rmsprop": _pair(de.RMSprop, torch.optim.RMSprop, lr=0.005, eps=0.01),
    "centered rmsprop with momentum": _pair(
        de.RMSprop, torch.optim.RMSprop, lr=0.001, eps=0.01, momentum=0.5, centered=True
    ),
}

LookUp = Callable[[torch.Tensor], torch.Tensor]


class BesideTorch:
    """`ours` and `theirs` look up the same indices of a small vocabulary; in our storage an index is a 64-bit
    key."""

    def __init__(self, storage: de.Storage, optimizer: str, *, padding: int | None = None, dense: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.keys = torch.randint(-(1 << 63), (1 << 63) - 1, (VOCABULARY,), generator=generator)
        ours, theirs = (DENSE_OPTIMIZERS if dense else OPTIMIZERS)[optimizer]
        self.module = Embedding(
            storage,
            group="beside",
            dimension=DIMENSION,
            optimizer=ours,
            initializer=de.Uniform(-0.5, 0.5),
            padding_idx=None if padding is None else int(self.keys[padding]),
        )
        first = self.rows()
        if padding is not None:
            first[padding] = 0.0
        self.padding = padding
        self.theirs = torch.nn.Embedding.from_pretrained(first, freeze=False, sparse=not dense, padding_idx=padding)
        self.their_optimizer = theirs(self.theirs.parameters())
        # Fixed: what comes after the lookup and what it should give.
        self.head = torch.randn(DIMENSION, 3, generator=generator)
        self.target = torch.randn(VOCABULARY, 3, generator=generator)

    def ours(self, indices: torch.Tensor) -> torch.Tensor:
        return self.module(self.keys[indices])

    def errors(self, vectors: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(vectors @ self.head) - self.target[indices]) ** 2

    def rows(self) -> torch.Tensor:
        return torch.from_numpy(self.module.embedding.lookup(self.keys.numpy(), insert=False))

    def largest_difference(self) -> float:
        difference = (self.rows() - self.theirs.weight.detach()).abs()
        if self.padding is not None:
            difference[self.padding] = 0.0
        return float(difference.max())


def draw(step: int, *shape: int) -> torch.Tensor:
    """Indices of one step, some of them several times."""
    generator = torch.Generator().manual_seed(step)
    return (torch.rand(shape, generator=generator) ** 2 * VOCABULARY).long()
