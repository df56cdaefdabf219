# SPDX-License-Identifier: Apache-2.0
"""Drives tests/faults, the libraries that stand between a process and its file system, and its memory.

It works in processes that were started with `environment()`. Here is also the list of points: a kind of call and a
class of file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "tests" / "faults"

# As the library numbers them.
KILL_BEFORE, KILL_AFTER, FAIL, FAIL_FOR_GOOD, SHORT, TEAR = range(1, 7)

# Every (kind, class) that a storage visits, but for what RocksDB writes for itself and never reads.
POINTS = [
    ("open", ""),
    ("write", "log"), ("write", "log.tmp"), ("write", "ingest.sst"), ("write", "sst"), ("write", "rocksdb-manifest"),
    ("write", "COMMITTED"), ("write", "COMMITTED.tmp"), ("write", "MANIFEST.tmp"), ("write", "CURRENT.tmp"),
    ("write", "presence.tmp"), ("write", "CHECKPOINT.tmp"), ("write", "rocksdb-CURRENT.tmp"), ("write", "dump.tmp"),
    ("write", "filter.tmp"), ("sync", "filter.tmp"), ("rename", "filter"), ("unlink", "filter"),
    ("sync", "log"), ("sync", "log.tmp"), ("sync", "ingest.sst"), ("sync", "sst"), ("sync", "rocksdb-manifest"),
    ("sync", "COMMITTED"), ("sync", "COMMITTED.tmp"), ("sync", "MANIFEST.tmp"), ("sync", "CURRENT.tmp"),
    ("sync", "presence.tmp"), ("sync", "CHECKPOINT.tmp"), ("sync", "rocksdb"), ("sync", "generation"),
    ("sync", "checkpoint.tmp"), ("sync", "dump.tmp"),
    ("rename", "log"), ("rename", "COMMITTED"), ("rename", "MANIFEST"), ("rename", "CURRENT"), ("rename", "presence"),
    ("rename", "CHECKPOINT"), ("rename", "checkpoint"), ("rename", "rocksdb-CURRENT"), ("rename", "dump"),
    ("link", "sst"), ("unlink", "ingest.sst"), ("unlink", "log"), ("unlink", "sst"), ("unlink", "rocksdb-manifest"),
    ("unlink", "CREATING"), ("unlink", "MANIFEST"), ("unlink", "generation"), ("mkdir", ""),
    ("truncate", "log"), ("truncate", ""),
]  # fmt: skip


@cache
def library(name: str = "faults") -> Path:
    """A built library; a build takes seconds and is kept under build/faults."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (looked for g++)")
    source = SOURCES / f"{name}.cc"
    version = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    built = ROOT / "build" / "faults" / f"libdamo_{name}-{version}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        staged = built.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(staged), "-ldl"], check=True)
        os.replace(staged, built)
    return built


def environment() -> dict[str, str]:
    """What a process needs in its environment to be under the library. A sanitizer that is preloaded stays."""
    preloaded = os.environ.get("LD_PRELOAD", "").split()
    libraries = [str(library("memory")), *preloaded, str(library())]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "DAMO_FAULTS": str(library())}


class Faults:
    """The library in this process."""

    def __init__(self) -> None:
        assert "DAMO_FAULTS" in os.environ, "this process was not started with faults.environment()"
        self._library = ctypes.CDLL(os.environ["DAMO_FAULTS"])
        self._library.damo_faults_mark.argtypes = [ctypes.c_char, ctypes.c_uint64]
        self._library.damo_faults_arm.argtypes = [
            ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int,
        ]  # fmt: skip
        self._library.damo_faults_hit.restype = ctypes.c_char_p
        self._library.damo_faults_counts.restype = ctypes.c_char_p
        self._library.damo_faults_visits.restype = ctypes.c_uint64

    def watch(self, root: Path, journal: Path | None = None, epitaph: Path | None = None) -> None:
        """Calls below `root` count from now on; all that changes there is written to `journal`.

        Whoever is killed at a point leaves its name in `epitaph`: who is dead without one died of something else.
        """
        if epitaph is not None:
            self._library.damo_faults_epitaph(os.fsencode(epitaph))
        if journal is not None:
            assert self._library.damo_faults_journal(os.fsencode(journal)) == 0
        self._library.damo_faults_watch(os.fsencode(root))

    def mark(self, kind: bytes, number: int) -> None:
        self._library.damo_faults_mark(kind, number)

    def flush(self) -> None:
        self._library.damo_faults_flush()

    def arm(self, action: int, call: str, file_class: str, nth: int, error: int = 5) -> None:
        known = self._library.damo_faults_arm(action, call.encode(), file_class.encode(), nth, error)
        assert known == 0, call

    def disarm(self) -> None:
        self._library.damo_faults_disarm()

    def pause(self, pause: bool) -> None:
        """Between a pause and its end calls are neither counted nor harmed."""
        self._library.damo_faults_pause(int(pause))

    def hit(self) -> str:
        return str(self._library.damo_faults_hit().decode())

    def visits(self) -> int:
        return int(self._library.damo_faults_visits())

    def counts(self) -> dict[tuple[str, str], int]:
        """Visits by (kind, class) since the last arm."""
        lines = self._library.damo_faults_counts().decode().splitlines()
        return {(call, name): int(count) for call, name, count in (line.split(" ") for line in lines)}
