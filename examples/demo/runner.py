# SPDX-License-Identifier: Apache-2.0
"""Runs parts of the demo as processes of their own: so memory is measured clean, and one that is killed takes nothing
along. Here their progress becomes bars.

They are forked from a process that has imported torch and has done nothing else (`preload`), for importing it takes
seconds each time. Ctrl-C reaches all of them: each part leaves its `with Storage(...)` blocks, and the runner waits for
that.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demo import part

# Where memory is measured, what glibc's allocator keeps for later is the process's as well: by default a heap for every
# thread, and freed arrays of up to 32 MiB. All parts, torch's too, give it back.
_SPARING = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}

# A thread's stack counts as private memory in full, used or not, and 8 MiB is the usual size: too much for a cap of
# some 200 MiB on a process with two dozen threads, ours or torch's. All parts get stacks of 1 MiB.
_STACK_BYTES = 1 << 20

PATIENCE_SECONDS = 60  # how long an interrupted part may take to close its storage


@dataclass
class Job:
    """A part to run: its name, what the bar is called, and the part's own options."""

    part: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    kill_at: int | None = None  # after this many steps the process is killed with SIGKILL, and has no result


class Runner:
    """Starts parts and shows how far they are."""

    def __init__(self, directory: Path, quick: bool) -> None:
        self._directory = directory
        self._quick = quick
        # The server takes all of this from here when it starts: with the first part.
        os.environ.update({name: value for name, value in _SPARING.items() if name not in os.environ})
        here = str(Path(__file__).resolve().parent.parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, hard))
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["demo.preload"])

    def run(self, *jobs: Job) -> list[dict[str, Any]]:
        """Run the jobs side by side and return their results in order. A job that fails ends the demo with
        its message.
        """
        children = [_Child(*self._start(job), job, place) for place, job in enumerate(jobs)]
        try:
            for child in children:
                child.wait()
        except BaseException:
            for child in children:
                child.stop()
            raise
        return [child.outcome() for child in children]

    def _start(self, job: Job) -> tuple[ForkServerProcess, Connection]:
        messages, channel = self._processes.Pipe(duplex=False)
        process = self._processes.Process(
            target=part.run, args=(job.part, self._directory.resolve(), self._quick, job.options, channel)
        )
        process.start()
        channel.close()  # the part's end: when the part is gone, there are no more messages
        return process, messages


class _Child:
    def __init__(self, process: ForkServerProcess, messages: Connection, job: Job, place: int) -> None:
        self._process = process
        self._messages = messages
        self._job = job
        self._steps = 0
        self._result: dict[str, Any] | None = None
        self._bar = tqdm(desc=job.label, position=place, total=1, disable=None, ncols=100, bar_format=_BAR)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while True:
            try:
                message = self._messages.recv()
            except (EOFError, ConnectionError):
                return
            if "total" in message:
                self._bar.reset(total=message["total"])
            if "tick" in message:
                self._steps += 1
                if message["note"]:
                    self._bar.set_postfix_str(message["note"], refresh=False)
                self._bar.update()
                if self._steps == self._job.kill_at:
                    self._process.kill()
                    self._bar.set_postfix_str("killed with SIGKILL")
            if "say" in message:
                tqdm.write("  " + message["say"], file=sys.stderr)
            if "result" in message:
                self._result = message["result"]

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(0.2)  # a join without end would hold Ctrl-C back
        self._process.join()
        self._bar.close()

    def stop(self) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGINT)  # which it has from the terminal, or not
        self._process.join(PATIENCE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._bar.close()

    def outcome(self) -> dict[str, Any]:
        status = self._process.exitcode
        if self._job.kill_at is not None and status == -signal.SIGKILL:
            return {"killed_at": self._steps}
        if self._job.kill_at is not None or status != 0 or self._result is None:
            raise SystemExit(f'error: the part "{self._job.label}" failed (exit status {status}); see above')
        return self._result


_BAR = "  {desc:<34} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
