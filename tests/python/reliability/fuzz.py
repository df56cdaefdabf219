# SPDX-License-Identifier: Apache-2.0
"""Every parser of the core under libFuzzer, AddressSanitizer and UBSan (tests/fuzz/libfuzzer.cc).

What reaches new code is kept in build/fuzz/corpus, where the next case begins. So a case does not come back by its
seed; a finding is a file in build/fuzz/findings, and a failure says the command that shows it again.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from pathlib import Path

from reliability.suite import SkippedError, Suite

ROOT = Path(__file__).resolve().parents[3]
BUILD = Path("build", "fuzz")
PROGRAM = BUILD / "damo_libfuzzer"
SEEDS = BUILD / "seeds"
CORPUS = BUILD / "corpus"
FINDINGS = BUILD / "findings"
RUNS = 100_000


class Fuzz(Suite):
    name = "fuzz"
    title = "libFuzzer on every parser, under AddressSanitizer and UBSan"
    promise = "read, or refused with CorruptionError; no byte is touched that is not the parser's"
    unit = "runs of each parser"
    small = 0  # damo_fuzz is among the C++ tests
    full = 5_000_000
    package = ("CMakeLists.txt", "src/core")  # Python is not in it
    files = ("CMakePresets.json", "tests/CMakeLists.txt", "tests/fuzz")

    def __enter__(self) -> Fuzz:
        if shutil.which("cmake") is None or shutil.which("clang++") is None:
            raise SkippedError("no CMake or no Clang")
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        with open(ROOT / BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # each job comes by here
            for command in (
                ["cmake", "--preset", "fuzz"],
                ["cmake", "--build", "--preset", "fuzz"],
                [PROGRAM, f"--write-seeds={SEEDS}"],
            ):
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        self.parsers = sorted(path.name for path in (ROOT / SEEDS).iterdir())
        for directory in (FINDINGS, *(CORPUS / parser for parser in self.parsers)):
            (ROOT / directory).mkdir(parents=True, exist_ok=True)
        return self

    def case(self, seed: int) -> None:
        for parser in self.parsers:
            command = [PROGRAM, f"--parser={parser}", f"-runs={RUNS}", f"-seed={seed + 1}"]  # 0 is a random one
            command += ["-reload=0", "-timeout=60", f"-artifact_prefix={FINDINGS}/{parser}-"]
            command += [CORPUS / parser, SEEDS / parser]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            if done.returncode != 0:
                written = re.search(r"Test unit written to (.+)", done.stderr)
                again = f"\nagain: {PROGRAM} --parser={parser} {written[1]}" if written else ""
                raise AssertionError(f"{parser}: {done.stderr[-6_000:]}{again}")
            counts = re.search(rf"^{parser}: (\d+) inputs, (\d+) refused$", done.stderr, re.MULTILINE)
            assert counts, done.stderr
            assert int(counts[1]) >= RUNS, done.stderr
            self.done[f"refused: {parser}"] += int(counts[2])
            self.done[f"read: {parser}"] += int(counts[1]) - int(counts[2])
        self.done[self.unit] += RUNS
