# SPDX-License-Identifier: Apache-2.0
"""damo.PyStorage: sharing, dumps, checkpoints that are replaced, loading, ttl, forks, the end of the process."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo
import damo_embedding as de
from damo import checkpoints
from damo_scripts import apply, embedding, initializer, look_up, optimizer, parameters, read_dump

DAY = 86_400


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAMO_MEMORY", "16MiB")


@pytest.fixture
def storage(path: Path) -> damo.PyStorage:
    return damo.PyStorage(str(path), 0)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


# -------------------------------------------------------------------- opening


def test_an_open_directory_that_is_opened_again_is_shared(path: Path, storage: damo.PyStorage) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    again = damo.PyStorage(str(link), 0)
    apply(embedding(storage), [1])
    assert (look_up(embedding(again), [1]) == -1).all()


def test_storages_are_made_anew_as_often_as_one_likes(path: Path) -> None:
    for step in range(1, 6):
        storage = damo.PyStorage(str(path), 0)
        rows = embedding(storage)
        apply(rows, [1])
        assert (look_up(rows, [1]) == -step).all()
    others = [damo.PyStorage(str(path.with_name(f"other{i}")), 0) for i in range(3)]
    for storage in others:
        assert not look_up(embedding(storage), [1]).any()


def test_the_last_reference_closes_the_directory_and_an_embedding_is_one(path: Path) -> None:
    rows = embedding(damo.PyStorage(str(path), 0))
    apply(rows, [1])
    with pytest.raises(de.AlreadyOpenError):
        de.Storage(path, memory="16MiB")
    del rows
    gc.collect()
    with de.Storage(path, memory="16MiB") as plain:
        assert plain.stats()["rows"] == 1


def test_a_directory_whose_last_user_is_just_going_opens_in_another_thread(path: Path) -> None:
    storage = damo.PyStorage(str(path), 0)
    apply(embedding(storage), [1])
    seen: list[object] = []

    def open_again() -> None:
        try:
            seen.append(look_up(embedding(damo.PyStorage(str(path), 0)), [1])[0, 0])
        except BaseException as error:
            seen.append(error)

    def switch_threads(_: object) -> None:  # the user is gone by now, and the directory not yet closed
        thread = threading.Thread(target=open_again)
        thread.start()
        thread.join()

    watch = weakref.ref(storage._shared, switch_threads)
    del storage
    assert watch() is None
    assert seen == [-1.0]


@pytest.mark.parametrize("collected", [False, True])
def test_a_directory_that_another_thread_is_closing_is_waited_for(path: Path, collected: bool) -> None:
    errors: list[BaseException] = []

    def make_anew(key: int) -> None:
        try:
            for step in range(1, 11):
                rows = embedding(damo.PyStorage(str(path), 0))
                apply(rows, [key])
                assert (look_up(rows, [key]) == -step).all()
                if collected:
                    rows.itself = rows  # type: ignore[attr-defined]
                del rows
                if collected:
                    gc.collect()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make_anew, args=(key,)) for key in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_directory_that_was_removed_and_made_again_is_a_new_one(path: Path, storage: damo.PyStorage) -> None:
    apply(embedding(storage), [1])
    shutil.rmtree(path)
    again = damo.PyStorage(str(path), 0)
    assert not look_up(embedding(again), [1]).any()


EXIT = """
import ctypes, sys, numpy as np, damo
def parameters(**values):
    made = damo.Parameters()
    for name, value in values.items(): made.insert(name, value)
    return made
storage = damo.PyStorage(sys.argv[1], 0)
optimizer = damo.PyOptimizer(parameters(name="sgd", gamma=1.0))
rows = damo.PyEmbedding(storage, optimizer, damo.PyInitializer(parameters(name="zeros")), 4)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(rows))  # a reference that is never given back
rows.apply_gradients(np.array([1]), np.ones(4, np.float32))
if sys.argv[2] == "kill":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "raise":
    raise SystemExit("an error of the script's")
