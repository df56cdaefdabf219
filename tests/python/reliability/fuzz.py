# SPDX-License-Identifier: Apache-2.0
"""Every parser of the core, fed with changed inputs under AddressSanitizer and UBSan (tests/fuzz/fuzz.cc)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from reliability.suite import SkippedError, Suite

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "asan" / "damo_fuzz"
RUNS = 20_000


class Fuzz(Suite):
    name = "fuzz"
    title = "changed inputs of every parser, under AddressSanitizer and UBSan"
    promise = "read, or refused with CorruptionError; no byte is touched that is not the parser's"
    unit = "inputs of each parser"
    small = 0  # a second of each is among the C++ tests
    full = 5_000_000

    def __enter__(self) -> Fuzz:
        if shutil.which("cmake") is None or shutil.which("g++") is None:
            raise SkippedError("no CMake or no C++ compiler")
        if not PROGRAM.exists():
            for command in (["--preset", "asan"], ["--build", "--preset", "asan", "--target", "damo_fuzz"]):
                subprocess.run(["cmake", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return self

    def case(self, seed: int) -> None:
        command = [str(PROGRAM), "--runs", str(RUNS), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        for name, runs, refused in re.findall(r"^(.+): (\d+) runs, (\d+) refused$", done.stdout, re.MULTILINE):
            assert int(runs) == RUNS, done.stdout
            self.done[f"refused: {name}"] += int(refused)
        self.done[self.unit] += RUNS
