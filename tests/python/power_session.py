# SPDX-License-Identifier: Apache-2.0
"""What processes do in test_power_loss.py before they end."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np

import damo_embedding as de
from reliability import faults, trainee
from storage_server import Served


def copy_files(served: Served, source: Path, target: Path) -> None:
    """As cp does, which syncs nothing."""
    del served
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            place.write_bytes(path.read_bytes())


MANY, WIDTH = 10_000, 64


def open_wide(path: Path, memory: str) -> tuple[de.Storage, de.Embedding]:
    storage = de.Storage(path, memory=memory, log_bytes="256MiB", threads=1)
    return storage, de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), dimension=WIDTH, group="wide")


def fill_and_fail_to_sync(served: Served, path: Path) -> str:
    storage, table = open_wide(path, "128MiB")
    served.storage = storage
    table.apply_gradients(np.arange(10), np.ones((10, WIDTH), np.float32))
    storage.commit(1)
    for part in range(10):
        table.apply_gradients(np.arange(MANY) + part * MANY, np.ones((MANY, WIDTH), np.float32))
    trainee.arm(served, faults.FAIL, "sync", "log", 1, errno.EIO)
    try:
        storage.commit(2)
    except de.StorageError as error:
        return str(error)
    return ""


def open_with_little_memory(served: Served, path: Path) -> None:
    trainee.arm(served, faults.KILL_AFTER, "sync", "rocksdb-manifest", 3)  # the first in opening, then evictions
    served.storage, _ = open_wide(path, "16MiB")


def new_filter(path: Path) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(capacity=10_000, count=2, path=str(path))


def add_and_fail_to_sync(served: Served, path: Path) -> str:
    seen = new_filter(path)
    seen.add(np.arange(1000))
    seen.sync()
    seen.add(np.arange(1000) + 10_000)
    trainee.arm(served, faults.FAIL, "sync", "", 1, errno.EIO)
    try:
        seen.sync()
    except de.StorageError as error:
        return str(error)
    return ""


def add_and_compact(served: Served, path: Path) -> int:
    seen = served.seen = new_filter(path)  # type: ignore[attr-defined]
    seen.add(np.arange(1000))
    seen.sync()
    for part in range(20):
        seen.add(np.arange(50_000) + part * 50_000)
    return seen.adds


def add_and_sync(served: Served, path: Path) -> int:
    del served
    with new_filter(path) as seen:
        seen.add(np.arange(7) + 10**9)
        seen.sync()
        return seen.adds
