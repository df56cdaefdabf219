# SPDX-License-Identifier: Apache-2.0
"""A storage: one directory that holds the tables of a model."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from damo_embedding import _core
from damo_embedding.checkpoints import (
    Checkpoint,
    list_checkpoints,
    newest_first,
    pass_over,
    read_checkpoint,
    verify_checkpoint,
)
from damo_embedding.errors import (
    CorruptionError,
    ForkedHandleError,
    NewerVersionError,
    ReadOnlyError,
    StorageError,
)
from damo_embedding.integers import as_int, parse_int
from damo_embedding.lifetimes import Ttl, parse_ttl, show_ttl
from damo_embedding.progress import Progress, reporting
from damo_embedding.rates import Rates
from damo_embedding.rescue import Damage, SalvageReport, VerifyReport

if TYPE_CHECKING:
    from damo_embedding.embedding import Embedding
    from damo_embedding.schedules import LearningRate

__all__ = ["Storage"]

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_DAY = 86_400
_SHOWN = 10  # damages that a message names
_MIN_DISK = 1 << 26
_WAY_OUT = ": restore a checkpoint, or bring the good rows into a new storage with Storage.salvage()"

PathLike = str | os.PathLike[str]
_Options = tuple[int, str, int, int, tuple[int, int] | None, int]  # as the core takes them


_open_storages: weakref.WeakSet[Storage] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At the end of the program, while other threads can still come out of a call: later that would abort it."""
    for storage in list(_open_storages):
        try:
            storage._core.close()
        except ForkedHandleError:
            pass  # its parent's
        except Exception:
            traceback.print_exc()  # the others are closed all the same


