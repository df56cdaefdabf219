# SPDX-License-Identifier: Apache-2.0
"""Our embedding and torch's, trained side by side from the same first weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

import damo_embedding as de
from damo_embedding.torch import Embedding

VOCABULARY, DIMENSION = 40, 8

# Two threads that wait for each other in tensors this small take several times as long as one.
torch.set_num_threads(1)
# torch warns when a sparse optimizer makes a tensor and nobody has said whether to check it.
torch.sparse.check_sparse_tensor_invariants.disable()

# Ours, and what of torch.optim it equals on sparse gradients.
OPTIMIZERS: dict[str, tuple[de.SGD | de.Adagrad | de.Adam, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (de.SGD(lr=0.1), lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "adagrad": (de.Adagrad(lr=0.05), lambda parameters: torch.optim.Adagrad(parameters, lr=0.05)),
    "adam": (
        de.Adam(lr=0.01, bias_correction="global"),
        lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01),
    ),
}

LookUp = Callable[[torch.Tensor], torch.Tensor]


class BesideTorch:
    """`ours` and `theirs` look up the same indices of a small vocabulary; in our storage an index is a 64-bit
    key."""

    def __init__(self, storage: de.Storage, optimizer: str, *, padding: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.keys = torch.randint(-(1 << 63), (1 << 63) - 1, (VOCABULARY,), generator=generator)
        ours, theirs = OPTIMIZERS[optimizer]
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
        self.theirs = torch.nn.Embedding.from_pretrained(first, freeze=False, sparse=True, padding_idx=padding)
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
