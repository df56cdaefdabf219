# SPDX-License-Identifier: Apache-2.0
"""Storage.dump: its conditions, its progress, one moment while others train, and what is left when it does not end."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from strangers import COMPILER, rows_in_c, rows_in_python

DAY = 86_400
LATE = 2**40  # ahead of any wall clock
ROWS, DIMENSION = 2_500, 4096  # rows of 16 KB, so that a dump tells how far it is twice on its way
f32 = np.float32


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[de.Storage]:
    """One storage for all tests that only dump it: rows that were looked up, and a few in another group."""
    with de.Storage(tmp_path_factory.mktemp("big") / "table.damo", memory="16MiB", threads=2) as storage:
        rows = de.Embedding(storage, de.SGD(), de.Constant(0.5), dimension=DIMENSION, group=3)
        few = de.Embedding(storage, de.SGD(), de.Zeros(), dimension=2, group="few")
        for begin in range(0, ROWS, 100):
            rows.lookup(np.arange(begin, begin + 100))
        few.apply_gradients(np.arange(10), np.ones((10, 2), f32))
        yield storage


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file of before, alone in its directory."""
    (tmp_path / "dumps").mkdir()
    file = tmp_path / "dumps" / "weights.bin"
    file.write_text("of before")
    return file


def assert_untouched(place: Path) -> None:
    assert os.listdir(place.parent) == [place.name]
    assert place.read_text() == "of before"


# --------------------------------------------------------------- conditions


