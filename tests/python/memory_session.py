# SPDX-License-Identifier: Apache-2.0
"""What the tests of memory that runs out do in the process that has the storage open."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np

from reliability import faults, trainee
from storage_server import Served


@dataclass(frozen=True)
class Looked:
    """A training lookup in which an allocation failed."""

    hit: bool
    raised: str  # the name of what it raised, or ""
    operations: int  # how many it was
    goes_on: bool  # the storage takes a commit
    refused: str  # what it said if it does not


def look_up(served: Served, call: str, group: int, nth: int) -> Looked:
    """Of a hundred new keys, while the nth allocation fails."""
    open_trainee = trainee.trainee_of(served)
    embedding, storage = open_trainee.embedding(group), open_trainee.storage
    keys = np.arange(100)
    embedding.lookup(keys, insert=False)
    out = np.empty((100, embedding.dimension), np.float32)
    before, raised, refused = storage.stats()["sequence"], "", ""
    trainee.arm(served, faults.FAIL, "allocate", "", nth, errno.ENOMEM)
    try:
        if call == "lookup":
            embedding.lookup(keys, out)
        else:  # as the torch modules do
            storage._core.forward_many([(embedding._table, keys, out, None)], True, False)
    except Exception as error:
        raised = type(error).__name__
    hit = trainee.disarm(served)[0]
    operations = storage.stats()["sequence"] - before
    try:
        storage.commit(1)
    except MemoryError as error:
        refused = str(error)
    return Looked(bool(hit), raised, operations, not refused, refused)
