# SPDX-License-Identifier: Apache-2.0
"""What a program may do to a storage that is open: fork, be ended, run out of things, lose the directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
from reliability.mounts import Ext4, Tmpfs
from reliability.suite import SkippedError

BEGIN = """
import multiprocessing, os, resource, signal, sys, threading, time, warnings
import numpy as np, damo_embedding as de
warnings.simplefilter("ignore")  # of forks beside threads

def make(path, **options):
    storage = de.Storage(path, memory="16MiB", **options)
    return storage, de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)

def step(embedding, seed, rows=2_000):
    keys = np.random.default_rng(seed).integers(0, 10**6, rows)
    embedding.apply_gradients(keys, np.ones((rows, 16), np.float32))

path = sys.argv[1]
"""


def begin(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BEGIN + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(script: str, *arguments: object) -> str:
    """What it printed; it must end well."""
    with begin(script, *arguments) as process:
        said, errors = process.communicate(timeout=100)
    assert process.returncode == 0, f"{process.returncode}: {said}{errors}"
    return said


def opened(path: Path) -> tuple[de.Storage, de.Embedding]:
    storage = de.Storage.open(path, memory="16MiB")
    return storage, de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)


# -------------------------------------------------------------------- fork


def test_a_worker_puts_a_storage_of_its_own_in_the_place_of_the_inherited_one(path: Path) -> None:
    said = run(
        """
storage, embedding = make(path)
step(embedding, 1)
def work():
    global storage, embedding
    storage, embedding = make(path + "-own")  # the inherited ones go away beside the new one's threads
    step(embedding, 2)
    storage.close()
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
print(worker.exitcode)
step(embedding, 3)
print(embedding.step)
""",
        path,
    )
    assert said.split() == ["0", "2"]


@pytest.mark.parametrize("end", ["os._exit(7)", "sys.exit(7)", "del storage, embedding; os._exit(7)"])
def test_children_forked_while_another_thread_trains_open_their_own_and_end(path: Path, end: str) -> None:
    said = run(
        f"""
storage, embedding = make(path)
step(embedding, 0)  # what NumPy imports late would be locked in a child
stop = threading.Event()
def train():
    seed = 0
    while not stop.is_set():
        step(embedding, seed, 5_000)
        seed += 1
trainer = threading.Thread(target=train)
trainer.start()
for number in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            embedding.lookup([1])
        except de.ForkedHandleError:
            own, table = make(path + f"-{{number}}")
            step(table, 1)
            own.close()
            {end}
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
trainer.join()
storage.close()
""",
        path,
    )
    assert said.split() == ["7"] * 4


# --------------------------------------------------------------------- end


def test_a_program_may_end_while_a_daemon_thread_trains(path: Path) -> None:
    script = """
storage, embedding = make(path)
def train():
    seed = 0
    while True:
        try:
            step(embedding, seed, 5_000)
        except de.ClosedError:
            return
        seed += 1
threading.Thread(target=train, daemon=True).start()
time.sleep(0.2)
print(embedding.step)
"""
    steps = 0
    for _ in range(5):
        steps = max(steps, int(run(script, path)))
        storage, embedding = opened(path)
        with storage:
            assert storage.stats()["redone_records"] == 0  # it was closed
            assert embedding.step >= steps


@pytest.mark.parametrize("call", ["embedding.lookup([1])", "storage.stats()", "embedding.step", "len(embedding)"])
def test_a_program_may_end_while_daemon_threads_go_on_after_the_close(path: Path, call: str) -> None:
    """Some of them come out of a call just when there is no interpreter any more to come back to."""
    run(
        f"""
storage, embedding = make(path)
def ask():
    while True:
        try:
            {call}
        except de.ClosedError:
            pass
for _ in range(8):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.1)
""",
        path,
    )


def test_a_close_does_not_wait_for_calls_that_begin_after_it(path: Path) -> None:
    """The lock went from one call to the next, and close() waited as long as any thread went on asking."""
    keys = np.arange(20_000)
    storage = de.Storage(path, memory="64MiB", threads=1)
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
    embedding.lookup(keys)
    calls = [0] * 8

    def ask(place: int) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                embedding.lookup(keys, insert=False)
            except de.ClosedError:
                return
            calls[place] += 1

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    while min(calls) < 3:
        time.sleep(0.01)
    before = sum(calls)
    storage.close()
    assert sum(calls) - before <= 20 * len(calls)  # those in flight, and what came before close() was heard of
    for thread in threads:
        thread.join()


def test_a_call_from_a_call_in_flight_is_answered_while_the_storage_waits_to_be_closed(path: Path) -> None:
    storage = de.Storage(path, memory="16MiB")
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
    embedding.lookup(np.arange(100))
    closer = threading.Thread(target=storage.close)
    answers: list[int] = []

    def progress(done: int, total: int) -> None:
        if not closer.is_alive() and not answers:
            closer.start()
            time.sleep(0.3)
        answers.append(len(embedding))

    assert storage.dump(path.parent / "dump", progress=progress) == 100
    closer.join()
    assert set(answers) == {100}
    with pytest.raises(de.ClosedError):
        storage.stats()


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_training_between_batches_and_nothing_is_lost(path: Path, way: signal.Signals) -> None:
    script = """
