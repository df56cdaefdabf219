# SPDX-License-Identifier: Apache-2.0
"""The process that has the storage open and may die: what a session of storage_server.py is told to do.

Every function here runs in the child and takes the `Served` object first. A session is of one storage, under a base
directory: base/table.damo, base/checkpoints, base/dumps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de
from damo_embedding import _core
from reliability.faults import Faults
from reliability.oracle import Found, Numbers, Operation, Rows
from reliability.workload import SHAPES, START, Shape
from storage_server import Served


class Trainee:
    """A storage and its groups, opened when they are first used."""

    def __init__(self, base: Path, shape: Shape, options: dict[str, Any], checkpoint: Path | None) -> None:
        self.base = base
        self.shape = shape
        self.options = options
        if checkpoint is None:
            self.storage = de.Storage(base / "table.damo", **options)
        else:
            self.storage = de.Storage.restore(checkpoint, base / "table.damo", **options)
        if shape.start != START:
            self.storage.now = shape.start - 1  # it was the wall clock, which is ahead; now that of the last operation
        # Before anybody sets it; the wall clock if there was no operation yet.
        self.clock = self.storage.now if self.storage.now >= shape.start else 0
        self.now = shape.start
        self.embeddings: dict[int, de.Embedding] = {}

    def embedding(self, number: int) -> de.Embedding:
        if number not in self.embeddings:
            group = next(group for group in self.shape.groups if group.group == number)
            self.embeddings[number] = group.open(self.storage)
        return self.embeddings[number]

    def reopen(self) -> None:
        self.storage.close()
        storage = de.Storage(self.base / "table.damo", **self.options)
        storage.now = self.now
        self.storage = storage  # only now: another thread may dump it
        self.embeddings = {}

    def drop(self, number: int) -> None:
        dropped = self.embedding(number)
        del self.embeddings[number]  # before: another thread has no more use for it then
        try:
            self.storage.drop_group(number)
        except Exception:
            self.embeddings[number] = dropped
            raise

    def checkpoint(self, number: int) -> None:
        """Every other one with a dense part beside the rows, as save_checkpoint of the front for torch writes it."""
        dense = dense_part(number)

        def fill(staged: str) -> None:
            try:
                Path(staged, DENSE).write_bytes(dense)
            except OSError as error:
                raise de.StorageError(f"[save_checkpoint] {error}") from error

        directory = self.base / "checkpoints" / str(number)
        self.storage._checkpoint(directory, number, None, None, fill if dense else None)

    def apply_together(self, updates: Iterable[Operation]) -> None:
        """As the front for torch does at the end of a backward pass."""
        items = [
            (self.embedding(update.group)._table, [(_core.Batch(update.keys), update.gradients)], update.lr)
            for update in updates
        ]
        self.storage._core.backward_many(items)

    def perform(self, operation: Operation) -> Any:
        """The call; what it returns, in a form that is compared with digest()."""
        verb = operation.verb
        if verb == "commit":
            return self.storage.commit(operation.number, operation.extra)
        if verb == "set_now":
            self.now = max(self.now, operation.number)  # what a reopening goes on from; time does not run back
            self.storage.now = operation.number
            return None
        if verb == "reopen":
            return self.reopen()
        if verb == "drop_group":
            return self.drop(operation.group)
        if verb == "checkpoint":
            return self.checkpoint(operation.number)
        if verb in ("expire", "compact"):
            return getattr(self.storage, verb)()
        if verb == "verify":  # rows that have expired may be among those that it counts
            return self.storage.verify().damages
        if verb == "apply_together":
            return self.apply_together(operation.parts)
        embedding = self.embedding(operation.group)
        if verb == "dump":
            self.storage.dump(self.base / "dumps" / f"{operation.number}.bin", group=operation.group)
        elif verb == "scan":
            for _ in embedding.scan(2048):
                pass
        elif verb == "apply_gradients":
            assert operation.gradients is not None
            embedding.apply_gradients(operation.keys, operation.gradients, lr=operation.lr)
        elif verb == "import_rows":
            assert operation.gradients is not None
            embedding.import_rows(operation.keys, operation.gradients, counts=operation.counts)
        elif verb == "lookup_only":
            return embedding.lookup(operation.keys, insert=False)
        elif verb != "open_group":
            return getattr(embedding, verb)(operation.keys)
        return None


DENSE = "dense.bin"


def dense_part(number: int) -> bytes:
    """Of a checkpoint; empty: it has none."""
    return np.random.default_rng(number).bytes(5_000) if number % 2 else b""


def sequence_of(storage: de.Storage) -> int:
    """The number of the last operation, counting drops of groups, which have none in the log."""
    stats = storage.stats()
    return int(stats["sequence"]) + storage._core.tables_made - len(stats["groups"])


def digest(answer: Any) -> bytes:
    """Of what a call returned, to compare it without sending it."""
    value = answer.tobytes() if isinstance(answer, np.ndarray) else repr(answer).encode()
    return hashlib.blake2b(value, digest_size=16).digest()


def watch(served: Served, root: Path, journal: Path | None = None, epitaph: Path | None = None) -> None:
    """Puts the file system below `root` under the library of faults.py."""
    served.faults = Faults()  # type: ignore[attr-defined]
    served.faults.watch(root, journal, epitaph)  # type: ignore[attr-defined]


def faults_of(served: Served) -> Faults | None:
    return getattr(served, "faults", None)


def arm(served: Served, *args: Any) -> None:
    faults = faults_of(served)
    assert faults is not None
    faults.arm(*args)


def disarm(served: Served) -> tuple[str, int, dict[tuple[str, str], int]]:
    """What was hit, how often its kind was visited, and how often every point was."""
    faults = faults_of(served)
    assert faults is not None
    faults.disarm()
    return faults.hit(), faults.visits(), faults.counts()


@contextmanager
def pausing(faults: Faults | None) -> Iterator[None]:
    """No call fails here."""
    if faults is not None:
        faults.pause(True)
    yield
    if faults is not None:
        faults.pause(False)


def flush(served: Served) -> None:
    faults = faults_of(served)
    assert faults is not None
    faults.flush()


def open_storage(
    served: Served, base: Path, shape: str, options: dict[str, Any], checkpoint: Path | None = None
) -> int:
    """Returns the sequence number it has."""
    served.trainee = Trainee(base, SHAPES[shape], options, checkpoint)  # type: ignore[attr-defined]
    if (faults := faults_of(served)) is not None:
        faults.mark(b"o", 0)
    return sequence_of(trainee_of(served).storage)


def try_to_open(served: Served, *args: Any) -> tuple[str, str] | None:
    """As open_storage; returns what it raised."""
    try:
        open_storage(served, *args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def try_to_close(served: Served) -> tuple[str, str] | None:
    try:
        close(served)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def weights_of(served: Served, group: int, keys: Any) -> Any:
    """Reads, and changes nothing."""
    return trainee_of(served).embedding(group).lookup(keys, insert=False)


def trainee_of(served: Served) -> Trainee:
    trainee = served.trainee  # type: ignore[attr-defined]
    assert isinstance(trainee, Trainee)
    return trainee


def look(served: Served, inspect: int = 5) -> Found:
    """All that the storage holds. Groups that do not exist are not made."""
    trainee = trainee_of(served)
    storage = trainee.storage
    sequence, stats = sequence_of(storage), storage.stats()
    groups = set(storage.groups())
    numbers = Numbers({}, {}, trainee.clock, storage.last_commit)
    rows, inspected, filters = {}, {}, {}
    for group in trainee.shape.groups:
        number = group.group
        if number not in groups:
            numbers.rows[number] = numbers.steps[number] = 0
            entries = entries_of(group.optimizer)
            none = np.empty((0, group.dimension), np.float32)
            rows[number] = Rows(
                np.empty(0, np.uint64),
                none,
                dict.fromkeys(entries, none),
                np.empty(0, np.uint32),
                np.empty(0, np.int64),
            )
            continue
        embedding = trainee.embedding(number)
        numbers.rows[number], numbers.steps[number] = len(embedding), embedding.step
        if embedding.admission is not None:
            keys = trainee.shape.keys_of(number)[::5]
            filters[number] = (embedding.admission.adds, keys, np.asarray(embedding.admission.estimate(keys)))
        rows[number] = all_rows(embedding)
        there = rows[number].keys
        for key in there[:: max(1, len(there) // inspect)].tolist() if inspect else []:
            info = embedding.inspect(key)
            assert info is not None, f"group {number}: the row {key} was in the scan, and is not there"
            inspected[number, key] = (info.sequence, info.step)
    return Found(sequence, groups, numbers, rows, inspected, stats, filters)


def entries_of(optimizer: de.Optimizer) -> list[str]:
    return [name for name, _, _ in _core.optimizer_state(optimizer.name, optimizer._settings())]


def all_rows(embedding: de.Embedding) -> Rows:
    parts = list(embedding.scan(2048))
    entries = entries_of(embedding.optimizer)
    none = np.empty((0, embedding.dimension), np.float32)
    return Rows(
        np.concatenate([np.empty(0, np.uint64), *(part.keys for part in parts)]),
        np.concatenate([none, *(part.weights for part in parts)]),
        # One number a row, in some optimizers.
        {name: np.concatenate([part.state[name] for part in parts]) if parts else none for name in entries},
        np.concatenate([np.empty(0, np.uint32), *(part.update_counts for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.last_updates for part in parts)]),
    )


def recover(
    served: Served,
    base: Path,
    shape: str,
    options: dict[str, Any],
    checkpoint: Path | None = None,
    inspect: int = 5,
) -> Found:
    """Opens what a crash left, and says what is there."""
    open_storage(served, base, shape, options, checkpoint)
    return look(served, inspect)


def try_to_recover(
    served: Served, base: Path, shape: str, options: dict[str, Any], checkpoint: Path | None
) -> Found | tuple[str, str]:
    """As recover, and closes again; or what it raised."""
    try:
        found = recover(served, base, shape, options, checkpoint)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        if hasattr(served, "trainee"):
            with suppress(de.DamoError):
                close(served)
            del served.trainee
    return found


def try_to_read_all(
    served: Served,
    base: Path,
    shape: str,
    options: dict[str, Any],
    keys: dict[int, Any],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Opens, reads as try_to_read_on, and closes."""
    try:
        open_storage(served, base, shape, options, checkpoint)
    except Exception as error:
        return {"errors": [(type(error).__name__, str(error))], "lookups": {}, "scans": {}, "rows": {}}
    answer = try_to_read_on(served, keys)
    with suppress(de.DamoError):
        close(served)
    del served.trainee  # type: ignore[attr-defined]
    return answer


