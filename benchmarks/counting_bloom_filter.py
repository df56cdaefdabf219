# SPDX-License-Identifier: Apache-2.0
"""The counting Bloom filter: false positives at and beyond capacity, memory, and time per key.

The first table is of docs/admission.md: `capacity` keys are added `count` times each, then ten times as many that were
never added are asked for. `--capacity`, `--json FILE`; `--part rates`, `speed` or `storage` for one of the three: the
last is what admission costs a training lookup, and how long a lookup waits while a cut saves the filter.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import damo_embedding as de
import report

COUNT = 3
STRIDES = {"sequential": 1, "stride 64": 64, "stride 2^20": 2**20, "stride 2^32": 2**32, "stride 2^39": 2**39}


def pattern(name: str, n: int) -> np.ndarray:
    if name == "random":
        return np.random.default_rng(1).integers(0, 2**64, n, dtype=np.uint64)
    return np.arange(n, dtype=np.uint64) * np.uint64(STRIDES[name])


def published_bytes(capacity: int, fpr: float) -> float:
    """Of m = capacity * ln(1/fpr) / ln(2)^2 counters of half a byte."""
    return capacity * math.log(1 / fpr) / math.log(2) ** 2 / 2


def rates(capacity: int) -> list[dict[str, Any]]:
    results = []
    for fpr in (1e-2, 1e-3, 1e-4):
        for name in ("random", *STRIDES):
            keys = pattern(name, 11 * capacity)
            with de.CountingBloomFilter(capacity=capacity, count=COUNT, fpr=fpr) as seen:
                seen.add(keys[:capacity], COUNT)
                assert seen.check(keys[:capacity]).all()
                result = {"fpr": fpr, "keys": name, "measured": float(seen.check(keys[capacity:]).mean())}
                result |= {"estimated": seen.estimated_fpr, "bytes_per_key": seen.memory_bytes / capacity}
                result["memory_ratio"] = seen.memory_bytes / published_bytes(capacity, fpr)
            results.append(result)
    report.print_table(
        ["fpr", "keys", "measured", "measured / fpr", "estimated_fpr", "bytes a key", "memory / published"],
        [
            [
                f"{r['fpr']:.0e}",
                r["keys"],
                f"{r['measured']:.3e}",
                f"{r['measured'] / r['fpr']:.2f}",
                f"{r['estimated']:.3e}",
                f"{r['bytes_per_key']:.2f}",
                f"{r['memory_ratio']:.3f}",
            ]
            for r in results
        ],
    )
    return results


def beyond_capacity(capacity: int) -> list[dict[str, Any]]:
    """All keys are added once and one in ten comes `count` times: which of the others are let through?"""
    results = []
    for load in (1, 2, 4, 8):
        keys = pattern("random", load * capacity + capacity)
        added, never = keys[: load * capacity], keys[load * capacity :]
        with de.CountingBloomFilter(capacity=capacity, count=COUNT) as seen:
            seen.add(added)
            often, once = added[::10], np.delete(added, np.s_[::10])
            for _ in range(COUNT - 1):
                seen.add(often)
            result = {"load": load, "once": float(seen.check(once).mean()), "never": float(seen.check(never).mean())}
            results.append(result | {"estimated": seen.estimated_fpr, "fill": seen.fill, "len": len(seen)})
    report.print_table(
        ["distinct keys / capacity", "let through of keys added once", "of keys never added", "fill", "len / distinct"],
        [
            [
                str(r["load"]),
                f"{r['once']:.1e}",
                f"{r['never']:.1e}",
                f"{r['fill']:.2f}",
                f"{r['len'] / r['load'] / capacity:.3f}",
            ]
            for r in results
        ],
    )
    return results


def best_time(call: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds of this thread, the least of some runs: a busy machine is no part of it."""
    best = math.inf
    for _ in range(repeats):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best


def speed(capacity: int, directory: str) -> list[dict[str, Any]]:
    results = []
    batches = np.array_split(pattern("random", capacity), max(capacity // 200_000, 1))[:20]
    for path in (None, os.path.join(directory, "seen.filter")):
        with de.CountingBloomFilter(capacity=capacity, count=COUNT, path=path) as seen:
            for batch in batches:
                seen.add(batch)
            n = sum(map(len, batches))
            singles = batches[0][:5_000].tolist()

            def add_batches(seen: de.CountingBloomFilter = seen) -> None:
                for batch in batches:
                    seen.add(batch)

            def check_batches(seen: de.CountingBloomFilter = seen) -> None:
                for batch in batches:
                    seen.check(batch)

            def add_singles(seen: de.CountingBloomFilter = seen, singles: list[int] = singles) -> None:
                for key in singles:
                    seen.add(key)

            result = {
                "where": "in memory" if path is None else "with a file",
                "add_ns": best_time(add_batches) / n * 1e9,
                "check_ns": best_time(check_batches) / n * 1e9,
                "single_add_us": best_time(add_singles) / len(singles) * 1e6,
            }
            results.append(result)
    report.print_table(
        [f"{capacity:,} keys", "add, ns a key", "check, ns a key", "add of one key, µs a call"],
        [[r["where"], f"{r['add_ns']:.0f}", f"{r['check_ns']:.0f}", f"{r['single_add_us']:.1f}"] for r in results],
    )
    return results


def opened(storage: de.Storage, capacity: int, count: int) -> de.Embedding:
    admission = de.CountingBloomFilter(capacity=capacity, count=count) if capacity else None
    return de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1, 1), 16, group="user", admission=admission)


