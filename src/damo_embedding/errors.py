# SPDX-License-Identifier: Apache-2.0
"""What this package raises when it is not the caller's mistake.

Exception
└── DamoError
    ├── CorruptionError        bytes on disk are not what was written; names the file and the offset or key
    │   └── NewerVersionError  a newer version of this package wrote them: upgrade
    ├── SchemaMismatchError    the storage holds a group, or the file a filter, of other settings
    ├── StorageError           the operating system or the cold tier refused: I/O error, disk full, memory
    ├── ReadOnlyError          a change was asked of a storage that is open with read_only=True
    ├── ClosedError            used after close()
    ├── AlreadyOpenError       another process, or another handle, has the directory or file open; names the holder
    └── ForkedHandleError      used in a child process after fork(); open the storage there

A caller's mistake is a ValueError or a TypeError. Whatever fails leaves the storage as it was.
"""

from __future__ import annotations

__all__ = [
    "AlreadyOpenError",
    "ClosedError",
    "CorruptionError",
    "DamoError",
    "ForkedHandleError",
    "NewerVersionError",
    "ReadOnlyError",
    "SchemaMismatchError",
    "StorageError",
]


class DamoError(Exception):
    """Base of all errors of this package."""


class CorruptionError(DamoError):
    """Bytes on disk are not what was written."""


class NewerVersionError(CorruptionError):
    """A newer version of this package wrote it: nothing is damaged, and nothing was changed."""


class SchemaMismatchError(DamoError):
    """The storage holds a group, or the file a filter, of other settings."""


class StorageError(DamoError):
    """The operating system or the cold tier refused: I/O error, disk full, out of memory."""


class ReadOnlyError(DamoError):
    """A change was asked of a storage that is open with read_only=True."""


class ClosedError(DamoError):
    """The storage or filter was used after close()."""


class AlreadyOpenError(DamoError):
    """The directory, or the filter's file, is open elsewhere."""


class ForkedHandleError(DamoError):
    """A handle of the parent process was used after fork()."""
