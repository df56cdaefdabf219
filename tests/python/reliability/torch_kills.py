# SPDX-License-Identifier: Apache-2.0
"""Trainings with torch that are killed again and again, and must end with the bits of one that was left alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from reliability import faults, trainee
from reliability.suite import ServedSuite, SkippedError, scratch
from reliability.workload import DURABILITIES
from storage_server import PATIENCE, ForkServer, Session, fork_server

KILLS = 6


class TorchKills(ServedSuite):
    name = "torch-kill"
    title = "a training with torch is killed, resumed, killed, resumed, and ends"
    promise = "rows, state, filters, dense weights, optimizers, random states and reader end as if nothing had been"
    unit = "trainings"
    small = 10
    full = 300

    def __enter__(self) -> TorchKills:
        for package in ("torch", "safetensors"):
            if importlib.util.find_spec(package) is None:
                raise SkippedError(f"{package} is not installed")
        self._server = fork_server(faults.environment(), "reliability.torch_trainee")
        self.server: ForkServer = self._server.__enter__()
        return self

    def case(self, seed: int) -> None:
        from reliability.torch_trainee import train

        random = np.random.default_rng([seed, 7])
        plan = draw_plan(random, seed)
        with scratch() as directory:
            session = self.server.session()
            alone, _ = follow(start(session, train, directory / "alone", plan, draw_options(random)), None)
            assert alone is not None
            session.leave()
            place = directory / "killed"
            place.mkdir()
            reached, ended = 0, None
            for _ in range(KILLS):
                session = self.server.session()
                until: int | None = int(random.integers(reached, min(plan.steps, reached + plan.steps // 3) + 1))
                if random.random() < 0.5:
                    arm(session, place, directory / "epitaph", random)
                    until = None  # a life that never comes by the point goes to the end
                options = draw_options(random)
                self.done[f"lives in mode {options['durability']}"] += 1
                start(session, train, place, plan, options)
                try:
                    ended, reached = follow(session, until)
                finally:
                    session.kill()
                self.note_death(directory / "epitaph", ended is not None)
                if ended is not None:
                    break
            if ended is None:
                session = self.server.session()
                ended, _ = follow(start(session, train, place, plan, draw_options(random)), None)
                session.leave()
            assert ended is not None
            different = [name for name in alone if ended.get(name) != alone[name]]
            assert not different, f"{plan}: other bits than left alone in {different}"
            left = sorted(os.listdir(place / "checkpoints"))
            whole = [name for name in left if name.isdigit()]
            assert len(whole) <= plan.keep, f"keep={plan.keep}, and there are {left}"
            # What was killed while it built or removed one is tidied up by the next; after the last there is none.
            assert len(left) - len(whole) <= 1, f"keep={plan.keep}, and there are {left}"
            self.done["trainings"] += 1

    def note_death(self, epitaph: Path, ended: bool) -> None:
        if epitaph.exists():
            self.done[f"at {epitaph.read_text()}"] += 1
            epitaph.unlink()
        elif not ended:
            self.done["at a random moment"] += 1
        else:
            return
        self.done["kills"] += 1


def draw_plan(random: np.random.Generator, seed: int) -> Any:
    from reliability.torch_trainee import DENSE_OPTIMIZERS, ROW_OPTIMIZERS, Plan

    return Plan(
        seed=seed,
        steps=int(random.integers(20, 60)),
        every=int(random.integers(2, 12)),
        keep=int(random.integers(1, 4)),
        batch=int(random.choice([16, 64])),
        dimension=int(random.choice([4, 8, 512])),  # with the last, rows go to the disk and come back
        row_optimizer=str(random.choice(list(ROW_OPTIMIZERS))),
        dense_optimizer=str(random.choice(list(DENSE_OPTIMIZERS))),
        deferred=bool(random.random() < 0.6),
        admission=int(random.choice([0, 2])),
        ttl=[None, "10h", 12][int(random.integers(3))],
    )


def draw_options(random: np.random.Generator) -> dict[str, Any]:
    """Of the storage; drawn anew for each life, for nothing may depend on them."""
    return {
        "memory": str(random.choice(["16MiB", "24MiB"])),
        "threads": int(random.integers(1, 4)),
        "log_bytes": str(random.choice(["1MiB", "64MiB"])),
        "durability": str(random.choice(DURABILITIES)),
    }


def arm(session: Session, place: Path, epitaph: Path, random: np.random.Generator) -> None:
    """Has the session die at the Nth visit of a point."""
    call, file_class = faults.POINTS[int(random.integers(len(faults.POINTS)))]
    actions = [faults.KILL_BEFORE, faults.KILL_AFTER] + [faults.TEAR] * (call == "write")
    nth = 1 + int(random.geometric(0.05 if file_class in ("log", "") else 0.4))
    session("call", trainee.watch, place, None, epitaph)
    session("call", trainee.arm, int(random.choice(actions)), call, file_class, nth - int(random.random() < 0.3))


def start(session: Session, train: Any, place: Path, plan: Any, options: dict[str, Any]) -> Session:
    session.start("call", train, place, plan, options)
    return session


def follow(session: Session, until: int | None) -> tuple[dict[str, str] | None, int]:
    """Hears a life until it has done this step, has ended, or is dead: what it ended with, and its last step."""
    step = 0
    try:
        while until is None or step < until:
            if not session.connection.poll(PATIENCE):
                raise session.overdue(f"the step after step {step}")
            match session.connection.recv():
                case ("resumed", first, _):
                    step = max(step, first)
                case ("step", done):
                    step = done
                case ("returned", ended):
                    return ended, step
                case ("raised", what):
                    raise AssertionError(f"a life failed after step {step}: {what}")
    except (EOFError, OSError):
        pass  # it is dead
    return None, step
