# SPDX-License-Identifier: Apache-2.0
"""Ways in which a call to the operating system failed and something broke; found by the suites in reliability/."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reliability import faults, trainee
from reliability.oracle import Operation, Oracle
from reliability.suite import Told, ask, expect, listen, make_base
from reliability.workload import SMALL, START
from storage_server import ForkServer, fork_server

OPTIONS = {"memory": "16MiB", "threads": 1, "log_bytes": "64MiB", "durability": "logged"}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "reliability.trainee") as server:
        yield server


def apply(keys: range) -> Operation:
    return Operation("apply_gradients", 0, np.array(keys), np.ones((len(keys), 3), np.float32))


SCAN = Operation("scan", 0)  # a cut: it writes table files


def train_with_a_failure(
    server: ForkServer, base: Path, before: list[Operation], failure: tuple[object, ...], after: list[Operation]
) -> tuple[Oracle, Told]:
    """`before`, then `after` while calls fail, then kill -9; the oracle has what happened."""
    oracle = Oracle(SMALL.groups, START)
    session = server.session()
    try:
        ask(session, trainee.watch, make_base(base))
        ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
        session.start("call", trainee.train, before, oracle.now)
        expect(oracle, before, listen(session))
        ask(session, trainee.arm, *failure)
        session.start("call", trainee.train, after, oracle.now, after_errors=True)
        told = listen(session)
        assert told.ended, "the process died"
        assert ask(session, trainee.disarm)[0] != "", "nothing failed"
    finally:
        session.kill()
    for place, operation in enumerate(after):
        if place not in told.raised:
            oracle.perform(operation)
    return oracle, told


def assert_comes_back(server: ForkServer, base: Path, oracle: Oracle) -> None:
    session = server.session()
    try:
        oracle.compare(ask(session, trainee.recover, base, SMALL.name, OPTIONS), oracle.sequence, oracle.sequence)
    finally:
        session.kill()


def test_a_storage_opens_after_a_failed_sync_of_the_manifest_of_its_cold_tier(
    server: ForkServer, tmp_path: Path
) -> None:
    """RocksDB removed the tables again that the manifest, not synced but written, told of."""
    failure = (faults.FAIL, "sync", "rocksdb-manifest", 1, errno.EIO)
    oracle, told = train_with_a_failure(server, tmp_path / "base", [apply(range(50))], failure, [SCAN])
    assert told.raised[0][0] == "StorageError"
    assert_comes_back(server, tmp_path / "base", oracle)


def test_opening_on_a_full_disk_does_not_end_the_process(server: ForkServer, tmp_path: Path) -> None:
    """RocksDB's log of its own doings met an assertion of RocksDB's."""
    reopen = Operation("reopen")
    failure = (faults.FAIL_FOR_GOOD, "write", "", 3, errno.ENOSPC)
    oracle, told = train_with_a_failure(
        server, tmp_path / "base", [apply(range(50)), SCAN, apply(range(50))], failure, [reopen]
    )
    assert told.raised[0][0] == "StorageError"
    assert_comes_back(server, tmp_path / "base", oracle)