def try_to_read_on(served: Served, keys: dict[int, Any]) -> dict[str, Any]:
    """Reads every row in every way there is; keeps what came and what was raised."""
    answer: dict[str, Any] = {"errors": [], "lookups": {}, "scans": {}, "rows": {}}
    for group, wanted in keys.items():
        try:
            embedding = trainee_of(served).embedding(group)
            answer["rows"][group] = len(embedding)
        except Exception as error:
            answer["errors"].append((type(error).__name__, str(error)))
            continue
        for begin in range(0, len(wanted), 16):
            # A training lookup would make the rows that it does not find.
            for insert in (False, True):
                try:
                    answer["lookups"][group, begin] = embedding.lookup(wanted[begin : begin + 16], insert=insert)
                except Exception as error:
                    answer["errors"].append((type(error).__name__, str(error)))
        try:
            answer["scans"][group] = all_rows(embedding)
            answer["rows"][group] = len(embedding)
        except Exception as error:
            answer["errors"].append((type(error).__name__, str(error)))
    return answer


def checkpoint_to(served: Served, path: Path) -> None:
    trainee_of(served).storage.checkpoint(path)


def try_to_checkpoint(served: Served, path: Path) -> tuple[str, str] | None:
    try:
        checkpoint_to(served, path)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def go_on(served: Served) -> None:
    """Changes some rows and closes."""
    embedding = trainee_of(served).embedding(trainee_of(served).shape.groups[0].group)
    embedding.apply_gradients(np.arange(9), np.ones((9, embedding.dimension), np.float32))
    close(served)


