# SPDX-License-Identifier: Apache-2.0
"""Ways in which embedding tables, and stores like ours, lose or mix rows; a test for each, by its name.

The suites in reliability/ look for such things at random. Here each stands alone, so that none comes back unseen.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import files_of, rows_of
from reliability import faults, trainee
from reliability.mounts import Tmpfs
from reliability.suite import SkippedError, ask
from storage_server import ForkServer, Group, Session, fork_server

pytestmark = pytest.mark.core

f32 = np.float32
NOW = 2**40
KEYS = np.arange(1, 200)
MORTAL = Group(7, de.SGD(lr=1.0), de.Uniform(-1.0, 1.0), dimension=4, ttl=100)
LASTING = Group(8, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=8)
OPTIONS: dict[str, Any] = {"memory": "16MiB", "threads": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server(faults.environment(), "reliability.trainee") as server:
        yield server


def started(server: ForkServer, path: Path, now: int = NOW) -> Session:
    """A process that has the storage open, with both groups."""
    session = server.session()
    session("open", path, [MORTAL, LASTING], now, **OPTIONS)
    return session


def killed(server: ForkServer, session: Session, path: Path, now: int = NOW) -> Session:
    session.kill()
    return started(server, path, now)


def opened(path: Path, group: Group = LASTING, now: int = NOW) -> tuple[de.Storage, de.Embedding]:
    storage = de.Storage(path, **OPTIONS)
    storage.now = now
    return storage, group.open(storage)


def ones(keys: np.ndarray, group: Group = LASTING) -> np.ndarray:
    return np.ones((len(keys), group.dimension), f32)


def first_weights(path: Path, group: Group, keys: np.ndarray) -> np.ndarray:
    """What training starts from, of another storage's table that is declared alike."""
    storage, table = opened(path, group)
    with storage:
        return table.lookup(keys, insert=False)


def test_an_expired_row_is_not_resurrected(server: ForkServer, path: Path, tmp_path: Path) -> None:
    session = started(server, path)
    session("embedding_call", 7, "apply_gradients", KEYS, ones(KEYS, MORTAL))
    session("storage_call", "checkpoint", tmp_path / "kept")  # the rows are in a table file
    session("set_now", NOW + 101)
    for _ in range(2):
        assert not session("embedding_call", 7, "contains", KEYS).any()
        assert not session("embedding_call", 7, "lookup", KEYS, insert=False, missing="zeros").any()
        assert session("numbers")[7] == (0, 1)
        session = killed(server, session, path, NOW + 101)
    session("embedding_call", 7, "apply_gradients", KEYS, ones(KEYS, MORTAL))
    first = first_weights(tmp_path / "other", MORTAL, KEYS)
    np.testing.assert_array_equal(session("embedding_call", 7, "lookup", KEYS), first - 1)  # and not - 2
    session.kill()


def test_a_row_that_expired_while_its_change_was_in_the_log_stays_expired(
    server: ForkServer, path: Path, tmp_path: Path
) -> None:
    session = started(server, path)
    session("embedding_call", 7, "apply_gradients", KEYS, ones(KEYS, MORTAL))
    session("set_now", NOW + 101)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))  # the clock goes on
    session = killed(server, session, path)  # and is not set back by who opens with an earlier time
    assert session("numbers")[7] == (0, 1)
    assert session("rows", 7) == {}
    session("embedding_call", 7, "apply_gradients", KEYS[:5], ones(KEYS[:5], MORTAL))
    first = first_weights(tmp_path / "other", MORTAL, KEYS[:5])
    for _ in range(2):
        assert len(session("rows", 7)) == 5
        np.testing.assert_array_equal(session("embedding_call", 7, "lookup", KEYS[:5]), first - 1)
        session = killed(server, session, path)
    session.kill()


def test_a_gradient_for_a_key_never_looked_up_changes_its_first_weights(path: Path) -> None:
    storage, table = opened(path, MORTAL)
    with storage:
        first = table.lookup(KEYS, insert=False)
        table.apply_gradients(KEYS, ones(KEYS, MORTAL))
        np.testing.assert_array_equal(table.lookup(KEYS, insert=False), first - 1)
        assert len(table) == len(KEYS)


def test_a_new_key_twice_in_one_lookup_is_one_row(path: Path) -> None:
    storage, table = opened(path)
    with storage:
        found = table.lookup([5, 6, 5, 5])
        assert len(table) == 2
        for place in (2, 3):
            np.testing.assert_array_equal(found[place], found[0])
        np.testing.assert_array_equal(table.lookup([5]), found[:1])


def test_a_larger_dimension_is_refused_and_the_rows_stay(path: Path) -> None:
    storage, table = opened(path)
    table.apply_gradients(KEYS, ones(KEYS))
    before = rows_of(table)
    storage.close()
    storage = de.Storage(path, **OPTIONS)
    with storage:
        with pytest.raises(de.SchemaMismatchError, match="dimension 8, opened with 9"):
            de.Embedding(storage, LASTING.optimizer, LASTING.initializer, dimension=9, group=8)
        assert rows_of(LASTING.open(storage)) == before


