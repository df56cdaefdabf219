# SPDX-License-Identifier: Apache-2.0
"""Tests the tester: every planted defect of src/core must be noticed by a suite. Lists those that were not.

The package must be built with DAMO_PLANTED_DEFECTS; scripts/plant does that. What is known is kept in the record of
the soak (docs/reliability.json), which goes into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from reliability import soak
from reliability.call_fails import KINDS
from reliability.suite import SkippedError
from reliability.suites import SUITES

ROOT = Path(__file__).resolve().parents[3]
# The cheapest suites first. Each gets a share of a defect's time, after an eighth of it: most are noticed by then.
ORDER = (
    "bad-input", "flips", "kill", "cold-flips", "power-loss", "any-order", "call-fails", "disk-full", "ext4-power-loss",
    "torch-kill",
)  # fmt: skip
# Not the bad-input matrices of the fronts, which reach nothing in the core that bad-input does not.
# What no suite does, or seldom, has a test of its own: lives that change; what a second process builds upon; what a
# thread in the background met.
TESTS = {
    "failed write forgotten": "test_system_errors",
    "last expired rows not purged": "test_expiry",
    "filter named by a name that is not synced": "test_power_loss",
    "filter synced without its end": "test_power_loss",
    "storage whose name is not synced": "test_power_loss",
    "opened upon an unsynced manifest": "test_power_loss",
    "redone before it is on the disk": "test_power_loss",
}


def defects() -> list[str]:
    """Their names, as they stand in the sources."""
    found: set[str] = set()
    for source in (ROOT / "src" / "core").rglob("*.cc"):
        found.update(re.findall(r'planted\("([^"]+)"\)', source.read_text()))
    return sorted(found)


def notice(name: str, seconds: float, seed: int = 0, stride: int = 0) -> str:
    """In this process: runs a suite from this seed until it fails; what it said, or ""."""
    stride = stride or (len(KINDS) + 1 if name == "call-fails" else 1)  # each kind of call in turn, at another N
    end = time.monotonic() + seconds
    try:
        with SUITES[name]() as suite:
            # The matrix has an end.
            while time.monotonic() < end and not (name == "bad-input" and seed >= SUITES[name].small):
                try:
                    suite.case(seed)
                except SkippedError:
                    raise
                except Exception as error:
                    said = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
                    return f"seed {seed}: {said}"
                seed += stride
    except SkippedError as missing:
        print(f"{name} skipped: {missing}", file=sys.stderr)
    except Exception as error:
        return f"at the end of the suite: {type(error).__name__}: {error}"
    return ""


def run(defect: str, name: str, seconds: float, seed: int = 0, stride: int = 0) -> str:
    command = [sys.executable, "-m", "reliability.planted", "--suite", name, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--stride", str(stride), "--seconds", str(seconds)],
        env={**os.environ, "DAMO_DEFECT": defect},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stdout.strip() or (f"it ended with {done.returncode}" if done.returncode else "")


def run_test(defect: str, test: str) -> str:
    """What a test said."""
    file = ROOT / "tests" / "python" / f"{test}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    tested = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "DAMO_DEFECT": defect}, stdout=subprocess.PIPE, text=True, check=False
    )
    if tested.returncode == 0:
        return ""
    failed = re.search(r"^(FAILED|ERROR) .*", tested.stdout, re.MULTILINE)
    return failed[0] if failed else f"pytest ended with {tested.returncode}"


def noticed(
    defect: str, suites: Sequence[str], first: int, stride: int, seconds: float, last: str = ""
) -> tuple[str, str]:
    """The suite (or the test) that noticed it, and what it said. Begins with the suite that noticed it last time."""
    if defect in TESTS and (said := run_test(defect, TESTS[defect])):
        if without := run_test("none", TESTS[defect]):
            raise SystemExit(f"{TESTS[defect]} fails without a defect, too: {without}")
        return TESTS[defect], said
    share = seconds / len(suites)
    tries = [(last, share)] if last in suites else []
    tries += [(name, share / 8) for name in suites]
    tries += [(name, share) for name in suites if name != last]
    for name, time_of_suite in tries:
        if said := run(defect, name, time_of_suite, first, stride):
            seed = re.match(r"seed (\d+): ", said)
            if without := run("none", name, 1e-3 if seed else time_of_suite, int(seed[1]) if seed else first, stride):
                raise SystemExit(f"{name} fails without a defect, too: {without}")
            return name, said
    return "", ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/plant", description=__doc__)
    parser.add_argument("defects", nargs="*", help="these only; none: all that no suite has noticed yet")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each defect, shared by the suites")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="defects beside each other")
    parser.add_argument("--in", dest="suites", nargs="+", choices=ORDER, default=ORDER, help="these suites only")
    parser.add_argument("--seed", type=int, default=0, help="the first of each suite")
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help=f"from one seed to the next; --in call-fails --stride {len(KINDS)} keeps to one kind of call, "
        f"with --seed {len(KINDS) - 1} to memory",
    )
    parser.add_argument("--suite", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.suite:
        print(notice(arguments.suite, arguments.seconds, arguments.seed, arguments.stride), end="")
        return 0
    known = defects()
    if unknown := set(arguments.defects) - set(known):
        parser.error(f"there is no defect {sorted(unknown)}")
    what, commit = soak.code(*SUITES)
    entry = soak.load("planted") or {}
    last = {defect: found["noticed_by"] for defect, found in entry.get("defects", {}).items()}
    if entry.get("code") != what:
        entry = {"code": what, "defects": {}}
    entry |= {"commit": commit, "known": len(known)}
    todo = arguments.defects or [defect for defect in known if not entry["defects"].get(defect, {}).get("noticed_by")]

    def look(defect: str) -> tuple[str, dict[str, Any]]:
        started = time.monotonic()
        suite, said = noticed(
            defect, arguments.suites, arguments.seed, arguments.stride, arguments.seconds, last.get(defect, "")
        )
        return defect, {"noticed_by": suite, "what": said[:300], "seconds": round(time.monotonic() - started, 1)}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(look, defect) for defect in todo]):
            defect, found = future.result()
            suite, said = found["noticed_by"], found["what"]
            print(f"{'noticed by ' + suite if suite else 'SURVIVED':<30}{defect}: {said[:150]}", flush=True)
            entry["defects"][defect] = found
            soak.save("planted", entry)
    soak.write_page()
    result = entry["defects"]
    survivors = [defect for defect, found in result.items() if not found["noticed_by"]]
    print(f"{len(result) - len(survivors)} of {len(result)} noticed; survivors: {', '.join(survivors) or 'none'}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
