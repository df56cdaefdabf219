# SPDX-License-Identifier: Apache-2.0
"""`train_step`: one training step of an embedding table, ours beside torch.nn.Embedding, in one run.

A step looks up 8,192 x 26 ids (Zipf 1.05 over 2 million scattered keys, all resident, fresh ids each step),
dimension 16, and updates their rows with Adam. The loss is sum(w * g) for a fixed g, so that nothing but the
table costs anything. Default settings. The contenders:

    numpy   Embedding.lookup, then Embedding.apply_gradients
    torch   damo_embedding.torch.Embedding: forward, loss, backward (which updates the rows)
    nn      torch.nn.Embedding(sparse=True) and torch.optim.SparseAdam: zero_grad, forward, loss, backward,
            step. Its ids are the ranks themselves, so that popular rows lie side by side: its best case
    floor   one copy of a row for every id, out of a small array: no lookup costs less

Each runs with each number of threads. Blocks of steps alternate, so that a noisy neighbour meets all of them,
and every block has ids that its contender has not just seen. What counts is the median step at the best
number of threads.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import damo_embedding as de
import damo_embedding.torch as de_torch
from report import machine, print_machine, print_table, write_json
from workload import BATCH, FIELDS, STEP, keys_of, zipf_steps

DIMENSION = 16
LR = 1e-3


@dataclass
class Contender:
    name: str
    threads: int
    step: Callable[[int], object]  # the number of the step whose ids to take
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads, so a busy machine shows in it less

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def ours(
    directory: Path, keys: list[NDArray[np.int64]], vocabulary: int, threads: int
) -> tuple[de.Storage, list[Contender]]:
    """Both fronts over one table that holds a row with state for every key."""
    storage = de.Storage(directory, threads=threads)
    settings: dict[str, Any] = {
        "optimizer": de.Adam(lr=LR),
        "initializer": de.Uniform(-0.01, 0.01),
        "dimension": DIMENSION,
    }
    table = de.Embedding(storage, group="bench", **settings)
    module = de_torch.Embedding(storage, group="bench", **settings)
    for part in np.array_split(keys_of(np.arange(vocabulary)), max(1, vocabulary // 100_000)):
        table.lookup(part)
        table.apply_gradients(part, np.full((part.size, DIMENSION), 1e-6, np.float32))
    gradients = fixed_gradients()
    tensor_gradients = torch.from_numpy(gradients)
    tensors = [torch.from_numpy(step) for step in keys]

    def numpy_step(i: int) -> None:
        table.lookup(keys[i])
        table.apply_gradients(keys[i], gradients)

    def torch_step(i: int) -> None:
        (module(tensors[i]) * tensor_gradients).sum().backward()

    return storage, [Contender("numpy", threads, numpy_step), Contender("torch", threads, torch_step)]


def theirs(ranks: list[NDArray[np.int64]], vocabulary: int, thread_counts: list[int]) -> list[Contender]:
    """One nn.Embedding; the number of threads is set before each block."""
    embedding = torch.nn.Embedding(vocabulary, DIMENSION, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()), lr=LR)
    gradients = torch.from_numpy(fixed_gradients())
    tensors = [torch.from_numpy(step) for step in ranks]

    def step(i: int) -> None:
        optimizer.zero_grad()
        (embedding(tensors[i]) * gradients).sum().backward()
        optimizer.step()

    return [Contender("nn", threads, step) for threads in thread_counts]


def floor(ranks: list[NDArray[np.int64]]) -> Contender:
    small = np.zeros((1024, DIMENSION), np.float32)
    rows = [step % 1024 for step in ranks]
    return Contender("floor", 1, lambda i: np.take(small, rows[i], axis=0))


def fixed_gradients() -> NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((BATCH, FIELDS, DIMENSION), np.float32) * np.float32(1e-3)


def run(contenders: list[Contender], steps: int, block: int, warm_up: int) -> None:
    blocks = steps // block
    for turn in range(warm_up + blocks):
        for place, contender in enumerate(contenders):
            torch.set_num_threads(contender.threads)
            # Contenders over one table are at different ids: none finds in the cache what another just used.
            first = (turn + place * (blocks // len(contenders) or 1)) % blocks * block
            for i in range(first, first + block):
                start, cpu_start = time.perf_counter(), time.process_time()
                contender.step(i)
                elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
                if turn >= warm_up:
                    contender.seconds.append(elapsed)
                    contender.cpu_seconds.append(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step, ours beside torch.nn.Embedding.")
    parser.add_argument("--vocabulary", type=int, default=2_000_000, help="keys in the table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each contender (default: %(default)s)")
    parser.add_argument(
        "--block", type=int, default=5, help="steps before the next contender's turn (default: %(default)s)"
    )
    parser.add_argument("--threads", default="1,2", help="numbers of threads to try (default: %(default)s)")
    parser.add_argument("--directory", help="where to put the storages (default: a temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    thread_counts = [int(threads) for threads in arguments.threads.split(",")]

    facts = machine(arguments.directory or tempfile.gettempdir())
    print_machine(facts)
    ranks = list(zipf_steps(arguments.steps, arguments.vocabulary))
    keys = [keys_of(step) for step in ranks]
    distinct = float(np.mean([np.unique(step).size for step in ranks[:10]]))

    with tempfile.TemporaryDirectory(prefix="damo-bench-", dir=arguments.directory) as directory:
        storages: list[de.Storage] = []
        contenders: list[Contender] = []
        for threads in thread_counts:
            torch.set_num_threads(threads)
            storage, fronts = ours(Path(directory) / f"{threads}-threads", keys, arguments.vocabulary, threads)
            storages.append(storage)
            contenders += fronts
        contenders += [*theirs(ranks, arguments.vocabulary, thread_counts), floor(ranks)]
        gc.collect()
        run(contenders, arguments.steps, arguments.block, warm_up=2)
        evictions = sum(storage.stats()["evictions"] for storage in storages)
        for storage in storages:
            storage.close()

    print(
        f"{arguments.steps} steps of {STEP:,} ids, {distinct:,.0f} of them distinct; "
        f"{arguments.vocabulary:,} rows of dimension {DIMENSION}, Adam\n"
    )
    best = {
        name: min((c for c in contenders if c.name == name), key=lambda c: c.median)
        for name in ("numpy", "torch", "nn")
    }
    rows = [
        [
            contender.name,
            str(contender.threads),
            f"{1e3 * contender.median:.1f}",
            f"{1e3 * np.quantile(contender.seconds, 0.1):.1f}",
            f"{1e3 * np.quantile(contender.seconds, 0.9):.1f}",
            f"{1e3 * np.median(contender.cpu_seconds):.1f}",
            f"{BATCH / contender.median:,.0f}",
            f"{distinct / contender.median / 1e3:,.0f}",
            "best" if contender is best.get(contender.name) else "",
        ]
        for contender in contenders
    ]
    print_table(["contender", "threads", "ms/step", "p10", "p90", "CPU ms", "examples/s", "thousand rows/s", ""], rows)
    ratios = {name: best["nn"].median / best[name].median for name in ("numpy", "torch")}
    print(f"times as fast as nn.Embedding + SparseAdam: numpy {ratios['numpy']:.2f}, torch {ratios['torch']:.2f}")
    if evictions:
        print(f"warning: {evictions:,} rows were evicted: the table did not fit into the budget")
    results = {
        "steps": arguments.steps,
        "vocabulary": arguments.vocabulary,
        "distinct_ids_per_step": distinct,
        "evictions": evictions,
        "contenders": [
            {
                "name": c.name,
                "threads": c.threads,
                "median_ms": 1e3 * c.median,
                "step_ms": [1e3 * s for s in c.seconds],
                "step_cpu_ms": [1e3 * s for s in c.cpu_seconds],
            }
            for c in contenders
        ],
        "times_as_fast_as_nn": ratios,
    }
    write_json(arguments.json, "train_step", facts, results)


if __name__ == "__main__":
    main()
