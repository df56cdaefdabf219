# SPDX-License-Identifier: Apache-2.0
"""Killed and resumed is never killed, to the last bit: the example that shows it, at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

SCRIPT = Path(__file__).parents[2] / "examples" / "kill_me.py"


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_bits_of_one_left_alone() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--steps", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal in every bit" in done.stdout
    aside = [int(line.split(" operations")[0].split()[-1]) for line in done.stdout.splitlines() if "aside" in line]
    assert sum(aside) > 0
