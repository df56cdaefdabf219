# SPDX-License-Identifier: Apache-2.0
"""What the tests of mode commit do in the process that has the storage open: training, and saying what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de
from comparing import rows_of
from reliability import faults
from storage_server import Group, Served

NOW = 2**40
# Rows of 12 and 8 KB: of some 1,300 in all, a few hundred are in memory at once.
GROUPS = [
    Group(3, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=1024, seed=5),
    Group(4, de.Adagrad(lr=0.1), de.Normal(), dimension=1000, seed=6),
]


def train(served: Served, first: int, steps: int) -> None:
    """Updates, rows that are only looked up, and now and then an erased one; each a function of its number."""
    for number in range(first, first + steps):
        random = np.random.default_rng([17, number])
        group = GROUPS[number % 2]
        embedding = served.embeddings[group.group]
        keys = random.integers(-400, 400, 60)
        embedding.apply_gradients(keys, random.standard_normal((60, group.dimension)).astype(np.float32))
        embedding.lookup(random.integers(-500, 500, 20))
        if number % 3 == 0:
            embedding.erase(keys[:5])


def everything(served: Served) -> dict[str, Any]:
    """All that the storage holds. Groups that are not open are opened, and must be among GROUPS."""
    storage = served.storage
    stats = storage.stats()
    for group in GROUPS:
        if group.group in storage.groups() and group.group not in served.embeddings:
            served.embeddings[group.group] = group.open(storage)
    known = set(storage.groups())
    return {
        "groups": [
            tuple(group[name] for name in ("group", "name", "rows", "step", "ttl")) for group in stats["groups"]
        ],
        "sequence": stats["sequence"],
        "now": storage.now,
        "last_commit": storage.last_commit,
        "rows": {number: rows_of(embedding) for number, embedding in served.embeddings.items() if number in known},
        "filters": {
            number: (embedding.admission.adds, embedding.admission.estimate(np.arange(500)).tobytes())
            for number, embedding in served.embeddings.items()
            if number in known and embedding.admission is not None
        },
    }


def arm(served: Served, root: Path, action: int, name: str, file_class: str, epitaph: Path) -> None:
    watch = faults.Faults()
    watch.watch(root, None, epitaph)
    watch.arm(action, name, file_class, 1)


def everything_changes(served: Served) -> None:
    storage = served.storage
    served.embeddings[9].lookup(np.arange(100, 400).repeat(4))
    served.embeddings[3].erase(np.arange(-400, 0))
    storage.now = NOW + 10**6
    storage.expire()
    named = de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), dimension=2, group=200, ttl="2d")
    named.import_rows(np.arange(10), np.ones((10, 2), np.float32))
    storage.now = NOW + 10**7
    storage.expire()
    assert len(named) == 0
    storage.compact()