def synced_sequence(served: Served) -> int:
    storage = trainee_of(served).storage
    stats = storage.stats()
    return sequence_of(storage) - int(stats["sequence"]) + int(stats["synced_sequence"])


def train(
    served: Served,
    operations: list[Operation],
    now: int,
    beside: str = "",
    after_errors: bool = False,
    pause: float = 0.0,
) -> None:
    """Does the operations, and says before and after each which one it is; an error ends it unless `after_errors`.

    `beside`: what another thread does meanwhile, one of BESIDE.
    """
    trainee, faults = trainee_of(served), faults_of(served)
    trainee.now = now
    trainee.storage.now = now
    trouble: list[BaseException] = []
    stop = threading.Event()
    thread = threading.Thread(target=_beside, args=(trainee, beside, stop, trouble), daemon=True)
    if beside:
        thread.start()
    for place, operation in enumerate(operations):
        served.connection.send(("issued", place))
        if faults is not None:
            faults.mark(b"i", place)
        try:
            answer = trainee.perform(operation)
        except Exception as error:
            sequence = -1
            with pausing(faults), suppress(de.ClosedError):
                sequence = sequence_of(trainee.storage)
            served.connection.send(("raised", place, type(error).__name__, str(error), sequence))
            if sequence < 0 or not after_errors:
                break
            continue
        if faults is not None:
            faults.mark(b"d", place)
        served.connection.send(("done", place, digest(answer)))
        if pause:
            time.sleep(pause)
    stop.set()
    if beside:
        thread.join()
    if trouble:
        raise trouble[0]