def test_strided_and_float64_output_is_refused_and_not_filled_wrongly(path: Path) -> None:
    storage, table = opened(path)
    with storage:
        whole = np.full((len(KEYS), 2 * table.dimension), 7, f32)
        wide = np.full((len(KEYS), table.dimension), 7, np.float64)
        with pytest.raises(ValueError, match="contiguous"):
            table.lookup(KEYS, out=whole[:, ::2])
        with pytest.raises(TypeError, match="float64"):
            table.lookup(KEYS, out=wide)  # type: ignore[arg-type]
        assert (whole == 7).all()
        assert (wide == 7).all()
        assert len(table) == 0


def test_a_checkpoint_that_is_interrupted_leaves_the_one_before(server: ForkServer, path: Path, tmp_path: Path) -> None:
    session = started(server, path)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    rows = session("rows", 8)
    kept = tmp_path / "checkpoints"  # by which the library of faults knows them
    kept.mkdir()
    session("storage_call", "checkpoint", kept / "1")
    before = files_of(kept)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    with pytest.raises(AssertionError, match="exists already"):  # what the session raised
        session("storage_call", "checkpoint", kept / "1")
    ask(session, trainee.watch, tmp_path)
    ask(session, trainee.arm, faults.KILL_BEFORE, "rename", "checkpoint", 1)
    with pytest.raises((EOFError, OSError)):  # it dies before it gives the checkpoint its name
        session("storage_call", "checkpoint", kept / "2")
    session.kill()
    assert list(kept.glob("2.*"))
    assert [Path(found.path).name for found in de.Storage.checkpoints(kept)] == ["1"]
    assert {name: hash for name, hash in files_of(kept).items() if name.startswith("1")} == before
    storage = de.Storage.restore(kept / "1", path, **OPTIONS)
    with storage:
        assert rows_of(LASTING.open(storage)) == rows
        storage.checkpoint(kept / "2")  # what was left of it is not in the way


def test_a_truncated_checkpoint_is_refused_and_not_read_past_its_end(path: Path, tmp_path: Path) -> None:
    storage, table = opened(path)
    with storage:
        table.apply_gradients(KEYS, ones(KEYS))
        storage.checkpoint(tmp_path / "kept")
    files = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in files:
        whole = file.read_bytes()
        file.unlink()  # it may be a hard link
        for length in {0, 1, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:length])
            with pytest.raises(de.CorruptionError):
                de.Storage.restore(tmp_path / "kept", tmp_path / "restored", **OPTIONS)
            assert not (tmp_path / "restored").exists()
        file.write_bytes(whole)
    de.Storage.restore(tmp_path / "kept", tmp_path / "restored", **OPTIONS).close()


def test_a_restore_replaces_and_does_not_merge(path: Path, tmp_path: Path) -> None:
    storage, table = opened(path)
    with storage:
        table.apply_gradients(KEYS[:50], ones(KEYS[:50]))
        rows = rows_of(table)
        storage.checkpoint(tmp_path / "kept")
        table.apply_gradients(KEYS[25:], ones(KEYS[25:]))
        table.erase(KEYS[:10])
    storage = de.Storage.restore(tmp_path / "kept", path, **OPTIONS)
    with storage:
        assert rows_of(LASTING.open(storage)) == rows


def test_a_checkpoint_and_a_dump_on_a_full_disk_say_so_and_leave_nothing(path: Path, tmp_path: Path) -> None:
    try:
        disk = Tmpfs(tmp_path / "small", 8)
    except SkippedError as missing:
        pytest.skip(str(missing))
    try:
        storage, table = opened(path)
        with storage:
            many = np.arange(4_000)
            table.apply_gradients(many, ones(many))
            rows = rows_of(table)
            for pages in (0, 1, 2, 8, 16):
                disk.leave(pages)
                with pytest.raises(de.StorageError, match=r"[Nn]o space|full"):
                    storage.checkpoint(disk.directory / "kept")
                with pytest.raises(de.StorageError, match=r"[Nn]o space|full"):
                    storage.dump(disk.directory / "dump.bin")
                assert [file.name for file in disk.directory.iterdir()] == ["filler"]
                disk.make_space()
            assert storage.dump(disk.directory / "dump.bin") == len(rows)
            storage.checkpoint(disk.directory / "kept")
        shutil.copytree(disk.directory / "kept", tmp_path / "kept")
        with de.Storage.restore(tmp_path / "kept", tmp_path / "restored", **OPTIONS) as restored:
            assert rows_of(LASTING.open(restored)) == rows
    finally:
        disk.unmount()


def test_a_read_error_is_not_taken_for_a_missing_row(server: ForkServer, path: Path, tmp_path: Path) -> None:
    session = started(server, path)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    rows = session("rows", 8)
    session("storage_call", "close")
    session.kill()
    session = server.session()
    ask(session, trainee.watch, path.parent)  # before the files are open
    session("open", path, [MORTAL, LASTING], NOW, **OPTIONS)
    ask(session, trainee.arm, faults.FAIL_FOR_GOOD, "read", "sst", 1)
    for verb in ("lookup", "contains"):
        with pytest.raises(AssertionError, match="StorageError"):  # what the session raised
            session("embedding_call", 8, verb, KEYS)
    with pytest.raises(AssertionError, match="StorageError"):
        session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    assert ask(session, trainee.disarm)[0] == "read sst"
    assert session("rows", 8) == rows
    session.kill()


