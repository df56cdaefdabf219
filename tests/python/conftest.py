# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a place for a storage, an open storage with the least memory there is, a seeded generator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de


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
