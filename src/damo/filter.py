# SPDX-License-Identifier: Apache-2.0
"""Which keys came often enough."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

import damo_embedding as de
from damo.open_once import Held, OpenOnce
from damo.parameters import Parameters, refuse_others, values_of
from damo_embedding.keys import Keys
from damo_embedding.storage import parse_path

__all__ = ["PyFilter"]

_ACCEPTED = ("capacity", "count", "path", "fpr", "reload")


class PyFilter:
    """The counting Bloom filter: counts keys, and says which came at least `count` times. docs/admission.md has more.

    | parameter | default | |
    |---|---|---|
    | `capacity` | 2**28 | distinct keys it is made for |
    | `count` | 15 | a key is let through from this many adds on, 1 to 15 |
    | `fpr` | 1e-3 | false-positive rate at capacity, 1e-9 to 0.5 |
    | `path` | a file in the user's data directory | the filter's file |
    | `reload` | True | go on with the file at `path`; False: start anew |

    The default path is damo-embedding/counting-bloom-filter in $XDG_DATA_HOME, or in ~/.local/share. A file has 7.75
    bytes for each key of the capacity at the default fpr, and the filter takes as much memory: 2 GB at the default
    capacity, so give a smaller one where it will do. A file that is open in this process already is shared.

    Raises:
        SchemaMismatchError: The file is a filter of other settings, and `reload` is True.
        CorruptionError: The file is damaged, or no filter file.
        AlreadyOpenError: Another process has it open.
        StorageError: The system refused.
        ValueError, TypeError: A parameter has another name or is out of range, or `parameters` is no Parameters.
    """

    def __init__(self, parameters: Parameters) -> None:
        values: dict[str, Any] = values_of("PyFilter", "parameters", parameters)
        refuse_others("PyFilter", values, _ACCEPTED)
        path = parse_path("PyFilter", "path", values.pop("path")) if "path" in values else _default_path()
        reload = values.pop("reload", True)
        self._shared = _open_filter(path, {"capacity": 2**28, "count": 15, "fpr": 1e-3, **values}, reload)

    def add(self, key: Keys, num: int = 1) -> None:
        """Counts a key, or each key of an array, `num` times. On return it survives the death of the process.

        Args:
            key: int64 or uint64: one key, or an array of any shape.
            num: At least 0. Beyond 15 nothing is told apart.
        """
        self._shared.filter.add(key, num)

    @overload
    def check(self, key: int) -> bool: ...
    @overload
    def check(self, key: Keys) -> bool | npt.NDArray[np.bool_]: ...

    def check(self, key: Keys) -> bool | npt.NDArray[np.bool_]:
        """Whether a key was added at least `count` times: a bool, or an array of bools for an array of keys."""
        return self._shared.filter.check(key)

    def __repr__(self) -> str:
        return f"PyFilter({self._shared.filter!r})"


class _OpenFilter:
    """One file, open once in this process."""

    def __init__(self, path: str, settings: dict[str, Any], reload: bool) -> None:
        self.settings = settings
        self.held = Held(de.CountingBloomFilter(path=path, reload=reload, **settings))
        self.lock_file = _identity(path)

    def is_there(self, path: str) -> bool:
        return not self.filter.closed and os.path.exists(path) and _identity(path) == self.lock_file

    @property
    def filter(self) -> de.CountingBloomFilter:
        return self.held.opened

    def forget_locks(self) -> None:
        """It has none of its own."""


_open: OpenOnce[_OpenFilter] = OpenOnce()


def _open_filter(path: str, settings: dict[str, Any], reload: bool) -> _OpenFilter:
    """The filter at `path`, opened or shared."""
    real = os.path.realpath(path)
    with _open.lock:
        shared = _open.find(real)
        if shared is not None and not shared.is_there(real):
            _open.close(real)
            shared = None
        if shared is None:
            shared = _OpenFilter(real, settings, reload)
            _open.add(real, shared, shared.held)
        elif not reload:
            de.CountingBloomFilter(**settings)  # refuses what is out of range while the old one is still open
            shared.held.close()
            shared.held.opened = de.CountingBloomFilter(path=real, reload=False, **settings)
            shared.settings = settings
        elif shared.settings != settings:
            raise de.SchemaMismatchError(
                f"[PyFilter] {real} is open with {_show(shared.settings)}; asked for {_show(settings)}: give the same,"
                " another path, or reload=False to start anew"
            )
        return shared


def _show(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _identity(path: str) -> tuple[int, int] | None:
    """Of the lock's file, which is neither replaced nor removed as long as the filter is open."""
    try:
        found = os.stat(path + ".lock")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _default_path() -> str:
    """In the user's own data directory; a folder that is made for it is open to the user alone."""
    home = os.environ.get("XDG_DATA_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "share"
        folder = base / "damo-embedding"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise de.StorageError(f"[PyFilter] there is no place for its file, give a path: {error}") from error
    return str(folder / "counting-bloom-filter")
