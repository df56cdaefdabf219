# SPDX-License-Identifier: Apache-2.0
"""A part of the demo in a process of its own, forked by `runner` from one that has imported everything already."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from demo.progress import Progress


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C leaves the `with Storage(...)` blocks; the next one must not keep them from closing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(name: str, directory: Path, quick: bool, options: dict[str, Any], channel: Connection) -> None:
    signal.signal(signal.SIGINT, interrupt_once)
    os.dup2(2, 1)  # what libraries print is not for the demo's standard output
    progress = Progress(channel)
    try:
        work = import_module(f"demo.{name}").work
        progress.result(work(directory, quick, options, progress))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
