# SPDX-License-Identifier: Apache-2.0
"""Runs suites at any size, goes on where it was stopped, and writes docs/reliability.md.

The record is docs/reliability.json: for each suite the code, the first seed, how many cases are done in a row, and
what they did. Other code or another first seed begins anew; a commit that changes neither the package nor what the
suite imports or names goes on, also on another machine, and so does one that changes docstrings or lines of C++ that
are a comment alone. A case is a seed, so a failure is one number. What is run with changes that are not committed
shows nothing of a commit: it is kept in build/soak, apart.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from reliability.suite import SkippedError
from reliability.suites import SUITES
from reliability.workload import again

ROOT = Path(__file__).resolve().parents[3]
DOCS, APART = ROOT / "docs", ROOT / "build" / "soak"
TESTS = ROOT / "tests" / "python"
# What is on top of damo_embedding, and the suites that see it; the others ask damo_embedding itself.
FRONTS = {"src/damo_embedding/torch": {"torch-kill", "bad-input-torch"}, "src/damo": {"bad-input-damo"}}

SANITIZERS = {"address": "AddressSanitizer with UBSan", "thread": "ThreadSanitizer"}
INTRODUCTION = """\
# Reliability

What the storage promises when a process dies, the power goes, a disk is full or damaged, and how often each was
tried. Written by `scripts/soak`, which goes on where it was stopped; `scripts/soak NAME --seed N` shows a case again
(of `fuzz`, a file in `build/fuzz/findings`). Cases of `fuzz` look for crashes, those of the bad-input matrices at
errors and at what has changed, those of `torch-kill` compare all with a training that was left alone; every other case
compares every row, bit for bit, with an oracle in NumPy that shares no code with the core
([`tests/python/reliability`](../tests/python/reliability)).

| suite | promise | done | failures | commit | seeds |
|---|---|---|---|---|---|
"""
LIMITS = """\
## What is not shown

- A disk that says a sync is done which is not. No software finds that out. Nor a file system without a journal on
  which the sync of a directory fails, succeeds when it is tried again, and did not write what the first one left.
- Memory that runs out inside RocksDB or nanobind, or for good: the process may end, which is as a kill. Once,
  elsewhere, it is a MemoryError. `call-fails` lets one `operator new` of the calling thread fail, once, and tries a
  sample of the tens of thousands that there are.
- A read error in a table file in the moment in which it is handed to RocksDB: the builds of RocksDB that
  distributions ship end the process then. What was logged is redone at the next open.
- More than one flipped bit may pass a checksum, with a probability of 2^-32 (rows, tables, what torch adds to a
  checkpoint) or 2^-64 (our other files).
"""


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout


@cache
def depends_on(name: str) -> tuple[str, ...]:
    """The files and folders that decide what a case of a suite does."""
    kind = SUITES[name]
    finder = ModuleFinder(path=[str(TESTS)])
    finder.run_script(inspect.getfile(kind))
    found = {Path(module.__file__) for module in finder.modules.values() if module.__file__}
    modules = sorted(str(path.resolve().relative_to(ROOT)) for path in found)
    unseen = [f":(exclude){front}" for front, seen_by in FRONTS.items() if name not in seen_by]
    return (*kind.package, *kind.files, *modules, *unseen)


def without_words(suffix: str, text: str) -> str:
    """Source without its docstrings, or its lines of C++ that are a comment alone: what they say, no case can see."""
    if suffix == ".py":
        lines: list[str | None] = list(text.split("\n"))
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if ast.get_docstring(node, clean=False) is not None:
                words, after = node.body[0], [other.lineno for other in node.body[1:]]
                begin, end = words.lineno - 1, words.end_lineno or words.lineno
                if end not in after and not (lines[begin] or "")[: words.col_offset].strip():
                    lines[begin:end] = [None] * (end - begin)
        return "\n".join(line for line in lines if line is not None)
    # In a raw string, or after a backslash that ends a line, such a line may be none.
    if suffix in {".cc", ".cpp", ".h"} and 'R"' not in text and "\\\n" not in text:
        return re.sub(r"^[ \t]*//.*\n", "", text, flags=re.MULTILINE)
    return text


@cache
def _fingerprint(path: Path, blob: str) -> str:
    """Of a file as it stands; `blob`, its name in git, changes when it does."""
    if path.suffix not in {".py", ".cc", ".cpp", ".h"}:
        return blob
    try:
        return hashlib.sha256(without_words(path.suffix, path.read_text()).encode()).hexdigest()
    except (OSError, SyntaxError):  # it is being changed
        return blob


def tracked(*names: str) -> list[str]:
    """The lines of git's index, by path, of what any of these suites depends on: what one excludes another may see."""
    lines = {line for name in names for line in git("ls-files", "--stage", "--", *depends_on(name)).splitlines()}
    return sorted(lines, key=lambda line: line.split("\t")[1])


