# SPDX-License-Identifier: Apache-2.0
"""What a power loss took with it once; found by the suite of reliability/power_loss.py, and made sure of here."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reliability import faults, trainee
from reliability.journal import Disk, Loss, read_journal
from reliability.oracle import Operation, Oracle
from reliability.suite import ask, expect, listen, make_base
from reliability.workload import SMALL, START
from storage_server import ForkServer, fork_server

pytestmark = pytest.mark.core

OPTIONS = {"memory": "16MiB", "threads": 1, "log_bytes": "64MiB", "durability": "durable"}
FIRST, SECOND = 0, 7  # groups


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "reliability.trainee") as server:
        yield server


def apply(group: int) -> Operation:
    dimension = next(known.dimension for known in SMALL.groups if known.group == group)
    return Operation("apply_gradients", group, np.arange(20), np.ones((20, dimension), np.float32))


@pytest.mark.parametrize("action", [faults.FAIL, faults.KILL_BEFORE])
def test_what_is_learnt_after_an_unsynced_manifest_was_opened_survives(
    server: ForkServer, tmp_path: Path, action: int
) -> None:
    """The manifest has a new group, and its new name is not on the disk: the sync failed in close(), or the process
    died before it. Whoever opened it logged updates of that group; after a power loss nobody knew the group.
    """
    base, oracle = make_base(tmp_path / "base"), Oracle(SMALL.groups, START)
    disk = Disk(base)
    before = [apply(FIRST), Operation("open_group", SECOND), Operation("reopen")]
    for number, operations in enumerate((before, [apply(SECOND)])):
        journal = tmp_path / f"journal-{number}"
        session = server.session()
        try:
            ask(session, trainee.watch, base, journal)
            ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
            if number == 0:
                session.start("call", trainee.train, operations[:2], oracle.now)
                expect(oracle, operations[:2], listen(session))
                ask(session, trainee.arm, action, "sync", "generation", 1, errno.EIO)
                operations = operations[2:]
            session.start("call", trainee.train, operations, oracle.now)
            told = listen(session)
            assert told.died == (number == 0 and action == faults.KILL_BEFORE)
            assert not told.raised
            expect(oracle, operations[: told.done + 1], told)
            if not told.died:
                ask(session, trainee.flush)
        finally:
            session.kill()
        for event in read_journal(journal):
            disk.happen(event)
    assert oracle.sequence == 2
    left = tmp_path / "left"
    left.mkdir()
    disk.after(Loss("everything", np.random.default_rng(0), disk.time), left)
    session = server.session()
    try:
        found = ask(session, trainee.recover, make_base(left), SMALL.name, OPTIONS)
    finally:
        session.kill()
    oracle.compare(found, 2, 2)
