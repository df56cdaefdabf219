# SPDX-License-Identifier: Apache-2.0
"""Serve: the serving file of the big table, written by `dump`, read back, compared row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import settings
from demo.stream_tables import our_tables
from demo.workspace import bytes_on_disk


def run(runner: Runner) -> dict[str, Any]:
    return runner.run(Job("serve", "dump, read back, compare"))[0]


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    size = settings(quick).stream
    path = directory / "stream" / "weights.bin"
    progress.total(3)
    storage_path = directory / "stream" / "storage"
    with de.Storage.open(storage_path, memory=size.memory) as storage:
        tables = our_tables(storage, size)
        rows = storage.dump(path)
        progress.tick(f"{rows:,} rows")
        dump = de.read_dump(path)
        progress.tick()
        identical = rows == sum(map(len, tables)) == sum(len(keys) for keys, _ in dump.values())
        for table in tables:
            keys, weights = dump[table.group]
            order = np.argsort(keys)
            keys, bits = keys[order], weights.view(np.uint32)
            for part in table.scan(batch=8192):
                place = np.minimum(np.searchsorted(keys, part.keys), len(keys) - 1)
                identical &= np.array_equal(keys[place], part.keys)
                identical &= np.array_equal(bits[order[place]], part.weights.view(np.uint32))
        progress.tick()
    return {
        "rows": rows,
        "identical": bool(identical),
        "bytes": path.stat().st_size,
        "disk_bytes": bytes_on_disk(storage_path),
    }
