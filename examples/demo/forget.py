# SPDX-License-Identifier: Apache-2.0
"""What the rows on disk are worth: the run of `oom` once more, with every row that leaves memory reset.

Our core cannot be told to lose rows, so the demo does it from outside: it remembers the keys used last, as
many as `oom` had rows in memory, and erases each key that falls out. When such a key comes back, it gets its
first weights and starts anew. How much memory its storage has changes none of this: it has enough not to wait.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import damo_embedding as de
from demo.array_file import ArrayFile
from demo.oom import ends
from demo.progress import Progress
from demo.settings import settings
from demo.stream import Stream
from demo.stream_model import StreamTrainer, learn_step, our_embeddings


class RecentlyUsed:
    """The `capacity` keys used last, over all fields, by the step of their last use."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys = np.empty(0, np.int64)  # sorted; a field's hash is in its keys, so keys of two fields never meet
        self._field = np.empty(0, np.int8)
        self._step = np.empty(0, np.int64)

    def use(self, keys: dict[str, NDArray[np.int64]], step: int) -> dict[str, NDArray[np.int64]]:
        """Note the use of these keys; returns those that fall out, by field."""
        for number, values in enumerate(keys.values()):
            used = np.unique(values)
            place = np.searchsorted(self._keys, used)
            known = place < len(self._keys)
            known[known] = self._keys[place[known]] == used[known]
            self._step[place[known]] = step
            new = ~known
            self._keys = np.insert(self._keys, place[new], used[new])
            self._field = np.insert(self._field, place[new], number)
            self._step = np.insert(self._step, place[new], step)
        excess = len(self._keys) - self._capacity
        if excess <= 0:
            return {}
        gone = np.argpartition(self._step, excess - 1)[:excess]
        fallen = {name: self._keys[gone[self._field[gone] == number]] for number, name in enumerate(keys)}
        self._keys, self._field, self._step = (np.delete(a, gone) for a in (self._keys, self._field, self._step))
        return fallen


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    size = settings(quick).stream
    out = directory / "stream"
    stream, recent = Stream(size), RecentlyUsed(options["rows"])
    torch.set_num_threads(1)
    progress.total(size.steps)
    erased = 0
    with (
        ArrayFile(out / "forgetful.npy", np.float32, size.steps * size.batch) as scores,
        de.Storage(out / "forgetful.damo", memory=size.forgetful_memory) as storage,
    ):
        embeddings = our_embeddings(storage, size)
        trainer, tables = StreamTrainer(embeddings, size), embeddings.embeddings
        for step in range(size.steps):
            batch = stream.batch(step)
            logits, _ = learn_step(storage, trainer, batch, step)
            scores.append(logits)
            for name, keys in recent.use(batch.keys, step).items():
                erased += tables[name].erase(keys)
            progress.tick(f"{erased:,} resets")
    return {**ends(out, "forgetful"), "erased": erased}