"""


@pytest.mark.parametrize("end", ["end", "raise", "kill"])
def test_a_process_that_ends_without_a_close_loses_nothing(path: Path, end: str) -> None:
    done = run(EXIT, path, end)
    assert done.returncode == {"end": 0, "raise": 1, "kill": -signal.SIGKILL}[end]
    assert done.stderr == ("an error of the script's\n" if end == "raise" else "")
    with de.Storage(path, memory="16MiB") as plain:
        # closed in order: nothing is left to be done again
        assert (plain.stats()["redone_records"] == 0) == (end != "kill")
    assert (look_up(embedding(damo.PyStorage(str(path), 0)), [1]) == -1).all()


def in_a_child(work: Any) -> str:
    """What `work` returns in a forked child, or the type of what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_in_a_forked_child_the_parent_s_handles_raise_and_its_own_work(path: Path, storage: damo.PyStorage) -> None:
    rows = embedding(storage)
    apply(rows, [1])

    def own() -> float:
        mine = embedding(damo.PyStorage(str(path.with_name("child")), 0))
        apply(mine, [5])
        return float(look_up(mine, [5])[0, 0])

    assert in_a_child(lambda: look_up(rows, [1])) == "ForkedHandleError"
    assert in_a_child(lambda: storage.checkpoint(str(path.with_name("c")))) == "ForkedHandleError"
    assert in_a_child(lambda: damo.PyStorage(str(path), 0)) == "AlreadyOpenError"
    assert in_a_child(own) == "-1.0"
    assert (look_up(rows, [1]) == -1).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3, 0), TypeError),
        ((b"dir", 0), TypeError),
        (("", 0), ValueError),
        (("dir", 1.5), TypeError),
        (("dir", True), TypeError),
        (("dir", "1d"), TypeError),
        (("dir", 2**40 + 1), ValueError),
        (("dir",), TypeError),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: Any, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        damo.PyStorage(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_the_published_package_is_refused_and_left_as_it_is(path: Path) -> None:
    path.mkdir()
    (path / "CURRENT").write_text("MANIFEST-000004\n")
    with pytest.raises(de.StorageError, match=r"made by another program with RocksDB.*docs/damo\.md"):
        damo.PyStorage(str(path), 0)
    assert [entry.name for entry in path.iterdir()] == ["CURRENT"]


# ------------------------------------------------------------------------ ttl


@pytest.mark.parametrize("ttl", [0, -1])
def test_a_ttl_of_0_or_less_means_never(path: Path, ttl: int) -> None:
    storage = damo.PyStorage(str(path), ttl)
    rows = embedding(storage)
    apply(rows, [1])
    del storage, rows
    with de.Storage(path, memory="16MiB") as plain:
        plain.now = int(time.time()) + 300 * DAY
        assert plain.stats()["rows"] == 1
        assert plain.stats()["groups"][0]["ttl"] == "never"


def test_a_row_that_is_older_than_the_ttl_is_gone_everywhere(path: Path, tmp_path: Path) -> None:
    storage = damo.PyStorage(str(path), 10)
    rows = embedding(storage)
    clock = rows._group.rows.storage
    clock.now = int(time.time())
    apply(rows, [1, 2])
    clock.now += 8
    apply(rows, [2])
    clock.now += 8
    storage.dump(str(tmp_path / "dump"))
    assert set(read_dump(tmp_path / "dump")[2]) == {(0, 2)}
    assert look_up(rows, [1, 2])[:, 0].tolist() == [0, -2]


def test_another_ttl_counts_from_the_next_opening_on_also_while_it_is_open(path: Path) -> None:
    storage = damo.PyStorage(str(path), 0)
    rows = embedding(storage)
    apply(rows, [1])
    again = damo.PyStorage(str(path), 30 * DAY)
    assert (look_up(rows, [1]) == -1).all()
    del storage, rows, again
    with de.Storage(path, memory="16MiB") as plain:
        assert plain.stats()["groups"][0]["ttl"] == 30 * DAY


def test_a_clock_that_is_a_year_ahead_is_told_and_empties_nothing(path: Path) -> None:
    with de.Storage(path, memory="16MiB", ttl="10d") as plain:
        plain.now = int(time.time()) - 400 * DAY
        de.Embedding(plain, de.SGD(lr=1.0), de.Zeros(), 4, 0).apply_gradients([1], np.ones((1, 4), np.float32))
    with pytest.warns(RuntimeWarning, match=r"400 days ahead of the last operation.*expire\(\)") as caught:
        storage = damo.PyStorage(str(path), 10 * DAY)
    assert caught[0].filename == __file__
    rows = embedding(storage)
    assert (look_up(rows, [1]) == -1).all()
    del storage, rows
    with de.Storage(path, memory="16MiB") as plain:
        assert plain.expire() >= 1  # the way out


# ----------------------------------------------------------------------- dump


def test_a_dump_has_every_key_that_was_ever_looked_up_byte_by_byte(
    storage: damo.PyStorage, tmp_path: Path, random: np.random.Generator
) -> None:
    keys = np.unique(np.r_[random.integers(0, 2**64, 500, np.uint64), np.uint64([0, 1, 2**63, 2**64 - 1])])
    first = embedding(storage, 3, 0, initializer=initializer("random_normal"))
    last = embedding(storage, 5, 255, initializer=initializer("xavier"))
    expected = {}
    for rows, dimension, group in ((first, 3, 0), (last, 5, 255)):
        for part in np.array_split(keys, 3):
            look_up(rows, part, dimension)
        apply(rows, keys[:100].astype(np.int64), 0.5, dimension)
        for key, weights in zip(keys.tolist(), look_up(rows, keys, dimension), strict=True):
            expected[group, key] = tuple(weights.tolist())
    assert storage.dump(str(tmp_path / "dump")) is None
    dimensions, counts, rows_found = read_dump(tmp_path / "dump")
    assert rows_found == expected
    assert {g: (dimensions[g], counts[g]) for g in range(256) if dimensions[g]} == {
        0: (3, len(keys)),
        255: (5, len(keys)),
    }
    assert (tmp_path / "dump").stat().st_size == 3072 + len(keys) * (12 + 12 + 12 + 20)


def test_a_dump_leaves_out_what_its_condition_says(path: Path, storage: damo.PyStorage, tmp_path: Path) -> None:
    clock = embedding(storage, 2)._group.rows.storage
    clock.now = now = int(time.time())
    for group in (0, 7):
        rows = embedding(storage, 2, group)
        look_up(rows, [10], 2)
        for keys in ([1, 2, 3], [2, 3], [3]):
            apply(rows, keys, 1.0, 2)
    clock.now = now + 5 * DAY
    apply(rows, [1], 1.0, 2)
    out = tmp_path / "dump"

    def dumped(**condition: int) -> set[tuple[int, int]]:
        assert storage.dump(str(out), parameters(**condition)) is None
        return set(read_dump(out)[2])

    everything = {(group, key) for group in (0, 7) for key in (1, 2, 3, 10)}
    assert dumped() == dumped(min_count=0) == dumped(expire_days=5) == everything
    assert dumped(group=7) == {(7, key) for key in (1, 2, 3, 10)}
    assert dumped(min_count=2) == {(0, 2), (0, 3), (7, 1), (7, 2), (7, 3)}
    assert dumped(expire_days=4) == {(7, 1)}
    assert dumped(group=0, min_count=3) == {(0, 3)}
    assert dumped(group=3) == set()  # a group that nobody made has no rows
    assert read_dump(out)[0] == [0] * 256


def test_a_condition_that_makes_no_sense_is_refused_and_the_file_stays(storage: damo.PyStorage, tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("old")
    for condition, error in (
        (parameters(group=256), ValueError),
        (parameters(group=-1), ValueError),
        (parameters(min_count=-1), ValueError),
        (parameters(min_count=2**32), ValueError),
        (parameters(expire_days=-1), ValueError),
        (parameters(expire_days=10**9 + 1), ValueError),
        (parameters(name="zeros"), ValueError),
        ({"group": 1}, TypeError),
        (1, TypeError),
    ):
        with pytest.raises(error, match=r"^\[dump\]"):
            storage.dump(str(tmp_path / "dump"), condition)  # type: ignore[arg-type]
    assert (tmp_path / "dump").read_text() == "old"


# ---------------------------------------------------------------- checkpoints


def content(storage: damo.PyStorage, tmp_path: Path) -> dict[tuple[int, int], tuple[float, ...]]:
    storage.dump(str(tmp_path / "content"))
    return read_dump(tmp_path / "content")[2]


def test_loading_replaces_the_content_and_embeddings_go_on_with_it(storage: damo.PyStorage, tmp_path: Path) -> None:
    before = embedding(storage, optimizer=optimizer("adam"), initializer=initializer("random_normal"))
    keys = [1, 2, 3]
    apply(before, keys)
    look_up(before, [4])  # only looked up: in the checkpoint all the same
    expected = content(storage, tmp_path)
    assert storage.checkpoint(str(tmp_path / "c")) is None
    apply(before, keys)
    look_up(before, [5])
    other = embedding(storage, group=9)  # a group that the checkpoint does not have
    apply(other, [1])
    after_two_updates = look_up(before, keys).copy()

    assert storage.load_from_checkpoint(str(tmp_path / "c")) is None
    assert content(storage, tmp_path) == expected
    apply(before, keys)  # with the state of the checkpoint: the same second update
    assert np.array_equal(look_up(before, keys), after_two_updates)
    assert not look_up(other, [1]).any()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "content", "table.damo"]

    storage.load_from_checkpoint(str(tmp_path / "c"))  # it is still there
    assert content(storage, tmp_path) == expected


def test_a_schedule_and_the_newest_settings_survive_a_load(storage: damo.PyStorage, tmp_path: Path) -> None:
    halving = damo.PyOptimizer(
        parameters(name="sgd", gamma=1.0), parameters(name="exponential_decay", decay_steps=1, decay_rate=0.5)
    )
    rows = embedding(storage, 1, optimizer=halving)
    apply(rows, [1], 1.0, 1)
    storage.checkpoint(str(tmp_path / "c"))
    for _ in range(3):
        apply(rows, [1], 1.0, 1)
    storage.load_from_checkpoint(str(tmp_path / "c"))
    apply(rows, [1], 1.0, 1)
    assert look_up(rows, [1], 1)[0, 0] == -1.5


def test_a_checkpoint_of_another_layout_is_refused_and_nothing_has_changed(
    storage: damo.PyStorage, tmp_path: Path
) -> None:
    other = damo.PyStorage(str(tmp_path / "other"), 0)
    apply(embedding(other, 8, 1), [1], 1.0, 8)
    other.checkpoint(str(tmp_path / "c"))
    zero, one = embedding(storage), embedding(storage, 4, 1)
    apply(zero, [1])
    apply(one, [1])
    expected = content(storage, tmp_path)
    with pytest.raises(de.SchemaMismatchError, match="dimension 8, opened with 4"):
        storage.load_from_checkpoint(str(tmp_path / "c"))
    assert content(storage, tmp_path) == expected
    assert (look_up(one, [1]) == -1).all()
    assert not list(tmp_path.glob("*before-load*"))
    del one
    gc.collect()
    storage.load_from_checkpoint(str(tmp_path / "c"))  # nobody holds group 1 to dimension 4 any more
    assert set(content(storage, tmp_path)) == {(1, 1)}


def test_a_ctrl_c_that_comes_when_the_content_is_replaced_brings_the_old_one_back(
    storage: damo.PyStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for a load that had not happened, and the only copy of the old content was removed."""
    rows = embedding(storage)
    apply(rows, [1])
    storage.checkpoint(str(tmp_path / "c"))
    apply(rows, [1])
    _core_restore, calls = de._core.restore, []

    def restore(*arguments: object) -> None:
        calls.append(arguments)
        _core_restore(*arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(de._core, "restore", restore)
    with pytest.raises(KeyboardInterrupt):
        storage.load_from_checkpoint(str(tmp_path / "c"))
    assert (look_up(rows, [1]) == -2).all()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "table.damo"]


def test_a_ctrl_c_in_the_close_before_a_load_leaves_it_open(
    storage: damo.PyStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embedding(storage)
    apply(rows, [1])
    storage.checkpoint(str(tmp_path / "c"))
    close, calls = de.Storage.close, []

    def close_once(self: de.Storage) -> None:
        close(self)
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(de.Storage, "close", close_once)
    with pytest.raises(KeyboardInterrupt):
        storage.load_from_checkpoint(str(tmp_path / "c"))
    assert (look_up(rows, [1]) == -1).all()


@pytest.mark.parametrize("damage", ["absent", "empty", "cut off", "missing file"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_has_changed(
    damage: str, storage: damo.PyStorage, tmp_path: Path
) -> None:
    rows = embedding(storage)
    apply(rows, [1])
    checkpoint = tmp_path / "c"
    storage.checkpoint(str(checkpoint))
    apply(rows, [1])
    if damage in ("absent", "empty"):
        shutil.rmtree(checkpoint)
        if damage == "empty":
            checkpoint.mkdir()
    else:
        (table,) = (checkpoint / "rocksdb").glob("*.sst")
        data = table.read_bytes()
        table.unlink()  # a link to the storage's own file
        if damage == "cut off":
            table.write_bytes(data[:-1])
    says = "is not a checkpoint: it has no file CHECKPOINT" if damage in ("absent", "empty") else r"\.sst"
    with pytest.raises(de.DamoError, match=says):
        storage.load_from_checkpoint(str(checkpoint))
    assert (look_up(rows, [1]) == -2).all()
    apply(rows, [1])
    assert (look_up(rows, [1]) == -3).all()
    assert not list(tmp_path.glob("*before-load*"))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_checkpoint_replaces_the_one_before(
    exchange: bool, storage: damo.PyStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(checkpoints.ctypes, "CDLL", lambda *_, **__: object())
    rows = embedding(storage)
    (tmp_path / "c").mkdir()  # an empty directory will do
    for step in range(1, 4):
        apply(rows, [1])
        storage.checkpoint(f"{tmp_path}/c/")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "table.damo"]
        loaded = damo.PyStorage(str(tmp_path / "loaded"), 0)
        loaded.load_from_checkpoint(str(tmp_path / "c"))
        assert (look_up(embedding(loaded), [1]) == -step).all()
        del loaded
        shutil.rmtree(tmp_path / "loaded")


def test_a_link_to_a_checkpoint_stays_a_link(storage: damo.PyStorage, tmp_path: Path) -> None:
    storage.checkpoint(str(tmp_path / "c"))
    (tmp_path / "link").symlink_to("c")
    storage.checkpoint(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "c" / "CHECKPOINT").exists()


@pytest.mark.parametrize("there", ["file", "directory", "storage", "its own directory"])
def test_what_is_no_checkpoint_is_never_replaced(there: str, storage: damo.PyStorage, tmp_path: Path) -> None:
    target = tmp_path / "c"
    if there == "file":
        target.write_text("thesis")
    elif there == "directory":
        target.mkdir()
        (target / "CHECKPOINT").write_text("DAMO, but not ours")
    elif there == "storage":
        de.Storage(target, memory="16MiB").close()
    else:
        target = tmp_path / "table.damo"
    before = sorted(str(entry) for entry in tmp_path.rglob("*"))
    with pytest.raises(de.StorageError, match="exists and is no checkpoint"):
        storage.checkpoint(str(target))
    assert sorted(str(entry) for entry in tmp_path.rglob("*")) == before


REPLACE = """
import os, sys, damo
from damo import checkpoints
name, module = sys.argv[3], {"rename": os, "_remove": checkpoints, "_exchange": checkpoints}[sys.argv[3]]
if name == "rename":
    checkpoints.ctypes.CDLL = lambda *_, **__: object()
real, left = getattr(module, name), int(sys.argv[4])
def dying(*arguments):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return real(*arguments)
setattr(module, name, dying)
storage = damo.PyStorage(sys.argv[1], 0)
storage.checkpoint(sys.argv[2])
"""


@pytest.mark.parametrize(("dies_in", "after"), [("_exchange", 0), ("_remove", 0), ("rename", 0), ("rename", 1)])
def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(path: Path, tmp_path: Path, dies_in: str, after: int) -> None:
    target = tmp_path / "c"
    storage = damo.PyStorage(str(path), 0)
    rows = embedding(storage)
    apply(rows, [1])
    storage.checkpoint(str(target))
    apply(rows, [1])
    del storage, rows
    assert run(REPLACE, path, target, dies_in, after).returncode == 9
    whole = sorted(entry.parent.name for entry in tmp_path.glob("c*/CHECKPOINT"))
    if (dies_in, after) == ("rename", 1):
        assert len(whole) == 2  # between two renames: both are there, and neither under its name
        assert "c" not in whole
    else:
        assert "c" in whole
        loaded = damo.PyStorage(str(tmp_path / "loaded"), 0)
        loaded.load_from_checkpoint(str(target))
        assert look_up(embedding(loaded), [1])[0, 0] == (-2 if dies_in == "_remove" else -1)


def test_other_threads_train_and_save_while_a_checkpoint_is_loaded(storage: damo.PyStorage, tmp_path: Path) -> None:
    rows = embedding(storage)
    look_up(rows, [1])
    storage.checkpoint(str(tmp_path / "c"))
    stop, errors = threading.Event(), []

    def work(verb: Any) -> None:
        try:
            while not stop.is_set():
                verb()
        except BaseException as error:
            errors.append(error)

    verbs = [
        lambda: apply(rows, [1]),
        lambda: look_up(rows, [1, 2]),
        lambda: storage.dump(str(tmp_path / "dump")),
        lambda: embedding(storage, group=3),
    ]
    threads = [threading.Thread(target=work, args=(verb,)) for verb in verbs]
    for thread in threads:
        thread.start()
    for _ in range(4):
        storage.load_from_checkpoint(str(tmp_path / "c"))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_paths_are_texts(storage: damo.PyStorage) -> None:
    for verb in ("dump", "checkpoint", "load_from_checkpoint"):
        for given in (3, b"x", None, ""):
            with pytest.raises((TypeError, ValueError), match=rf"^\[{verb}\] path is"):
                getattr(storage, verb)(given)
