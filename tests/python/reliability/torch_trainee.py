# SPDX-License-Identifier: Apache-2.0
"""A training with torch that may die at any moment: what a session of storage_server.py is told to do.

All that makes resuming hard: rows in groups with filters, lifetimes and schedules, a dense part with an optimizer and a
schedule of its own, dropout, bags, a reader that shuffles.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import damo_embedding as de
from damo_embedding.torch import EmbeddingCollection, Feature, SparseOptimizer, load_checkpoint, save_checkpoint
from reliability.trainee import all_rows
from storage_server import Served

START = 1_700_000_000
EVENTS = 3_000
BAG = 3

ROW_OPTIMIZERS = {
    "adam": de.Adam(lr=0.02),
    "adam with warm-up": de.Adam(lr=de.LinearWarmup(warmup_steps=20, then=0.02)),
    "adagrad": de.Adagrad(lr=0.05),
    "row-wise adagrad": de.RowWiseAdagrad(lr=0.05),
    "sgd with momentum": de.SGD(lr=0.05, momentum=0.9),
    "lion": de.Lion(lr=0.001),
    "amsgrad": de.AMSGrad(lr=0.02),
}
DENSE_OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


@dataclass(frozen=True)
class Plan:
    """What a training is."""

    seed: int
    steps: int
    every: int  # steps from checkpoint to checkpoint
    keep: int
    batch: int
    dimension: int
    row_optimizer: str
    dense_optimizer: str
    deferred: bool  # updates of rows at step(), instead of in backward()
    admission: int  # sightings before a row; 0: no filter
    ttl: str | int | None  # an int is of steps


class Reader:
    """Batches of events, shuffled anew each epoch."""

    def __init__(self, plan: Plan) -> None:
        events = np.random.default_rng([plan.seed, 1])
        self.batch = plan.batch
        self.users = de.hash_keys("user", events.zipf(1.2, EVENTS) % 5_000)
        self.tags = events.zipf(1.3, (EVENTS, BAG)) % 3_000
        self.clicks = (events.random(EVENTS) < 0.1 + 0.4 * (self.tags[:, 0] % 2)).astype(np.float32)
        self.shuffle = np.random.default_rng([plan.seed, 2])
        self.order = self.shuffle.permutation(EVENTS)
        self.position = 0

    def next(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if self.position + self.batch > EVENTS:
            self.order, self.position = self.shuffle.permutation(EVENTS), 0
        chosen = self.order[self.position : self.position + self.batch]
        self.position += self.batch
        ids = {"user": torch.from_numpy(self.users[chosen]), "tags": torch.from_numpy(self.tags[chosen])}
        return ids, torch.from_numpy(self.clicks[chosen])

    def state(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle.bit_generator.state, "order": self.order, "position": self.position}

    def go_to(self, state: dict[str, Any]) -> None:
        self.shuffle.bit_generator.state = state["shuffle"]
        self.order, self.position = state["order"], state["position"]


class Model(torch.nn.Module):
    def __init__(self, storage: de.Storage, plan: Plan) -> None:
        super().__init__()
        admission = de.CountingBloomFilter(capacity=10_000, count=plan.admission) if plan.admission else None
        self.fields = EmbeddingCollection(
            storage,
            {"user": Feature(plan.dimension, admission=admission), "tags": Feature(plan.dimension, pooling="mean")},
            optimizer=ROW_OPTIMIZERS[plan.row_optimizer],
            initializer=de.Normal(0, 0.1),
            ttl=de.Steps(plan.ttl) if isinstance(plan.ttl, int) else plan.ttl,
        )
        self.head = torch.nn.Sequential(
            torch.nn.Linear(2 * plan.dimension, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        vectors = self.fields(ids)
        clicks: torch.Tensor = self.head(torch.cat([vectors["user"], vectors["tags"]], 1))
        return clicks.squeeze(1)


def train(served: Served, place: Path, plan: Plan, options: dict[str, Any]) -> dict[str, str]:
    """The whole training, or what is left of it; says each step that is done. Returns what it ended with."""
    torch.set_num_threads(1)  # sums in one order
    random.seed(0)
    torch.manual_seed(plan.seed)
    checkpoints = place / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    with de.Storage(place / "rows.damo", **options) as storage:
        model, reader = Model(storage, plan), Reader(plan)
        dense = DENSE_OPTIMIZERS[plan.dense_optimizer](model.parameters())
        decay = torch.optim.lr_scheduler.StepLR(dense, step_size=15, gamma=0.7)
        states: list[Any] = [dense, decay]
        if plan.deferred:
            states.append(SparseOptimizer(model))
        resumed = load_checkpoint(checkpoints, model, states, storage)
        if resumed is None:
            save_checkpoint(checkpoints / "0", model, states, storage, 0, reader.state(), keep=plan.keep)
        else:
            reader.go_to(resumed.reader_state)
        first = resumed.step if resumed else 0
        storage.now = START + 3_600 * first  # also where no step is left
        served.connection.send(("resumed", first, resumed.operations_set_aside if resumed else 0))
        for step in range(first + 1, plan.steps + 1):
            storage.now = START + 3_600 * step
            ids, clicks = reader.next()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids), clicks)
            dense.zero_grad()
            loss.backward()
            dense.step()
            if plan.deferred:
                states[-1].step()
            decay.step()
            if step % plan.every == 0 or step == plan.steps:
                state = reader.state()
                save_checkpoint(checkpoints / str(step), model, states, storage, step, state, keep=plan.keep)
            served.connection.send(("step", step))
        return fingerprints(model, storage, checkpoints / str(plan.steps))


def fingerprints(model: Model, storage: de.Storage, checkpoint: Path) -> dict[str, str]:
    """A digest of each part: rows, filters, the dense weights, optimizers, random states, the reader."""
    found = {}
    for name, table in model.fields.embeddings.items():
        rows = all_rows(table)
        order = np.argsort(rows.keys)
        columns = {
            "keys": rows.keys, "weights": rows.weights, "counts": rows.update_counts, "times": rows.last_updates,
            **rows.state,
        }  # fmt: skip
        for column, values in columns.items():
            found[f"{column} of {name}"] = values[order].tobytes()
        found[f"numbers of {name}"] = repr((len(table), table.step)).encode()
        if table.admission is not None:
            estimates = table.admission.estimate(np.arange(4_000))
            found[f"filter of {name}"] = repr(table.admission.adds).encode() + np.asarray(estimates).tobytes()
    found["clock"] = repr(storage.now).encode()
    for file in ("dense.safetensors", "training.json"):
        found[file] = (checkpoint / file).read_bytes()
    return {name: hashlib.blake2b(data, digest_size=16).hexdigest() for name, data in found.items()}
