# SPDX-License-Identifier: Apache-2.0
"""kill -9 while a process trains, again and again on one storage: what was acknowledged is there, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
from comparing import assert_same_rows, rows_of_reference
from reference import ReferenceTable
from storage_server import ForkServer, Group, fork_server

KILLS = 20
NOW = 2**40
# Rows of 12 and 8 KB: the 3,000 of them are three times the memory.
GROUPS = [
    Group(3, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=1024, seed=5),
    Group(4, de.Adagrad(lr=0.1), de.Normal(), dimension=1000, seed=6),
]
Step = tuple[int, int, np.ndarray, np.ndarray]


def step_of(number: int) -> Step:
    """The update with this number, the same in every process."""
    random = np.random.default_rng([17, number])
    group = GROUPS[number % 2]
    keys = random.integers(-750, 750, 40)
    return number, group.group, keys, random.standard_normal((40, group.dimension)).astype(np.float32)


OPTIONS = {"memory": "16MiB", "threads": 2, "log_bytes": "4MiB"}


def killed_while_training(server: ForkServer, path: Path, first: int, steps: int) -> tuple[int, int]:
    """Trains from step `first` and kills after `steps` acknowledged ones; returns the last acknowledged and issued."""
    session = server.session()
    session("open", path, GROUPS, NOW, **OPTIONS)
    session.start("train", [step_of(number) for number in range(first, first + steps + 20)])
    applied = issued = first - 1
    while applied < first + steps - 1:
        assert session.connection.poll(60), "the training hangs"
        what, number = session.connection.recv()
        applied, issued = (number, issued) if what == "applied" else (applied, number)
    for what, value in session.kill():  # what it did while the signal was on its way
        if what == "applied":
            applied = value
        elif what == "issued":
            issued = value
    return applied, issued


@pytest.mark.slow
def test_after_each_of_twenty_kills_every_row_equals_some_acknowledged_step(tmp_path: Path) -> None:
    path = tmp_path / "table.damo"
    random = np.random.default_rng(99)
    tables = {
        group.group: ReferenceTable(
            group.optimizer, group.initializer, group.dimension, seed=group.seed, stream=group.group
        )
        for group in GROUPS
    }
    for table in tables.values():
        table.now = NOW
    replayed = -1  # the last step that the oracle has
    evicted = redone = 0
    with fork_server() as server:
        for _ in range(KILLS):
            applied, issued = killed_while_training(server, path, replayed + 1, int(random.integers(1, 12)))
            session = server.session()
            session("open", path, GROUPS, NOW, **OPTIONS)
            survived = sum(step for _, step in session("numbers").values()) - 1
            assert applied <= survived <= issued
            for number in range(replayed + 1, survived + 1):
                _, group, keys, gradients = step_of(number)
                tables[group].apply_gradients(keys, gradients)
            replayed = survived
            stats = session("storage_call", "stats")
            evicted, redone = evicted + stats["evictions"], redone + stats["redone_records"]
            numbers = session("numbers")
            for group, table in tables.items():
                assert numbers[group] == (len(table), table.step)
                assert_same_rows(session("rows", group), rows_of_reference(table))
            session.kill()  # without a close: this opening is a victim too
    assert redone > KILLS  # the log was read
    assert evicted > 0  # and rows left memory while it was
