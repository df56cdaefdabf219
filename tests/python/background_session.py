# SPDX-License-Identifier: Apache-2.0
"""What the tests of errors of background threads do in the process that has the storage open."""

from __future__ import annotations

import time

import numpy as np

from reliability import trainee
from storage_server import Served

PATIENCE = 20.0


def update_once(served: Served, rows: int) -> None:
    trainee.trainee_of(served).embedding(0).apply_gradients(np.arange(rows), np.ones((rows, 3), np.float32))


def cut_until_a_call_has_failed(served: Served, cuts: int) -> int:
    """Updates and cuts, each of which leaves one more table file on top; how many it took. Nothing comes after."""
    open_trainee, faults = trainee.trainee_of(served), trainee.faults_of(served)
    assert faults is not None
    embedding = open_trainee.embedding(0)
    for number in range(1, cuts + 1):
        embedding.apply_gradients(np.arange(50), np.ones((50, 3), np.float32))
        for _ in embedding.scan():
            pass
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            if faults.hit():
                return number
            time.sleep(0.01)
    return 0


def update_until_it_raises(served: Served, rows: int) -> tuple[str, str, str, bool]:
    """What an update raised (or ""), its words, what commit said after it, and whether a lookup goes on."""
    open_trainee = trainee.trainee_of(served)
    embedding, storage = open_trainee.embedding(0), open_trainee.storage
    keys, ones = np.arange(rows), np.ones((rows, 3), np.float32)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            embedding.apply_gradients(keys, ones)
        except Exception as error:
            said = ""
            try:
                storage.commit(1)
            except Exception as refused:
                said = str(refused)
            looked = bool(np.isfinite(embedding.lookup(np.arange(50), insert=False)).all())
            return type(error).__name__, str(error), said, looked
        time.sleep(0.001)
    return "", "", "", False
