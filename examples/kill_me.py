# SPDX-License-Identifier: Apache-2.0
"""A training that is killed again and again, and ends with the same bits as one that is left alone.

    python examples/kill_me.py              # 12 kills, well below a minute
    python examples/kill_me.py --kills 50 --steps 2000 --seed 7

The training has all that makes resuming hard: rows in a storage, updated by a SparseOptimizer; a dense part with Adam
and a learning-rate schedule; dropout; a reader that shuffles. It saves a checkpoint every few steps. kill -9 comes at a
random moment: during a step, a checkpoint, a removal of an old one, or a resumption.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import damo_embedding as de
from damo_embedding.torch import EmbeddingCollection, Feature, SparseOptimizer, load_checkpoint, save_checkpoint

EVENTS, BATCH, EVERY = 2_000, 64, 10
START = 1_700_000_000


class Reader:
    """Batches of events, shuffled anew each epoch. Where it stands is a dictionary of plain values."""

    def __init__(self) -> None:
        events = np.random.default_rng(1)
        self.users = events.zipf(1.3, EVENTS) % 500
        self.items = events.zipf(1.2, EVENTS) % 800
        self.clicks = (events.random(EVENTS) < 0.1 + 0.4 * ((self.users + self.items) % 2)).astype(np.float32)
        self.shuffle = np.random.default_rng(2)
        self.order = self.shuffle.permutation(EVENTS)
        self.position = 0

    def batch(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if self.position + BATCH > EVENTS:
            self.order, self.position = self.shuffle.permutation(EVENTS), 0
        chosen = self.order[self.position : self.position + BATCH]
        self.position += BATCH
        ids = {"user": torch.from_numpy(self.users[chosen]), "item": torch.from_numpy(self.items[chosen])}
        return ids, torch.from_numpy(self.clicks[chosen])

    def state(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle.bit_generator.state, "order": self.order, "position": self.position}

    def go_to(self, state: dict[str, Any]) -> None:
        self.shuffle.bit_generator.state = state["shuffle"]
        self.order, self.position = state["order"], state["position"]


class Model(torch.nn.Module):
    def __init__(self, storage: de.Storage) -> None:
        super().__init__()
        self.fields = EmbeddingCollection(
            storage, {"user": Feature(8), "item": Feature(8)}, optimizer=de.Adam(lr=0.02), initializer=de.Normal(0, 0.1)
        )
        self.head = torch.nn.Sequential(
            torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
        )

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        vectors = self.fields(ids)
        clicks: torch.Tensor = self.head(torch.cat([vectors["user"], vectors["item"]], 1))
        return clicks.squeeze(1)


def train(place: Path, steps: int, told: Connection) -> None:
    """The whole training, or what is left of it. Nothing here knows of kills."""
    torch.set_num_threads(1)  # sums in one order
    random.seed(0)
    torch.manual_seed(0)
    checkpoints = place / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    with de.Storage(place / "rows.damo", memory="16MiB", threads=1) as storage:
        model, reader = Model(storage), Reader()
        dense, rows = torch.optim.Adam(model.parameters(), lr=0.01), SparseOptimizer(model)
        decay = torch.optim.lr_scheduler.StepLR(dense, step_size=50, gamma=0.7)
        states = [dense, rows, decay]

        resumed = load_checkpoint(checkpoints, model, states, storage)
        if resumed is None:
            save_checkpoint(checkpoints / "0", model, states, storage, 0, reader.state(), keep=2)
        else:
            reader.go_to(resumed.reader_state)
        first = resumed.step if resumed else 0
        told.send((first, resumed.operations_set_aside if resumed else 0))

        for step in range(first + 1, steps + 1):
            storage.now = START + step
            ids, clicks = reader.batch()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids), clicks)
            dense.zero_grad()
            loss.backward()
            dense.step()
            rows.step()
            decay.step()
            if step % EVERY == 0 or step == steps:
                save_checkpoint(checkpoints / str(step), model, states, storage, step, reader.state(), keep=2)
            told.send(step)


def life(place: Path, steps: int, die_at: int | None, delay: float = 0.0) -> tuple[int, int, int]:
    """One process. Returns where it began, what it set aside, and the last step it told of."""
    mine, its = multiprocessing.Pipe(duplex=False)
    # Forked before torch has any thread, and with torch imported: a life begins at once.
    process = multiprocessing.get_context("fork").Process(target=train, args=(place, steps, its))
    process.start()
    its.close()
    first, aside, step = 0, 0, 0
    try:
        if die_at != 0:
            first, aside = mine.recv()
            step = first
        while die_at is None or step < die_at:
            step = mine.recv()
        time.sleep(delay)
    except EOFError:  # it has ended
        pass
    if die_at is not None and process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"the training failed: exit code {process.exitcode}")
    return first, aside, step if process.exitcode else steps


def rows_of(place: Path) -> dict[str, bytes]:
    """Every row with its state, count and time, as bytes."""
    found = {}
    with de.Storage.open(place / "rows.damo", memory="16MiB") as storage:
        for name, table in Model(storage).fields.embeddings.items():
            parts = list(table.scan())
            keys = np.concatenate([part.keys for part in parts])
            order = np.argsort(keys)
            columns = {"keys": keys, "weights": np.concatenate([part.weights for part in parts])}
            columns["counts"] = np.concatenate([part.update_counts for part in parts])
            columns["times"] = np.concatenate([part.last_updates for part in parts])
            for entry in parts[0].state:
                columns[entry] = np.concatenate([part.state[entry] for part in parts])
            found |= {f"{name} {column}": values[order].tobytes() for column, values in columns.items()}
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=12)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    given = options.parse_args()
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as directory:
        alone, killed = Path(directory, "alone"), Path(directory, "killed")
        life(alone, given.steps, None)
        print(f"left alone: {given.steps} steps")
        reached = 0
        for number in range(1, given.kills + 1):
            # Now and then so early that it is still resuming.
            die_at = 0 if number % 4 == 0 else reached + 1 + moments.randrange(max(1, 2 * given.steps // given.kills))
            die_at = min(die_at, given.steps - 1)
            first, aside, reached = life(killed, given.steps, die_at, moments.random() * 0.02)
            how = f"from step {first}, {aside} operations set aside, to step {reached}" if die_at else "while it began"
            print(f"kill {number}: {how}")
        first, aside, _ = life(killed, given.steps, None)
        print(f"last life: from step {first}, {aside} operations set aside, to the end")

        ends = [place / "checkpoints" / str(given.steps) for place in (alone, killed)]
        equal = {name: len({(end / name).read_bytes() for end in ends}) == 1
                 for name in ("dense.safetensors", "training.json")}  # fmt: skip
        one, other = rows_of(alone), rows_of(killed)
        equal["rows"] = one == other
        left = sorted(os.listdir(killed / "checkpoints"))
    rows = sum(len(data) // 8 for name, data in one.items() if name.endswith("keys"))
    print(f"{rows} rows with state; weights, optimizers, random numbers, reader: ", end="")
    print("equal in every bit" if all(equal.values()) else f"NOT EQUAL: {[name for name in equal if not equal[name]]}")
    print(f"checkpoints left: {', '.join(left)}")
    return 0 if all(equal.values()) and len(left) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
