# SPDX-License-Identifier: Apache-2.0
"""OOV: the same ratings in time order. Most users of the last fifth were never seen before.

Both models predict a few ratings, then learn them, and so on. Ours gives a new user a row; torch.nn.Embedding
has the vocabulary of the first four fifths and one row a field for everyone else, and goes on training both
and its dense part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import movielens
from demo.metrics import auc, auc_in_windows
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import settings
from demo.training import Trainer, our_trainer, torch_trainer

WINDOWS = 20


def run(runner: Runner, data: Path) -> dict[str, Any]:
    jobs = (("ours", "damo_embedding"), ("torch", "nn.Embedding, frozen vocabulary"))
    ours, frozen = runner.run(*(Job("oov", label, {"system": name, "data": str(data)}) for name, label in jobs))
    return {"ours": ours, "torch": frozen}


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(1)
    size = settings(quick).movielens
    system, out = options["system"], directory / "oov"
    out.mkdir(exist_ok=True)
    events = movielens.read(Path(options["data"]))
    order = np.argsort(events.times, kind="stable")
    first, last = order[: len(order) * 8 // 10], order[len(order) * 8 // 10 :]
    progress.total(size.epochs * -(-len(first) // size.batch) + -(-len(last) // size.online_batch))

    def predict_then_learn(trainer: Trainer, events: movielens.Events) -> np.ndarray:
        trainer.fit(events, first, size, 0, progress.tick)
        scores = []
        for i in range(0, len(last), size.online_batch):
            rows = last[i : i + size.online_batch]
            scores.append(trainer.predict(events, rows))
            trainer.learn(events, rows)
            progress.tick()
        return np.concatenate(scores)

    if system == "ours":
        with our_trainer(out / "storage", events, size, seed=0) as trainer:
            scores = predict_then_learn(trainer, events)
    else:
        vocabulary = movielens.Vocabulary(events, first)
        encoded = vocabulary.encode(events)
        scores = predict_then_learn(torch_trainer(vocabulary, encoded, size, seed=0), encoded)
    labels = events.labels[last]
    np.save(out / f"{system}.npy", scores)
    np.save(out / "labels.npy", labels)
    users = events.fields["user"]
    assert isinstance(users, np.ndarray)
    ends, windows = auc_in_windows(labels, scores, WINDOWS)
    return {
        "auc": auc(labels, scores),
        "ends": ends,
        "windows": windows,
        "events": len(last),
        "events_of_new_users": int((~np.isin(users[last], users[first])).sum()),
    }
