# SPDX-License-Identifier: Apache-2.0
"""Power losses after a process that died or had a sync fail, and another that built upon what it left.

What the first had not synced is visible to the second, and may still be lost: nothing that the second syncs may depend
on it. The suite of reliability/power_loss.py found the first of these; each is made sure of here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import power_session
from power_session import MANY, WIDTH, new_filter, open_wide
from reliability import faults, trainee
from reliability.journal import Disk, Loss, read_journal
from reliability.oracle import Moment, Operation, Oracle
from reliability.suite import DiedError, Told, ask, expect, listen, make_base
from reliability.workload import SMALL, START
from storage_server import ForkServer, Session, fork_server
from test_filter_file import seal_mark

pytestmark = pytest.mark.core

OPTIONS = {"memory": "16MiB", "threads": 1, "log_bytes": "64MiB", "durability": "durable"}
FIRST, SECOND = 0, 7  # groups


class Machine:
    """One disk, and processes that use it one after the other until the power goes."""

    def __init__(self, server: ForkServer, place: Path) -> None:
        self.server, self.place = server, place
        self.base = make_base(place / "base")
        self.disk = Disk(self.base)
        self.processes = 0

    @contextmanager
    def process(self) -> Iterator[Session]:
        """Ends by kill -9, wherever it is."""
        journal = self.place / f"journal-{self.processes}"
        self.processes += 1
        session = self.server.session()
        try:
            ask(session, trainee.watch, self.base, journal, self.place / "epitaph")
            yield session
            with suppress(DiedError):
                ask(session, trainee.flush)
        finally:
            session.kill()
        for event in read_journal(journal):
            self.disk.happen(event)

    def lose_power(self, kind: str = "everything", seed: int = 0) -> Path:
        left = self.place / f"left-{kind}-{seed}"
        left.mkdir()
        self.disk.after(Loss(kind, np.random.default_rng(seed), self.disk.time), left)
        return make_base(left)

    def recover(self, left: Path) -> trainee.Found:
        session = self.server.session()
        try:
            found: trainee.Found = ask(session, trainee.recover, left, SMALL.name, OPTIONS)
        finally:
            session.kill()
        return found


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "power_session") as server:
        yield server


@pytest.fixture
def machine(server: ForkServer, tmp_path: Path) -> Machine:
    return Machine(server, tmp_path)


def apply(group: int) -> Operation:
    dimension = next(known.dimension for known in SMALL.groups if known.group == group)
    return Operation("apply_gradients", group, np.arange(20), np.ones((20, dimension), np.float32))


def train(session: Session, oracle: Oracle, operations: list[Operation]) -> Told:
    session.start("call", trainee.train, operations, oracle.now)
    told = listen(session)
    assert not told.raised
    expect(oracle, operations[: told.done + 1], told)
    return told


def test_a_close_that_could_not_save_a_group_says_so(machine: Machine) -> None:
    """The sync of the new manifest failed, so it was not renamed; close() returned, and the group was gone."""
    with machine.process() as session:
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
        train(session, Oracle(SMALL.groups, START), [apply(FIRST), Operation("open_group", SECOND)])
        ask(session, trainee.arm, faults.FAIL, "sync", "MANIFEST.tmp", 1, errno.EIO)
        refused = ask(session, trainee.try_to_close)
        assert refused is not None
        assert refused[0] == "StorageError"
        assert "MANIFEST.tmp" in refused[1]
    assert machine.recover(machine.base).groups == {FIRST}


@pytest.mark.parametrize("action", [faults.FAIL, faults.KILL_BEFORE])
def test_a_group_that_was_made_before_a_kill(machine: Machine, action: int) -> None:
    """The manifest has the new group, and its new name is not on the disk: the sync failed in close(), or the process
    died before it. The next one logged updates of that group; after a power loss nobody knew the group.
    """
    oracle = Oracle(SMALL.groups, START)
    with machine.process() as session:
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
        train(session, oracle, [apply(FIRST), Operation("open_group", SECOND)])
        ask(session, trainee.arm, action, "sync", "generation", 1, errno.EIO)
        session.start("call", trainee.train, [Operation("reopen")], oracle.now)
        told = listen(session)
        assert told.died == (action == faults.KILL_BEFORE)
        assert told.died or told.raised[0][0] == "StorageError"
    with machine.process() as session:
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
        train(session, oracle, [apply(SECOND)])
    oracle.compare(machine.recover(machine.lose_power()), 2, 2)


def test_the_name_of_a_storage_whose_maker_died(machine: Machine) -> None:
    """Dead between mkdir and the sync of the directory above; what was trained in it was gone with its name."""
    oracle = Oracle(SMALL.groups, START)
    with machine.process() as session:
        ask(session, trainee.arm, faults.KILL_AFTER, "mkdir", "", 1, errno.EIO)
        with pytest.raises(DiedError):
            ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
    with machine.process() as session:
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
        train(session, oracle, [apply(FIRST)])
    oracle.compare(machine.recover(machine.lose_power()), 1, 1)


def test_a_copy_of_a_checkpoint_that_was_restored(machine: Machine) -> None:
    """Tables are linked; nobody had synced them, and the storage of before was gone."""
    oracle = Oracle(SMALL.groups, START)
    checkpoints = machine.base / "checkpoints"
    with machine.process() as session:
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS)
        train(session, oracle, [apply(FIRST), Operation("checkpoint", number=2)])
    with machine.process() as session:
        ask(session, power_session.copy_files, checkpoints / "2", checkpoints / "3")
        ask(session, trainee.open_storage, machine.base, SMALL.name, OPTIONS, checkpoints / "3")
        oracle = oracle.from_moment(Moment(oracle.sequence, (2, b""), None))
        train(session, oracle, [apply(FIRST)])
    oracle.compare(machine.recover(machine.lose_power()), oracle.sequence, oracle.sequence)


def test_rows_redone_from_a_log_whose_sync_had_failed(machine: Machine) -> None:
    """Redo evicted rows whose records were in the page cache only; the cold tier was ahead of the log then."""
    path = machine.base / "table.damo"
    with machine.process() as session:
        assert "the log takes nothing more" in ask(session, power_session.fill_and_fail_to_sync, path)
    with machine.process() as session, pytest.raises(DiedError):
        ask(session, power_session.open_with_little_memory, path)
    storage, table = open_wide(machine.lose_power() / "table.damo", "16MiB")
    with storage:
        weights = np.concatenate([part.weights for part in table.scan()])
        assert weights.shape == (len(table), WIDTH)
        assert len(table) == 10 * MANY
        assert np.unique(weights).tolist() == [np.float32(-0.2), np.float32(-0.1)]
        assert not storage.verify(strict=False).damages


def adds_after(machine: Machine, kind: str, seed: int) -> int:
    """What another boot of the machine finds."""
    path = machine.lose_power(kind, seed) / "seen.filter"
    path.write_bytes(seal_mark(path.read_bytes(), boot=12_345))
    with new_filter(path) as seen:
        return seen.adds


LOSSES = [("everything", 0), *((kind, seed) for kind in ("anything", "a moment") for seed in range(8))]


def test_a_filter_whose_sync_had_failed(machine: Machine) -> None:
    """It was opened again, and the next sync told of adds that never came to the disk."""
    path = machine.base / "seen.filter"
    with machine.process() as session:
        assert "open it again" in ask(session, power_session.add_and_fail_to_sync, path)
    with machine.process() as session:
        assert ask(session, power_session.add_and_sync, path) == 2007
    assert [adds_after(machine, *loss) for loss in LOSSES] == [2007] * len(LOSSES)


def test_a_filter_that_was_written_anew_before_a_kill(machine: Machine) -> None:
    """The new file's name was not on the disk, and the next process did not see to it either."""
    path = machine.base / "seen.filter"
    with machine.process() as session:
        assert ask(session, power_session.add_and_compact, path) == 1_001_000
    with machine.process() as session:
        assert ask(session, power_session.add_and_sync, path) == 1_001_007
    assert [adds_after(machine, *loss) for loss in LOSSES] == [1_001_007] * len(LOSSES)
