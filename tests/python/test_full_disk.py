# SPDX-License-Identifier: Apache-2.0
"""A disk that is full for a while: what cannot be written is refused whole, and with space the same handle goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
from reliability.mounts import Tmpfs
from reliability.suite import SkippedError

pytestmark = pytest.mark.core

DIMENSION, LR, KEYS = 16, 0.5, 400_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs]:
    try:
        mounted = Tmpfs(tmp_path / "disk", megabytes=256)
    except SkippedError as reason:
        pytest.skip(str(reason))
    yield mounted
    mounted.unmount()


class Trained:
    """A group under SGD whose rows begin with zeros, and what they must be."""

    def __init__(self, storage: de.Storage) -> None:
        self.embedding = de.Embedding(
            storage, group=0, dimension=DIMENSION, optimizer=de.SGD(lr=LR), initializer=de.Constant(0.0)
        )
        self.weights = np.zeros((KEYS, DIMENSION), np.float32)
        self.exists = np.zeros(KEYS, bool)

    def step(self, generator: np.random.Generator) -> None:
        keys = np.unique(generator.integers(0, KEYS, 4000))
        gradients = generator.standard_normal((len(keys), DIMENSION)).astype(np.float32)
        self.embedding.apply_gradients(keys, gradients)
        self.weights[keys] -= np.float32(LR) * gradients
        self.exists[keys] = True

    def check(self, embedding: de.Embedding) -> None:
        found = embedding.lookup(np.arange(KEYS), insert=False)
        np.testing.assert_array_equal(found.view(np.uint32), self.weights.view(np.uint32))
        np.testing.assert_array_equal(embedding.contains(np.arange(KEYS)), self.exists)
        assert len(embedding) == self.exists.sum()


@pytest.mark.parametrize("log_bytes", [1 << 20, 64 << 20], ids=["the log is to be cut", "memory is to be made"])
def test_with_space_the_same_handle_goes_on_and_no_row_is_wrong(disk: Tmpfs, log_bytes: int) -> None:
    path = disk.directory / "storage"
    generator = np.random.default_rng(log_bytes)
    with de.Storage(path, memory="16MiB", log_bytes=log_bytes) as storage:
        trained = Trained(storage)
        for _ in range(30):
            trained.step(generator)
        for _ in range(2):
            disk.leave(pages=1000)
            refused = []
            for number in range(300):
                # A cut may make room once; then the disk is full again.
                if number >= 30 and len(refused) > 1:
                    break
                try:
                    trained.step(generator)
                except de.StorageError as error:
                    refused.append(str(error))
            assert len(refused) > 1
            assert all("No space left" in text for text in refused)
            trained.check(trained.embedding)
            disk.make_space()
            for _ in range(30):
                trained.step(generator)
            storage.commit(step=1)
            trained.check(trained.embedding)
    with de.Storage.open(path, memory="16MiB") as storage:
        trained.check(Trained(storage).embedding)


def test_another_life_that_found_no_space_may_be_tried_again(disk: Tmpfs) -> None:
    """The group counted as in use by then, with the life that it had before."""
    with de.Storage(disk.directory / "storage", memory="16MiB", log_bytes=1 << 20) as storage:
        trained = Trained(storage)
        for _ in range(30):
            trained.step(np.random.default_rng(0))
    with de.Storage(disk.directory / "storage", memory="16MiB", log_bytes=64 << 20) as storage:
        settings = {"group": 0, "dimension": DIMENSION, "optimizer": de.SGD(lr=LR), "initializer": de.Constant(0.0)}
        other = de.Embedding(storage, de.SGD(lr=LR), de.Zeros(), DIMENSION, 1)
        other.apply_gradients(np.arange(20_000), np.ones((20_000, DIMENSION), np.float32))  # a cut has to write these
        disk.leave(pages=16)
        with pytest.raises(de.StorageError, match="No space left"):
            de.Embedding(storage, ttl="30d", **settings)
        disk.make_space()
        assert de.Embedding(storage, ttl="60d", **settings).ttl == 60 * 86_400


def test_a_load_that_cannot_write_what_it_replaces_leaves_it_open(disk: Tmpfs, tmp_path: Path) -> None:
    """In mode commit the close had nowhere to keep what was done since the last commit, and was the end of it."""
    torch = pytest.importorskip("torch")
    from damo_embedding.torch import load_checkpoint, save_checkpoint

    model = torch.nn.Linear(1, 1)
    with de.Storage(disk.directory / "storage", memory="16MiB", durability="commit") as storage:
        trained = Trained(storage)
        generator = np.random.default_rng(0)
        trained.step(generator)
        save_checkpoint(tmp_path / "1", model, None, storage, 1)
        for _ in range(20):
            trained.step(generator)
        disk.leave(pages=16)
        with pytest.raises(de.StorageError, match="No space left"):
            load_checkpoint(tmp_path / "1", model, None, storage)
        disk.make_space()
        trained.check(trained.embedding)
        assert load_checkpoint(tmp_path / "1", model, None, storage) is not None
