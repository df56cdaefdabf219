# SPDX-License-Identifier: Apache-2.0
"""What an EmbeddingCollection is told of each of its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from damo_embedding._core import MAX_DIMENSION
from damo_embedding.admission import parse_admission
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.initializers import Initializer
from damo_embedding.integers import parse_int
from damo_embedding.lifetimes import Ttl, parse_ttl
from damo_embedding.optimizers import Optimizer
from damo_embedding.torch.ids import padding_key
from damo_embedding.torch.pooling import POOLINGS


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of an `EmbeddingCollection`.

    Args:
        dimension: length of its vectors.
        pooling: None for one vector an id; "sum" or "mean" for one vector a bag of ids, as
            `torch.nn.EmbeddingBag`.
        group: the group of its rows; the feature's name unless given. Features with the same group and equal
            settings share their rows.
        optimizer, initializer, seed, ttl, admission: those of the collection unless given.
        padding_idx: the id that stands for nothing: zeros, no row, no gradient, not counted by a mean.
    """

    dimension: int
    pooling: Literal["sum", "mean"] | None = None
    group: int | str | None = None
    optimizer: Optimizer | None = None
    initializer: Initializer | None = None
    seed: int | None = None
    padding_idx: int | None = None
    ttl: Ttl | None = None
    admission: CountingBloomFilter | Literal["all"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimension", parse_int("Feature", "dimension", self.dimension, 1, MAX_DIMENSION))
        if self.pooling is not None and not (isinstance(self.pooling, str) and self.pooling in POOLINGS):
            raise ValueError(f'[Feature] pooling is {self.pooling!r}, expected None, "sum" or "mean"')
        padding_key(self.padding_idx)
        parse_ttl("Feature", self.ttl)
        parse_admission("Feature", self.admission)
