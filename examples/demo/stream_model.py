# SPDX-License-Identifier: Apache-2.0
"""DeepFM on the stream: what every part that trains on generated events shares."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import damo_embedding as de
from damo_embedding.torch import EmbeddingCollection, Feature
from demo.model import DeepFM
from demo.settings import StreamSettings
from demo.stream import FIELDS, START, StreamBatch
from demo.stream_tables import INITIALIZER


def our_embeddings(storage: de.Storage, size: StreamSettings) -> EmbeddingCollection:
    features = {name: Feature(size.dimension) for name in FIELDS}
    return EmbeddingCollection(storage, features, optimizer=de.Adam(lr=size.lr), initializer=INITIALIZER)


class StreamTrainer:
    """Predicts a batch and learns it, in one pass over it.

    Args:
        embeddings: of our tables or of torch's.
        sparse: the optimizer of torch's tables; ours are updated by `backward()`.
    """

    def __init__(
        self, embeddings: nn.Module, size: StreamSettings, sparse: torch.optim.Optimizer | None = None
    ) -> None:
        torch.manual_seed(size.seed)
        self.model = DeepFM(embeddings, len(FIELDS), size.dimension)
        self.dense = torch.optim.Adam(self.model.dense_parameters(), lr=size.dense_lr)
        self._optimizers = [self.dense] if sparse is None else [self.dense, sparse]

    def learn(self, ids: dict[str, NDArray[np.int64]], labels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits, from before anything was learnt from the labels."""
        logits = self.model({name: torch.from_numpy(values) for name, values in ids.items()})
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return logits.detach().numpy()


def learn_step(
    storage: de.Storage, trainer: StreamTrainer, batch: StreamBatch, step: int
) -> tuple[NDArray[np.float32], float]:
    """A step of ours: its logits, and the seconds it took."""
    storage.now = START + step
    started = time.perf_counter()
    logits = trainer.learn(batch.keys, batch.labels)
    return logits, time.perf_counter() - started


def warm_up(size: StreamSettings) -> object:
    """Some steps on a throw-away table of torch's and on one of ours, so that what is there once, whatever the
    table (torch's buffers, the code of torch and of RocksDB), is there before memory is measured.

    Returns the arrays of a step, to be kept until memory was measured: a batch is there with any table.
    """

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1, size.dimension, sparse=True)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: self.table(ids) for name, ids in batch.items()}

    rows = Rows()
    trainer = StreamTrainer(rows, size, torch.optim.SGD(rows.parameters(), lr=0.1))
    nothing = np.zeros(size.batch, np.int64)
    for _ in range(2):
        trainer.learn(dict.fromkeys(FIELDS, nothing), nothing.astype(np.float32))
    with (
        tempfile.TemporaryDirectory() as directory,
        de.Storage(Path(directory) / "warm-up", memory="16MiB", log_bytes="1MiB") as storage,
    ):
        ours = StreamTrainer(our_embeddings(storage, size), size)
        for step in range(8):  # more rows than 16 MiB hold: some go to disk
            ids = np.arange(step * size.batch, (step + 1) * size.batch)
            ours.learn(dict.fromkeys(FIELDS, ids), nothing.astype(np.float32))
    return trainer.model(dict.fromkeys(FIELDS, torch.from_numpy(nothing)))
