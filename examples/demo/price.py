# SPDX-License-Identifier: Apache-2.0
"""Price: what it costs to have no vocabulary, where torch.nn.Embedding can do the job too: a table that fits
into memory.

The model and the batches of `oom`, with so few ids that all rows stay in memory. torch gets its ids as
indices, ready made; ours get 64-bit keys. Each is timed with one thread and with all cores, in turns; the
better counts.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import damo_embedding as de
from demo.model import TorchEmbeddings
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import settings
from demo.stream import Stream
from demo.stream_model import StreamTrainer, our_embeddings

BATCHES = 30


def run(runner: Runner) -> dict[str, Any]:
    return runner.run(Job("price", "both, in turns"))[0]


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    sizes = settings(quick)
    size = replace(sizes.stream, visitors=sizes.price_visitors, ads=sizes.price_ads)
    stream = Stream(size)
    batches = [stream.batch(step) for step in range(BATCHES)]
    threads = sorted({1, os.cpu_count() or 1})
    out = directory / "price"
    out.mkdir()

    with ExitStack() as storages:
        contenders: list[tuple[str, int, Callable[[int], object]]] = []
        for count in threads:
            path = out / f"threads-{count}.damo"
            storage = storages.enter_context(de.Storage(path, memory=sizes.price_memory, threads=count))
            ours = StreamTrainer(our_embeddings(storage, size), size)
            contenders.append(("ours", count, lambda i, ours=ours: ours.learn(batches[i].keys, batches[i].labels)))
            tables = TorchEmbeddings({"visitor": size.visitors + 1, "ad": size.ads + 1}, set(), size.dimension)
            sparse = torch.optim.SparseAdam(list(tables.parameters()), lr=size.lr)
            torchs = StreamTrainer(tables, size, sparse)
            contenders.append(
                ("torch", count, lambda i, torchs=torchs: torchs.learn(batches[i].ids, batches[i].labels))
            )
        progress.total((1 + sizes.price_rounds) * len(contenders))

        seconds: dict[str, list[float]] = {f"{system}-{count}": [] for system, count, _ in contenders}
        for turn in range(1 + sizes.price_rounds):
            for system, count, step in contenders:
                torch.set_num_threads(count)
                if turn == 0:  # every row is there before anything is timed
                    for i in range(BATCHES):
                        step(i)
                else:
                    until, i = time.perf_counter() + sizes.price_seconds, 0
                    while i < 2 or time.perf_counter() < until:
                        started = time.perf_counter()
                        step(i % BATCHES)
                        seconds[f"{system}-{count}"].append(time.perf_counter() - started)
                        i += 1
                progress.tick()
        rows = int(storage.stats()["rows"])
    for count in threads:
        shutil.rmtree(out / f"threads-{count}.damo")
    np.savez(out / "seconds.npz", **{name: np.array(values) for name, values in seconds.items()})
    # Seconds of all steps, not their median: what a table does now and then, it does at the user's expense.
    speed = {name: size.batch * len(values) / sum(values) for name, values in seconds.items()}
    best = {system: max(speed[f"{system}-{count}"] for count in threads) for system in ("ours", "torch")}
    return {
        "samples_per_second": best["ours"],
        "samples_per_second_torch": best["torch"],
        "speed": speed,
        "rows": rows,
    }
