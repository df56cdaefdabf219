# SPDX-License-Identifier: Apache-2.0
"""The Nth call to the operating system fails, once or for good: write, sync, rename, open, read, ..., memory."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from reference import ReferenceTable
from reference_filter import AdmittedTable
from reliability import faults, trainee
from reliability.oracle import Moment, Operation, Oracle
from reliability.suite import (
    DiedError,
    Kept,
    ServedSuite,
    Told,
    ask,
    check_kept,
    expect,
    kept,
    listen,
    make_base,
    scratch,
)
from reliability.workload import DURABILITIES, SMALL, START, TIGHT, Shape, Workload, draw_options
from storage_server import Session

# kind of call, what becomes of it, what the system says
KINDS = [
    (call, action, error)
    for call, error in (
        ("write", errno.EIO),
        ("write", errno.ENOSPC),
        ("sync", errno.EIO),
        ("rename", errno.EIO),
        ("open", errno.EMFILE),
        ("read", errno.EIO),
        ("link", errno.EIO),
        ("unlink", errno.EIO),
        ("mkdir", errno.ENOSPC),
        ("truncate", errno.ENOSPC),
    )
    for action in (faults.FAIL, faults.FAIL_FOR_GOOD)
]
KINDS += [("write", faults.SHORT, 0), ("allocate", faults.FAIL, errno.ENOMEM)]  # nothing works without any memory
SCENARIOS = 8
# Every call of a scenario fails once in each way, and of those for memory, tens of thousands, as many as this. How many
# reads the tight scenario takes, 700 to 1,200, depends on what was evicted in time.
PLACES, PLACES_OF_MEMORY = 2_000, 150
# What a call may raise when the system refuses: typed, never RuntimeError or a bare Exception.
TYPED = ("StorageError", "MemoryError", "AlreadyOpenError")


@dataclass
class Scenario:
    """A storage that a kill left, what is done to it, and how many calls of each kind that takes."""

    shape: Shape
    base: Path
    oracle: Oracle
    operations: list[Operation]
    options: dict[str, Any]
    counts: dict[str, int]

    @property
    def in_mode_commit(self) -> bool:
        return bool(self.options["durability"] == "commit")


class CallFails(ServedSuite):
    name = "call-fails"
    title = "the Nth call fails: write, sync, rename, open, read, link, unlink, mkdir, truncate, memory"
    promise = "the call raises, typed, with nothing half applied; reads go on; what returned is there after reopening"
    unit = "failed calls"
    small = 300
    full = 10_000
    cases = len(KINDS) * SCENARIOS * PLACES

    def environment(self) -> dict[str, str]:
        return faults.environment()

    def __enter__(self) -> Self:
        super().__enter__()
        self._scratch = scratch()
        self._directory = self._scratch.__enter__()
        self._scenarios: dict[int, Scenario] = {}
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scratch.__exit__(*exception)
        super().__exit__(*exception)

    def case(self, seed: int) -> None:
        """Seeds that follow each other go through all kinds, then all scenarios, then all N."""
        kind, scenario_number = seed % len(KINDS), seed // len(KINDS) % SCENARIOS
        place = seed // (len(KINDS) * SCENARIOS)
        call, action, error = KINDS[kind]
        scenario = self._scenario(scenario_number)
        count = scenario.counts.get(call, 0)
        memory = call == "allocate"
        assert memory or count <= PLACES, f"{count} calls of the kind {call}: say so in PLACES"
        if place >= min(count, PLACES_OF_MEMORY if memory else PLACES):
            return  # every N was done
        nth = 1 + (place + 7 * kind) * 7919 % count
        with scratch() as directory:
            try:
                self._fail(seed, scenario, directory / "base", (call, action, error), nth)
            except AssertionError as wrong:
                wrong.add_note(
                    f"call {nth} of {count} of the kind {call} failed"
                    f"{' for good' if action == faults.FAIL_FOR_GOOD else ''} ({errno.errorcode.get(error, 'short')})"
                )
                raise

    def _scenario(self, number: int) -> Scenario:
        if number not in self._scenarios:
            self._scenarios[number] = self._prepare(number)
        return self._scenarios[number]

    def _prepare(self, number: int) -> Scenario:
        random = np.random.default_rng([number, 21])
        shape = TIGHT if number % SCENARIOS == SCENARIOS - 1 else SMALL
        workload = Workload([number, 22], shape)
        oracle = Oracle(shape.groups, START)
        base = make_base(self._directory / f"scenario-{number}")
        options = {**draw_options(random, shape), "durability": DURABILITIES[number % 3]}
        session = self.server.session()
        try:
            ask(session, trainee.open_storage, base, shape.name, options)
            operations = workload.fill() + workload.draw(30)
            session.start("call", trainee.train, operations, oracle.now)
            told = listen(session)
            assert told.ended, f"{told}"
            assert not told.raised, f"{told}"
            before = oracle.moment(())
            expected = expect(oracle, operations, told)
        finally:
            session.kill()
        left = oracle.sequence
        if options["durability"] == "commit":
            (moment,) = expected.moments(oracle, operations, told.done, told.issued, before)
            left = moment.sequence
        oracle = oracle.from_here(left)
        operations = workload.draw(25)
        operations.insert(int(random.integers(5, 20)), Operation("drop_group", shape.groups[number % 3].group))
        scenario = Scenario(shape, base, oracle, operations, options, {})
        # Once without a failure, to count the calls. A failure that never comes counts memory, too.
        with scratch() as directory:
            shutil.copytree(base, directory / "base")
            session = self.server.session()
            try:
                ask(session, trainee.watch, directory / "base")
                ask(session, trainee.arm, faults.FAIL, "allocate", "", 10**9, 0)
                ask(session, trainee.open_storage, directory / "base", shape.name, options)
                session.start("call", trainee.train, scenario.operations, oracle.now)
                told = listen(session)
                assert told.ended, f"{told}"
                assert not told.raised, f"{told}"
                _, allocations, counts = ask(session, trainee.disarm)
            finally:
                session.kill()
        for (call, _), count in counts.items():
            scenario.counts[call] = scenario.counts.get(call, 0) + count
        scenario.counts["allocate"] = allocations
        return scenario

    def _fail(self, seed: int, scenario: Scenario, base: Path, what: tuple[str, int, int], nth: int) -> None:
        random = np.random.default_rng([seed, 23])
        call, action, error = what
        shape, options = scenario.shape, scenario.options
        shutil.copytree(scenario.base, base)
        oracle = scenario.oracle.from_here(scenario.oracle.sequence)  # the scenario's own stays where it is
        made: list[Kept] = []
        moments = [oracle.moment()] if scenario.in_mode_commit else None
        raised: list[Any] = []
        drops: list[Operation] = []
        session = self.server.session()
        try:
            ask(session, trainee.watch, base)
            ask(session, trainee.arm, action, call, "", nth, error)
            try:
                refused = ask(session, trainee.try_to_open, base, shape.name, options)
                alive = refused is None
                if refused is not None:
                    assert refused[0] in TYPED, f"opening raised {refused}"
                else:
                    session.start("call", trainee.train, scenario.operations, oracle.now, after_errors=True)
                    told = listen(session)
                    raised = [(scenario.operations[place].verb, *error) for place, error in told.raised.items()]
                    tried = [scenario.operations[place] for place in told.raised]
                    drops = [operation for operation in tried if operation.verb == "drop_group"]
                    alive = follow(
                        told,
                        scenario.operations,
                        oracle,
                        base,
                        made,
                        moments,
                        may_die=call == "allocate",
                        unreadable=call in ("read", "open", "allocate"),
                    )
                    if told.died:
                        raise DiedError("train")
                hit = ask(session, trainee.disarm)[0]
                if alive:
                    read_on(session, oracle)
                    if random.random() < 0.5:
                        if moments is not None:
                            moments.append(oracle.moment())  # whether it closes or not
                        refused = ask(session, trainee.try_to_close)
                        assert refused is None or refused[0] in TYPED, f"closing raised {refused}"
                        if moments is not None and refused is None:
                            moments[:] = moments[-1:]
            except DiedError as died:
                # The C++ library and RocksDB end the process where they cannot say that memory ran out: as a kill.
                if call != "allocate":
                    raise AssertionError(f"the process died in {died}") from died
                hit = "allocate, which ended the process"
            session.kill()
            self._reopen(random, base, scenario, oracle, made, moments, drops)
        except AssertionError as wrong:
            wrong.add_note(f"raised: {raised[:3]}")
            raise
        finally:
            session.kill()
        self.done[f"failed: {hit}" if hit else "not reached"] += 1
        self.done["failed calls"] += bool(hit)

    def _reopen(
        self,
        random: np.random.Generator,
        base: Path,
        scenario: Scenario,
        oracle: Oracle,
        made: list[Kept],
        moments: list[Moment] | None,
        drops: list[Operation],
    ) -> None:
        """`drops`: those that raised."""
        session = self.server.session()
        try:
            found = ask(session, trainee.recover, base, scenario.shape.name, draw_options(random, scenario.shape))
            if oracle.may_be_dropped is not None and found.sequence == oracle.sequence + 1:
                # One of those that raised is on the disk. A group that was never saved is not there either, and empty.
                gone = [drop for drop in drops if drop.group not in found.groups]
                assert gone, f"no group is gone, of {drops}"
                oracle.perform(max(gone, key=lambda drop: content_of(oracle.tables[drop.group])))
            if moments is not None:
                oracle.compare_moments(found, moments)
            else:
                low = oracle.sequence - int(oracle.last_may_be_missing)
                oracle.compare(found, max(low, scenario.oracle.sequence), oracle.sequence)
        finally:
            session.kill()
        if made:
            what = made[int(random.integers(len(made)))]
            check_kept(self.server, what, scenario.shape, scenario.options, oracle)


def content_of(table: ReferenceTable) -> tuple[int, ...]:
    """What there is of it: nothing of one that has no record."""
    return len(table.rows), table.step, table.filter.adds if isinstance(table, AdmittedTable) else 0


def follow(
    told: Told,
    operations: list[Operation],
    oracle: Oracle,
    base: Path,
    made: list[Kept],
    moments: list[Moment] | None = None,
    may_die: bool = False,
    unreadable: bool = False,
) -> bool:
    """Does in the oracle what happened. Whether the storage can be read on.

    `moments`: in mode commit, what it may go back to; what is kept from now on takes their place.
    `unreadable`: files could not be read, which are damaged to who asks whether all is whole.
    """
    if not may_die:
        assert told.ended, f"the process died in operation {told.issued}, {operations[told.issued].verb}"
    follow_from = 0
    unchanged = oracle.sequence
    for place, operation in enumerate(operations[: told.issued + 1]):
        if place < follow_from:
            continue
        if oracle.sequence > unchanged:
            oracle.may_be_dropped, unchanged = None, oracle.sequence
        keeps = operation.verb in ("commit", "reopen")
        if place in told.raised:
            name, text, sequence = told.raised[place]
            may_say = (*TYPED, "CorruptionError") if unreadable and operation.verb == "verify" else TYPED
            assert name in may_say, f"{operation.verb} raised {name}: {text}"
            if sequence < 0:
                assert operation.verb == "reopen", f"{operation.verb} left a storage that does not answer: {text}"
                if moments is not None:
                    moments.append(oracle.moment())  # it may have been closed
                return False
            if sequence == oracle.sequence:
                if operation.verb == "drop_group" and moments is None:
                    oracle.may_be_dropped = operation
                made += kept(base, expect(oracle.from_here(sequence), [operation]), -1)
                continue
            if moments is not None and operation.verb == "commit":
                # It may be kept all the same, where only the end of it failed.
                tried = oracle.from_here(oracle.sequence)
                tried.perform(operation)
                moments.append(tried.moment())
                oracle.perform(replace(operation, verb="lost commit"))
                assert sequence == oracle.sequence, f"commit raised {text}, after {sequence} operations"
                continue
            # It is in the log, and something after that failed. A drop has nothing after that.
            assert operation.verb != "drop_group", f"raised {name}: {text}, and the group is gone"
            made += kept(base, expect(oracle, [operation]), -1)
            assert sequence == oracle.sequence, f"{operation.verb} raised {text}, after {sequence} operations"
            # Those change no rows in memory, or let go of them all.
            if name == "MemoryError" and operation.verb not in ("expire", "compact"):
                # Not all of its rows changed in memory. Nothing may be built upon that; redo does it.
                later = [after for after in sorted(told.answers) if after > place]
                reopened = next((after for after in later if operations[after].verb == "reopen"), None)
                until = [operations[after].verb for after in later if reopened is None or after < reopened]
                assert not {"commit", "checkpoint"}.intersection(until), f"went on with {until}"
                if reopened is None:
                    return False
                assert moments is None, "a storage in mode commit was closed as if nothing were missing"
                follow_from = reopened
        elif place in told.answers:
            answer = Told(answers={0: told.answers[place]})
            made += kept(base, expect(oracle, [operation], answer), 0)
            if moments is not None and keeps:
                moments[:] = [oracle.moment()]
        else:  # in which it died; it may have happened
            made += kept(base, expect(oracle, [operation]), -1)
            oracle.last_may_be_missing = operation.verb in (
                "apply_gradients",
                "apply_together",
                "lookup",
                "import_rows",
                "erase",
                "commit",
                "expire",
                "compact",
                "drop_group",
            )
            if moments is not None and keeps:
                moments.append(oracle.moment())
    if oracle.sequence > unchanged:
        oracle.may_be_dropped = None
    return True


def read_on(session: Session, oracle: Oracle) -> None:
    """Rows can be read, whatever failed."""
    for group in oracle.tables:
        table = oracle.table_now(group)
        keys = np.array(list(table.rows), np.uint64)
        if len(keys) == 0:
            continue
        found = ask(session, trainee.weights_of, group, keys)
        assert found.tobytes() == table.lookup(keys, insert=False).tobytes(), f"group {group} reads otherwise"
