# SPDX-License-Identifier: Apache-2.0
"""The verbs of a storage, one workload each, through the public API; dimension 16, Adam.

In memory (the table fits into the default budget):
    insert_new      training lookups of keys that have no row yet
    lookup_hot      lookups of resident keys, Zipf, insert=False
    lookup_missing  lookups of keys without a row, insert=False
    log_append      apply_gradients of the same 8,192 rows over and over: what a record in the log costs
    log_cutting     the same with a log of 32 MiB that is cut all the while
    checkpoint      a checkpoint while another thread trains: how long, its pause, and the longest step beside it
    open            close and open again, then kill and open again: what the log has to do over
    commit          commits in mode "commit", beside checkpoints of the same changes; and an update without a log

Ten times the budget:
    update_cold     lookup + apply_gradients of uniform keys: most rows come from the disk
    update_zipf     lookup + apply_gradients of 212,992 Zipf ids
    lookup_cold     lookups of uniform keys, insert=False, after the files were dropped from the page cache
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import damo_embedding as de
from report import machine, print_machine, write_json
from workload import STEP, keys_of, zipf_ranks

DIMENSION = 16
ROW_BYTES = 32 + 3 * 4 * DIMENSION  # as stored: header, weights, two moments
BATCH = 65_536


@dataclass
class Result:
    workload: str
    what: str
    value: float
    unit: str


def open_table(path: Path, memory: str = "1GiB", **options: Any) -> tuple[de.Storage, de.Embedding]:
    storage = de.Storage(path, memory=memory, **options)
    return storage, de.Embedding(storage, de.Adam(lr=1e-3), de.Uniform(-0.01, 0.01), DIMENSION, group="bench")


def batches(ranks: NDArray[np.int64], size: int = BATCH) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, ranks.size, size):
        yield keys_of(ranks[begin : begin + size])


def gradients(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((rows, DIMENSION), np.float32)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fill(table: de.Embedding, rows: int) -> None:
    for keys in batches(np.arange(rows)):
        table.apply_gradients(keys, gradients(keys.size))


def train(table: de.Embedding, keys: NDArray[np.int64], update: NDArray[np.float32]) -> None:
    table.lookup(keys)
    table.apply_gradients(keys, update[: keys.size])


# ------------------------------------------------------------------------------- in memory


def insert_new(table: de.Embedding, rows: int) -> Iterator[Result]:
    order = np.random.default_rng(3).permutation(rows)
    each = [seconds(lambda keys=keys: table.lookup(keys)) for keys in batches(order)]
    yield Result("insert_new", "keys", rows / sum(each), "/s")
    fill(table, rows)  # so that what follows finds rows with state


def lookup_hot(table: de.Embedding, rows: int) -> Iterator[Result]:
    rng = np.random.default_rng(4)
    steps = [keys_of(zipf_ranks(STEP, rows, rng)) for _ in range(12)]
    each = [seconds(lambda keys=keys: table.lookup(keys, insert=False)) for keys in steps]
    yield Result("lookup_hot", "ids", STEP / float(np.median(each)), "/s")


def lookup_missing(table: de.Embedding, rows: int) -> Iterator[Result]:
    absent = np.arange(rows, rows + 16 * BATCH)
    each = [seconds(lambda keys=keys: table.lookup(keys, insert=False)) for keys in batches(absent)]
    yield Result("lookup_missing", "keys", BATCH / float(np.median(each)), "/s")


def log_append(table: de.Embedding, rows: int) -> Iterator[Result]:
    keys = keys_of(np.arange(min(8192, rows)))
    update = gradients(keys.size)
    each = [seconds(lambda: table.apply_gradients(keys, update)) for _ in range(200)]
    record = keys.size * (8 + 4 * DIMENSION)
    yield Result("log_append", "record of 8,192 rows", 1e3 * float(np.median(each)), "ms")
    yield Result("log_append", "log", record / float(np.median(each)) / 1e6, "MB/s")


def log_cutting(directory: Path, rows: int) -> Iterator[Result]:
    storage, table = open_table(directory / "cutting", log_bytes="32MiB")
    with storage:
        fill(table, rows)
        update = gradients(8192)
        rng = np.random.default_rng(8)
        # Other rows each time, as a log that is cut has them to write.
        steps = [keys_of(rng.integers(0, rows, 8192)) for _ in range(200)]
        before = storage.stats()
        each = [seconds(lambda keys=keys: table.apply_gradients(keys, update)) for keys in steps]
        after = storage.stats()
    yield Result("log_cutting", "record of 8,192 rows", 1e3 * float(np.median(each)), "ms")
    yield Result("log_cutting", "longest", 1e3 * max(each), "ms")
    yield Result("log_cutting", "log, all told", 200 * 8192 * (8 + 4 * DIMENSION) / sum(each) / 1e6, "MB/s")
    yield Result("log_cutting", "cuts", float(after["cuts"] - before["cuts"]), "")
    shutil.rmtree(directory / "cutting")


def checkpoint(storage: de.Storage, table: de.Embedding, rows: int, directory: Path) -> Iterator[Result]:
    rng = np.random.default_rng(5)
    steps = [keys_of(zipf_ranks(STEP // 4, rows, rng)) for _ in range(20)]
    update = gradients(STEP // 4)
    alone = [seconds(lambda keys=keys: train(table, keys, update)) for keys in steps]
    beside: list[float] = []
    done = threading.Event()

    def trainer() -> None:
        while not done.is_set():
            beside.append(seconds(lambda: train(table, steps[len(beside) % len(steps)], update)))

    thread = threading.Thread(target=trainer)
    thread.start()
    try:
        took = seconds(lambda: storage.checkpoint(directory / "checkpoint-1"))
        pauses = [storage.stats()["cut_pause_seconds"]]
        again = seconds(lambda: storage.checkpoint(directory / "checkpoint-2"))
        pauses.append(storage.stats()["cut_pause_seconds"])
    finally:
        done.set()
        thread.join()
    yield Result("checkpoint", "first, all rows changed", took, "s")
    yield Result("checkpoint", "second, what changed since", again, "s")
    yield Result("checkpoint", "longer pause of the two", 1e3 * max(pauses), "ms")
    yield Result("checkpoint", "median step before", 1e3 * float(np.median(alone)), "ms")
    yield Result("checkpoint", "median step beside it", 1e3 * float(np.median(beside)), "ms")
    yield Result("checkpoint", "longest step beside it", 1e3 * max(beside), "ms")
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(directory / name)


def commits(directory: Path, rows: int) -> Iterator[Result]:
    path = directory / "commits"
    storage, table = open_table(path, durability="commit")
    with storage:
        fill(table, rows)
        yield Result("commit", "first, all rows changed", seconds(lambda: storage.commit(0)), "s")
        rng = np.random.default_rng(8)
        update = gradients(STEP)
        for changed in sorted({min(changed, rows) for changed in (1, 8192, STEP)}):
            kinds: dict[str, list[float]] = {"commit": [], "checkpoint": []}
            for number in range(14):
                table.apply_gradients(keys_of(rng.permutation(rows)[:changed]), update[:changed])
                if number % 2:
                    kinds["commit"].append(seconds(lambda number=number: storage.commit(number)))
                    continue
                name = directory / f"checkpoint-{changed}-{number}"
                kinds["checkpoint"].append(seconds(lambda name=name: storage.checkpoint(name)))
            for kind, each in kinds.items():
                yield Result("commit", f"{kind}, {changed:,} rows changed", 1e3 * float(np.median(each)), "ms")
        nothing = [seconds(lambda number=number: storage.commit(number)) for number in range(9)]
        yield Result("commit", "commit, nothing changed", 1e3 * float(np.median(nothing)), "ms")
        keys = keys_of(np.arange(min(8192, rows)))
        each = [seconds(lambda: table.apply_gradients(keys, update[: keys.size])) for _ in range(200)]
        yield Result("commit", "update of 8,192 rows, no log", 1e3 * float(np.median(each)), "ms")
        closing = seconds(storage.close)
    yield Result("commit", "close", closing, "s")
    yield Result("commit", "open", timed_open(path, "commit"), "s")
    for leftover in [path, *directory.glob("checkpoint-*")]:
        shutil.rmtree(leftover)


def open_again(path: Path, rows: int) -> Iterator[Result]:
    """The storage at `path` is closed. A child process adds to the log, and dies."""
    yield Result("open", "after close", timed_open(path), "s")
    child = subprocess.run([sys.executable, __file__, "--rows", str(rows), "--die-in", str(path)], check=False)
    if child.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the child that was to kill itself ended with {child.returncode}")
    start = time.perf_counter()
    with de.Storage(path) as storage:
        yield Result("open", "after kill -9", time.perf_counter() - start, "s")
        redone, log = storage.stats()["redone_records"], storage.stats()["log_bytes"]
    yield Result("open", "records done over after kill -9", float(redone), "")
    yield Result("open", "log then", log / 1e6, "MB")


def timed_open(path: Path, durability: str = "logged") -> float:
    start = time.perf_counter()
    storage = de.Storage(path, durability=durability)
    elapsed = time.perf_counter() - start
    storage.close()
    return elapsed


def die(path: Path, rows: int) -> None:
    _, table = open_table(path)
    rng = np.random.default_rng(6)
    update = gradients(STEP)
    for _ in range(50):
        train(table, keys_of(zipf_ranks(STEP, rows, rng)), update)
    os.kill(os.getpid(), signal.SIGKILL)


def in_memory(directory: Path, rows: int) -> Iterator[Result]:
    path = directory / "hot"
    storage, table = open_table(path)
    with storage:
        yield from insert_new(table, rows)
        yield from lookup_hot(table, rows)
        yield from lookup_missing(table, rows)
        yield from log_append(table, rows)
        yield from checkpoint(storage, table, rows, directory)
    yield from open_again(path, rows)
    shutil.rmtree(path)
    yield from log_cutting(directory, rows)
    yield from commits(directory, rows)


# -------------------------------------------------------------------- ten times the budget


def hit_rate(storage: de.Storage, before: dict[str, float]) -> float:
    now = storage.stats()
    hits, misses = now["hits"] - before["hits"], now["misses"] - before["misses"]
    return 100 * hits / max(1, hits + misses)


def update_steps(
    storage: de.Storage, table: de.Embedding, name: str, steps: list[NDArray[np.int64]]
) -> Iterator[Result]:
    update = gradients(max(keys.size for keys in steps))
    before = storage.stats()
    each = [seconds(lambda keys=keys: train(table, keys, update)) for keys in steps]
    distinct = float(np.mean([np.unique(keys).size for keys in steps]))
    yield Result(name, "distinct rows", distinct / float(np.median(each)), "/s")
    yield Result(name, "step, median", 1e3 * float(np.median(each)), "ms")
    yield Result(name, "step, longest", 1e3 * max(each), "ms")
    yield Result(name, "found in memory", hit_rate(storage, before), "%")


def beyond_memory(directory: Path, memory: int) -> Iterator[Result]:
    path = directory / "cold"
    rows = 10 * memory // ROW_BYTES
    storage, table = open_table(path, memory=str(memory))
    rng = np.random.default_rng(7)
    with storage:
        yield Result("fill", "rows, to ten times the budget", rows / seconds(lambda: fill(table, rows)), "/s")
        uniform = [keys_of(rng.integers(0, rows, 16_384)) for _ in range(20)]
        yield from update_steps(storage, table, "update_cold", uniform)
        zipf = [keys_of(zipf_ranks(STEP, rows, rng)) for _ in range(20)]
        yield from update_steps(storage, table, "update_zipf", zipf)
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    storage, table = open_table(path, memory=str(memory))
    with storage:
        steps = [keys_of(rng.integers(0, rows, 16_384)) for _ in range(12)]
        before = storage.stats()
        each = [seconds(lambda keys=keys: table.lookup(keys, insert=False)) for keys in steps]
        yield Result("lookup_cold", "keys", 16_384 / float(np.median(each)), "/s")
        yield Result("lookup_cold", "found in memory", hit_rate(storage, before), "%")
    shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="The verbs of a storage, one workload each.")
    parser.add_argument(
        "--rows", type=int, default=2_000_000, help="rows of the table in memory (default: %(default)s)"
    )
    parser.add_argument("--memory", type=int, default=32, help="MiB of budget, beyond memory (default: %(default)s)")
    parser.add_argument("--directory", help="where to put the storages (default: a temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--die-in", metavar="STORAGE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.die_in is not None:
        die(Path(arguments.die_in), arguments.rows)

    facts = machine(arguments.directory or tempfile.gettempdir())
    print_machine(facts)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="damo-bench-", dir=arguments.directory) as directory:
        print(f"{arguments.rows:,} rows in memory; then ten times {arguments.memory} MiB\n", flush=True)
        in_turn = chain(
            in_memory(Path(directory), arguments.rows), beyond_memory(Path(directory), arguments.memory << 20)
        )
        for result in in_turn:  # minutes: each is printed when it is there
            print(
                f"{result.workload:<15}  {result.what:<31}  {shown(result.value):>11} {result.unit}",
                flush=True,
            )
            results.append(result)
    write_json(arguments.json, "storage", facts, [asdict(result) for result in results])


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()
