# SPDX-License-Identifier: Apache-2.0
"""What this process takes of the machine's memory, as the kernel counts it, and a cap on it."""

from __future__ import annotations

import resource


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    """The largest `resident()` ever, or since the last `reset_peak()` that worked."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Make `peak()` start anew. Some sandboxes forbid it; then it goes on from the start of the process."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def cap_growth(by: int) -> None:
    """From now on the process's private writable memory may grow by this many bytes; beyond, allocations
    fail.

    RLIMIT_DATA counts heap, anonymous mappings and thread stacks, used or only reserved, but not files mapped
    for reading, so it is the tightest cap that any user may set on a process of their own.
    """
    limit = _status("VmData") + by
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
