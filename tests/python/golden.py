# SPDX-License-Identifier: Apache-2.0
"""Storages as each format version wrote them: tests/data/NAME.tar.xz. Made once, by the version that wrote the format:

    python tests/python/golden.py plain       a manifest of version 1
    python tests/python/golden.py filters     one of version 2, which tells of filters
    python tests/python/golden.py together    the same, and the log has updates of several groups (record 12)

An archive is never made again: it is there to be opened by every later version. A new format gets an archive of its
own beside the old ones. In each: `closed`, a storage that was closed; `killed`, one whose process died, with rows on
the disk and a log behind them; `checkpoint` and `dump.bin` of the first; `filter`, a file of its own; and what is in
them, read when they were made: `rows.npz` and `numbers.json`.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de
from damo_embedding import _core

DATA = Path(__file__).resolve().parents[1] / "data"
START = 1_700_000_000
KEYS = np.array([0, 1, -1, 7, 2**63 - 1, -(2**63), 12345, 99, -5, 31], np.int64)
ADDED = np.arange(40)

OPTIMIZERS: dict[str, de.Optimizer] = {
    "sgd": de.SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    "ftrl": de.FTRL(lr=0.1),
    "adagrad": de.Adagrad(lr=0.1),
    "rowwise": de.RowWiseAdagrad(lr=0.1),
    "adam": de.Adam(lr=de.LinearWarmup(warmup_steps=3, then=0.05)),
    "amsgrad": de.AMSGrad(lr=0.05),
    "adamw": de.AdamW(lr=0.05, weight_decay=0.1),
    "lion": de.Lion(lr=0.01),
    "rmsprop": de.RMSprop(lr=0.01, momentum=0.5, centered=True),
}
INITIALIZERS = [de.Uniform(-0.5, 0.5), de.Normal(0.0, 0.1), de.TruncatedNormal(), de.XavierUniform(), de.Constant(0.5)]


def groups_of(storage: de.Storage, filters: bool) -> dict[str, de.Embedding]:
    """Every optimizer, a name or a number each, some with a lifetime or a filter of their own."""
    groups = {}
    for place, (name, optimizer) in enumerate(OPTIMIZERS.items()):
        filtered = filters and place % 3 == 0
        groups[name] = de.Embedding(
            storage,
            optimizer,
            INITIALIZERS[place % len(INITIALIZERS)],
            dimension=3 + place,
            group=name if place % 2 else place,
            seed=place,
            ttl=[None, "30d", de.Steps(1000)][place % 3],
            admission=de.CountingBloomFilter(capacity=200, count=2, halve_every=500) if filtered else None,
        )
    return groups


def train(storage: de.Storage, groups: dict[str, de.Embedding], begin: int, end: int, together: bool = False) -> None:
    for step in range(begin, end):
        random = np.random.default_rng(step)
        storage.now = START + 100 * step
        updates = []
        for embedding in groups.values():
            keys = random.choice(KEYS, 6)
            embedding.lookup(keys)
            gradients = random.standard_normal((6, embedding.dimension)).astype(np.float32)
            if together:
                updates.append((embedding._table, [(_core.Batch(keys), gradients)], None))
            else:
                embedding.apply_gradients(keys, gradients)
        if updates:
            storage._core.backward_many(updates)  # as the front for torch does at the end of a backward pass
        storage.commit(step=step, extra=f"step {step}".encode())


def fill(base: Path, name: str, filters: bool, together: bool) -> None:
    """Every kind of record, before and after a cut."""
    storage = de.Storage(base / name, memory="16MiB", ttl="never")
    groups = groups_of(storage, filters)
    train(storage, groups, 0, 6, together)
    adagrad = groups["adagrad"]
    weights = np.arange(2 * adagrad.dimension, dtype=np.float32).reshape(2, -1)
    adagrad.import_rows(np.array([1001, 1002]), weights, {"sum": weights + 1}, np.array([3, 4], np.uint32))
    groups["rmsprop"].erase(KEYS[:2])
    dropped = de.Embedding(storage, de.SGD(lr=1.0), de.Constant(1.0), dimension=2, group="dropped")
    dropped.lookup(KEYS)
    storage.drop_group(dropped.group)
    storage.expire()
    if name == "closed":
        storage.close()
        return
    storage.checkpoint(base / "a-cut")  # what came before is on the disk, what comes is in the log
    train(storage, groups, 6, 9, together)
    adagrad.import_rows(np.array([1003]), weights[:1], {"sum": weights[:1] + 1})
    groups["adam"].erase(KEYS[3:5])
    os._exit(0)


def contents(storage: de.Storage, filters: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and numbers: all that there is."""
    storage.now = START + 5_000
    arrays: dict[str, Any] = {}
    numbers: dict[str, Any] = {
        "sequence": storage.stats()["sequence"],
        "last_commit": [storage.last_commit[0], storage.last_commit[1].decode()] if storage.last_commit else None,
        "groups": {str(number): name for number, name in storage.groups().items()},
    }
    for name, embedding in groups_of(storage, filters).items():
        rows = next(iter(embedding.scan()))
        order = np.argsort(rows.keys)
        columns = {"keys": rows.keys, "weights": rows.weights, "counts": rows.update_counts, "times": rows.last_updates}
        columns |= {f"state {entry}": values for entry, values in rows.state.items()}
        for column, values in columns.items():
            arrays[f"{name}/{column}"] = values[order]
        numbers[name] = {"rows": len(embedding), "step": embedding.step, "ttl": str(embedding.ttl), "lr": embedding.lr}
        if embedding.admission is not None:
            arrays[f"{name}/estimates"] = np.asarray(embedding.admission.estimate(KEYS))
            numbers[name]["adds"] = embedding.admission.adds
    return arrays, numbers


def make(name: str) -> None:
    filters, together = name != "plain", name == "together"
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        for storage_name in ("closed", "killed"):
            process = multiprocessing.get_context("fork").Process(
                target=fill, args=(base, storage_name, filters, together)
            )
            process.start()
            process.join()
            assert process.exitcode == 0
        with de.CountingBloomFilter(capacity=500, count=3, path=base / "filter") as bloom:
            bloom.add(ADDED, num=2)
            filter_adds = bloom.adds
        arrays: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        kept = io.BytesIO()
        with tarfile.open(fileobj=kept, mode="w:xz", preset=9) as archive:
            for storage_name in ("closed", "killed"):
                archive.add(base / storage_name, storage_name, filter=anonymous)  # before this version opens it
                with de.Storage(base / storage_name, memory="16MiB") as storage:
                    found, numbers[storage_name] = contents(storage, filters)
                    arrays |= {f"{storage_name}/{column}": values for column, values in found.items()}
                    if storage_name == "closed":
                        storage.checkpoint(base / "checkpoint", step=77, extra=b"kept")
                        storage.dump(base / "dump.bin")
            numbers["filter"] = filter_adds
            np.savez(base / "rows.npz", **arrays)
            (base / "numbers.json").write_text(json.dumps(numbers, indent=1))
            for file in ("checkpoint", "dump.bin", "filter", "rows.npz", "numbers.json"):
                archive.add(base / file, file, filter=anonymous)
        target = DATA / f"{name}.tar.xz"
        with open(target, "xb") as file:
            file.write(kept.getvalue())
        print(f"{target}: {target.stat().st_size:,} bytes")


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without who held the lock and RocksDB's own log; of the machine its host name stays, in table files."""
    if os.path.basename(entry.name).startswith(("LOCK", "LOG")):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        make(wanted)
