# SPDX-License-Identifier: Apache-2.0
"""The directories that are open in this process, each once, however often a script opens it.

There is no `close` in this API. A directory is closed with the last object that uses it, or when the interpreter
exits. Whoever opens it again before that shares it; who opens it while another thread closes it waits for that.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import damo_embedding as de
from damo.initializer import stored_initializer
from damo.open_once import Held, OpenOnce
from damo_embedding import _core
from damo_embedding.storage import parse_bytes

__all__ = ["Group", "OpenStorage", "open_storage"]

T = TypeVar("T")
_counter = itertools.count()


class Group:
    """What the PyEmbedding objects of one group share. Of two that differ the newer one counts."""

    def __init__(self, number: int, dimension: int, optimizer: de.Optimizer, initializer: de.Initializer) -> None:
        self.number = number
        self.dimension = dimension
        self.optimizer = optimizer
        self.initializer = initializer
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.lock = threading.RLock()  # held where rows get other first weights than the group is stored with
        self.rows: de.Embedding  # another one when the storage is opened anew


class OpenStorage:
    """One directory, open once in this process."""

    def __init__(self, path: str, ttl: int | str) -> None:
        self.lock = threading.RLock()  # held while it is opened anew
        self._path = path
        self._ttl = ttl
        self._groups: dict[int, Group] = {}
        self.held = Held(de.Storage(path, **self._options()))
        self._lock_file = _identity(path)
        held = self._storage.stats()["clock_held_seconds"]
        if held > 0:
            warnings.warn(
                f"[PyStorage] the clock is {held / 86_400:,.0f} days ahead of the last operation on {path}: no row"
                " expires until damo_embedding.Storage.expire() confirms that (docs/expiry.md)",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def _storage(self) -> de.Storage:
        return self.held.opened

    def _options(self) -> dict[str, Any]:
        return {"memory": os.environ.get("DAMO_MEMORY", "1GiB"), "ttl": self._ttl}

    def run(self, call: Callable[[de.Storage], T]) -> T:
        """`call`, and once more when the storage was closed meanwhile because it is being opened anew."""
        while True:
            before = self._storage
            try:
                return call(before)
            except de.ClosedError:
                with self.lock:
                    if self._storage is before:
                        raise

    def group(
        self, user: object, number: int, dimension: int, optimizer: de.Optimizer, initializer: de.Initializer
    ) -> Group:
        """The group for a new PyEmbedding; SchemaMismatchError if its rows are laid out otherwise."""
        with self.lock:
            group = self._groups.get(number)
            if group is None:
                group = Group(number, dimension, optimizer, initializer)
                group.rows = self._rows(self._storage, group)
                self._groups[number] = group
            else:
                for what, is_, came in (
                    ("dimension", group.dimension, dimension),
                    ("optimizer", group.optimizer.name, optimizer.name),
                ):
                    if is_ != came:
                        raise de.SchemaMismatchError(
                            f"[PyEmbedding] group {number} has {what} {is_}, opened with {came}: open it with what it"
                            " has, or give another group"
                        )
                before, group.optimizer, group.initializer = group.optimizer, optimizer, initializer
                if _without_rate(before) == _without_rate(optimizer):
                    group.rows.lr = optimizer.lr
                else:
                    group.users.add(user)
                    self._open_anew()
            group.users.add(user)
            return group

    def set_ttl(self, ttl: int | str) -> None:
        """Opens it anew if it is open with another ttl, or if opening it anew failed before."""
        with self.lock:
            if ttl != self._ttl or self._storage.closed:
                self._ttl = ttl
                self._open_anew()

    def load(self, checkpoint: str) -> None:
        """Replaces the content by a checkpoint. Whatever fails leaves the content as it was."""
        if not os.path.isfile(os.path.join(checkpoint, "CHECKPOINT")):
            raise de.StorageError(f"[load_from_checkpoint] {checkpoint} is not a checkpoint: it has no file CHECKPOINT")
        aside = f"{self._path}.before-load-{os.getpid()}-{next(_counter)}"
        memory, done = parse_bytes("memory", self._options()["memory"]), bytearray(1)
        with self.lock:
            try:
                self._close()
                # Only now that nobody uses it: an update between the copy and the load would be lost.
                with self._reopened() as unused:
                    unused.checkpoint(aside)
                _core.restore(checkpoint, self._path, memory, done)
                self._bind(self._reopened())
            except BaseException as error:
                self._close()
                if done[0]:  # Ctrl-C may come when the work is done
                    error.add_note(f"If the content of before is not back, it is in {aside}")
                    _core.restore(aside, self._path, memory, bytearray(1))
                self._bind(self._reopened())
                shutil.rmtree(aside, ignore_errors=True)
                raise
            shutil.rmtree(aside, ignore_errors=True)

    def is_there(self) -> bool:
        """Whether its directory is still the one that was opened."""
        return _identity(self._path) == self._lock_file

    def _close(self) -> None:
        with contextlib.suppress(de.StorageError):  # what could not be written is in the log
            self._storage.close()

    def _reopened(self) -> de.Storage:
        return de.Storage.open(self._path, **self._options())

    def _open_anew(self) -> None:
        self._close()
        self._bind(self._reopened())

    def _bind(self, storage: de.Storage) -> None:
        """Lets all that is in use go on with `storage`; closes it if some group is laid out otherwise there."""
        self._groups = {number: group for number, group in self._groups.items() if len(group.users)}
        try:
            rows = {number: self._rows(storage, group) for number, group in self._groups.items()}
        except BaseException:
            storage.close()
            raise
        for number, group in self._groups.items():
            group.rows = rows[number]
        self.held.opened = storage  # last: `run` takes it for the sign that all is ready

    @staticmethod
    def _rows(storage: de.Storage, group: Group) -> de.Embedding:
        # Stored rows that have no update yet are drawn again when they are read, so the stored initializer stays.
        initializer, seed = group.initializer, 0
        for stored in storage.stats()["groups"]:
            if stored["group"] == group.number:
                initializer = stored_initializer(stored["initializer"], stored["initializer_settings"])
                seed = stored["seed"]
        return de.Embedding(storage, group.optimizer, initializer, group.dimension, group.number, seed)

    def forget_locks(self) -> None:
        """In a forked child, where other threads held them and are no more."""
        self.lock = threading.RLock()
        for group in self._groups.values():
            group.lock = threading.RLock()


def _without_rate(optimizer: Any) -> object:
    return replace(optimizer, lr=1.0)  # any rate will do


_open: OpenOnce[OpenStorage] = OpenOnce()


def open_storage(path: str, ttl: int | str) -> OpenStorage:
    """The storage at `path`, opened or shared; `ttl` counts from now on."""
    real = os.path.realpath(path)
    with _open.lock:
        shared = _open.find(real)
        if shared is not None and not shared.is_there():
            _open.close(real)
            shared = None
        if shared is None:
            _expect_ours(real)
            shared = OpenStorage(real, ttl)
            _open.add(real, shared, shared.held)
            return shared
    shared.set_ttl(ttl)
    return shared


def _identity(path: str) -> tuple[int, int] | None:
    """Of the lock's file, which the storage keeps open: no file that comes later has the same."""
    try:
        found = os.stat(os.path.join(path, "LOCK"))
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _expect_ours(path: str) -> None:
    """A directory that the published package made is RocksDB's own, whose CURRENT names another kind of file."""
    with contextlib.suppress(OSError), open(os.path.join(path, "CURRENT"), "rb") as file:
        if file.read(9) == b"MANIFEST-":
            raise de.StorageError(
                f"[PyStorage] {path} was made by another program with RocksDB: give an empty or absent directory, and"
                " bring the rows over with a dump (docs/damo.md)"
            )
