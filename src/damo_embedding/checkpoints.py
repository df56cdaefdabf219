# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a directory, and which of them to go back to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from damo_embedding import _core
from damo_embedding.errors import CorruptionError, NewerVersionError, StorageError

__all__ = ["Checkpoint"]

_LINEAGE = 8  # bytes of a storage's id that a restore keeps


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself."""

    path: str
    step: int | None  # None when none was given
    sequence: int  # number of the last operation in it
    created: int  # seconds since 1970
    _id: bytes = field(default=b"", repr=False)

    @property
    def _lineage(self) -> bytes:
        return self._id[:_LINEAGE]

    @staticmethod
    def _of(path: str, about: Iterable[Any]) -> Checkpoint:
        step, sequence, created, storage_id = about
        return Checkpoint(os.path.abspath(path), None if step < 0 else step, sequence, created, storage_id)


def list_checkpoints(directory: str) -> tuple[list[Checkpoint], list[tuple[str, str, bool]]]:
    """The complete ones, oldest first; and what cannot be used, with what is wrong, and whether a newer version is."""
    complete, damaged = _core.list_checkpoints(directory)
    return [Checkpoint._of(path, about) for path, *about in complete], damaged


def verify_checkpoint(path: str) -> Checkpoint:
    """Reads all of it; CorruptionError or StorageError."""
    return Checkpoint._of(path, _core.verify_checkpoint(path))


def read_checkpoint(path: str) -> Checkpoint:
    """What its file CHECKPOINT says."""
    return Checkpoint._of(path, _core.read_checkpoint(path))


def pass_over(operation: str, wrong: object, stacklevel: int) -> None:
    warnings.warn(
        f"[{operation}] a checkpoint is passed over, for it is not whole: {wrong}", RuntimeWarning, stacklevel
    )


def newest_first(operation: str, place: str, stacklevel: int = 4) -> Iterator[Checkpoint]:
    """The complete checkpoints at `place`, a directory of them or one itself, newest first. Warns of the others.

    Nothing for a directory that is absent or has none. Raises CorruptionError when nobody took what there is, so ask
    for the next one only if the last is no good. One of a newer version, which may be the newest, is not passed over:
    NewerVersionError.
    """
    if os.path.lexists(os.path.join(place, "CHECKPOINT")):
        yield read_checkpoint(place)
        raise CorruptionError(f"[{operation}] the checkpoint {place} is not whole: give another one")
    complete, damaged = list_checkpoints(place)
    for path, wrong, newer in damaged:
        if newer:
            raise NewerVersionError(
                f"[{operation}] {wrong}. Nothing was changed: to go on from an older checkpoint, move {path} away"
            )
        pass_over(operation, wrong, stacklevel)
    if len({checkpoint._lineage for checkpoint in complete}) > 1:
        first = complete[0]
        other = next(one for one in complete if one._lineage != first._lineage)
        raise StorageError(
            f"[{operation}] {place} holds checkpoints of different storages, such as {first.path} and {other.path}:"
            " give the path of the one you want, or move the others away"
        )
    yield from reversed(complete)
    if complete or damaged:
        raise CorruptionError(
            f"[{operation}] none of the {len(complete) + len(damaged)} checkpoints in {place} is whole: nothing was"
            " changed; to begin anew, move them away"
        )