storage, embedding = make(path)
for seed in range(10**9):
    step(embedding, seed, 5_000)
    print(seed + 1, flush=True)
"""
    with begin(script, path) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 20:
            pass
        process.send_signal(way)
        said = process.stdout.read()
        process.wait(timeout=100)
    # Python makes an exception of SIGINT; SIGTERM ends the process where it stands.
    assert process.returncode == -way
    storage, embedding = opened(path)
    with storage:
        assert (storage.stats()["redone_records"] > 0) == (way == signal.SIGTERM)
        assert embedding.step - int([20, *said.split()][-1]) in (0, 1)


def test_a_program_that_ends_without_a_close_writes_what_changed_and_does_not_rewrite_the_rest(path: Path) -> None:
    run("storage, embedding = make(path)\nfor seed in range(60):\n    step(embedding, seed, 10_000)\n", path)
    before = {file.name: file.stat().st_ino for file in path.rglob("*.sst")}
    assert before
    started = time.monotonic()
    run("storage, embedding = make(path)\nstep(embedding, 1)\n", path)
    assert time.monotonic() - started < 60
    after = {file.name: file.stat().st_ino for file in path.rglob("*.sst")}
    assert before.items() & after.items(), "every table file was written anew"
    storage, embedding = opened(path)
    with storage:
        assert embedding.step == 61
        assert storage.stats()["redone_records"] == 0


# ---------------------------------------------------------- running out of


def test_with_few_file_descriptors_errors_are_typed_and_nothing_is_half_done(path: Path) -> None:
    said = run(
        """
storage, embedding = make(path)
step(embedding, 1)
storage.commit(step=1)
storage.close()
free = len(os.listdir("/proc/self/fd"))
for limit in range(free, free + 60, 3):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        with de.Storage.open(path, memory="16MiB") as storage:
            embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
            print("opened", embedding.step, storage.last_commit[0])
    except de.StorageError as error:
        print("refused", type(error).__name__)
""",
        path,
    )
    answers = set(said.splitlines())
    assert answers == {"opened 1 1", "refused StorageError"}


@pytest.mark.skipif(os.geteuid() != 0, reason="the limit does not bind root, and needs root to become somebody else")
def test_with_few_threads_it_opens_with_fewer_or_says_so() -> None:
    answers = []
    for limit in (1, 3, 40):
        place = Path(tempfile.mkdtemp())  # a place for somebody else, which tmp_path is not
        place.chmod(0o777)
        process = begin(
            """
limit = int(sys.argv[2])
np.random.default_rng(0)  # imported late, and from where this user may not read
os.setgid(65534)
os.setuid(61_000 + limit)  # who has no other threads
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
try:
    storage, embedding = make(path + "/table.damo", threads=4)
    step(embedding, 1)
    storage.close()
    print("opened")
except de.StorageError as error:
    print("refused")