def test_dense_state_is_that_of_the_step_of_the_rows(path: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dt = pytest.importorskip("damo_embedding.torch")
    (tmp_path / "kept").mkdir()
    with de.Storage(path, **OPTIONS) as storage:
        rows = dt.Embedding(storage, group=8, dimension=1, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
        model = torch.nn.ModuleDict({"rows": rows, "dense": torch.nn.Linear(1, 1, bias=False)})
        torch.nn.init.zeros_(model["dense"].weight)
        dense = torch.optim.SGD(model["dense"].parameters(), lr=1.0, momentum=0.5)
        optimizers = {"dense": dense, "rows": dt.SparseOptimizer(model)}
        weights = {}
        for step in range(1, 7):  # the row goes down by one at each
            (model["rows"](torch.tensor([1])).sum() + model["dense"](torch.ones(1)).sum()).backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            weights[step] = model["dense"].weight.item()
            if step % 2 == 0:
                dt.save_checkpoint(tmp_path / "kept" / str(step), model, optimizers, storage, step)
        for step in (4, 2, 6):
            resumed = dt.load_checkpoint(tmp_path / "kept" / str(step), model, optimizers, storage)
            assert resumed.step == step
            assert rows.embedding.lookup([1], insert=False).item() == -step
            assert model["dense"].weight.item() == weights[step]
            (momentum,) = (state["momentum_buffer"].item() for state in dense.state.values())
            assert momentum == 2 - 0.5 ** (step - 1)


def test_a_checkpoint_has_no_row_newer_than_its_step(path: Path, tmp_path: Path) -> None:
    storage, table = opened(path)
    with storage:
        table.apply_gradients(KEYS, ones(KEYS))
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                table.apply_gradients(KEYS, ones(KEYS))

        thread = threading.Thread(target=train)
        thread.start()
        try:
            for number in range(10):
                storage.checkpoint(tmp_path / f"kept-{number}")
        finally:
            stop.set()
            thread.join()
    steps = []
    for number in range(10):
        with de.Storage.restore(tmp_path / f"kept-{number}", tmp_path / f"restored-{number}", **OPTIONS) as restored:
            found = LASTING.open(restored)
            steps.append(found.step)
            assert {row.update_count for row in rows_of(found).values()} == {found.step}
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


def test_a_clock_that_is_set_back_changes_nothing(path: Path) -> None:
    storage, table = opened(path, MORTAL)
    with storage:
        table.apply_gradients(KEYS[:100], ones(KEYS[:100], MORTAL))
        storage.now = NOW + 60
        table.apply_gradients(KEYS[100:], ones(KEYS[100:], MORTAL))
        storage.now = NOW - 10**6
        assert storage.now == NOW + 60
        table.apply_gradients([10**6], np.ones((1, 4), f32))
        storage.now = NOW + 110
        table.apply_gradients([10**6], np.ones((1, 4), f32))
        assert len(table) == len(KEYS) - 100 + 1
    storage, table = opened(path, MORTAL, NOW - 10**6)
    with storage:
        assert storage.now == NOW + 110
        assert {row.last_update for row in rows_of(table).values()} == {NOW + 60, NOW + 110}


def test_len_is_right_after_redo(server: ForkServer, path: Path, tmp_path: Path) -> None:
    session = started(server, path)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    session("storage_call", "checkpoint", tmp_path / "kept")  # counted in a file, and again by the log if it is wrong
    for keys in (KEYS, np.arange(150, 300)):
        session("embedding_call", 8, "apply_gradients", keys, ones(keys))
    session("embedding_call", 8, "erase", np.arange(290, 400))
    session("embedding_call", 8, "lookup", np.arange(295, 298))
    expected = 289 + 3
    for _ in range(3):
        assert session("numbers")[8] == (expected, 3)
        assert len(session("rows", 8)) == expected
        session = killed(server, session, path)
    session.kill()


def test_erased_rows_are_not_back_after_a_kill(server: ForkServer, path: Path, tmp_path: Path) -> None:
    session = started(server, path)
    session("embedding_call", 8, "apply_gradients", KEYS, ones(KEYS))
    session("storage_call", "checkpoint", tmp_path / "first")  # the rows are in a table file
    assert session("embedding_call", 8, "erase", KEYS[:100]) == 100
    for cut in (False, True, False):
        if cut:
            session("storage_call", "checkpoint", tmp_path / "second")  # the log begins anew
        session = killed(server, session, path)
        assert not session("embedding_call", 8, "contains", KEYS[:100]).any()
        assert session("numbers")[8][0] == len(session("rows", 8)) == len(KEYS) - 100
    session.kill()
