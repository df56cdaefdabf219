# SPDX-License-Identifier: Apache-2.0
"""The output directory: replaced by every run, but only if it is one of ours."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

MARK = ".damo-demo"


def prepare(directory: Path) -> None:
    """Make an empty output directory. What an earlier run left in it goes; what is not ours stays, and is an
    error.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise SystemExit(f"error: {directory} is not a directory; choose another with --out")
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARK).is_file():
            raise SystemExit(
                f"error: {directory} holds files that are not the demo's (there is no {MARK} in it), "
                "so it stays as it is; choose another directory with --out"
            )
        for entry in directory.iterdir():
            if entry.name != MARK:  # the mark goes last: a run stopped here is recognized by the next one
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).write_text("Written by examples/demo.py, which replaces everything in this directory.\n")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def bytes_on_disk(directory: Path) -> int:
    """The sizes of all files below, each counted once however many hard links it has."""
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # a live storage removes files while we look
                continue
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
