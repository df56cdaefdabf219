# SPDX-License-Identifier: Apache-2.0
"""Simulated power loss: a training is recorded, and any moment of it is a place where the power may go.

From the journal of one run come as many disks as are asked for (journal.py), each opened and compared. In some runs a
sync fails, and what it should have covered never comes to the disk. The recovery of
some of them is recorded again, with operations after it, and the power goes again, also within that recovery. Where the
process was killed and the power had not gone, what the first did not sync is then lost with what the second did not.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reliability import faults, trainee
from reliability.journal import Disk, Event, Loss, read_journal
from reliability.oracle import Found, Moment, Operation, Oracle
from reliability.suite import (
    Expected,
    Kept,
    ServedSuite,
    ask,
    check_kept,
    expect,
    kept,
    listen,
    make_base,
    scratch,
)
from reliability.workload import Shape, Workload, draw_options, draw_shape

STATES = 24  # disks of one recorded run
DEPTH = 3  # recoveries within recoveries


@dataclass
class Recorded:
    """A run that was recorded, and what it promised."""

    origin: Path  # the directory before it
    events: list[Event]
    oracle: Oracle
    floor: int  # the sequence number that was safe before it
    operations: list[Operation]
    expected: Expected
    durability: str
    before: Moment
    closed: bool  # at its end
    opened: int  # how many events there were by then
    replaced: Oracle | None  # what was there before a checkpoint was restored in its place
    killed: Killed | None  # the run before, where the power did not go between the two

    def disk(self) -> Disk:
        """As it was when the run began."""
        if self.killed is None:
            return Disk(self.origin)
        disk = self.killed.run.disk()
        for event in self.killed.run.events[: self.killed.position]:
            disk.happen(event)
        return disk

    def promised(self, position: int) -> tuple[Recorded, int]:
        """The run whose promises count, and where it was: until the storage is open, they are those of before."""
        if self.killed is None or position >= self.opened:
            return self, position
        return self.killed.run.promised(self.killed.position)

    def made(self, base: Path, position: int) -> list[tuple[Kept, Oracle]]:
        """Checkpoints and dumps of this run, and of those before it, with the oracle that knows what they are of."""
        _, _, done, issued = self.range_at(position, everything_kept=True)
        before = [] if self.killed is None else self.killed.run.made(base, self.killed.position)
        there = [what for what in kept(base, self.expected, done) if what.sequence <= self.expected.sequence(issued)]
        return before + [(what, self.oracle) for what in there]

    def moments_at(self, done: int, issued: int) -> list[Moment]:
        """In mode commit: what it may go back to."""
        moments = self.expected.moments(self.oracle, self.operations, done, issued, self.before)
        if self.closed and done == len(self.operations) - 1:
            assert self.before.groups is not None
            moments.append(self.oracle.moment(self.expected.groups_at_the_end(self.before.groups)))
        return moments

    def range_at(self, position: int, everything_kept: bool) -> tuple[int, int, int, int]:
        """After the first `position` events: the least and greatest sequence number; the last place done, issued."""
        issued = done = -1
        for event in self.events[:position]:
            if event.type == "K":
                letter, place = chr(event.numbers[0]), event.numbers[1]
                if letter == "i":
                    issued = place
                elif letter == "d":
                    done = place
        if everything_kept or (self.closed and position == len(self.events)):  # as after a kill; or a close returned
            low = self.expected.sequence(done)
        else:
            low = self.expected.last_durable(self.operations, done, self.durability == "durable")
        return max(low, self.floor), self.expected.sequence(issued), done, issued


@dataclass
class Killed:
    """Where a process was killed, with all that it had not synced still to come to the disk."""

    run: Recorded
    position: int


class PowerLoss(ServedSuite):
    name = "power-loss"
    title = "simulated power loss: unsynced bytes and directory entries are dropped"
    promise = (
        "what was committed, checkpointed or dumped, or returned in mode durable, is there, and a prefix of what "
        "followed, nothing torn; in mode commit exactly the last commit"
    )
    unit = "disks"
    small = 1_000
    full = 50_000

    def environment(self) -> dict[str, str]:
        return faults.environment()

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 11])
        shape = draw_shape(random, tight=0.1)
        with scratch() as directory:
            origin = make_base(directory / "origin")
            oracle = Oracle(shape.groups, shape.start)
            restored = self.make_checkpoint(seed, random, shape, origin, oracle) if random.random() < 0.2 else None
            self.explore(seed, random, shape, origin, oracle, set(), 0, STATES, restored)

    def make_checkpoint(
        self, seed: int, random: np.random.Generator, shape: Shape, origin: Path, oracle: Oracle
    ) -> tuple[Path, Oracle]:
        """Trains, makes one on the way, and closes; nothing is lost here. Returns it, with what it is of."""
        workload = Workload([seed, 13], shape, first_number=900_000_000)
        operations = [*workload.fill(), *workload.draw(25), Operation("checkpoint", number=1), *workload.draw(15)]
        session = self.server.session()
        try:
            ask(session, trainee.open_storage, origin, shape.name, draw_options(random, shape))
            session.start("call", trainee.train, operations, oracle.now, "")
            told = listen(session)
            assert told.ended, f"{told}"
            ask(session, trainee.close)
        finally:
            session.kill()
        expected = expect(oracle, operations, told)
        kept_one = oracle.from_moment(Moment(expected.checkpoints[1], (1, b""), None))
        return origin / "checkpoints" / "1", kept_one

    def explore(
        self,
        seed: int,
        random: np.random.Generator,
        shape: Shape,
        origin: Path,
        oracle: Oracle,
        groups: set[int],
        depth: int,
        states: int,
        restored: tuple[Path, Oracle] | None = None,
        killed: Killed | None = None,
    ) -> None:
        """Records a run from `origin`, which holds what the oracle has now, and looks at what losses leave of it.

        `restored`: a checkpoint that takes its place first, and what that is of. `killed`: the run that left it.
        """
        run = self.record(seed, random, shape, origin, oracle, groups, depth, restored, killed)
        disk = run.disk()
        at = 0
        for number, position in enumerate(sorted(self._positions(random, run, states))):
            for event in run.events[at:position]:
                disk.happen(event)
            at = position
            deeper = depth + 1 < DEPTH and number % 6 == 5 and not (run.replaced and position < run.opened)
            kind = str(random.choice(Loss.KINDS, p=[0.5, 0.15, 0.15, 0.2] if deeper else [0.1, 0.25, 0.25, 0.4]))
            where = f"run {depth}, power lost after event {position} of {len(run.events)}, {kind} of the rest lost"
            if kind == "nothing":
                where = f"run {depth}, killed after event {position} of {len(run.events)}"
            base = origin.with_name(f"{origin.name}-{number}")
            base.mkdir()
            disk.after(Loss(kind, random, disk.time), base)
            make_base(base)
            try:
                found = self.check(random, shape, run, position, kind == "nothing", base, keep=not deeper)
                self.done["disks"] += 1
                self.done[f"lost: {kind}"] += 1
                self.done[f"mode {run.durability}"] += 1
                self.done["lost after a kill, too"] += killed is not None and kind != "nothing"
                if deeper:
                    oracle = run.promised(position)[0].oracle.from_here(found.sequence)
                    was_killed = Killed(run, position) if kind == "nothing" else None
                    more = states // (2 if was_killed else 4)
                    self.explore(seed, random, shape, base, oracle, found.groups, depth + 1, more, killed=was_killed)
            except AssertionError as error:
                error.add_note(where)
                raise
            finally:
                _remove(base)

    def _positions(self, random: np.random.Generator, run: Recorded, states: int) -> list[int]:
        """Half of them anywhere, half around what matters most: syncs, renames, links, removals."""
        anywhere = random.integers(0, len(run.events) + 1, states - states // 2).tolist()
        turns = [place for place, event in enumerate(run.events) if event.type in "SYRLUO"]
        around = random.choice(turns, states // 2) + random.integers(0, 2, states // 2)
        return anywhere + around.tolist()

    def record(
        self,
        seed: int,
        random: np.random.Generator,
        shape: Shape,
        origin: Path,
        oracle: Oracle,
        groups: set[int],
        depth: int,
        restored: tuple[Path, Oracle] | None,
        killed: Killed | None,
    ) -> Recorded:
        replaced = None
        if restored is not None:
            replaced, oracle = oracle, restored[1]
        options = draw_options(random, shape)
        number = next(self._runs)
        workload = Workload([seed, 12, int(random.integers(2**31))], shape, first_number=1_000_000 * number)
        operations = (workload.fill() if depth == 0 else []) + workload.draw(int(random.integers(10, 50)))
        with scratch() as directory:
            base, journal = directory / "base", directory / "journal"
            _copy(origin, base)
            session = self.server.session()
            try:
                ask(session, trainee.watch, base, journal)
                checkpoint = None if restored is None else base / restored[0].relative_to(origin)
                sequence = ask(session, trainee.open_storage, base, shape.name, options, checkpoint)
                if checkpoint is not None:
                    found = ask(session, trainee.look)
                    oracle.compare(found, sequence, sequence)
                    groups = found.groups
                    self.done["checkpoints restored"] += 1
                assert sequence == oracle.sequence, f"opened twice: {oracle.sequence}, then {sequence}"
                # Sometimes a sync fails, and is the end of it: the call says so, or the next one.
                fails = bool(random.random() < 0.2)
                beside = "" if fails else str(random.choice(["", "", "scan", "lookup"]))
                if fails:
                    ask(session, trainee.arm, faults.FAIL, "sync", "", int(random.geometric(0.1)), errno.EIO)
                session.start("call", trainee.train, operations, oracle.now, beside)
                told = listen(session)
                assert told.ended, f"{told}"
                assert fails or not told.raised, f"{told}"
                assert all(name == "StorageError" for name, _, _ in told.raised.values()), f"{told.raised}"
                self.done["runs with a sync that failed"] += bool(told.raised)
                operations = operations[: told.issued + 1]
                closed = not fails and bool(random.random() < 0.3)
                if closed:
                    ask(session, trainee.close)
                ask(session, trainee.flush)
            finally:
                session.kill()
            events = read_journal(journal)
        floor, before = oracle.sequence, oracle.moment(groups)
        expected = expect(oracle, operations, told)
        durability = options["durability"]
        opened = next(
            place for place, event in enumerate(events, 1) if event.type == "K" and event.numbers[0] == ord("o")
        )
        return Recorded(
            origin, events, oracle, floor, operations, expected, durability, before, closed, opened, replaced, killed
        )

    _runs = itertools.count(1)

    def check(
        self,
        random: np.random.Generator,
        shape: Shape,
        run: Recorded,
        position: int,
        everything_kept: bool,
        base: Path,
        keep: bool,
    ) -> Found:
        """Opens the disk and compares all of it; returns what it holds. `keep`: the files may change."""
        run, position = run.promised(position)
        low, high, done, issued = run.range_at(position, everything_kept)
        opened = base
        if not keep:
            opened = base.with_name(base.name + "-opened")
            _copy(base, opened)
        session = self.server.session()
        try:
            found = ask(session, trainee.recover, opened, shape.name, draw_options(random, shape), inspect=2)
            if run.replaced is not None and position < run.opened and found.sequence == run.replaced.sequence:
                run.replaced.compare(found, found.sequence, found.sequence)
                return found
            if run.durability == "commit":
                run.oracle.compare_moments(found, run.moments_at(done, issued))
            else:
                run.oracle.compare(found, low, high)
        finally:
            session.kill()
        must_exist = run.expected.groups(run.before.groups, done, issued)
        if run.durability != "commit":  # which compares them
            assert must_exist <= found.groups, f"groups {must_exist - found.groups} are lost"
        made = run.made(opened, position)
        if made and random.random() < 0.2:
            what, oracle = made[int(random.integers(len(made)))]
            if check_kept(self.server, what, shape, draw_options(random, shape), oracle):
                self.done["checkpoints and dumps compared"] += 1
        if opened != base:
            _remove(opened)
        return found


def _copy(origin: Path, target: Path) -> None:
    shutil.copytree(origin, target, symlinks=True)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
