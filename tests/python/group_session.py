# SPDX-License-Identifier: Apache-2.0
"""What the tests of changes to groups do in the process that has the storage open, while calls fail there."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np

import damo_embedding as de
from reliability import faults, trainee
from storage_server import Served

KEYS = np.arange(4)


def make(storage: de.Storage, group: int, **options: object) -> de.Embedding:
    return de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=4, group=group, **options)  # type: ignore[arg-type]


def step(embedding: de.Embedding) -> None:
    embedding.lookup(KEYS)  # or a group with a filter takes no gradients of them
    embedding.apply_gradients(KEYS, np.ones((len(KEYS), 4), np.float32))


def change_with_a_failing_sync(served: Served, path: Path, change: str, nth: int) -> None:
    """The change raises when its manifest is in place and only the directory could not be synced. Training goes on."""
    admission = de.CountingBloomFilter(capacity=1000, count=1)
    with de.Storage(path, memory="16MiB") as storage:
        step(make(storage, 3, admission=admission))
    storage = de.Storage(path, memory="16MiB")
    other = make(storage, 5)
    step(other)
    embedding = make(storage, 3) if change == "drop_group" else None
    trainee.arm(served, faults.FAIL, "sync", "generation", nth, errno.EIO)
    try:
        if change == "drop_group":
            storage.drop_group(3)
        else:
            make(storage, 3, admission="all")
        raised = ""
    except de.StorageError as error:
        raised = str(error)
    trainee.disarm(served)
    embedding = embedding or make(storage, 3)
    step(embedding)
    storage.commit(7, raised.encode())
    if change == "drop_filter":  # a close would write the manifest anew
        os.kill(os.getpid(), signal.SIGKILL)
    storage.close()


def cut_without_space_for_the_presence_filter(served: Served, path: Path) -> tuple[int, int, list[str]]:
    """(log bytes before, and after a cut while there is no space for that file, what is left of it)."""
    with de.Storage(path, memory="16MiB", log_bytes="64MiB") as storage:
        embedding = make(storage, 3)
        for _ in range(2_000):
            step(embedding)
        before = storage.stats()["log_bytes"]
        trainee.arm(served, faults.FAIL_FOR_GOOD, "write", "presence.tmp", 1, errno.ENOSPC)
        storage.compact()
        assert trainee.disarm(served)[0] != "", "nothing failed"
        return before, storage.stats()["log_bytes"], [str(left) for left in path.rglob("presence.tmp")]


def open_a_group_again_after_a_memory_error(served: Served, path: Path, nth: int) -> bool:
    """Whether the nth allocation was reached."""
    storage = de.Storage(path, memory="16MiB")
    trainee.arm(served, faults.FAIL, "allocate", "", nth, errno.ENOMEM)
    with suppress(MemoryError):
        make(storage, 3)
    hit = trainee.disarm(served)[0]
    step(make(storage, 3))
    storage.commit(1)
    storage.close()
    return hit != ""


def drop_while_memory_ends(served: Served, path: Path, nth: int) -> bool:
    """It is dropped, or it raises and the group is as before. Whether the nth allocation was reached."""
    storage = de.Storage(path, memory="16MiB")
    embedding, other = make(storage, 3), make(storage, 5)
    step(embedding)
    step(other)
    dropped = goes_on = True
    trainee.arm(served, faults.FAIL, "allocate", "", nth, errno.ENOMEM)
    try:
        storage.drop_group(3)
    except MemoryError:
        dropped = False
    except de.StorageError:  # the log could not be synced, and takes nothing more
        dropped = goes_on = False
    hit = trainee.disarm(served)[0]
    assert (3 not in storage.groups()) == dropped, f"dropped: {dropped}, but the groups are {storage.groups()}"
    if goes_on:
        if not dropped:
            step(embedding)
            assert embedding.step == 2
        step(other)
        storage.commit(1)
    try:
        storage.close()
    except de.StorageError:  # of that log
        assert not goes_on
    return hit != ""
