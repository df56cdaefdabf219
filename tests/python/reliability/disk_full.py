# SPDX-License-Identifier: Apache-2.0
"""A disk that becomes full at any step of 4 KB, and then has space again."""

from __future__ import annotations

import shutil
from typing import Any, Self

import numpy as np

from reliability import trainee
from reliability.call_fails import follow, read_on
from reliability.mounts import Tmpfs
from reliability.oracle import Found, Moment, Oracle
from reliability.suite import DiedError, Kept, ServedSuite, ask, check_kept, expect, listen, make_base, scratch
from reliability.workload import SMALL, START, Workload, draw_options


class DiskFull(ServedSuite):
    name = "disk-full"
    title = "disk full at every 4 KB step of a small tmpfs, then space again"
    promise = "StorageError with nothing half applied; reads go on; with space the same handle does, or says to reopen"
    unit = "full disks"
    small = 30
    full = 1_000

    def __enter__(self) -> Self:
        self._scratch = scratch()
        directory = self._scratch.__enter__()
        try:
            self.disk = Tmpfs(directory / "disk", megabytes=24)
            super().__enter__()
        except BaseException:
            self._scratch.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.disk.unmount()
        self._scratch.__exit__(*exception)

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 51])
        workload = Workload([seed, 52], SMALL)
        oracle = Oracle(SMALL.groups, START)
        options = {**draw_options(random, SMALL), "log_bytes": "1MiB"}
        base = make_base(self.disk.directory / "base")
        # Small steps matter most: there a call is cut in two.
        pages = seed % 64 if seed % 2 else int(random.integers(0, 600))
        made: list[Kept] = []
        session = self.server.session()
        try:
            ask(session, trainee.open_storage, base, SMALL.name, options)
            before = workload.draw(int(random.integers(0, 30)))
            session.start("call", trainee.train, before, oracle.now)
            told = listen(session)
            assert told.ended, f"{told}"
            assert not told.raised, f"{told}"
            moments = [oracle.moment()] if options["durability"] == "commit" else None
            follow(told, before, oracle, base, made, moments)
            made.clear()
            self.disk.leave(pages)
            operations = workload.draw(80, without=("reopen",))
            session.start("call", trainee.train, operations, oracle.now, after_errors=True)
            told = listen(session)
            follow(told, operations, oracle, base, made, moments)
            read_on(session, oracle)
            if told.raised:
                self.done["noticed"] += 1
            whole = oracle  # which knows all that checkpoints and dumps may be of
            if random.random() < 0.3:
                self._reopen_when_full(session, random, base, options, oracle, moments)
                session = self.server.session()
                self.disk.make_space()
                found = ask(session, trainee.recover, base, SMALL.name, options)
                oracle = self._compare(found, oracle, moments)
            else:
                self.disk.make_space()
                again = workload.draw(10, without=("reopen",))
                session.start("call", trainee.train, again, oracle.now, after_errors=True)
                told = listen(session)
                follow(told, again, oracle, base, made, moments)
                self.done["went on at once" if not told.raised else "needed a reopening"] += 1
                if random.random() < 0.5:
                    self._close(session, oracle, moments)
            session.kill()
            session = self.server.session()
            found = ask(session, trainee.recover, base, SMALL.name, options)
            oracle = self._compare(found, oracle, moments)
            if made:
                check_kept(self.server, made[int(random.integers(len(made)))], SMALL, options, whole)
            last = workload.draw(10)
            session.start("call", trainee.train, last, oracle.now)
            told = listen(session)
            assert told.ended, f"{told}"
            assert not told.raised, f"there is space, but {told.raised}"
            expect(oracle, last, told)
            ask(session, trainee.close)
            self.done["full disks"] += 1
        except DiedError as died:
            raise AssertionError(f"the process died in {died}") from died
        except AssertionError as wrong:
            wrong.add_note(f"{pages} pages of 4 KiB were free")
            raise
        finally:
            session.kill()
            (self.disk.directory / "filler").unlink(missing_ok=True)
            shutil.rmtree(base, ignore_errors=True)

    def _compare(self, found: Found, oracle: Oracle, moments: list[Moment] | None) -> Oracle:
        """Everything is there, or in mode commit what was kept; the oracle that goes on from there."""
        if moments is None:
            oracle.compare(found, oracle.sequence, oracle.sequence)
            return oracle
        moment = oracle.compare_moments(found, moments)
        moments[:] = [moment]
        self.done["back at a commit"] += 1
        return oracle.from_moment(moment)

    def _close(self, session: Any, oracle: Oracle, moments: list[Moment] | None) -> None:
        refused = ask(session, trainee.try_to_close)
        if moments is None:
            assert refused is None, f"closing raised {refused}, and the log has everything"
        assert refused is None or refused[0] == "StorageError", f"closing raised {refused}"
        if moments is not None:
            moments[:] = [*(moments if refused else []), oracle.moment()]

    def _reopen_when_full(
        self,
        session: Any,
        random: np.random.Generator,
        base: Any,
        options: dict[str, Any],
        oracle: Oracle,
        moments: list[Moment] | None,
    ) -> None:
        """Closing and opening on a full disk may fail, typed, and must change nothing."""
        if random.random() < 0.5:
            self._close(session, oracle, moments)
        session.kill()
        other = self.server.session()
        refused = ask(other, trainee.try_to_open, base, SMALL.name, options)
        other.kill()
        assert refused is None or refused[0] == "StorageError", f"opening raised {refused}"
        self.done["opened on a full disk" if refused is None else "not opened on a full disk"] += 1
