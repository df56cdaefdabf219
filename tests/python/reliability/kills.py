# SPDX-License-Identifier: Apache-2.0
"""kill -9, at random moments and at named points, with options drawn anew at each start."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from reliability import faults, trainee
from reliability.oracle import Found, Moment, Operation, Oracle
from reliability.suite import (
    DiedError,
    Expected,
    Kept,
    ServedSuite,
    ask,
    check_checkpoint_beside,
    check_dumps_beside,
    check_kept,
    expect,
    hear_the_rest,
    kept,
    listen,
    make_base,
    scratch,
)
from reliability.workload import LARGE, Shape, Workload, draw_options, draw_shape

ROUNDS = 5


class Kills(ServedSuite):
    name = "kill"
    title = "kill -9 at random and at named points"
    promise = (
        "every operation that returned is there, the one in flight is there or not, nothing is torn; "
        "in mode commit exactly the last commit"
    )
    unit = "kills"
    small = 200
    full = 5_000

    def environment(self) -> dict[str, str]:
        return faults.environment()

    def case(self, seed: int) -> None:
        with scratch() as directory:
            Victim(self, seed, directory).live()


class Victim:
    """One storage that is killed some times."""

    def __init__(self, suite: Kills, seed: int, directory: Path) -> None:
        self.suite = suite
        self.random = np.random.default_rng([seed, 1])
        self.shape: Shape = draw_shape(self.random, large=0.02)
        self.workload = Workload([seed, 2], self.shape)
        self.base = make_base(directory / "base")
        self.epitaph = directory / "epitaph"
        self.oracle = Oracle(self.shape.groups, self.shape.start)
        self.low = self.high = 0  # the sequence number it may come back with
        self.groups: set[int] = set()  # that must exist
        self.moments: list[Moment] | None = None  # of a process in mode commit: one of these, instead of all that
        self.kept: list[Kept] = []
        self.expected = Expected(0, self.shape.start)  # of the last training

    def live(self) -> None:
        for number in range(ROUNDS):
            filled = self.workload.fill() if number == 0 else []
            operations = filled + self.workload.draw(int(self.random.integers(5, 60)))
            self.start_and_die(operations, len(filled) if self.shape is LARGE else 0)
        session = self.suite.server.session()
        self.check(ask(session, trainee.recover, self.base, self.shape.name, self.options()))
        ask(session, trainee.close)
        session.leave()

    def options(self) -> dict[str, Any]:
        return draw_options(self.random, self.shape)

    def check(self, found: Found) -> None:
        """After a recovery: everything; then the oracle goes on from there."""
        if self.moments is None:
            self.oracle.compare(found, self.low, self.high)
            assert self.groups <= found.groups, f"groups {self.groups - found.groups} are lost"
        else:
            self.oracle.compare_moments(found, self.moments)
            self.suite.done["back at a commit"] += 1
        if self.kept and self.random.random() < 0.5:
            what = self.kept[int(self.random.integers(len(self.kept)))]
            if check_kept(self.suite.server, what, self.shape, self.options(), self.oracle):
                self.suite.done["checkpoints and dumps compared"] += 1
        self.kept = []
        self.check_beside()
        self.oracle = self.oracle.from_here(found.sequence)
        self.low = self.high = found.sequence
        self.groups, self.moments = set(found.groups), None

    def check_beside(self) -> None:
        """Dumps and checkpoints that another thread made, as they came in between the operations."""
        directory = self.base / "beside"
        for until in directory.glob("*.until"):
            if not until.read_text().endswith("]"):  # the process died while it wrote this
                until.unlink()
        compared = check_dumps_beside(directory, self.oracle, self.expected)
        for path in sorted(directory.glob("*")):
            if path.name.isdecimal():  # else the process died before it was whole, or while it was removed
                options = self.options()
                check_checkpoint_beside(self.suite.server, path, self.shape, options, self.oracle, self.expected)
                compared += 1
        self.suite.done["made beside a training, compared"] += compared
        shutil.rmtree(directory, ignore_errors=True)

    def start_and_die(self, operations: list[Operation], unharmed: int) -> None:
        """Does the operations, of which the first `unharmed` return."""
        session = self.suite.server.session()
        at_a_point = self.random.random() < 0.7 and not unharmed
        if at_a_point:
            call, file_class = faults.POINTS[int(self.random.integers(len(faults.POINTS)))]
            actions = [faults.KILL_BEFORE, faults.KILL_AFTER] + [faults.TEAR] * (call == "write")
            action = int(self.random.choice(actions))
            nth = 1 + int(self.random.geometric(0.1 if call == "open" or file_class in ("log", "") else 0.5))
            ask(session, trainee.watch, self.base, None, self.epitaph)
            ask(session, trainee.arm, action, call, file_class, nth - int(self.random.random() < 0.3))
        options = self.options()
        try:
            found = ask(session, trainee.recover, self.base, self.shape.name, options)
        except DiedError:
            self.note_death()
            session.kill()
            return
        try:
            self.check(found)
        except BaseException:
            session.kill()
            raise
        before = self.oracle.moment(found.groups)
        beside = str(self.random.choice(trainee.BESIDE))
        with suppress(BrokenPipeError):  # a thread of the storage has come by the point before it was asked
            session.start("call", trainee.train, operations, self.oracle.now, beside)
        # At a point, the end of the operations kills those that never came by it.
        until = None if at_a_point else int(self.random.integers(unharmed, len(operations)))
        told = listen(session, until)
        if not told.died and not told.ended:
            time.sleep(float(self.random.exponential(0.002)))
        if told.died:
            self.note_death()
        else:
            self.suite.done["at a random moment"] += 1
            self.suite.done["kills"] += 1
        hear_the_rest(told, session)
        assert not told.raised, f"{told.raised}"
        expected = self.expected = expect(self.oracle, operations[: told.issued + 1], told)
        self.low, self.high = expected.sequence(told.done), expected.sequence(told.issued)
        if options["durability"] == "commit":
            self.moments = expected.moments(self.oracle, operations, told.done, told.issued, before)
        self.groups = expected.groups(self.groups, told.done, told.issued)
        self.kept = kept(self.base, expected, told.done)

    def note_death(self) -> None:
        """It died by itself: of the point, or of something that must not be."""
        assert self.epitaph.exists(), "the process died, and not at the point where it was to be killed"
        self.suite.done[f"at {self.epitaph.read_text()}"] += 1
        self.suite.done["kills"] += 1
        self.epitaph.unlink()
