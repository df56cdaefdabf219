# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a place for a storage, an open storage with the least memory there is, a seeded generator."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de

# Who starts the tests in the background of a shell has Ctrl-C ignored, and so would have every process of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first: where processes share the tests, none is left with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a storage may be made; there is nothing yet."""
    return tmp_path / "table.damo"


@pytest.fixture
def storage(path: Path) -> Iterator[de.Storage]:
    """An empty storage with the least memory there is."""
    with de.Storage(path, memory="16MiB", threads=2) as storage:
        yield storage


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(20240607)
