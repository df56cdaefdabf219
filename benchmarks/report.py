# SPDX-License-Identifier: Apache-2.0
"""What every benchmark prints beside its numbers: the machine, the commit, the versions.

Run as a program it prints the machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


def machine(directory: str | os.PathLike[str] = ".") -> dict[str, str]:
    """What a number cannot be read without; `directory` is where the benchmark's files lie."""
    facts = {
        "commit": _commit(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "memory": _memory(),
        "directory on": _file_system(Path(directory)),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "RocksDB": _rocksdb(),
    }
    for package in ("numpy", "torch"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def print_machine(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:>14}: {value}")
    print(flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Text to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    left = [not any(re.match(r"[\d-]", row[i]) for row in rows) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ]
        print("  ".join(cells).rstrip())
    print(flush=True)


def write_json(path: str | None, benchmark: str, facts: dict[str, str], results: Any) -> None:
    if path is not None:
        content = {"benchmark": benchmark, "machine": facts, "results": results}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _commit() -> str:
    try:
        run = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _file_system(directory: Path) -> str:
    inside = directory.resolve()
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        if inside.is_relative_to(mount) and len(mount) > len(best[0]):
            best = (mount, kind)
    return best[1]


def _rocksdb() -> str:
    """The version of the library that this process has loaded."""
    import damo_embedding._core  # noqa: F401  (loads it)

    found = re.search(
        r"librocksdb[^/\n]*\.so\.([\d.]+)$", Path("/proc/self/maps").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found[1] if found else "unknown"


if __name__ == "__main__":
    print_machine(machine())
