# SPDX-License-Identifier: Apache-2.0
"""What a part says to the process that has started it: messages, progress first and one result at the end."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any


class Progress:
    def __init__(self, channel: Connection) -> None:
        self._channel = channel

    def total(self, steps: int) -> None:
        self._channel.send({"total": steps})

    def tick(self, note: str = "") -> None:
        """A step is done."""
        self._channel.send({"tick": 1, "note": note})

    def say(self, line: str) -> None:
        """A line that stays on the screen."""
        self._channel.send({"say": line})

    def result(self, value: dict[str, Any]) -> None:
        self._channel.send({"result": value})
