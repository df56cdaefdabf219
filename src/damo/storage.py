# SPDX-License-Identifier: Apache-2.0
"""A directory that holds embeddings."""

from __future__ import annotations

from typing import Any

import damo_embedding as de
from damo.checkpoints import replace_checkpoint
from damo.open_storages import open_storage
from damo.parameters import Parameters, refuse_others, values_of
from damo_embedding.integers import parse_int
from damo_embedding.storage import parse_path

__all__ = ["PyStorage"]

_HIGHEST = {"expire_days": 10**9, "group": 255, "min_count": 2**32 - 1}


class PyStorage:
    """One directory, made if it is absent or empty; its parent exists.

    A directory that is open in this process already is shared. It is closed with the last object that uses it, or
    when the interpreter exits; a program that dies loses nothing either. One process has it open at a time.

    Memory: 1 GiB for rows and what belongs to them, or what the environment variable DAMO_MEMORY says ("4GiB").

    Args:
        data_dir: The directory.
        ttl_seconds: A row that was not updated for so long is gone; at most 2**40. 0 and below: rows stay. It may
            differ from one opening to the next, and then counts for all that have the directory open.

    Raises:
        AlreadyOpenError: Another process has it open.
        CorruptionError, StorageError: It is damaged, is no storage, or cannot be written.
        ValueError, TypeError: An argument is out of range or of the wrong type.
    """

    def __init__(self, data_dir: str, ttl_seconds: int) -> None:
        path = parse_path("PyStorage", "data_dir", data_dir)
        ttl = parse_int("PyStorage", "ttl_seconds", ttl_seconds, -(2**63), 2**40)
        self._shared = open_storage(path, ttl if ttl > 0 else "never")

    def dump(self, path: str, condition: Parameters | None = None) -> None:
        """Writes keys and weights to the serving file (docs/dump.md), replacing one of that name when it is whole.

        Args:
            path: The file; its directory exists.
            condition: `expire_days` leaves out rows not updated for more than that many days, `group` all other
                groups, `min_count` rows updated fewer times. None: every key that was ever looked up or updated.

        Raises:
            ValueError: The condition has another name, or a number is out of range.
            StorageError, CorruptionError: It could not be written, or a row not be read; `path` is what it was.
        """
        text = parse_path("dump", "path", path)
        values = {} if condition is None else values_of("dump", "condition", condition)
        refuse_others("dump", values, _HIGHEST)
        checked: dict[str, Any] = {
            name: parse_int("dump", name, value, 0, _HIGHEST[name]) for name, value in values.items()
        }

        def dump(storage: de.Storage) -> None:
            if checked.get("group", 0) in storage.groups() or "group" not in checked:
                storage.dump(text, **checked)
            else:
                storage._core.dump(text, checked["group"], 0, None, None)  # no such group yet: the tables, and no row

        self._shared.run(dump)

    def checkpoint(self, path: str) -> None:
        """Writes all that is needed to go on training to the directory `path`, whole or not at all.

        A checkpoint that is there is replaced, at one moment; so is an empty directory. Training may go on meanwhile
        in other threads.

        Raises:
            StorageError: Something else is at `path`, its parent does not exist, or the disk is full; what is at
                `path` is as it was.
        """
        text = parse_path("checkpoint", "path", path)
        self._shared.run(lambda storage: replace_checkpoint(storage, text))

    def load_from_checkpoint(self, path: str) -> None:
        """Replaces the content by that of a checkpoint; embeddings go on with it. The checkpoint stays.

        Every file is verified first. On any error the content is what it was. It needs the disk for the rows in
        memory, beside the directory.

        Raises:
            CorruptionError: A file of the checkpoint is missing or damaged.
            SchemaMismatchError: An embedding in use has another dimension or optimizer than the checkpoint.
            StorageError: `path` is no checkpoint, or the disk is full.
        """
        self._shared.load(parse_path("load_from_checkpoint", "path", path))

    def __repr__(self) -> str:
        return self._shared.run(lambda storage: f"PyStorage({storage.path!r})")
