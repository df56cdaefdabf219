# SPDX-License-Identifier: Apache-2.0
"""What a part says to the process that has started it: lines of JSON, progress first and one result at the end."""

from __future__ import annotations

import json
import os
from typing import Any


class Progress:
    """Takes standard output for itself: whatever else prints there goes to standard error."""

    def __init__(self) -> None:
        self._channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def total(self, steps: int) -> None:
        self._send({"total": steps})

    def tick(self, note: str = "") -> None:
        """A step is done."""
        self._send({"tick": 1, "note": note})

    def say(self, line: str) -> None:
        """A line that stays on the screen."""
        self._send({"say": line})

    def result(self, value: dict[str, Any]) -> None:
        self._send({"result": value})

    def _send(self, message: dict[str, Any]) -> None:
        self._channel.write(json.dumps(message) + "\n")