def parse_bytes(argument: str, value: int | str) -> int:
    """A size in bytes: an int, or a text such as "2GiB" or "512 MiB"."""
    if not isinstance(value, str):
        number = as_int(value)
        if number is None:
            raise TypeError(f'[open] {argument} is {value!r}, expected bytes as an int or a text such as "2GiB"')
        return number
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f'[open] {argument} is {value!r}, expected a size such as "2GiB", "512MiB" or a number of bytes'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_path(operation: str, argument: str, value: PathLike) -> str:
    """A path as text; bytes and other types are refused."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"[{operation}] {argument} is {type(value).__name__}, expected a str or a Path")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"[{operation}] {argument} is a path of bytes, expected a str or a Path")
    if path == "" or "\0" in path:
        raise ValueError(f"[{operation}] {argument} is {path!r}, expected the name of a file or directory")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"[{operation}] {argument} is {path!r}, expected a name that is UTF-8") from None
    return path


def _step_and_extra(operation: str, step: int | None, extra: bytes | str | None) -> tuple[int, bytes]:
    number = -1 if step is None else parse_int(operation, "step", step, 0, 2**63 - 1)
    if extra is None:
        return number, b""
    if isinstance(extra, str):
        try:
            return number, extra.encode()
        except UnicodeEncodeError:
            raise ValueError(f"[{operation}] extra is {extra!r}, which UTF-8 does not hold: give bytes") from None
    if not isinstance(extra, bytes):
        raise TypeError(f"[{operation}] extra is {type(extra).__name__}, expected bytes or str")
    return number, extra


def _holds_something(path: str) -> bool:
    """Whether there is more at `path` than nothing, an empty directory, or a creation that was cut short."""
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        return os.path.lexists(path)
    except OSError:
        return True
    return "CURRENT" in names or ("CREATING" not in names and bool(names - {"LOCK", "CREATING.tmp"}))


def _set_aside(path: str) -> str:
    """Gives a damaged directory another name; returns that."""
    target = os.path.abspath(path)
    aside = next(
        name for name in (f"{target}.damaged-{number}" for number in itertools.count(1)) if not os.path.lexists(name)
    )
    try:
        os.rename(target, aside)
    except OSError as error:
        raise StorageError(f"[open_or_restore] {target} cannot be renamed to {aside}: {error.strerror}") from None
    return aside


class Storage:
    """Opens the storage at `path`, or creates it if the directory is absent or empty.

    Any number of threads may use it, and any number of embeddings. A forked child may not: it opens its own.

    Args:
        path: The storage's directory (str or Path); its parent exists. One process has it open at a time, beside any
            number with read_only.
        memory: The budget in bytes, or a text such as "2GiB" (1024-based; "2GB" is 1000-based): rows in
            memory, their index, and everything RocksDB holds. At least 16 MiB; may differ from one open to
            the next. The process's resident memory grows by no more than this plus 10 %, beside the arrays of
            the batches themselves.
        durability: "logged" (an operation survives the death of the process when its call returns; power loss
            goes back to the last commit plus a prefix of what followed), "durable" (it survives power
            loss as well: the log is synced before the call returns), or "commit" (nothing is logged: a crash of
            either kind goes back to the last `commit`, or to the opening if there was none, exactly). May differ
            from one open to the next.
        threads: Threads of one call; None: one per core. Results do not depend on it.
        log_bytes: The operation log is cut when it is larger than this (bytes, or a text as for `memory`; at
            least 1 MiB). None: max(1 GiB, 4 x memory), at most an eighth of the free disk (and at least 64 MiB).
            With `disk`, at most a sixteenth of that (and at least 1 MiB).
        ttl: How long a row lives after its last update (or its creation): seconds, a text such as "30d" or
            "12h", a timedelta, `Steps(n)`, or "never". For the embeddings that are given none of their own.
            None: as stored, which is "never" at first. Kept to a 262,144th of itself, never cut short; changing it
            reads the tables once.
        disk: What the directory may take (bytes, or a text as for `memory`; at least 64 MiB and 4 x memory).
            When it fills, the rows that were updated least often and longest ago are erased
            (`stats()["forgotten"]`). It has to hold the files that a compaction replaces beside the new ones, so
            that the rows that stay take about a third of it; in mode "commit", which has the files of the last
            commit as well, about a sixth. None: no limit.
        read_only: Look at a storage, or a checkpoint, without touching a byte of it, also while another process trains
            it, or on a disk that cannot be written to. It shows one moment, that of the opening: what an opening would
            have shown had the writer died then (`last_commit`, `stats()["sequence"]`). Open it again to see what came
            since. All that reads works, `lookup` with insert=False; all that changes is a ReadOnlyError. `now` is the
            reader's own clock. Goes with `memory` and `threads` alone.

    Raises:
        AlreadyOpenError: The directory is open elsewhere, and read_only is False.
        CorruptionError: Its files are damaged.
        StorageError: It is not a storage, not writable, not a directory.
        ValueError, TypeError: An argument is out of range or of the wrong type.

    Example:
        >>> with Storage("ctr.damo", memory="64MiB") as storage:  # doctest: +SKIP
        ...     users = Embedding(storage, Adam(lr=1e-3), Uniform(-0.01, 0.01), dimension=16, group="user")
        ...     users.apply_gradients(keys, gradients)
        ...     storage.commit(step=1)
    """

    def __init__(
        self,
        path: PathLike,
        *,
        memory: int | str = "1GiB",
        durability: str = "logged",
        threads: int | None = None,
        log_bytes: int | str | None = None,
        ttl: Ttl | None = None,
        disk: int | str | None = None,
        read_only: bool = False,
    ) -> None:
        self._set_up(self._open(path, "open_or_create", memory, durability, threads, log_bytes, ttl, disk, read_only))

    def _set_up(self, opened: tuple[_core.Storage, _Options]) -> None:
        self._core, self._opened_with = opened
        _open_storages.add(self)
        # Which go on when the content is replaced, in the order in which they were made.
        self._embeddings: weakref.WeakKeyDictionary[Embedding, None] = weakref.WeakKeyDictionary()
        self._given_now: int | None = None
        self._dumping: list[int] = []  # the threads that are in a dump, which close() waits for
        self._rates = Rates()
        self._restored_from: Checkpoint | None = None

    @staticmethod
    def _options(
        memory: int | str,
        durability: str,
        threads: int | None,
        log_bytes: int | str | None,
        ttl: Ttl | None,
        disk: int | str | None,
    ) -> _Options:
        memory_bytes = parse_bytes("memory", memory)
        if not _core.MIN_MEMORY_BYTES <= memory_bytes < 2**48:
            raise ValueError(
                f"[open] memory is {memory_bytes} bytes, expected at least {_core.MIN_MEMORY_BYTES} (16 MiB):"
                " it would be too small to work in"
                if memory_bytes < 2**48
                else f"[open] memory is {memory_bytes} bytes, expected less than 2**48"
            )
        if durability not in ("commit", "logged", "durable"):
            raise ValueError(f'[open] durability is {durability!r}, expected "commit", "logged" or "durable"')
        count = 0 if threads is None else parse_int("open", "threads", threads, 1, 1024)
        log = 0 if log_bytes is None else parse_bytes("log_bytes", log_bytes)
        if log_bytes is not None and not 2**20 <= log < 2**62:
            raise ValueError(f"[open] log_bytes is {log}, expected at least {2**20} (1 MiB)")
        space = 0 if disk is None else parse_bytes("disk", disk)
        if disk is not None and not _MIN_DISK <= space < 2**62:
            raise ValueError(f"[open] disk is {space} bytes, expected at least {_MIN_DISK} (64 MiB)")
        if disk is not None and space < _core.MIN_DISK_PER_MEMORY * memory_bytes:
            raise ValueError(
                f"[open] disk is {space} bytes and memory {memory_bytes}, expected disk to be at least"
                f" {_core.MIN_DISK_PER_MEMORY} times memory: give more disk or less memory"
            )
        return memory_bytes, durability, count, log, parse_ttl("open", ttl), space

    @classmethod
    def _open(
        cls,
        path: PathLike,
        mode: str,
        memory: int | str,
        durability: str,
        threads: int | None,
        log_bytes: int | str | None,
        ttl: Ttl | None,
        disk: int | str | None,
        read_only: bool = False,
    ) -> tuple[_core.Storage, _Options]:
        text = parse_path("open", "path", path)
        options = cls._options(memory, durability, threads, log_bytes, ttl, disk)
        if not isinstance(read_only, bool):
            raise TypeError(f"[open] read_only is {read_only!r}, expected True or False")
        if read_only:
            given = {"durability": durability != "logged", "log_bytes": log_bytes is not None}
            given |= {"ttl": ttl is not None, "disk": disk is not None}
            if idle := [name for name, is_given in given.items() if is_given]:
                raise ValueError(
                    f"[open] {' and '.join(idle)} given with read_only=True, which writes nothing: leave it out"
                )
            mode = "read_only"
        try:
            return _core.Storage.open(text, mode, *options), options
        except NewerVersionError:
            raise
        except CorruptionError as damage:
            if read_only or "restore a checkpoint" in str(damage):
                raise
            raise CorruptionError(f"{damage}{_WAY_OUT}") from None

    @classmethod
    def _wrap(cls, opened: tuple[_core.Storage, _Options]) -> Self:
        storage = cls.__new__(cls)
        storage._set_up(opened)
        return storage

    def _go_back_to(self, checkpoint: str, done: bytearray) -> None:
        """Replaces the content by a checkpoint's, for all who use this storage: its embeddings go on with that.

        `done`, one byte, is 1 from when the content is the checkpoint's. An error before that leaves it as it was; one
        that comes later (Ctrl-C, no memory to open it again) leaves the checkpoint's, perhaps closed. Calls on other
        threads meanwhile get a ClosedError.
        """
        if self.read_only:
            raise ReadOnlyError(
                f"[restore] the storage {self.path} is open read-only, and nothing was changed: open it without"
                " read_only to go back to a checkpoint"
            )
        self._check_not_dumping("restore")
        # Numbers before names, which take what is free; and those that say what others take as it is come first.
        embeddings = sorted(
            self._embeddings, key=lambda one: (one._opened_with[0] is None, one._opened_with[-2:] == (None, None))
        )
        wanted = [(embedding._table, embedding._opened_with[-1]) for embedding in embeddings]
        _core.check_layouts(checkpoint, wanted, self._opened_with[0])
        rates = {embedding: self._rates.followed(embedding._table) for embedding in embeddings}
        path = self.path
        durability, in_place = self._opened_with[1], self._core.in_place
        if durability == "commit":
            # What a close would keep, should it be needed again. But a close that cannot is the end of it.
            step, extra = self._core.last_commit() or (0, b"")
            self._core.commit(step, extra)
        try:
            try:
                self._core.close()
            except StorageError:
                # With a log, what it could not write is there. In another's place nothing is to be restored.
                if durability == "commit" or not in_place:
                    raise
            _core.restore(checkpoint, path, self._opened_with[0], done)
        finally:
            self._open_again(path, embeddings, rates, checkpoint if done[0] else None)

    def _open_again(
        self,
        path: str,
        embeddings: list[Embedding],
        rates: dict[Embedding, LearningRate],
        checkpoint: str | None,
    ) -> None:
        """If it is closed; `checkpoint`: what was restored."""
        if not self._core.closed:
            return
        self._core = _core.Storage.open(path, "open", *self._opened_with)
        if checkpoint is not None:
            self._restored_from = read_checkpoint(checkpoint)
        self._rates = Rates()
        wrong: Exception | None = None
        for embedding in embeddings:
            try:
                embedding._open_table()
                self._rates.follow(embedding._table, rates[embedding])
            except Exception as error:  # the others go on all the same
                wrong = wrong or error
        if wrong is not None:
            raise wrong
        if self._given_now is not None:
            try:
                self.now = self._given_now
            except ValueError:  # too far ahead of the checkpoint: the clock stands there until it is set
                self.now = 0

    @classmethod
    def create(
        cls,
        path: PathLike,
        *,
        memory: int | str = "1GiB",
        durability: str = "logged",
        threads: int | None = None,
        log_bytes: int | str | None = None,
        ttl: Ttl | None = None,
        disk: int | str | None = None,
    ) -> Self:
        """A new storage in an absent or empty directory; StorageError if there is one already."""
        return cls._wrap(cls._open(path, "create", memory, durability, threads, log_bytes, ttl, disk))

    @classmethod
    def open(
        cls,
        path: PathLike,
        *,
        memory: int | str = "1GiB",
        durability: str = "logged",
        threads: int | None = None,
        log_bytes: int | str | None = None,
        ttl: Ttl | None = None,
        disk: int | str | None = None,
        read_only: bool = False,
    ) -> Self:
        """An existing storage; StorageError if there is none."""
        return cls._wrap(cls._open(path, "open", memory, durability, threads, log_bytes, ttl, disk, read_only))

    @classmethod
    def restore(
        cls,
        checkpoint: PathLike,
        path: PathLike,
        *,
        memory: int | str = "1GiB",
        durability: str = "logged",
        threads: int | None = None,
        log_bytes: int | str | None = None,
        ttl: Ttl | None = None,
        disk: int | str | None = None,
    ) -> Self:
        """Replaces the storage at `path` by a checkpoint and opens it.

        Every file of the checkpoint is verified first; on any error nothing has changed. The storage at
        `path` must not be open; it may be absent. The checkpoint stays as it is.

        Args:
            checkpoint: A directory that `checkpoint` made.
            path: The storage's directory; what it holds is replaced.
            memory, durability, threads, log_bytes, ttl, disk: As for Storage.

        Returns:
            The open storage.

        Raises:
            CorruptionError: A file of the checkpoint is missing, truncated or damaged.
            AlreadyOpenError: The storage at `path` is open.
            StorageError: `checkpoint` is no checkpoint, `path` is not a storage, or the disk is full.
            ValueError: The checkpoint's admission filters have no room in `memory`; or as for Storage.

        Example:
            >>> storage = Storage.restore("checkpoints/1000", "ctr.damo", memory="2GiB")  # doctest: +SKIP
        """
        options = cls._options(memory, durability, threads, log_bytes, ttl, disk)  # checked before anything is replaced
        source = parse_path("restore", "checkpoint", checkpoint)
        _core.restore(source, parse_path("restore", "path", path), options[0], bytearray(1))
        storage = cls.open(
            path, memory=memory, durability=durability, threads=threads, log_bytes=log_bytes, ttl=ttl, disk=disk
        )
        storage._restored_from = read_checkpoint(source)
        return storage

    @classmethod
    def open_or_restore(
        cls,
        path: PathLike,
        checkpoints: PathLike,
        *,
        replace_damaged: bool = False,
        memory: int | str = "1GiB",
        durability: str = "logged",
        threads: int | None = None,
        log_bytes: int | str | None = None,
        ttl: Ttl | None = None,
        disk: int | str | None = None,
    ) -> Self:
        """The storage at `path`; if there is none, the newest whole checkpoint; if there is none, a new storage.

        A storage that is there is opened as it is: what returned before a kill is in it, also what came after the
        last checkpoint. `restored_from` tells what happened. Checkpoints that are not whole are passed over with a
        RuntimeWarning each.

        Args:
            path: The storage's directory.
            checkpoints: The directory that the checkpoints lie in, which may be absent; or one checkpoint.
            replace_damaged: What to do with a storage that is there but too damaged to open. False: CorruptionError,
                nothing changes. True: the directory is renamed to `PATH.damaged-N`, a RuntimeWarning says so, and
                the newest whole checkpoint takes its place; without one, CorruptionError all the same.
            memory, durability, threads, log_bytes, ttl, disk: As for Storage.

        Damage in a row is found when the row is read, and not here: `verify` reads all of them.

        Raises:
            CorruptionError: The storage is damaged; or there is none, there are checkpoints, and not one is whole.
            NewerVersionError: The storage, or a checkpoint, is of a newer version, which is no damage: not
                replaced, and not passed over.
            AlreadyOpenError: The storage at `path` is open.
            StorageError: `path` is something else than a storage; or the checkpoints are of different storages, of
                which one is to be chosen by its path.

        Example:
            >>> storage = Storage.open_or_restore("ctr.damo", "checkpoints", memory="2GiB")  # doctest: +SKIP
            >>> storage.restored_from  # doctest: +SKIP
            Checkpoint(path='/data/checkpoints/1000', step=1000, sequence=2046, created=1700000000)
        """
        operation = "open_or_restore"
        options: dict[str, Any] = {
            "memory": memory,
            "durability": durability,
            "threads": threads,
            "log_bytes": log_bytes,
            "ttl": ttl,
            "disk": disk,
        }
        cls._options(**options)
        target, place = parse_path(operation, "path", path), parse_path(operation, "checkpoints", checkpoints)
        if not isinstance(replace_damaged, bool):
            raise TypeError(f"[{operation}] replace_damaged is {replace_damaged!r}, expected True or False")
        if not _holds_something(target):
            for checkpoint in newest_first(operation, place):
                try:
                    return cls.restore(checkpoint.path, target, **options)
                except NewerVersionError:
                    raise
                except CorruptionError as wrong:
                    pass_over(operation, wrong, 3)
            return cls(target, **options)
        try:
            return cls.open(target, **options)
        except NewerVersionError:
            raise
        except CorruptionError as damage:
            what = str(damage).removesuffix(_WAY_OUT)
            if not replace_damaged:
                raise CorruptionError(
                    f"{what}. Nothing was replaced: to go on from the newest whole checkpoint in {place}, pass"
                    " replace_damaged=True, which keeps the damaged directory under another name;"
                    " Storage.salvage() brings its good rows into a new storage"
                ) from damage
            for checkpoint in newest_first(operation, place):
                try:
                    verify_checkpoint(checkpoint.path)
                except NewerVersionError:
                    raise
                except CorruptionError as wrong:
                    pass_over(operation, wrong, 3)
                    continue
                if Path(os.path.realpath(checkpoint.path)).is_relative_to(os.path.realpath(target)):
                    raise CorruptionError(
                        f"{what}. Nothing was replaced: the checkpoint {checkpoint.path} is in the storage's own"
                        " directory, which would be renamed and take it along; move the checkpoints to another place"
                    ) from damage
                aside = _set_aside(target)
                warnings.warn(
                    f"[{operation}] the storage {target} is damaged and now at {aside}; {checkpoint.path} takes its"
                    f" place: {what}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return cls.restore(checkpoint.path, target, **options)
            raise CorruptionError(
                f"{what}. Nothing was replaced: there is no checkpoint in {place}; Storage.salvage() brings the good"
                " rows of the storage into a new one"
            ) from damage

    @staticmethod
    def checkpoints(directory: PathLike) -> list[Checkpoint]:
        """The complete checkpoints in a directory, in the order in which they were made; the last one is the newest.

        Complete: the file CHECKPOINT is whole and all files are there with their lengths; `restore` verifies their
        checksums. None for a directory that does not exist.

        Raises:
            StorageError: The directory cannot be read.
        """
        return list_checkpoints(parse_path("checkpoints", "directory", directory))[0]

    @property
    def restored_from(self) -> Checkpoint | None:
        """The checkpoint that this handle began with; None when it opened what was there, or made a new storage."""
        return self._restored_from

    @property
    def path(self) -> str:
        """The storage's directory."""
        return self._core.path

    @property
    def read_only(self) -> bool:
        """Whether it was opened with read_only=True."""
        return self._core.read_only

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._core.closed

    @property
    def now(self) -> int:
        """The storage's clock in whole seconds since 1970: the wall clock, or what was set last.

        Set it to the time of the events when old ones are replayed; it then stands until it is set again. It
        never runs back: a time before the last operation's changes nothing until it is passed. While rows
        expire by time, a step of more than 366 days past the last operation is refused (and not believed of the
        wall clock) until `expire` confirms it.
        """
        return self._core.now

    @now.setter
    def now(self, seconds: int) -> None:
        given = parse_int("now", "now", seconds, 0, 2**62, "whole seconds since 1970 as an int, e.g. int(time.time())")
        self._core.now = given
        self._given_now = given

    def expire(self, now: int | None = None) -> int:
        """Confirms the clock, however far it is ahead of the last operation; returns how many rows expired by it.

        Not needed as long as the storage is used once a year: rows expire by themselves. The disk space comes
        back when RocksDB next merges its files, or by `compact`.

        Args:
            now: Sets the clock, as `storage.now = now` does. None: the wall clock, or what was set.
        """
        given = None if now is None else parse_int("expire", "now", now, 0, 2**62)
        expired = self._core.expire(given)
        if given is not None:
            self._given_now = given
        return expired

    def compact(self) -> None:
        """Rewrites the files without what expired, was erased, dropped or overwritten, to have its space back now.

        Reads and writes the whole storage; needs as much free disk as the rows that stay. Lookups and updates go
        on meanwhile.
        """
        self._core.compact()

    def drop_group(self, group: int | str) -> None:
        """Removes a group (number or name) with all its rows. Its embeddings raise ValueError from now on, and
        ClosedError once the content was replaced by a checkpoint's.

        Raises:
            ValueError: There is no such group.
        """
        number = self._group_number("drop_group", group)
        dropped = [embedding for embedding in self._embeddings if embedding.group == number]
        self._core.drop_group(number)
        for embedding in dropped:  # they go on with nothing
            self._embeddings.pop(embedding, None)

    def groups(self) -> dict[int, str]:
        """The stored groups by number, with their names ("" for one that is known by its number)."""
        return {group["group"]: group["name"] for group in self.stats()["groups"]}

    def _group_number(self, operation: str, group: int | str) -> int:
        """The number of a stored group that is given by number or name."""
        wanted = group if isinstance(group, str) else parse_int(operation, "group", group, 0, 255, "a number or a name")
        groups = self.groups()
        found = [number for number, name in groups.items() if wanted in ((number, name) if name else (number,))]
        if not found:
            known = ", ".join(repr(name) if name else str(number) for number, name in groups.items())
            raise ValueError(f"[{operation}] there is no group {group!r}; the storage has {known or 'none yet'}")
        return found[0]

    def commit(self, step: int | None = None, extra: bytes | str | None = None) -> None:
        """Everything that returned before survives power loss.

        Syncs the log. In mode "commit", which has none, it writes the changed rows and keeps the storage as it is now
        in its directory, for the next opening after a crash: that costs what changed since the last commit, and the
        files of before stay until the next one.

        Args:
            step: A number of yours, at least 0, e.g. the training step.
            extra: Bytes of yours, at most 16 MiB (a str becomes its UTF-8), e.g. where the reader stands.

        `last_commit` gives both back, after reopening and restoring too.

        Raises:
            StorageError: The log could not be written or synced. After a failed sync the storage takes no
                more changes until it is opened again; `last_commit` may be this one then, which power loss undoes.
                In mode "commit": the disk is full, or refused. The last commit stands. With space a later commit
                succeeds; where the storage says that it must be opened again, that goes back to the last commit.
        """
        self._core.commit(*_step_and_extra("commit", step, extra))
        if (held := self._core.clock_held_seconds) > 0:
            warnings.warn(
                f"[commit] the clock is {held / _DAY:,.0f} days ahead of the last operation on {self.path}: no row"
                " expires until storage.expire() confirms that, or storage.now is set to the time of the events",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def last_commit(self) -> tuple[int | None, bytes] | None:
        """(step, extra) of the last commit, or None.

        `step` is None when none was given; `extra` is bytes.
        """
        commit = self._core.last_commit()
        return None if commit is None else (None if commit[0] < 0 else commit[0], commit[1])

    def checkpoint(
        self,
        directory: PathLike,
        step: int | None = None,
        extra: bytes | str | None = None,
        keep: int | None = None,
    ) -> None:
        """Keeps the storage as it is now in a new directory: whole or not at all.

        Rows that changed are written first; table files are hard-linked where the file system can, so the
        cost follows what changed. Training in other threads goes on, but for a pause when it begins
        (`stats()["cut_pause_seconds"]`).

        Args:
            directory: Must not exist; its parent must. `Storage.restore` reads it.
            step, extra: As for `commit`; kept in the checkpoint's file CHECKPOINT.
            keep: How many checkpoints of this storage to leave in the parent of `directory`, this one included,
                at least 1. When it is there, those made first are removed. Only complete ones count and are
                removed; nothing else is touched, nor are checkpoints of another storage. A storage that was
                restored is still the one its checkpoint was made of. None: all.

        A checkpoint that cannot be removed is a RuntimeWarning: the new one is there.

        Raises:
            StorageError: `directory` exists already, its parent does not, or the disk is full; nothing is
                left behind.

        Example:
            >>> storage.checkpoint(f"checkpoints/{step}", step=step, keep=3)  # doctest: +SKIP
        """
        self._checkpoint(directory, step, extra, keep, None)

    def _checkpoint(
        self,
        directory: PathLike,
        step: int | None,
        extra: bytes | str | None,
        keep: int | None,
        fill: Callable[[str], object] | None,
    ) -> None:
        """`fill` puts more files into the directory it is given, before that is the checkpoint."""
        count = 0 if keep is None else parse_int("checkpoint", "keep", keep, 1, 2**31 - 1)
        number, data = _step_and_extra("checkpoint", step, extra)
        text = parse_path("checkpoint", "directory", directory)
        for problem in self._core.checkpoint(text, number, data, count, fill):
            warnings.warn(
                f"[checkpoint] {text} is there, but an old one could not be removed: {problem}",
                RuntimeWarning,
                stacklevel=3,
            )

    def dump(
        self,
        path: PathLike,
        *,
        group: int | str | None = None,
        min_count: int = 0,
        expire_days: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Writes the serving file (keys and weights, little-endian, docs/format.md), as of now.

        It is written aside and renamed: another file of that name is replaced when the new one is whole. Rows
        that were only looked up are in it, with their first weights.

        Args:
            path: The file; its directory exists. `read_dump` reads it.
            group: This group only (number or name).
            min_count: Leave out rows updated fewer times.
            expire_days: Leave out rows whose last update is more than that many days before `now`.
            progress: Told how far it is: a function, called as progress(done, total) at the start, now and then
                and at the end, with the rows gone through (those left out, too) and the rows there are; or a
                progress bar: `tqdm`, or one of your own such as `tqdm(unit=" rows")`, which stays yours to
                close. Any class or object that has tqdm's `reset(total=...)` and `update(n)` will do.

        What `progress` raises ends the dump, and so does Ctrl-C, with it or without: the exception comes out, and
        `path` is what it was. It may use the storage, but not close it.

        Returns:
            How many rows it holds.

        Raises:
            ValueError: There is no such group.
            StorageError: The directory does not exist, or the disk is full; `path` is what it was.
            CorruptionError: A row on disk is damaged; `path` is what it was.

        Example:
            >>> from tqdm import tqdm  # doctest: +SKIP
            >>> storage.dump("weights.bin", group="item", min_count=3, progress=tqdm)  # doctest: +SKIP
            182345
        """
        number = None if group is None else self._group_number("dump", group)
        count = parse_int("dump", "min_count", min_count, 0, 2**32 - 1)
        since = (
            None if expire_days is None else self.now - _DAY * parse_int("dump", "expire_days", expire_days, 0, 10**9)
        )
        text = parse_path("dump", "path", path)
        thread = threading.get_ident()
        with reporting("dump", progress) as report:
            self._dumping.append(thread)
            try:
                return self._core.dump(text, number, count, since, report)
            finally:
                self._dumping.remove(thread)

    def verify(self, *, strict: bool = True) -> VerifyReport:
        """Reads everything that is on the disk, to see whether it is whole. Changes nothing but what a scan does.

        CURRENT and MANIFEST; every record of the log; every byte of the table files, by the checksum that their
        maker noted, those of the last commit in mode "commit" too; the files of the groups' filters; RocksDB's own
        manifest, as the next open would read it; every row, by its checksum; and whether the counts and the filter
        of keys agree with the rows. Training goes on meanwhile, until the log reaches twice `log_bytes`; checkpoints
        and, in mode "commit", commits wait. A checkpoint is verified by `restore`.

        Args:
            strict: Raise CorruptionError when something is damaged. False: leave that to who reads the report.

        Returns:
            What was read, and `damages`, each with its file and, of rows, the group and the key or range of keys.

        Raises:
            CorruptionError: Something is damaged, or could not be read; names it and says why.
            StorageError: The changed rows could not be written first.
        """
        if not isinstance(strict, bool):
            raise TypeError(f"[verify] strict is {strict!r}, expected True or False")
        rows, files, size, records, damages = self._core.verify()
        report = VerifyReport(rows, files, size, records, tuple(Damage(*damage) for damage in damages))
        if strict and report.damages:
            shown = "; ".join(damage.what for damage in report.damages[:_SHOWN])
            more = len(report.damages) - _SHOWN
            raise CorruptionError(
                f"[verify] {self.path} is damaged: {shown}{f'; and {more} more' if more > 0 else ''}. Restore a"
                " checkpoint, or bring the good rows into a new storage with Storage.salvage()"
            )
        return report

    @staticmethod
    def salvage(path: PathLike, out: PathLike, *, manifest_of: PathLike | None = None) -> SalvageReport:
        """Brings every good row of a damaged storage into a new one. The damaged one stays as it is.

        Rows arrive as they were, to the last bit. What cannot be told to be right is left out and listed: a damaged
        row; all rows of a damaged block or file, also where an older file has a version of them; what the log did
        after its first damaged record. A row that had reached the table files by then is in its newest form.

        Args:
            path: The damaged storage, which is not open.
            out: An absent or empty directory.
            manifest_of: A checkpoint of this storage, that tells the groups when its own MANIFEST is damaged. Rows of
                groups that came later are lost.

        Returns:
            How many rows are in the new storage, and `lost`, each with its file and, of rows, the group and the key
            or range of keys.

        Raises:
            CorruptionError: Nothing can be read: MANIFEST is damaged and `manifest_of` not given, or it is not known
                which table files count. Nothing is made.
            AlreadyOpenError: The storage is open.
            StorageError: `path` is no directory, `out` exists already, or the disk is full.

        Example:
            >>> report = Storage.salvage("ctr.damo", "rescued.damo")  # doctest: +SKIP
            >>> for damage in report.lost:  # doctest: +SKIP
            ...     print(damage.file, damage.what, damage.group, damage.key)
        """
        rows, records, lost = _core.salvage(
            parse_path("salvage", "path", path),
            parse_path("salvage", "out", out),
            "" if manifest_of is None else parse_path("salvage", "manifest_of", manifest_of),
        )
        return SalvageReport(rows, records, tuple(Damage(*damage) for damage in lost))

    def stats(self) -> dict[str, Any]:
        """Counts since opening, and sizes now. Sizes are in bytes; keys are distinct keys of a call.

        - rows: of all groups. hot_rows, hot_bytes_in_use, hot_bytes: rows in memory, what they take with
          their index, and their share of the budget.
        - hits, cold_hits, created, misses: keys of training lookups found in memory; brought or read from
          disk, for updates too; rows made; the last two together.
        - evictions, written_back, write_waits: rows that left memory; changed ones among those written; times
          an operation waited for memory.
        - cuts, cut_rows, cut_displaced, cut_pause_seconds: cuts, rows they wrote, old rows set aside
          meanwhile, and how long operations stood still when the last one began.
        - disk_bytes, disk_files, disk_cache_bytes: table files of RocksDB, and its cache. disk_keys_read,
          disk_keys_found, disk_keys_written, disk_bytes_written: what was asked of it and written to it,
          without its compactions.
        - log_bytes, sequence, synced_sequence, redone_records: size of the operation log, number of the last
          operation, the last one that is synced, and how many records were redone at opening. In mode "commit" the
          first is 0, and synced is what the last commit kept. recovery_bytes: table files that are only there
          for going back to it; disk_bytes does not count them.
        - clock_held_seconds: how far the clock is ahead of what is believed before `expire` confirms it.
          forgotten: rows erased to keep within `disk`.
        - groups: for each, group, name, dimension, rows, step (applied updates), row_bytes (of a stored row,
          key and header included), ttl (seconds, Steps(n) or "never"), initializer (its name),
          initializer_settings, seed, admission: None, or of its filter memory_bytes, adds, keys (distinct, about),
          fill, refused (keys of training lookups that got no row), ignored_gradients (keys of updates that had
          none). `Embedding.admission` tells the false-positive rate.
        """
        stats: dict[str, Any] = self._core.stats()
        for group in stats["groups"]:
            group["ttl"] = show_ttl(*group["ttl"])
        return stats

    def close(self) -> None:
        """Writes changed rows to the disk and lets go of the directory. A second call does nothing.

        Calls in flight on other threads end first. When the disk is full no row is lost: the log has them,
        and the next open does them again.

        Raises:
            StorageError: In mode "commit", which has no log, the changed rows could not be written: the storage is
                what it was at the last commit. In the others the log could not be synced: power loss may undo what
                the last commit does not have; or a group in which nothing was done yet could not be saved (on a full
                disk that one is forgotten). In all, the directory was moved or removed. It is closed all the same.
            ValueError: Called by the `progress` of a dump, which it would wait for.
        """
        self._check_not_dumping("close")
        self._core.close()

    def _check_not_dumping(self, operation: str) -> None:
        if threading.get_ident() in self._dumping:
            raise ValueError(
                f"[{operation}] the storage {self.path} is being dumped by this thread: close it when dump() has"
                " returned or raised"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Storage({self.path!r}{', read_only' if self.read_only else ''}{', closed' if self.closed else ''})"

    def __reduce__(self) -> Any:
        raise TypeError("[storage] a Storage cannot be pickled or copied: open the directory where it is needed")