def test_conditions_together_leave_what_each_of_them_leaves(storage: de.Storage, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    dimensions: dict[int | str, int] = {0: 1, 3: 2, "user": 3, "empty": 4}
    embeddings = {
        group: de.Embedding(storage, de.SGD(lr=0.1), de.Normal(0, 1), dimension, group, seed=dimension)
        for group, dimension in dimensions.items()
    }
    updates: dict[int | str, dict[int, int]] = {group: {} for group in dimensions}  # by key: how many
    times: dict[int | str, dict[int, int]] = {group: {} for group in dimensions}  # of the last one, or of creation
    for day in range(20):
        storage.now = LATE + day * DAY
        for group in (0, 3, "user"):
            keys = random.integers(0, 60, 8)
            if day % 3 == 0:
                embeddings[group].lookup(keys)
            else:
                embeddings[group].apply_gradients(keys, np.ones((8, dimensions[group]), f32))
            for key in np.unique(keys).tolist():
                if day % 3 or key not in times[group]:
                    times[group][key] = storage.now
                updates[group][key] = updates[group].get(key, 0) + (day % 3 > 0)
    storage.now = LATE + 20 * DAY + 5
    file = tmp_path / "weights.bin"
    seen = set()
    for group in (None, 0, 3, "user", embeddings["user"].group, "empty"):
        for min_count in (0, 1, 2, 5, 2**32 - 1):
            for expire_days in (None, 0, 1, 5, 12, 20, 10**9):
                written = storage.dump(file, group=group, min_count=min_count, expire_days=expire_days)
                wanted = [name for name in dimensions if group in (None, name, embeddings[name].group)]
                dumped = de.read_dump(file)
                assert dumped.keys() == {embeddings[name].group for name in wanted}
                for name in wanted:
                    keys, weights = dumped[embeddings[name].group]
                    assert set(keys.tolist()) == {
                        key
                        for key, count in updates[name].items()
                        if count >= min_count
                        and (expire_days is None or storage.now - times[name][key] <= expire_days * DAY)
                    }
                    np.testing.assert_array_equal(weights, embeddings[name].lookup(keys, insert=False))
                assert written == sum(len(keys) for keys, _ in dumped.values())
                seen.add(written)
    assert len(seen) > 20  # the conditions did select


def test_strangers_read_what_read_dump_reads(storage: de.Storage, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for group, dimension in ((0, 1), (7, 16), ("user", 100)):
        embedding = de.Embedding(storage, de.Adam(lr=0.1), de.Uniform(-1, 1), dimension, group)
        keys = random.integers(-(2**63), 2**63, 500)
        embedding.apply_gradients(keys, random.standard_normal((500, dimension)).astype(f32))
        embedding.lookup(random.integers(0, 100, 50))
    written = storage.dump(tmp_path / "weights.bin")
    expected = {
        (group, int(key)): row.tobytes()
        for group, (keys, weights) in de.read_dump(tmp_path / "weights.bin").items()
        for key, row in zip(keys, weights, strict=True)
    }
    assert written == len(expected) > 1_500
    for reader in (rows_in_python, rows_in_c) if COMPILER is not None else (rows_in_python,):
        found = {(group, key): np.array(row, f32).tobytes() for group, key, row in reader(tmp_path / "weights.bin")}
        assert found == expected


@pytest.mark.parametrize("what", ["a pipe", "a device"])
def test_a_dump_takes_the_place_of_no_pipe_and_no_device(big: de.Storage, tmp_path: Path, what: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    place = pipe if what == "a pipe" else Path("/dev/null")
    with pytest.raises(de.StorageError, match=r"\[dump\] .* is a device, a pipe or a socket"):
        big.dump(place)
    assert place.is_fifo() if what == "a pipe" else place.is_char_device()
    assert os.listdir(tmp_path) == ["pipe"]


# ----------------------------------------------------------------- progress


def test_progress_goes_from_nothing_to_all_rows(big: de.Storage, place: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert big.dump(place, progress=lambda done, total: calls.append((done, total))) == ROWS + 10
    assert [total for _, total in calls] == [ROWS + 10] * len(calls)
    done = [done for done, _ in calls]
    assert (done[0], done[-1]) == (0, ROWS + 10)
    assert len(done) >= 4
    assert done == sorted(set(done))


def test_progress_counts_the_rows_that_conditions_leave_out(big: de.Storage, place: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert big.dump(place, group=3, min_count=1, progress=lambda *call: calls.append(call)) == 0
    assert calls[-1] == (ROWS, ROWS)
    assert len(calls) >= 4
    assert big.dump(place, group="few", progress=lambda *call: calls.append(call)) == 10
    assert calls[-2:] == [(0, 10), (10, 10)]


def test_progress_of_an_empty_storage_is_nothing_of_nothing(storage: de.Storage, place: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert storage.dump(place, progress=lambda *call: calls.append(call)) == 0
    assert set(calls) == {(0, 0)}


def test_progress_counts_the_living_and_comes_over_expired_rows_too(path: Path, place: Path) -> None:
    calls: list[tuple[int, int]] = []
    with de.Storage(path, memory="16MiB", threads=2, ttl=10) as storage:
        storage.now = LATE
        rows = de.Embedding(storage, de.SGD(), de.Zeros(), dimension=DIMENSION, group=1)
        for begin in range(0, ROWS, 100):
            rows.lookup(np.arange(begin, begin + 100))
        storage.now = LATE + 20
        rows.lookup(np.arange(ROWS, ROWS + 10))
        # The log still begins before they expired, so they are on the disk.
        assert storage.dump(place, progress=lambda *call: calls.append(call)) == 10
    assert (calls[0], calls[-1]) == ((0, 10), (10, 10))
    assert len(calls) >= 4
    assert calls == sorted(calls)


class EnoughError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [EnoughError("seen"), KeyboardInterrupt(), SystemExit(3)], ids=["its own", "Ctrl-C", "exit"]
)
@pytest.mark.parametrize("at", [0, 1, -1], ids=["at the start", "on its way", "at the end"])
def test_what_progress_raises_comes_out_and_leaves_the_file_of_before(
    big: de.Storage, place: Path, at: int, error: BaseException
) -> None:
    calls = 0
    big.dump(place, progress=lambda done, total: None)
    place.write_text("of before")

    def progress(done: int, total: int) -> None:
        nonlocal calls
        if done == total if at < 0 else calls == at:
            raise error
        calls += 1

    with pytest.raises(type(error)) as raised:
        big.dump(place, progress=progress)
    assert raised.value is error
    assert_untouched(place)


def test_progress_may_use_the_storage(storage: de.Storage, place: Path) -> None:
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=2, group=1)
    embedding.lookup(np.arange(5))

    def progress(done: int, total: int) -> None:
        embedding.apply_gradients(np.arange(100), np.ones((100, 2), f32))
        storage.commit(done)
        assert storage.stats()["rows"] == 100
        assert storage.dump(place.with_name("inner.bin")) == 100

    assert storage.dump(place, progress=progress) == 5
    keys, weights = de.read_dump(place)[1]
    assert sorted(keys.tolist()) == [0, 1, 2, 3, 4]
    assert not weights.any()  # the dump is of before


def test_progress_that_closes_the_storage_is_refused_and_does_not_hang(storage: de.Storage, place: Path) -> None:
    with pytest.raises(ValueError, match=r"\[close\] .* is being dumped by this thread"):
        storage.dump(place, progress=lambda done, total: storage.close())
    assert_untouched(place)
    assert not storage.closed

    def progress(done: int, total: int) -> None:
        storage.dump(place)  # one within the other
        with pytest.raises(ValueError, match=r"\[close\]"):
            storage.close()

    storage.dump(place, progress=progress)
    storage.close()
    assert storage.closed


class RecordingBar:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        bars.append(self)

    def reset(self, total: int) -> None:
        self.calls.append(("total", total))

    def update(self, n: int) -> None:
        self.calls.append(n)

    def close(self) -> None:
        self.calls.append("closed")


bars: list[RecordingBar] = []


def test_a_bar_is_moved_along_and_stays_open(big: de.Storage, place: Path) -> None:
    bar = RecordingBar()
    for _ in range(2):
        bar.calls.clear()
        big.dump(place, progress=bar)
        assert bar.calls[0] == ("total", ROWS + 10)
        assert sum(bar.calls[1:]) == ROWS + 10


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_made_of_a_class_is_closed_in_the_end(big: de.Storage, place: Path, fails: bool) -> None:
    bars.clear()
    if fails:
        with pytest.raises(de.StorageError):
            big.dump(place.parent, progress=RecordingBar)
    else:
        big.dump(place, group="few", progress=RecordingBar)
    (bar,) = bars
    assert bar.calls == ["closed"] if fails else [("total", 10), 0, 10, "closed"]


def test_tqdm_is_a_progress(big: de.Storage, place: Path) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    shown = io.StringIO()

    class Shown(tqdm):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(file=shown, mininterval=0)

    big.dump(place, progress=Shown)
    assert f"{ROWS + 10}/{ROWS + 10}" in shown.getvalue()
    assert "100%" in shown.getvalue()
    with tqdm(file=io.StringIO(), unit=" rows") as bar:
        big.dump(place, progress=bar)
        assert (bar.n, bar.total) == (ROWS + 10, ROWS + 10)


@pytest.mark.parametrize("progress", [3, True, "bar", [print], int])
def test_a_progress_that_is_none_is_refused_before_anything_is_written(
    big: de.Storage, place: Path, progress: Any
) -> None:
    with pytest.raises(TypeError, match=r"\[dump\] progress is .*, expected a function of \(done, total\), or a prog"):
        big.dump(place, progress=progress)
    assert_untouched(place)


CTRL_C = """
import glob, os, signal, sys, threading, time
import numpy as np
import damo_embedding as de

with de.Storage(sys.argv[1], memory="16MiB", threads=2) as storage:
    rows = de.Embedding(storage, de.SGD(), de.Zeros(), dimension=4096, group=1)
    for begin in range(0, 10_000, 500):
        rows.lookup(np.arange(begin, begin + 500))
    def interrupt():
        while not glob.glob(sys.argv[2] + ".building-*"):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        storage.dump(sys.argv[2])
    except KeyboardInterrupt:
        print("interrupted")
    assert storage.stats()["rows"] == 10_000
"""


def test_ctrl_c_ends_a_dump_that_nobody_watches(path: Path, place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, path, place], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout == "interrupted\n"
    assert_untouched(place)


# ----------------------------------------------------------------- one moment

POOL = 2_000  # of 4 and 3 KB each in two groups: more than memory holds, so that rows come and go during a dump
WIDTHS = (1024, 768)


def operation(number: int) -> tuple[int, str, np.ndarray]:
    """The group, the verb and the keys of an operation: the same in every run."""
    random = np.random.default_rng(number)
    verb = ("apply", "apply", "lookup", "erase")[int(random.integers(4))]
    return int(random.integers(2)), verb, np.unique(random.integers(0, POOL, 150 if verb != "erase" else 20))


def states_after(count: int) -> np.ndarray:
    """The updates of each key after 0, 1, ... `count` operations, -1 where there is no row: [count + 1, 2, POOL]."""
    states = np.full((count + 1, 2, POOL), -1, np.int16)
    for number in range(count):
        group, verb, keys = operation(number)
        states[number + 1] = states[number]
        row = states[number + 1, group]
        if verb == "erase":
            row[keys] = -1
        else:
            row[keys] = np.maximum(row[keys], 0) + (verb == "apply")
    return states


def dumped_state(file: Path) -> np.ndarray:
    state = np.full((2, POOL), -1, np.int16)
    for group, (keys, weights) in de.read_dump(file).items():
        assert (weights == weights[:, :1]).all(), "a row of two moments"
        state[group, keys] = -weights[:, 0]  # from 0, one less at each update
    return state


def moments_of(state: np.ndarray, states: np.ndarray) -> np.ndarray:
    """After which operations the storage was in this state."""
    return np.flatnonzero((states == state).all(axis=(1, 2)))


def test_a_dump_is_the_storage_after_one_operation_while_another_thread_trains(path: Path, tmp_path: Path) -> None:
    done = 0  # operations that have returned
    stop = threading.Event()
    errors: list[BaseException] = []
    with de.Storage(path, memory="16MiB", threads=2, log_bytes="8MiB") as storage:
        embeddings = [
            de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), width, group) for group, width in enumerate(WIDTHS)
        ]

        def train() -> None:
            nonlocal done
            try:
                while not stop.is_set():
                    group, verb, keys = operation(done)
                    if verb == "apply":
                        embeddings[group].apply_gradients(keys, np.ones((len(keys), WIDTHS[group]), f32))
                    elif verb == "lookup":
                        embeddings[group].lookup(keys)
                    else:
                        embeddings[group].erase(keys)
                    done += 1
            except BaseException as error:
                errors.append(error)

        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()

        def wait_for(count: int) -> None:
            for _ in range(60_000):
                if done >= count or errors:
                    break
                threading.Event().wait(0.001)
            assert not errors, errors
            assert done >= count, "the training hangs"

        moments = []
        try:
            wait_for(60)
            for number in range(4):
                begun, reports = done, []

                def progress(*_: int, reports: list[int] = reports) -> None:
                    reports.append(done)
                    wait_for(done + 5)  # the training goes on while the dump is being written

                storage.dump(tmp_path / f"{number}.bin", progress=progress)
                assert len(reports) >= 3
                moments.append((begun, reports[0] + 1))  # the first report comes when the cut is made
        finally:
            stop.set()
            trainer.join(timeout=60)
        assert storage.stats()["evictions"] > 0
    assert not errors, errors
    states = states_after(done)
    for number, (first, last) in enumerate(moments):
        state = dumped_state(tmp_path / f"{number}.bin")
        moments_found = moments_of(state, states)
        assert moments_found.size > 0, "no operation left the storage as it is in the dump"
        assert ((first <= moments_found) & (moments_found <= last)).any(), (moments_found, first, last)
        state[0, np.flatnonzero(state[0] > 0)[0]] += 1
        assert moments_of(state, states).size == 0  # one update too many would be seen


# ------------------------------------------------------------- when it does not end


@contextmanager
def a_limit_on_files(directory: Path) -> Iterator[Path]:
    """No file may grow beyond 1 MiB. (Python ignores the signal that comes with it.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield directory
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def a_small_disk(directory: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "damo-test", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("trouble", [a_limit_on_files, a_small_disk], ids=["a limit on files", "a full disk"])
def test_a_dump_that_does_not_fit_leaves_the_file_of_before_and_the_next_may_work(
    big: de.Storage, tmp_path: Path, trouble: Callable[[Path], Any]
) -> None:
    big.dump(tmp_path / "once.bin", group="few")  # what changed is on the disk: the next cut has nothing to write
    room = tmp_path / "room"
    room.mkdir()
    with trouble(room) as directory:
        place = directory / "weights.bin"
        place.write_text("of before")
        for _ in range(2):
            with pytest.raises(de.StorageError, match=r"weights\.bin\.building-.*: (No space left|File too large)"):
                big.dump(place)
            assert_untouched(place)
        assert big.dump(place, group="few") == 10
        assert len(de.read_dump(place)) == 1
        big.commit()


KILLED = """
import os, signal, sys
import numpy as np
import damo_embedding as de

storage = de.Storage(sys.argv[1], memory="16MiB", threads=2)
rows = de.Embedding(storage, de.SGD(), de.Ones(), dimension=4096, group=1)
for begin in range(0, 1_500, 500):
    rows.lookup(np.arange(begin, begin + 500))
storage.dump(sys.argv[2], progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done else None)
"""


def test_a_process_killed_in_its_dump_leaves_the_file_of_before(path: Path, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path, place], capture_output=True, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert place.read_text() == "of before"
    left = [name for name in os.listdir(place.parent) if name != place.name]
    assert len(left) == 1
    assert left[0].startswith("weights.bin.building-")
    with de.Storage(path, memory="16MiB", threads=2) as storage:
        assert storage.dump(place) == 1_500
    assert (de.read_dump(place)[1][1] == 1).all()
