# SPDX-License-Identifier: Apache-2.0
"""A little of each suite, of a core built with sanitizers: AddressSanitizer with UBSan, or ThreadSanitizer.

scripts/sanitize builds that core and calls this. A report fails the case in whose time it was written, wherever it was:
whoever is to be killed anyway leaves it in a file. So does a report in the process of the suite itself, which it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from damo_embedding import _core
from reliability import faults, soak
from reliability.suite import SkippedError
from reliability.suites import SUITES
from storage_server import fork_server

ROOT = Path(__file__).resolve().parents[3]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Those that take longest first. Not fuzz: it has a program of its own, which has the sanitizers.
DEFAULT = (
    "power-loss", "any-order", "torch-kill", "kill", "call-fails", "disk-full", "ext4-power-loss", "flips",
    "cold-flips", "bad-input", "bad-input-damo",
)  # fmt: skip
STRIDE = {"call-fails": 23}  # as in test_reliability.py: a few seeds see all kinds


def python_of(name: str) -> Path:
    """Which finds the package with this sanitizer, and starts with `environment` only. scripts/sanitize makes it."""
    return ROOT / "build" / "sanitized" / name / "venv" / "bin" / "python"


def environment(name: str, reports: Path) -> dict[str, str]:
    """Of a process with this sanitizer, whose reports are files in `reports`."""
    compiler = os.environ.get("CXX", "g++")
    preloaded = []
    # Python loads no C++ library, whose function for throwing the runtime takes when it starts.
    for library in (RUNTIMES[name], "libstdc++.so.6"):
        found = subprocess.run([compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True)
        path = found.stdout.strip()
        if not os.path.isabs(path):
            raise FileNotFoundError(f"{compiler} has no {library}")
        preloaded.append(str(Path(path).resolve()))
    common = f"log_path={reports}/report:exitcode=77:allocator_may_return_null=1"  # bad-input asks for too much
    # Memory that Python has at its end is no leak. A crash is the sanitizer's, not a handler's of the test. operator
    # new is of tests/faults/memory.cc in some suites. (RocksDB moves objects whose size it knows, as they are.)
    address = "detect_leaks=0:handle_segv=2:handle_sigbus=2:verify_asan_link_order=0:detect_stack_use_after_return=0"
    # Forks with threads are the fork server's, whose children start their own.
    thread = f"halt_on_error=1:die_after_fork=0:suppressions={ROOT / 'tests' / 'tsan.supp'}"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": f"{common}:{address}",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{common}:{thread}",
        # Threads of NumPy's are none of ours.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def reported(reports: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(reports.iterdir()))


def take_cases(name: str, seeds: list[int], seconds: float, reports: Path) -> int:
    """In a process with the sanitizer. Says each seed before it begins, for a report may end it."""
    kind = SUITES[name]
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        try:
            suite = stack.enter_context(kind())
        except SkippedError as missing:  # raised later it is a failure
            print(f"skipped {missing}", flush=True)
            return 0
        for place, seed in enumerate(seeds):
            if place and time.monotonic() > end:  # a suite that takes long to begin is to show something, too
                break
            print(f"seed {seed}", flush=True)
            suite.case(seed)
            assert not list(reports.iterdir()), "a report of the sanitizer"
        print(f"done {suite.done[kind.unit]}", flush=True)
    return 0


def run_part(name: str, suite: str, part: int, seeds: list[int], seconds: float) -> tuple[int, float, str, str]:
    """(cases, units, why none ran, what went wrong) of a share of a suite's cases."""
    reports = ROOT / "build" / "sanitized" / name / "reports" / f"{suite}-{part}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    command = [str(python_of(name)), "-m", "reliability.sanitized", name, suite, "--part", str(part)]
    command += ["--seconds", str(seconds), "--seeds", *map(str, seeds)]
    done = subprocess.run(command, env=environment(name, reports), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    begun = [line.split()[1] for line in lines if line.startswith("seed ")]
    skipped = next((line for line in lines if line.startswith("skipped ")), "")
    units = next((float(line.split()[1]) for line in lines if line.startswith("done ")), 0.0)
    wrong = ""
    if done.returncode != 0 or list(reports.iterdir()):
        last = f"--seed {begun[-1]}" if begun else "(before the first case)"
        wrong = f"{suite} {last}: exit status {done.returncode}\n{done.stderr[-6000:]}\n{reported(reports)}"
    return len(begun), units, skipped, wrong


def fault(served: object, kind: str) -> None:
    """What a sanitizer must see, in a child of a fork server, as the suites' storages are."""
    del served
    core = Path(_core.__file__)
    assert core.is_relative_to(ROOT / "build" / "sanitized" / kind), core
    assert f"__{kind[0]}san_".encode() in core.read_bytes(), f"{core} is not built with a sanitizer"
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size = 64 << 20
    memory = libc.malloc(ctypes.c_size_t(size))

    def fill(extra: int = 0) -> None:
        libc.memset(ctypes.c_void_p(memory), 1, ctypes.c_size_t(size + extra))

    if kind == "address":
        fill(1)
    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def provoke(name: str) -> int:
    from reliability import sanitized  # by its name, as the child knows it

    with fork_server(faults.environment(), "reliability.sanitized") as server:
        session = server.session()
        try:
            session("call", sanitized.fault, name)
        except (EOFError, OSError):
            session.kill()
    return 0


def check_the_sanitizer(name: str) -> None:
    """A report must reach us, or a run without reports shows nothing."""
    reports = ROOT / "build" / "sanitized" / name / "reports" / "provoked"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    command = [str(python_of(name)), "-m", "reliability.sanitized", name, "--provoke"]
    done = subprocess.run(command, env=environment(name, reports), capture_output=True, text=True, check=False)
    said = reported(reports)
    if "Sanitizer" not in said:
        raise SystemExit(f"a fault that was provoked was not reported: {done.returncode}\n{done.stdout}\n{done.stderr}")
    shutil.rmtree(reports)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/sanitize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sanitizer", choices=RUNTIMES)
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; none: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--cases", type=int, default=20, help="of each suite")
    parser.add_argument("--seed", type=int, help="one case of one suite, to see a failure again")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="for each suite; its cases in hand go on to their end"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="keep what was run, as scripts/soak does")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--provoke", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"there is no suite {sorted(unknown)}; there are {', '.join(SUITES)}")
    name = arguments.sanitizer
    if arguments.provoke:
        return provoke(name)
    seconds = arguments.seconds or float("inf")
    if arguments.part is not None:
        (suite,) = arguments.suites
        reports = ROOT / "build" / "sanitized" / name / "reports" / f"{suite}-{arguments.part}"
        return take_cases(suite, arguments.seeds, seconds, reports)
    if arguments.seed is not None and len(arguments.suites) != 1:
        parser.error("--seed is of one suite")
    for library in ("faults", "memory"):
        faults.library(library)  # a compiler is not to run under a sanitizer
    check_the_sanitizer(name)
    names = arguments.suites or list(DEFAULT)
    what, commit = soak.code(*SUITES)
    ran = {}
    running = {}
    failures = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for suite in names:
            stride = STRIDE.get(suite, 1)
            seeds = [place * stride for place in range(arguments.cases)] if arguments.seed is None else [arguments.seed]
            parts = max(
                1, min(arguments.jobs, len(seeds) // 5)
            )  # each has to begin first, which takes as long as cases
            shares = [seeds[part::parts] for part in range(parts)]
            running[suite] = [
                pool.submit(run_part, name, suite, part, share, seconds) for part, share in enumerate(shares)
            ]
        for suite in names:
            done = [part.result() for part in running[suite]]
            cases, units = sum(part[0] for part in done), sum(part[1] for part in done)
            skipped = next((part[2] for part in done if part[2]), "")
            wrong = [part[3] for part in done if part[3]]
            failures += len(wrong)
            said = "FAILED" if wrong else skipped or f"{units:.0f} {SUITES[suite].unit}"
            print(f"{suite}: {cases} cases, {said}", flush=True)
            ran[suite] = said
            for text in wrong:
                print(f"FAILED: scripts/sanitize {name} {text}", flush=True)
    if arguments.record:
        entry = soak.load("sanitizers") or {}
        soak.save("sanitizers", entry | {name: {"code": what, "commit": commit, "cases": arguments.cases, "ran": ran}})
        soak.write_page()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
