# SPDX-License-Identifier: Apache-2.0
"""DeepFM (Guo et al. 2017) on rows from wherever they come, and torch.nn.Embedding as the place they usually
come from.
"""

from __future__ import annotations

import torch
from torch import nn

from demo.movielens import Batch


class DeepFM(nn.Module):
    """A logit from the rows of an event's fields: first-order weights, pairwise products, and a small
    network.

    Args:
        embeddings: from a dict of ids by field to a dict of rows by field, `[batch, dimension]` each. The
        first number of a row
            is its first-order weight, the others are its factors.
        num_fields, dimension: the shape of what `embeddings` returns.
    """

    def __init__(self, embeddings: nn.Module, num_fields: int, dimension: int, hidden: int = 32) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.bias = nn.Parameter(torch.zeros(()))
        self.network = nn.Sequential(nn.Linear(num_fields * (dimension - 1), hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, batch: Batch) -> torch.Tensor:
        rows = torch.stack(list(self.embeddings(batch).values()), dim=1)
        first, factors = rows[..., 0], rows[..., 1:]
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        return self.bias + first.sum(1) + pairs + self.network(factors.flatten(1)).squeeze(1)

    def dense_parameters(self) -> list[nn.Parameter]:
        return [self.bias, *self.network.parameters()]


class TorchEmbeddings(nn.Module):
    """One torch.nn.Embedding a field (nn.EmbeddingBag for several values an event), sized by a vocabulary."""

    def __init__(self, sizes: dict[str, int], pooled: set[str], dimension: int) -> None:
        super().__init__()
        # A list, as the names of fields need not be names of Python attributes.
        self._names = list(sizes)
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(size, dimension, mode="mean", sparse=True)
            if name in pooled
            else nn.Embedding(size, dimension, sparse=True)
            for name, size in sizes.items()
        )
        for table in self.tables:
            nn.init.uniform_(table.weight, -0.01, 0.01)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows = {}
        for name, table in zip(self._names, self.tables, strict=True):
            ids = batch[name]
            rows[name] = table(*ids) if isinstance(ids, tuple) else table(ids)
        return rows
