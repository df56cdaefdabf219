# SPDX-License-Identifier: Apache-2.0
"""Storages in processes that can be killed.

A fork server with everything imported (this file, run as a script) forks a child for each session; the child opens
storages and obeys over a pipe. Killing a session kills the process that has the storage open, as kill -9 would a
training job, and the next session opens within milliseconds.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

import damo_embedding as de
from comparing import Row, rows_of
from damo_embedding import _core

PATIENCE = 60  # seconds; what takes so long hangs


@dataclass(frozen=True)
class Group:
    """How an embedding is opened."""

    group: int
    optimizer: de.Optimizer
    initializer: de.Initializer
    dimension: int
    seed: int = 0
    admission: de.CountingBloomFilter | None = None
    ttl: int | de.Steps | None = None  # seconds, or steps

    def open(self, storage: de.Storage) -> de.Embedding:
        return de.Embedding(
            storage,
            self.optimizer,
            self.initializer,
            dimension=self.dimension,
            group=self.group,
            seed=self.seed,
            admission=self.admission,
            ttl=self.ttl,
        )


class Served:
    """What a session can be told, in the child."""

    storage: de.Storage

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.embeddings: dict[int, de.Embedding] = {}

    def open(
        self,
        path: Path,
        groups: list[Group],
        now: int,
        checkpoint: Path | None = None,
        or_restore: Path | None = None,
        **options: Any,
    ) -> None:
        """Opens the storage, restored from a checkpoint if one is given, and its groups."""
        if or_restore is not None:
            self.storage = de.Storage.open_or_restore(path, or_restore, **options)
        elif checkpoint is None:
            self.storage = de.Storage(path, **options)
        else:
            self.storage = de.Storage.restore(checkpoint, path, **options)
        self.storage.now = now
        self.embeddings = {group.group: group.open(self.storage) for group in groups}

    def open_group(self, group: Group) -> None:
        self.embeddings[group.group] = group.open(self.storage)

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """A function of another module, which gets this object first."""
        return function(self, *args, **named)

    def storage_call(self, verb: str, *args: Any, **named: Any) -> Any:
        return getattr(self.storage, verb)(*args, **named)

    def embedding_call(self, group: int, verb: str, *args: Any, **named: Any) -> Any:
        return getattr(self.embeddings[group], verb)(*args, **named)

    def apply_together(self, updates: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """One update of each (group, keys, gradients), in one call."""
        self.storage._core.backward_many(
            [(self.embeddings[group]._table, [(_core.Batch(keys), floats)], None) for group, keys, floats in updates]
        )

    def set_now(self, now: int) -> None:
        self.storage.now = now

    def last_commit(self) -> tuple[int | None, bytes] | None:
        return self.storage.last_commit

    def numbers(self) -> dict[int, tuple[int, int]]:
        """(rows, step) of each group."""
        return {group: (len(embedding), embedding.step) for group, embedding in self.embeddings.items()}

    def rows(self, group: int) -> dict[int, Row]:
        return rows_of(self.embeddings[group])

    def filter(self, group: int, keys: np.ndarray) -> tuple[int, np.ndarray]:
        """(adds, the estimate of each key) of a group's filter."""
        admission = self.embeddings[group].admission
        assert admission is not None
        return admission.adds, np.asarray(admission.estimate(keys))

    def read_dump(self, path: Path, **conditions: Any) -> tuple[int, dict[int, Any]]:
        return self.storage.dump(path, **conditions), de.read_dump(path)


def serve(connection: Connection) -> None:
    connection.send(os.getpid())
    served = Served(connection)
    while True:
        try:
            verb, args, named = connection.recv()
        except EOFError:  # whoever asked is gone
            return
        try:
            answer = ("returned", getattr(served, verb)(*args, **named))
        except Exception as error:
            answer = ("raised", f"{type(error).__name__}: {error}")
        connection.send(answer)


def run_fork_server(address: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    gc.freeze()  # else the first collection in each child writes to, and so copies, all that was imported
    with Listener(address, "AF_UNIX", backlog=16) as listener:
        socket = listener._listener._socket  # type: ignore[attr-defined]
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([socket, sys.stdin], [], [])
            if sys.stdin in readable:  # the end of the tests, however they ended
                return
            connection = listener.accept()
            if os.fork() == 0:
                try:
                    serve(connection)
                finally:
                    os._exit(0)
            connection.close()


class Session:
    """A process that opens storages and does what it is told."""

    def __init__(self, address: str) -> None:
        self.connection = Client(address, "AF_UNIX")
        self.pid: int = self.connection.recv()
        self._died = os.pidfd_open(self.pid)
        self._over = False

    def start(self, verb: str, *args: Any, **named: Any) -> None:
        """Does not wait for the answer."""
        self.connection.send((verb, args, named))

    def __call__(self, verb: str, *args: Any, **named: Any) -> Any:
        self.start(verb, *args, **named)
        if not self.connection.poll(PATIENCE):
            raise self.overdue(f"{verb} {args[:2]}")
        what, value = self.connection.recv()
        assert what == "returned", value
        return value

    def kill(self) -> list[Any]:
        """kill -9, now; returns what it had still said. On return the process does not exist any more."""
        if self._over:
            return []
        with suppress(ProcessLookupError):  # it is dead already
            signal.pidfd_send_signal(self._died, signal.SIGKILL)
        self._wait()
        said = []
        try:
            while True:
                said.append(self.connection.recv())
        except (EOFError, OSError):  # OSError: cut off within a message
            self.connection.close()
        return said

    def overdue(self, what: str) -> AssertionError:
        """Kills a process that does not answer; the error says where its threads were, if there is a debugger."""
        where = "where it was, gdb would tell"
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["gdb", "-p", str(self.pid), "-batch", "-ex", "thread apply all backtrace 20"]
            where = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        self.kill()
        return AssertionError(f"{what} did not end within {PATIENCE} s: killed\n{where}")

    def leave(self) -> None:
        """Lets the process end: nobody asks any more."""
        self.connection.close()
        self._wait()

    def _wait(self) -> None:
        select.select([self._died], [], [])
        os.close(self._died)
        self._over = True


@dataclass(frozen=True)
class ForkServer:
    address: str

    def session(self) -> Session:
        return Session(self.address)


@contextmanager
def fork_server(environment: Mapping[str, str] | None = None, preload: str = "") -> Iterator[ForkServer]:
    """`environment`: of the server and its children, instead of this process's. `preload`: a module they have."""
    # Not in a tmp_path: the name of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="damo-") as directory:
        address = os.path.join(directory, "sessions")
        with subprocess.Popen(
            [sys.executable, __file__, address, preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == b"ready\n"
            try:
                yield ForkServer(address)
            finally:
                process.stdin.close()


if __name__ == "__main__":
    import storage_server  # by its name, as it is in what comes over the pipe; children find it imported

    if sys.argv[2]:
        importlib.import_module(sys.argv[2])
    storage_server.run_fork_server(sys.argv[1])
