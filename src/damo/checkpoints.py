# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that replace the one before under the same name.

The new one is made beside the old one, and the two change names in one step of the file system (renameat2), so that
a crash leaves the old one or the new one. A file system without that step takes two: a crash between them leaves
nothing under the name, and both of them, whole, beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil

import damo_embedding as de

__all__ = ["replace_checkpoint"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_counter = itertools.count()


def replace_checkpoint(storage: de.Storage, path: str) -> None:
    """Makes a checkpoint at `path`, in the place of one that is there, or of an empty directory. Or a StorageError."""
    target = os.path.realpath(path)
    try:
        _replace(storage, target)
    except OSError as error:
        raise de.StorageError(f"[checkpoint] {target} cannot be replaced: {error}") from error


def _replace(storage: de.Storage, target: str) -> None:
    expect_replaceable(target)
    if not os.path.lexists(target):
        storage.checkpoint(target)
        return
    aside = f"{target}.replacing-{os.getpid()}-{next(_counter)}"
    storage.checkpoint(aside)
    try:
        expect_replaceable(target)  # it took a while
        old = _exchange(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):  # Ctrl-C may come after the exchange, and then this is the old one
            _sync_directory(os.path.dirname(target))
            _remove(aside)
        raise
    _sync_directory(os.path.dirname(target))
    _remove(old)


def expect_replaceable(target: str) -> None:
    """StorageError if something is at `target` that is neither a checkpoint of ours nor an empty directory."""
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    with contextlib.suppress(OSError), open(os.path.join(target, "CHECKPOINT"), "rb") as file:
        if file.read(8) == b"DAMOCKPT":
            return
    raise de.StorageError(
        f"[checkpoint] {target} exists and is no checkpoint: it is left as it is; give another path, or remove it"
    )


def _exchange(aside: str, target: str) -> str:
    """Puts `aside` in the place of `target`; returns where the old one is now."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(aside), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return aside
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise de.StorageError(f"[checkpoint] {target} cannot be replaced: {os.strerror(code)}")
    old = f"{aside}-old"
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


def _remove(checkpoint: str) -> None:
    # First what makes it a checkpoint, so that no half of one can be loaded.
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(checkpoint, "CHECKPOINT"))
    shutil.rmtree(checkpoint, ignore_errors=True)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
