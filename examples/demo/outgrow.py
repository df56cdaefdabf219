# SPDX-License-Identifier: Apache-2.0
"""torch.nn.Embedding on the stream of `oom`, under the same cap on memory: it dies, and says at which row.

Nobody can give it a vocabulary of a stream, so it gets one that grows: a table with twice the rows whenever
it is full. Everything else is as sparing as it can be made: the vocabulary is two sorted arrays, and the old
table is gone before the optimizer's is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from demo import memory
from demo.progress import Progress
from demo.settings import StreamSettings, settings, size_in_bytes
from demo.stream import Stream
from demo.stream_model import StreamTrainer, warm_up
from demo.workspace import write_json

FIRST_ROWS = 16384


class GrowingEmbedding(nn.Module):
    """One nn.Embedding for the keys of all fields, and SparseAdam for it."""

    def __init__(self, size: StreamSettings) -> None:
        super().__init__()
        self.rows = 0
        self._keys = np.empty(0, np.int64)
        self._indices = np.empty(0, np.int64)
        self.table = _table(FIRST_ROWS, size.dimension)
        self.optimizer = torch.optim.SparseAdam(list(self.table.parameters()), lr=size.lr)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.table(indices) for name, indices in batch.items()}

    def indices(self, keys: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """The rows of the keys; new keys get new rows."""
        used = np.unique(np.concatenate(list(keys.values())))
        place = np.searchsorted(self._keys, used)
        known = place < len(self._keys)
        known[known] = self._keys[place[known]] == used[known]
        new = ~known
        while self.rows + int(new.sum()) > self.table.num_embeddings:
            self._grow()
        fresh = np.arange(self.rows, self.rows + int(new.sum()))
        self._keys = np.insert(self._keys, place[new], used[new])
        self._indices = np.insert(self._indices, place[new], fresh)
        self.rows += len(fresh)
        return {name: self._indices[np.searchsorted(self._keys, values)] for name, values in keys.items()}

    def _grow(self) -> None:
        old = self.table.weight
        state = self.optimizer.state.pop(old, {})
        self.table = _table(2 * len(old), old.shape[1], first=old.data)
        self.optimizer.param_groups[0]["params"] = [self.table.weight]
        del old
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() == 2:
                grown = torch.zeros_like(self.table.weight)
                grown[: len(value)] = value
                state[name] = grown
        if state:
            self.optimizer.state[self.table.weight] = state


def _table(rows: int, dimension: int, first: torch.Tensor | None = None) -> nn.Embedding:
    weight = torch.empty(rows, dimension).uniform_(-0.01, 0.01)
    if first is not None:
        weight[: len(first)] = first
    return nn.Embedding(rows, dimension, sparse=True, _weight=weight)


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    size = settings(quick).stream
    stream = Stream(size)
    torch.set_num_threads(1)
    stream.batch(0).distinct()
    warm_up(size)
    progress.total(size.steps)
    memory.cap_growth(size_in_bytes(size.cap))
    embeddings = GrowingEmbedding(size)
    trainer = StreamTrainer(embeddings, size, embeddings.optimizer)
    history: list[dict[str, Any]] = []
    try:
        for step in range(size.steps):
            history.append({"step": step, "rows": embeddings.rows})
            batch = stream.batch(step)
            trainer.learn(embeddings.indices(batch.keys), batch.labels)
            progress.tick(f"{embeddings.rows:,} rows")
    except (MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, RuntimeError) and "memory" not in said:
            raise  # not what this part is about
        history.append({"step": step, "rows": embeddings.rows, "error": said})
        progress.say(f"torch.nn.Embedding died at row {embeddings.rows + 1:,}: {said}")
    write_json(directory / "stream" / "outgrow.json", history)
    dead = "error" in history[-1]
    return {
        "died_at_rows": history[-1]["rows"] if dead else None,
        "died_at_step": history[-1]["step"] if dead else None,
    }
