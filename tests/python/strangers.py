# SPDX-License-Identifier: Apache-2.0
"""The readers of a serving file in examples/, used as a stranger to this project would use them."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
# The address and undefined-behaviour sanitizers end the program; leaks are no matter in one that ends anyway.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C"}

Row = tuple[int, int, tuple[float, ...]]  # group, key, weights


class RefusedError(Exception):
    """What the reader said of a file it does not take."""


@functools.cache
def _python_reader() -> Any:
    spec = importlib.util.spec_from_file_location("stranger_read_dump", EXAMPLES / "read_dump.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_in_python(path: Path) -> Iterator[Row]:
    try:
        yield from _python_reader().read_dump(path)
    except ValueError as error:
        raise RefusedError(str(error)) from error


@functools.cache
def c_reader() -> Path:
    """The program, compiled with sanitizers."""
    assert COMPILER is not None
    directory = Path(tempfile.mkdtemp(prefix="damo-reader-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = directory / "read_dump"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    source = str(EXAMPLES / "read_dump.c")
    done = subprocess.run(
        [COMPILER, "-std=c11", "-O1", "-g", *warnings, *SANITIZERS, "-o", str(program), source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program


def rows_in_c(path: Path) -> list[Row]:
    done = subprocess.run([c_reader(), path], capture_output=True, text=True, check=False, timeout=60, env=ENVIRONMENT)
    assert done.returncode in (0, 1), done.stderr
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    if done.returncode == 1:
        raise RefusedError(done.stderr)
    assert done.stderr == ""
    rows = []
    for line in done.stdout.splitlines():
        group, key, *weights = line.split(" ")
        rows.append((int(group), int(key), tuple(map(float, weights))))
    return rows