# From a second thread: verbs that change nothing, checkpoints and dumps. Mostly there is no second thread.
BESIDE = ("", "", "scan", "lookup", "prefetch", "checkpoint", "dump")


def _beside(trainee: Trainee, what: str, stop: threading.Event, trouble: list[BaseException]) -> None:
    keys = np.arange(-50, 50)
    made = itertools.count()
    (trainee.base / "beside").mkdir(exist_ok=True)
    actions: dict[str, Callable[[de.Embedding], Iterable[Any]]] = {
        "scan": lambda embedding: embedding.scan(512),
        "lookup": lambda embedding: embedding.lookup(keys, insert=False),
        "prefetch": lambda embedding: (embedding.prefetch(keys), embedding.contains(keys)),
        "checkpoint": lambda _: _checkpoint_beside(trainee, next(made)),
        "dump": lambda _: _dump_beside(trainee, next(made)),
    }
    try:
        while not stop.is_set():
            for embedding in list(trainee.embeddings.values()):
                try:
                    for _ in actions[what](embedding):
                        pass
                except ValueError:  # it was dropped
                    if embedding in trainee.embeddings.values():
                        raise
    except de.ClosedError:
        pass  # it is being reopened
    except BaseException as error:
        trouble.append(error)


def _checkpoint_beside(trainee: Trainee, number: int) -> tuple[()]:
    trainee.storage.checkpoint(trainee.base / "beside" / str(number), step=number, keep=2)
    return ()


def _dump_beside(trainee: Trainee, number: int) -> tuple[()]:
    """It waits when it has its moment, so that much happens before that is written; beside it is what came before."""
    path = trainee.base / "beside" / f"{number % 16}.bin"
    path.with_suffix(".until").unlink(missing_ok=True)  # of one that had this name
    until: list[int] = []

    def wait(done: int, total: int) -> None:
        del done, total
        until[:] = until or [sequence_of(trainee.storage), trainee.now]
        time.sleep(0.01)

    trainee.storage.dump(path, progress=wait)
    path.with_suffix(".until").write_text(json.dumps(until))
    return ()


def close(served: Served) -> None:
    trainee_of(served).storage.close()


def leave(served: Served) -> None:
    """The process ends without a close and without its destructors."""
    os._exit(0)
