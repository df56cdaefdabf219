# SPDX-License-Identifier: Apache-2.0
"""Kill: a training process killed with SIGKILL half-way goes on from its checkpoint as if nothing had
happened.

A checkpoint of `save_checkpoint` is a directory with the rows, the dense weights, their optimizer and the
step, of one moment. The killed process has gone on after it; what its rows had run ahead is set aside. A run
that nobody disturbs is the yardstick: in the end every row, its optimizer state, its update count and time,
and every dense weight must agree in every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import damo_embedding as de
from damo_embedding.torch import load_checkpoint, save_checkpoint
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import Settings, StreamSettings, settings
from demo.stream import Stream
from demo.stream_model import StreamTrainer, learn_step, our_embeddings
from demo.stream_tables import our_tables


def run(runner: Runner, sizes: Settings) -> dict[str, Any]:
    half = sizes.kill_steps // 2
    _, victim = runner.run(
        Job("kill", "left alone", {"role": "undisturbed"}),
        Job("kill", "killed half-way", {"role": "victim"}, kill_at=half),
    )
    [resumed] = runner.run(Job("kill", "resumed from its checkpoint", {"role": "resumed"}))
    return {**victim, **resumed}


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(1)  # sums in one order
    sizes = settings(quick)
    size = replace(sizes.stream, steps=sizes.kill_steps, memory="16MiB")
    out = directory / "kill"
    out.mkdir(exist_ok=True)
    checkpoint = out / "checkpoint"
    role = options["role"]
    name = "undisturbed" if role == "undisturbed" else "resumed"
    path = out / name
    first = aside = 0
    opener = de.Storage.open if role == "resumed" else de.Storage.create  # what the killed process has left, or new
    with opener(path, memory=size.memory) as storage:
        trainer = StreamTrainer(our_embeddings(storage, size), size)
        if role == "resumed":
            resumed = load_checkpoint(checkpoint, trainer.model, trainer.dense, storage)
            assert resumed is not None
            first, aside = resumed.step, resumed.operations_set_aside
        checkpoint_at = size.steps * 2 // 5
        progress.total(size.steps - first + (role == "resumed"))
        stream = Stream(size)
        for step in range(first, size.steps):
            batch = stream.batch(step)
            learn_step(storage, trainer, batch, step)
            if role == "victim" and step + 1 == checkpoint_at:
                save_checkpoint(checkpoint, trainer.model, trainer.dense, storage, step=step + 1)
            progress.tick()
        storage.commit(step=size.steps)
    _save_dense(out / f"{name}.npz", trainer, next_step=size.steps)
    result = {"resumed_at": first, "operations_set_aside": aside}
    if role == "resumed":
        result |= _compare(out, size)
        progress.tick("equal, bit by bit" if result["equal"] else "not equal")
    return result


def _save_dense(path: Path, trainer: StreamTrainer, next_step: int) -> None:
    """Plain arrays: nothing in the file can run code when it is read."""
    arrays = {"next_step": np.array(next_step)}
    for i, parameter in enumerate(trainer.model.dense_parameters()):
        arrays[f"{i}"] = parameter.detach().numpy()
        for name, value in trainer.dense.state[parameter].items():
            arrays[f"{i}.{name}"] = value.numpy()
    np.savez(path, **arrays)


def _compare(out: Path, size: StreamSettings) -> dict[str, Any]:
    rows, equal = 0, True
    with (
        de.Storage.open(out / "undisturbed", memory=size.memory) as one,
        de.Storage.open(out / "resumed", memory=size.memory) as other,
    ):
        for mine, its in zip(our_tables(one, size), our_tables(other, size), strict=True):
            left, right = dict(_all_rows(mine)), dict(_all_rows(its))
            rows += len(left["keys"])
            equal &= left.keys() == right.keys()
            equal &= all(np.array_equal(left[name], right[name]) for name in left)
    with np.load(out / "undisturbed.npz") as left, np.load(out / "resumed.npz") as right:
        dense = sum(left[name].size for name in left.files)
        equal &= left.files == right.files
        equal &= all(left[name].tobytes() == right[name].tobytes() for name in left.files)
    return {"equal": bool(equal), "rows": rows, "dense": int(dense)}


def _all_rows(table: de.Embedding) -> Iterator[tuple[str, NDArray[Any]]]:
    """Everything a table holds, its floats as bits, by key."""
    parts = list(table.scan())
    keys = np.concatenate([part.keys for part in parts])
    order = np.argsort(keys)
    yield "keys", keys[order]
    yield "update_counts", np.concatenate([part.update_counts for part in parts])[order]
    yield "last_updates", np.concatenate([part.last_updates for part in parts])[order]
    yield "weights", np.concatenate([part.weights for part in parts])[order].view(np.uint32)
    for name in parts[0].state:
        yield f"state {name}", np.concatenate([part.state[name] for part in parts])[order].view(np.uint32)
