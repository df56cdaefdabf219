# SPDX-License-Identifier: Apache-2.0
"""How the demo trains a DeepFM on MovieLens, on our tables and on torch's, in one and the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import damo_embedding as de
from damo_embedding.torch import EmbeddingCollection, Feature
from demo.model import DeepFM, TorchEmbeddings
from demo.movielens import Events, Ragged, Vocabulary
from demo.settings import MovieLensSettings


class Trainer:
    """A model with the optimizers of its dense part and, for torch's tables, of its rows. Ours are updated by
    `backward()`.
    """

    def __init__(self, model: DeepFM, optimizers: list[torch.optim.Optimizer]) -> None:
        self.model = model
        self._optimizers = optimizers

    def learn(self, events: Events, rows: NDArray[np.int64]) -> None:
        self.model.train()
        logits = self.model(events.batch(rows))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(events.labels[rows]))
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()

    @torch.no_grad()
    def predict(self, events: Events, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.model.eval()
        parts = [self.model(events.batch(rows[i : i + 4096])).numpy() for i in range(0, len(rows), 4096)]
        return np.concatenate(parts)

    def fit(
        self,
        events: Events,
        rows: NDArray[np.int64],
        settings: MovieLensSettings,
        seed: int,
        tick: Callable[[], None],
    ) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(settings.epochs):
            order = generator.permutation(rows)
            for i in range(0, len(order), settings.batch):
                self.learn(events, order[i : i + settings.batch])
                tick()


@contextmanager
def our_trainer(path: Path, events: Events, settings: MovieLensSettings, seed: int) -> Iterator[Trainer]:
    with de.Storage(path, memory=settings.memory, threads=1) as storage:
        features = {
            name: Feature(settings.dimension, pooling="mean" if isinstance(column, Ragged) else None)
            for name, column in events.fields.items()
        }
        # torch's SparseAdam counts a table's steps, not a row's: here the two are to be the same optimizer.
        embeddings = EmbeddingCollection(
            storage,
            features,
            optimizer=de.Adam(lr=settings.lr, bias_correction="global"),
            initializer=de.Uniform(-0.01, 0.01),
            seed=seed,
        )
        yield _trainer(embeddings, events, settings, seed, [])


def torch_trainer(vocabulary: Vocabulary, events: Events, settings: MovieLensSettings, seed: int) -> Trainer:
    torch.manual_seed(seed)
    pooled = {name for name, column in events.fields.items() if isinstance(column, Ragged)}
    embeddings = TorchEmbeddings(vocabulary.sizes(), pooled, settings.dimension)
    sparse = torch.optim.SparseAdam(list(embeddings.parameters()), lr=settings.lr)
    return _trainer(embeddings, events, settings, seed, [sparse])


def _trainer(
    embeddings: nn.Module,
    events: Events,
    settings: MovieLensSettings,
    seed: int,
    optimizers: list[torch.optim.Optimizer],
) -> Trainer:
    torch.manual_seed(seed)  # the same first dense weights for both
    model = DeepFM(embeddings, len(events.fields), settings.dimension)
    return Trainer(model, [*optimizers, torch.optim.Adam(model.dense_parameters(), lr=settings.dense_lr)])