def lookups(directory: str, keys: int = 20_000) -> dict[str, float]:
    """Processor time of training lookups, ns a key, taking turns; one thread."""
    known = np.random.default_rng(0).integers(0, 2**62, keys)
    storages = {
        name: de.Storage(os.path.join(directory, name), memory="256MiB", threads=1) for name in ("without", "with")
    }
    times: dict[str, list[float]] = {}

    def timed(what: str, embedding: de.Embedding, wanted: np.ndarray, out: np.ndarray) -> None:
        start = time.thread_time_ns()
        embedding.lookup(wanted, out)
        times.setdefault(what, []).append((time.thread_time_ns() - start) / keys)

    embeddings = {name: opened(storage, 5_000_000 * (name == "with"), 3) for name, storage in storages.items()}
    for embedding in embeddings.values():
        for _ in range(3):
            out = embedding.lookup(known)
    random = np.random.default_rng(1)
    for turn in range(300):
        fresh = random.integers(0, 2**62, keys)
        for name, embedding in embeddings.items():
            timed(f"{name} admission, keys with rows", embedding, known, out)
            if turn < 20:
                timed(f"{name} admission, new keys", embedding, fresh, out)
    for storage in storages.values():
        storage.close()
    medians = {what: float(np.median(values)) for what, values in times.items()}
    for what, value in medians.items():
        print(f"{what}: {value:.0f} ns a key")
    return medians


def cuts(capacity: int, directory: str) -> dict[str, float]:
    """How long lookups of 2,000 new keys take beside eight checkpoints, and otherwise."""
    path = os.path.join(directory, f"cuts-{capacity}")
    done, inside = threading.Event(), threading.Event()
    took: dict[str, list[float]] = {"other": [], "cut": []}
    with de.Storage(path, memory="512MiB", threads=2) as storage:
        embedding = opened(storage, capacity, 15)
        random = np.random.default_rng(2)

        def train() -> None:
            while not done.is_set():
                cutting, keys = inside.is_set(), random.integers(0, 2**62, 2_000)
                start = time.perf_counter()
                embedding.lookup(keys)
                took["cut" if cutting or inside.is_set() else "other"].append(time.perf_counter() - start)

        thread = threading.Thread(target=train)
        thread.start()
        for i in range(8):
            time.sleep(0.3)
            inside.set()
            storage.checkpoint(f"{path}-{i}")
            inside.clear()
        done.set()
        thread.join()
        admission = embedding.admission
        assert admission is not None
        result = {"filter_bytes": float(admission.memory_bytes)}
    for what, values in took.items():
        result[f"{what}_median_ms"] = 1e3 * float(np.median(values))
        result[f"{what}_max_ms"] = 1e3 * max(values)
    print(", ".join(f"{name}={value:.3g}" for name, value in result.items()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, default=1_000_000, help="of the filters whose rate is measured")
    parser.add_argument("--speed-capacity", type=int, default=10_000_000)
    parser.add_argument("--part", choices=["rates", "speed", "storage"])
    parser.add_argument("--directory", help="where the filter with a file goes (default: a temporary directory)")
    parser.add_argument("--json", help="keep the numbers in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="damo-", dir=arguments.directory) as directory:
        facts = report.machine(directory)
        report.print_machine(facts)
        results: dict[str, Any] = {}
        if arguments.part in (None, "rates"):
            results["rates"] = rates(arguments.capacity)
            results["beyond_capacity"] = beyond_capacity(arguments.capacity)
        if arguments.part in (None, "speed"):
            results["speed"] = speed(arguments.speed_capacity, directory)
        if arguments.part in (None, "storage"):
            results["storage"] = {
                "lookup": lookups(directory),
                "cuts": [cuts(arguments.speed_capacity // n, directory) for n in (100, 1)],
            }
        report.write_json(arguments.json, "counting_bloom_filter", facts, results)


if __name__ == "__main__":
    main()
