# SPDX-License-Identifier: Apache-2.0
"""256 groups in one small storage beside the oracle, each with its own dimension, optimizer, initializer, seed,
schedule and admission filter.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import damo_embedding as de
import damo_embedding.optimizers as optimizers_module
import reference
from comparing import assert_equals_reference
from damo_embedding import _core
from reference_filter import AdmittedTable

pytestmark = pytest.mark.core

LATE = 2**40  # ahead of any wall clock
KEYS = np.arange(-6, 6)
f32 = np.float32

OPTIMIZERS = [
    thing
    for thing in vars(optimizers_module).values()
    if inspect.isclass(thing) and issubclass(thing, de.Optimizer) and thing is not de.Optimizer
]
INITIALIZERS = [
    de.Zeros(),
    de.Ones(),
    de.Constant(0.5),
    de.Uniform(-0.5, 0.25),
    de.Normal(0.1, 2.0),
    de.TruncatedNormal(0.0, 0.5),
]


SCHEDULES: list[Callable[[float], de.Schedule]] = [
    lambda lr: de.ExponentialDecay(lr=lr, decay_steps=2, decay_rate=0.5),
    lambda lr: de.PolynomialDecay(lr=lr, decay_steps=3, power=2.0),
    lambda lr: de.NaturalExponentialDecay(lr=lr, decay_steps=2, decay_rate=0.5),
    lambda lr: de.InverseTimeDecay(lr=lr, decay_steps=2, decay_rate=0.5),
    lambda lr: de.CosineDecay(lr=lr, decay_steps=4),
    lambda lr: de.LinearCosineDecay(lr=lr, decay_steps=4),
    lambda lr: de.LinearWarmup(warmup_steps=2, then=lr, start_lr=lr / 4),
]


def dimension_of(group: int) -> int:
    """256 dimensions from 1 to 4,096, a few of them large."""
    return 1 + group + 3840 * group**3 // 255**3


def filter_of(group: int) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(capacity=20 + group, count=1 + group % 5, fpr=(1e-3, 1e-2, 0.1)[group % 3])


def open_all(storage: de.Storage) -> list[de.Embedding]:
    storage.now = LATE
    # Every optimizer meets every initializer; each group's rate, which its schedule starts from, is its own.
    pairs = itertools.cycle(itertools.product(OPTIMIZERS, INITIALIZERS))
    return [
        de.Embedding(
            storage, optimizer(lr=SCHEDULES[group % len(SCHEDULES)](0.001 * (1 + group))), initializer,
            dimension_of(group), group=group, seed=group * 7919, admission=filter_of(group),
        )
        for group, (optimizer, initializer) in zip(range(256), pairs, strict=False)
    ]  # fmt: skip


def oracle_of(embedding: de.Embedding) -> AdmittedTable:
    table = AdmittedTable(
        embedding.optimizer, embedding.initializer, embedding.dimension, filter_of(embedding.group),
        seed=embedding.seed, stream=embedding.group,
    )  # fmt: skip
    table.lr = embedding.optimizer.lr
    table.now = LATE
    return table


def train(embedding: de.Embedding, table: AdmittedTable, random: np.random.Generator) -> None:
    keys = random.choice(KEYS, 20)
    gradients = random.standard_normal((20, embedding.dimension)).astype(f32)
    np.testing.assert_array_equal(embedding.lookup(keys), table.lookup(keys))
    embedding.apply_gradients(keys, gradients)
    table.apply_gradients(keys, gradients)


def test_the_groups_of_this_file_have_all_dimensions_optimizers_and_schedules() -> None:
    dimensions = [dimension_of(group) for group in range(256)]
    assert len(set(dimensions)) == 256
    assert (dimensions[0], dimensions[255]) == (1, 4096)
    assert {optimizer.name for optimizer in OPTIMIZERS} == set(reference.OPTIMIZERS)
    assert {schedule(1.0).name for schedule in SCHEDULES} == set(_core.schedule_names()) - {"constant"}
    assert len({filter_of(group).capacity for group in range(256)}) == 256
    assert {filter_of(group).count for group in range(256)} == {1, 2, 3, 4, 5}


@pytest.mark.slow
def test_256_groups_equal_the_reference_through_evictions_a_dump_and_a_reopening(
    path: Path, tmp_path: Path, random: np.random.Generator
) -> None:
    with de.Storage(path, memory="16MiB", threads=2) as storage:
        embeddings = open_all(storage)
        tables = [oracle_of(embedding) for embedding in embeddings]
        for _ in range(2):
            for embedding, table in zip(embeddings, tables, strict=True):
                train(embedding, table, random)
        stats = storage.stats()
        assert stats["evictions"] > 256
        assert stats["hot_bytes_in_use"] <= stats["hot_bytes"] < 16 << 20
        assert sum(group["rows"] * group["row_bytes"] for group in stats["groups"]) > 1.5 * stats["hot_bytes"]

    with de.Storage(path, memory="17MiB", threads=1) as storage:
        assert storage.groups() == dict.fromkeys(range(256), "")
        embeddings = open_all(storage)
        for embedding, table in zip(embeddings, tables, strict=True):
            assert (len(embedding), embedding.step) == (len(table), table.step)
            train(embedding, table, random)
        assert storage.stats()["evictions"] > 256
        rows = storage.dump(tmp_path / "weights.bin")
        for embedding, table in zip(embeddings, tables, strict=True):
            assert_equals_reference(embedding, table)
            assert embedding.admission is not None
            assert embedding.admission.adds == table.filter.adds
            assert embedding.admission.estimate(KEYS).tolist() == [table.filter.estimate(key) for key in KEYS.tolist()]
            assert embedding.lr == embedding.optimizer.lr(table.step)  # type: ignore[operator]
        assert sum(table.refused > 0 for table in tables) > 150

    dumped = de.read_dump(tmp_path / "weights.bin")
    assert dumped.keys() == set(range(256))
    assert rows == sum(len(table) for table in tables)
    for group, table in enumerate(tables):
        keys, weights = dumped[group]
        assert weights.shape == (len(table), dimension_of(group))
        assert {int(key): row.tobytes() for key, row in zip(keys, weights, strict=True)} == {
            key: row.weights.tobytes() for key, row in table.rows.items()
        }
