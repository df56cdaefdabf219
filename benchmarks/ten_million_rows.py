# SPDX-License-Identifier: Apache-2.0
"""Ten million rows in a quarter of a gibibyte: does the budget hold, and is every row right?

One process creates and updates every row once, with a gradient that depends on its key, under memory="256MiB",
and watches its own resident memory. A second one opens the storage and compares every row, weights and state, with
the NumPy reference of the tests. `python benchmarks/ten_million_rows.py [--rows N] [--directory DIR]` prints the
figures; exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import damo_embedding as de

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))
import reference

DIMENSION, BATCH, MEMORY_MIB, STRIDE = 16, 50_000, 256, 7919
OPTIMIZER, INITIALIZER = de.Adam(lr=1e-3), de.Uniform(-0.01, 0.01)


def keys_of(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.int64) * STRIDE


def gradients_of(keys: np.ndarray) -> np.ndarray:
    by_key = ((keys % 1000 - 500) / 1000).astype(np.float32)
    return by_key[:, None] * np.linspace(0.5, 1.5, DIMENSION, dtype=np.float32)


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def open_table(path: str) -> tuple[de.Storage, de.Embedding]:
    storage = de.Storage(path, memory=f"{MEMORY_MIB}MiB")
    return storage, de.Embedding(storage, OPTIMIZER, INITIALIZER, dimension=DIMENSION, group=1)


def write(path: str, rows: int) -> None:
    gradients_of(keys_of(0, BATCH))  # NumPy's own memory is not the storage's
    before = resident_mib("VmRSS")
    start = time.perf_counter()
    storage, table = open_table(path)
    with storage:
        for first in range(0, rows, BATCH):
            keys = keys_of(first, min(rows, first + BATCH))
            table.lookup(keys)
            table.apply_gradients(keys, gradients_of(keys))
        seconds = time.perf_counter() - start
        assert len(table) == rows
    print(f"rows                 {rows:,} in {seconds:.0f} s ({rows / seconds:,.0f} rows/s)")
    growth = resident_mib("VmHWM") - before
    print(f"resident growth      {growth:.0f} MiB, promised at most {MEMORY_MIB * 1.1:.0f} MiB")
    row_bytes = DIMENSION * 4 * 3
    disk = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    print(f"bytes on disk        {disk:,} = {disk / rows / row_bytes:.2f} x rows x row bytes")
    if growth > MEMORY_MIB * 1.1 or disk < 0.9 * rows * row_bytes:
        sys.exit(1)


def check(path: str, rows: int) -> None:
    adam = reference.optimizer(OPTIMIZER.name, OPTIMIZER._settings())
    uniform = reference.initializer(INITIALIZER.name, INITIALIZER._settings())
    storage, table = open_table(path)
    seen = 0
    with storage:
        for part in table.scan():
            keys = part.keys.view(np.int64)
            weights = uniform.weights(0, 1, part.keys, DIMENSION)
            state = adam.initial_state(len(keys), DIMENSION)
            adam.update(weights, state, gradients_of(keys), group_step=1, update_counts=1)
            assert (part.update_counts == 1).all()
            np.testing.assert_array_equal(part.weights, weights)
            for name, values in state.items():
                np.testing.assert_array_equal(part.state[name], values)
            assert (keys % STRIDE == 0).all()
            assert (keys // STRIDE < rows).all()
            seen += len(keys)
        assert seen == len(table) == rows
    print(f"rows equal to NumPy  {seen:,}, bit for bit, in a new process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--directory", help="where the storage goes (default: a temporary directory)")
    parser.add_argument("--part", choices=["write", "check"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"write": write, "check": check}[arguments.part](arguments.directory, arguments.rows)
        return
    root = tempfile.mkdtemp(prefix="damo-", dir=arguments.directory)
    try:
        for part in ("write", "check"):
            command = [sys.executable, __file__, "--rows", str(arguments.rows), "--part", part]
            subprocess.run([*command, "--directory", os.path.join(root, "storage")], check=True)
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