def code(*names: str) -> tuple[str, str]:
    """A name for what suites run, and the commit; with a mark for what is not committed and shows nothing."""
    files = [line.split("\t") for line in tracked(*names)]
    parts = [f"{stage.split()[0]} {name} {_fingerprint(ROOT / name, stage.split()[1])}" for stage, name in files]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *(name for _, name in files)) else ""
    return digest + dirty, git("rev-parse", "--short", "HEAD").strip() + dirty


def machine() -> str:
    system, release = platform.system(), platform.release().split("-")[0]
    return f"{system} {release}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _record(name: str) -> Path:
    """Where the entry of a suite is, or that of "planted", which is of all."""
    suites = [name] if name in SUITES else list(SUITES)
    return (APART if code(*suites)[0].endswith("-dirty") else DOCS) / "reliability.json"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def load(name: str) -> dict[str, Any] | None:
    entry: dict[str, Any] | None = _read(_record(name)).get(name)
    return entry


def save(name: str, entry: dict[str, Any]) -> None:
    path = _record(name)
    record = _read(path)  # another entry may be of somebody who runs beside this
    record[name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(staged, path)


def write_page() -> None:
    """reliability.md, beside each record."""
    for path in (DOCS / "reliability.json", APART / "reliability.json"):
        if path.exists():
            path.with_suffix(".md").write_text(page(_read(path)))
            print(f"written: {path.with_suffix('.md').relative_to(ROOT)}")


def work(name: str, todo: Any, results: Any) -> None:
    """A process: cases by their seeds until there is a None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ExitStack() as stack:
        try:
            suite = stack.enter_context(SUITES[name]())
        except SkippedError as missing:  # raised later it is a failure: nothing that the suite needs was missing
            results.put((None, {}, f"skipped: {missing}", 0.0))
            return
        for seed in iter(todo.get, None):
            before, started, failure = Counter(suite.done), time.monotonic(), ""
            try:
                suite.case(seed)
            except Exception:
                failure = traceback.format_exc().replace(f"{ROOT}/", "")
            results.put((seed, dict(suite.done - before), failure, time.monotonic() - started))


def run(name: str, units: int, cases: int, first: int, jobs: int, until: float) -> dict[str, Any]:
    """Goes on with a suite, to so many units or, unless 0, so many cases; returns its entry in the record."""
    kind = SUITES[name]
    entry = load(name)
    what, commit = code(name)
    if entry is None or (entry["code"], entry["first_seed"]) != (what, first):
        entry = {"code": what, "first_seed": first, "cases": 0, "done": {}, "failures": [], "seconds": 0.0}
    entry["commit"] = commit
    entry["machines"] = sorted({*entry.get("machines", []), machine()})
    entry.pop("skipped", None)
    done = Counter(entry["done"])
    todo: Any = multiprocessing.Queue()
    results: Any = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=work, args=(name, todo, results)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    next_seed = next_counted = first + entry["cases"]
    ahead: dict[int, tuple[dict[str, int], str]] = {}

    def is_enough() -> bool:
        return next_counted - first >= cases if cases else done[kind.unit] >= units

    for _ in range(2 * jobs):
        todo.put(next_seed)
        next_seed += 1
    started, base = time.monotonic(), entry["seconds"]
    try:
        while not is_enough() and time.monotonic() < until:
            seed, did, failure, _ = results.get(timeout=1_200)
            if seed is None:
                entry["skipped"] = failure
                print(f"{name}: {failure}", flush=True)
                break
            ahead[seed] = did, failure
            todo.put(next_seed)
            next_seed += 1
            # Only what is done in a row counts, so that a run that is stopped leaves no hole.
            while next_counted in ahead and not is_enough():
                did, failure = ahead.pop(next_counted)
                done.update(did)
                if failure:
                    command = again(name, next_counted)
                    entry["failures"].append({"seed": next_counted, "again": command, "what": failure})
                    print(f"FAILED: {command}\n{failure}", flush=True)
                next_counted += 1
            entry.update(
                cases=next_counted - first, done=dict(done), seconds=round(base + time.monotonic() - started, 1)
            )
            if seed % 20 == 0 and (did or not cases):
                save(name, entry)
                print(f"{name}: {done[kind.unit]:,} of {'at least ' if cases else ''}{units:,} {kind.unit}", flush=True)
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on", flush=True)
        raise
    finally:
        save(name, entry)
        for _ in workers:
            todo.put(None)
        for worker in workers:
            worker.terminate()
            worker.join()
    return entry


def page(record: dict[str, Any]) -> str:
    lines = INTRODUCTION.splitlines()
    machines = sorted({name for entry in record.values() for name in entry.get("machines", [])})
    for name, kind in SUITES.items():
        entry = record.get(name)
        if entry is None:
            lines.append(f"| {kind.title} (`{name}`) | {kind.promise} | not run | | | |")
            continue
        if "skipped" in entry and not entry["cases"]:
            lines.append(f"| {kind.title} (`{name}`) | {kind.promise} | {entry['skipped']} | | {entry['commit']} | |")
            continue
        seeds = f"{entry['first_seed']} to {entry['first_seed'] + entry['cases'] - 1}" if entry["cases"] else ""
        failures = ", ".join(str(failure["seed"]) for failure in entry["failures"]) or "none"
        count = f"{entry['done'].get(kind.unit, 0):,} {kind.unit}"
        if "skipped" in entry:  # where it was run last; another machine had done these
            count += f"; then {entry['skipped']}"
        lines.append(
            f"| {kind.title} (`{name}`) | {kind.promise} | {count} | {failures} | `{entry['commit']}` | {seeds} |"
        )
    lines += ["", "## What the cases did", ""]
    for name, kind in SUITES.items():
        entry = record.get(name)
        if entry is None or not entry["done"]:
            continue
        did = ", ".join(f"{what} {count:,}" for what, count in sorted(entry["done"].items()) if what != kind.unit)
        lines += [f"- **{name}**, {entry['cases']:,} cases in {entry['seconds']:,.0f} s: {did or 'as counted above'}."]
    if planted := record.get("planted"):
        found = planted["defects"]
        noticed = Counter(entry["noticed_by"] for entry in found.values() if entry["noticed_by"])
        by_suite = ", ".join(f"{count} by {name}" for name, count in noticed.most_common())
        survivors = ", ".join(defect for defect, entry in found.items() if not entry["noticed_by"])
        lines += [
            "",
            "## Defects that were planted",
            "",
            f"`scripts/plant` builds {planted['known']} ways to lose or mix rows into the core. Of {len(found)} that "
            f"the suites have looked for, {sum(noticed.values())} were noticed ({by_suite}), on `{planted['commit']}`. "
            f"Not noticed: {survivors or 'none'}. Fourteen were chosen by somebody who had not seen the suites.",
        ]
    if sanitizers := record.get("sanitizers"):
        lines += [
            "",
            "## Under sanitizers",
            "",
            "A little of each suite on a core built with a sanitizer, by `scripts/sanitize`.",
        ]
        for name, entry in sorted(sanitizers.items()):
            failed = [suite for suite, said in entry["ran"].items() if said == "FAILED"]
            did = ", ".join(f"{suite} {said}" for suite, said in entry["ran"].items())
            lines += ["", f"{SANITIZERS[name]}, on `{entry['commit']}`, reports: {', '.join(failed) or 'none'}. {did}."]
    lines += [
        "",
        *LIMITS.splitlines(),
        "",
        f"Run on {'; '.join(machines)}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; none: all")
    parser.add_argument("--seed", type=int, help="one case of one suite, to see a failure again")
    parser.add_argument("--scale", type=float, default=1.0, help="of the full size: 0.01 is a hundredth")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after that time, shared by the suites")
    parser.add_argument("--first-seed", type=int, default=0, help="where the seeds begin; another one begins anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    names = arguments.suites or list(SUITES)
    if unknown := set(names) - set(SUITES):
        parser.error(f"there is no suite {sorted(unknown)}; there are {', '.join(SUITES)}")
    if arguments.seed is not None:
        if len(names) != 1:
            parser.error("--seed is of one suite")
        with SUITES[names[0]]() as suite:
            suite.case(arguments.seed)
        print(f"passed: {dict(suite.done)}")
        return 0
    failed = False
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    for place, name in enumerate(names):
        left = end - time.monotonic()
        until = time.monotonic() + left / (len(names) - place)
        kind = SUITES[name]
        cases = kind.cases if arguments.scale >= 1 else 0
        entry = run(name, round(kind.full * arguments.scale), cases, arguments.first_seed, arguments.jobs, until)
        failed |= bool(entry["failures"])
    write_page()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
