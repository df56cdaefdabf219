# SPDX-License-Identifier: Apache-2.0
"""A part of the demo as a process: `python -m demo PART DIRECTORY quick|full OPTIONS`, started by `runner`."""

from __future__ import annotations

import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType

from demo.progress import Progress


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C leaves the `with Storage(...)` blocks; the next one must not keep them from closing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGINT, interrupt_once)
    part, directory, size, options = sys.argv[1:]
    progress = Progress()
    try:
        work = import_module(f"demo.{part}").work
        progress.result(work(Path(directory), size == "quick", json.loads(options), progress))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


if __name__ == "__main__":
    main()
