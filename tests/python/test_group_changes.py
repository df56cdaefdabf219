# SPDX-License-Identifier: Apache-2.0
"""Groups that are made, dropped or given another life while calls fail, the power goes, or rows are forgotten."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
import group_session
from group_session import KEYS, make, step
from reliability import faults, trainee
from reliability.suite import DiedError, ask
from storage_server import ForkServer, fork_server

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "reliability.trainee") as server:
        yield server


# Of a dropped filter: a cut of the log comes first, which syncs the directory for the presence filter.
@pytest.mark.parametrize(("change", "nth"), [("drop_group", 1), ("drop_filter", 2)])
def test_a_change_whose_sync_failed_did_not_happen(server: ForkServer, path: Path, change: str, nth: int) -> None:
    """Its manifest stayed on the disk: the group was gone at the next open, or the log counted keys for no filter."""
    session = server.session()
    try:
        ask(session, trainee.watch, path)
        ask(session, group_session.change_with_a_failing_sync, path, change, nth)
    except (DiedError, EOFError, OSError):
        assert change == "drop_filter"  # as it was told to
    finally:
        session.kill()
    with de.Storage.open(path, memory="16MiB") as storage:
        commit = storage.last_commit
        assert commit is not None
        raised = commit[1].decode()
        embedding = make(storage, 3)
        assert (embedding.lookup(KEYS, insert=False) == -2.0).all()
        assert embedding.admission is not None
    assert "Input/output error" in raised


def test_a_dropped_group_takes_no_operation_before_it_along_when_the_power_goes(path: Path, tmp_path: Path) -> None:
    """The drop was on the disk, and the import of its rows into another group was not."""
    storage = de.Storage(path, memory="16MiB")
    source, target = make(storage, 3), make(storage, 4)
    step(source)
    storage.commit(1)
    rows = next(source.scan())
    target.import_rows(rows.keys, rows.weights)
    storage.drop_group(3)
    assert storage.stats()["synced_sequence"] == storage.stats()["sequence"]
    storage.close()


def after_each_failing_allocation(
    server: ForkServer, directory: Path, change: Callable[..., bool]
) -> Iterator[de.Storage]:
    """The storage as it opens after `change` with its first, second, ... allocation failing, until none does."""
    for nth in range(1, 400):
        path = directory / str(nth)
        session = server.session()
        try:
            ask(session, trainee.watch, path)
            hit = ask(session, change, path, nth)
        except DiedError:  # nanobind has no answer to it
            continue
        finally:
            session.kill()
        with de.Storage.open(path, memory="16MiB") as storage:
            yield storage
        shutil.rmtree(path)
        if not hit:
            break
    assert 10 < nth < 399


def test_a_new_group_that_is_tried_again_after_a_memory_error_opens(server: ForkServer, tmp_path: Path) -> None:
    """A second try wrote the group into the manifest twice, which no opening accepts."""
    change = group_session.open_a_group_again_after_a_memory_error
    for storage in after_each_failing_allocation(server, tmp_path, change):
        assert [group["group"] for group in storage.stats()["groups"]] == [3], storage.path


def test_a_drop_for_which_memory_ends_drops_nothing(server: ForkServer, tmp_path: Path) -> None:
    """It raised after the group was gone on the disk, with its rows still in memory."""
    for storage in after_each_failing_allocation(server, tmp_path, group_session.drop_while_memory_ends):
        assert 5 in storage.groups(), storage.path


def test_the_log_is_cut_where_there_is_no_space_for_the_presence_filter(server: ForkServer, path: Path) -> None:
    """It raised instead, and what it had written of that file held the space."""
    session = server.session()
    try:
        ask(session, trainee.watch, path)
        before, after, left = ask(session, group_session.cut_without_space_for_the_presence_filter, path)
    finally:
        session.kill()
    assert after < before / 2
    assert left == []


# -------------------------------------------------- beside what keeps the disk


LIMITED = {"memory": "16MiB", "disk": "64MiB"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with more rows of group 3 than the limit lets stay."""
    path = tmp_path_factory.mktemp("filled") / "table.damo"
    with de.Storage(path, memory="16MiB") as storage:
        group, many = make(storage, 3), 50_000
        for first in range(0, 1_000_000, many):
            group.apply_gradients(np.arange(first, first + many), np.ones((many, 4), np.float32))
    return path


def wait_for_forgotten_rows(storage: de.Storage) -> None:
    deadline = time.monotonic() + 100
    while storage.stats()["forgotten"] == 0:
        assert time.monotonic() < deadline, "none are forgotten"


def test_a_group_may_be_dropped_while_its_rows_are_forgotten(filled: Path, path: Path) -> None:
    """The thread that forgets them met a group that was gone, and the storage took no change any more."""
    shutil.copytree(filled, path)
    with de.Storage(path, **LIMITED) as storage:
        other = make(storage, 4)
        wait_for_forgotten_rows(storage)
        storage.drop_group(3)
        for _ in range(30):
            step(other)
            time.sleep(0.05)
        storage.commit(1)
    with de.Storage.open(path, **LIMITED) as storage:
        assert [group["group"] for group in storage.stats()["groups"]] == [4]


def test_a_group_may_get_another_life_while_its_rows_are_forgotten(filled: Path, path: Path) -> None:
    """Rows that went while they were counted by their new ages stayed in the count."""
    for _ in range(3):
        shutil.copytree(filled, path)
        with de.Storage(path, **LIMITED) as storage:
            wait_for_forgotten_rows(storage)
            make(storage, 3, ttl=de.Steps(10**9))
            assert storage.verify().damages == ()
        shutil.rmtree(path)