""",
            place,
            limit,
        )
        with process:
            said, errors = process.communicate(timeout=100)
        shutil.rmtree(place)
        # RocksDB starts threads of its own, and has no way out where it cannot: the process may end there.
        assert process.returncode == 0 or "Resource temporarily unavailable" in errors, errors
        answers.append(said.strip())
    assert answers[0] == "refused"
    assert answers[-1] == "opened"


# ------------------------------------------------------ losing the directory


@pytest.mark.parametrize("durability", ["commit", "logged", "durable"])
def test_nothing_is_reported_as_done_in_a_directory_that_was_removed(path: Path, durability: str) -> None:
    storage = de.Storage(path, memory="16MiB", durability=durability)
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
    keys, ones = np.arange(5), np.ones((5, 16), np.float32)
    embedding.apply_gradients(keys, ones)
    shutil.rmtree(path)
    changes: list[Callable[[], object]] = [
        lambda: embedding.apply_gradients(keys, ones),
        lambda: embedding.lookup([77]),
        lambda: embedding.erase(keys),
        lambda: storage.commit(step=1),
        lambda: storage.checkpoint(path.with_name("checkpoint")),
        storage.close,
    ]
    for change in changes:
        with pytest.raises(de.StorageError, match="was moved, removed or replaced by another program"):
            change()
    assert not path.exists()
    assert not path.with_name("checkpoint").exists()


@pytest.mark.parametrize("durability", ["commit", "logged", "durable"])
def test_nothing_is_reported_as_done_on_a_disk_that_was_unmounted(tmp_path: Path, durability: str) -> None:
    try:
        disk = Tmpfs(tmp_path / "disk", megabytes=64)
    except SkippedError as reason:
        pytest.skip(str(reason))
    path = disk.directory / "table.damo"
    storage = de.Storage(path, memory="16MiB", durability=durability)
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
    keys, ones = np.arange(5), np.ones((5, 16), np.float32)
    embedding.apply_gradients(keys, ones)
    subprocess.run(["umount", "--lazy", disk.directory], check=True)
    changes: list[Callable[[], object]] = [
        lambda: embedding.apply_gradients(keys, ones),
        lambda: storage.commit(step=1),
        storage.close,
    ]
    for change in changes:
        with pytest.raises(de.StorageError, match="was moved, removed or replaced by another program"):
            change()
    assert list(disk.directory.iterdir()) == []


@pytest.mark.parametrize("durability", ["commit", "logged", "durable"])
def test_a_disk_that_goes_away_beneath_a_storage_is_told_and_loses_no_commit(tmp_path: Path, durability: str) -> None:
    """Every call of it fails from then on, as of a cable that was pulled; then it is back."""
    try:
        disk = Ext4(tmp_path / "image", tmp_path / "disk", megabytes=64)
        disk.mount()
    except SkippedError as reason:
        pytest.skip(str(reason))
    try:
        path = disk.directory / "table.damo"
        storage = de.Storage(path, memory="16MiB", durability=durability)
        embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
        keys, ones = np.arange(5), np.ones((5, 16), np.float32)
        embedding.apply_gradients(keys, ones)
        storage.commit(step=1)
        try:
            disk.lose_power()
        except SkippedError as reason:
            storage.close()
            pytest.skip(str(reason))
        with suppress(de.StorageError):  # an append may go well, into the page cache
            embedding.apply_gradients(keys, ones)
        with pytest.raises(de.StorageError):
            storage.commit(step=2)
        found = embedding.lookup(keys, insert=False)  # they are in memory, with the update or without
        assert found.tobytes() in {(-ones).tobytes(), (-2 * ones).tobytes()}
        with pytest.raises(de.StorageError):
            storage.commit(step=3)
        with suppress(de.StorageError):
            storage.close()
        disk.unmount()
        disk.mount()
        with de.Storage(path, memory="16MiB") as again:
            assert again.last_commit == (1, b"")
            embedding = de.Embedding(again, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
            assert embedding.lookup(keys, insert=False).tobytes() == (-ones).tobytes()
    finally:
        disk.unmount()


@pytest.mark.parametrize("durability", ["commit", "logged"])
def test_an_old_handle_leaves_a_new_storage_of_the_same_name_alone(path: Path, durability: str) -> None:
    storage = de.Storage(path, memory="16MiB", durability=durability, log_bytes="1MiB")
    embedding = de.Embedding(storage, de.SGD(lr=1.0), de.Zeros(), dimension=16, group=1)
    embedding.apply_gradients(np.arange(5_000), np.ones((5_000, 16), np.float32))
    storage.commit(step=1)
    shutil.rmtree(path)
    # Many table files, of other numbers than those of the old one: a close that removed what it does not know would
    # remove them.
    script = f"""
for number in range(12):
    storage, embedding = make(path, durability={durability!r}, log_bytes="1MiB")
    step(embedding, number)
    storage.commit(step=700 + number)
    storage.close()
storage, embedding = make(path, durability={durability!r}, log_bytes="1MiB")
step(embedding, 20, 20_000)
storage.commit(step=777)
print("ready", flush=True)
sys.stdin.readline()
step(embedding, 21)
storage.commit(step=778)
storage.close()
"""
    with begin(script, path) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        for _ in range(30):
            with pytest.raises(de.StorageError, match="removed or replaced"):
                embedding.apply_gradients(np.arange(5_000), np.ones((5_000, 16), np.float32))
        with pytest.raises(de.StorageError, match="removed or replaced"):
            storage.close()
        _, errors = other.communicate("\n", timeout=100)
    assert other.returncode == 0, errors
    storage, embedding = opened(path)
    with storage:
        assert storage.last_commit == (778, b"")
        assert embedding.step == 14
        assert not storage.verify().damages
