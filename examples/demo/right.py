# SPDX-License-Identifier: Apache-2.0
"""Right: trained on our tables, a model is as good as on torch.nn.Embedding, though nobody built a
vocabulary.

Random 80/20 splits of MovieLens-100K, the same split, first dense weights and order of events for both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo import movielens
from demo.metrics import auc
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import settings
from demo.training import our_trainer, torch_trainer

SYSTEMS = ("ours", "torch")
FEATURES = {"all": "all features", "user_item": "user and item only"}


def run(runner: Runner, data: Path) -> dict[str, Any]:
    """Mean AUC by features and system, and the single ones."""
    names = {"ours": "damo_embedding", "torch": "torch.nn.Embedding"}
    single = runner.run(*(Job("right", names[system], {"system": system, "data": str(data)}) for system in SYSTEMS))
    by_system = dict(zip(SYSTEMS, single, strict=True))
    return {
        features: {
            system: {
                "mean": float(np.mean(by_system[system][features])),
                "seeds": by_system[system][features],
            }
            for system in SYSTEMS
        }
        for features in FEATURES
    }


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(1)  # the other system has the other core
    size = settings(quick).movielens
    system, out = options["system"], directory / "right"
    out.mkdir(exist_ok=True)
    everything = movielens.read(Path(options["data"]))
    train_size = len(everything) * 8 // 10
    progress.total(len(FEATURES) * size.seeds * size.epochs * -(-train_size // size.batch))

    results: dict[str, list[float]] = {}
    for features in FEATURES:
        events = everything if features == "all" else everything.only(movielens.USER_AND_ITEM)
        results[features] = []
        for seed in range(size.seeds):
            order = np.random.default_rng(seed).permutation(len(events))
            train, test = order[:train_size], order[train_size:]
            if system == "ours":
                storage = out / f"{features}-{seed}.damo"
                with our_trainer(storage, events, size, seed) as trainer:
                    trainer.fit(events, train, size, seed, progress.tick)
                    scores = trainer.predict(events, test)
                shutil.rmtree(storage)
            else:
                vocabulary = movielens.Vocabulary(events, np.arange(len(events)))
                encoded = vocabulary.encode(events)
                trainer = torch_trainer(vocabulary, encoded, size, seed)
                trainer.fit(encoded, train, size, seed, progress.tick)
                scores = trainer.predict(encoded, test)
            np.save(out / f"{features}-{seed}-{system}.npy", scores)
            np.save(out / f"{features}-{seed}-labels.npy", events.labels[test])
            results[features].append(auc(events.labels[test], scores))
    return results
