# SPDX-License-Identifier: Apache-2.0
"""Power loss on a real journal: the writer is killed, its ext4 shut down without a log flush, and mounted again."""

from __future__ import annotations

import shutil
import time
from typing import Any, Self

import numpy as np

from reliability import trainee
from reliability.mounts import Ext4
from reliability.oracle import Oracle
from reliability.suite import (
    ServedSuite,
    ask,
    check_checkpoint_beside,
    check_kept,
    expect,
    hear_the_rest,
    kept,
    listen,
    make_base,
    scratch,
)
from reliability.workload import DURABILITIES, Workload, draw_options, draw_shape

ROUNDS = 3


class JournaledDisk(ServedSuite):
    name = "ext4-power-loss"
    title = "power loss on ext4: file-system shutdown without log flush after the writer is killed"
    promise = (
        "what was committed, checkpointed or dumped, or returned in mode durable, is there, and a prefix of what "
        "followed, nothing torn; in mode commit exactly the last commit"
    )
    unit = "power losses"
    small = 30
    full = 9_000  # a third of them in each mode

    def __enter__(self) -> Self:
        self._scratch = scratch()
        directory = self._scratch.__enter__()
        try:
            self.disk = Ext4(directory / "image", directory / "disk")
            self.disk.mount()
            try:
                self.disk.lose_power()  # who may mount may not be able to do that
            finally:
                self.disk.unmount()
            self.disk.mount()  # the journal is replayed
            self.disk.unmount()
            super().__enter__()
        except BaseException:
            self._scratch.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._scratch.__exit__(*exception)

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 41])
        shape = draw_shape(random, tight=0.15)
        durability = DURABILITIES[seed % 3]
        workload = Workload([seed, 42], shape)
        oracle = Oracle(shape.groups, shape.start)
        base = self.disk.directory / "base"
        self.disk.mount()
        try:
            make_base(base)
            self.disk.sync()
            low, high, groups, made = 0, 0, set[int](), []
            moments = [oracle.moment(())]
            for number in range(ROUNDS + 1):
                session = self.server.session()
                options = {**draw_options(random, shape), "durability": durability}
                try:
                    found = ask(session, trainee.recover, base, shape.name, options)
                    if durability == "commit":
                        oracle.compare_moments(found, moments)
                    else:
                        oracle.compare(found, low, high)
                        assert groups <= found.groups, f"groups {groups - found.groups} are lost"
                    if made and random.random() < 0.5:
                        what = made[int(random.integers(len(made)))]
                        if check_kept(self.server, what, shape, options, oracle):
                            self.done["checkpoints and dumps compared"] += 1
                    oracle = oracle.from_here(found.sequence)
                    before = oracle.moment(found.groups)
                    if number == ROUNDS:
                        break
                    operations = (workload.fill() if number == 0 else []) + workload.draw(int(random.integers(5, 50)))
                    # Checkpoints from another thread: a sync of the log takes its time here, and more comes meanwhile.
                    began = time.time()
                    beside = str(random.choice(["", "", "checkpoint"]))
                    session.start("call", trainee.train, operations, oracle.now, beside)
                    if random.random() < 0.3:
                        time.sleep(float(random.exponential(0.02)))
                        self.disk.sync()  # as the kernel does now and then
                    told = listen(session, int(random.integers(0, len(operations))))
                    hear_the_rest(told, session)
                finally:
                    session.kill()
                self.disk.lose_power()
                self.disk.unmount()
                self.disk.mount(int(random.choice([1, 5, 300])))
                assert not told.raised, f"{told.raised}"
                expected = expect(oracle, operations[: told.issued + 1], told)
                moments = expected.moments(oracle, operations, told.done, told.issued, before)
                low = expected.last_durable(operations, told.done, durability == "durable")
                high = expected.sequence(told.issued)
                groups = expected.groups(groups, told.done, told.issued)
                made = kept(base, expected, told.done)
                for path in sorted((base / "beside").glob("*")):
                    # Else it was not whole yet, or is being removed, or is of a round before and its rename was lost.
                    if path.name.isdecimal() and path.stat().st_mtime > began:
                        check_checkpoint_beside(self.server, path, shape, options, oracle, expected)
                        self.done["made beside a training, compared"] += 1
                if (base / "beside").exists():
                    (base / "beside").rename(base / f"beside-{number}")
                self.done["power losses"] += 1
                self.done[f"mode {durability}"] += 1
        finally:
            shutil.rmtree(base, ignore_errors=True)
            self.disk.unmount()
