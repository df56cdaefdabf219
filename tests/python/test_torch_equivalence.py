# SPDX-License-Identifier: Apache-2.0
"""Rows train as those of torch.nn.Embedding(sparse=True) do: 500 steps, every row within 1e-5."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import damo_embedding as de  # noqa: E402
from beside_torch import (  # noqa: E402
    DENSE_OPTIMIZERS,
    DIMENSION,
    OPTIMIZERS,
    VOCABULARY,
    BesideTorch,
    LookUp,
    draw,
)
from damo_embedding.torch import EmbeddingCollection, Feature, SparseOptimizer  # noqa: E402

STEPS = 500
TOLERANCE = 1e-5


@pytest.fixture(params=OPTIMIZERS)
def beside(request: pytest.FixtureRequest, storage: de.Storage) -> BesideTorch:
    return BesideTorch(storage, request.param)


# Each takes a lookup and the indices of a step, and gives the step's loss.


def mean_loss(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    return beside.errors(look_up(ids), ids).mean()


def sum_loss(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    return 0.01 * beside.errors(look_up(ids), ids).sum()


def two_lookups(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    first, second = ids[:, :2], ids[:, 1:]
    return (beside.errors(look_up(first), first) * beside.errors(look_up(second), second)).mean()


def two_losses(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    vectors = look_up(ids)
    return beside.errors(vectors, ids).mean() + 0.1 * (vectors**2).sum()


def lookup_without_loss(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    look_up(ids.flip(0))
    (look_up(ids) * 3.0).detach()
    return beside.errors(look_up(ids), ids).mean()


def checkpointed(use_reentrant: bool) -> Callable[[BesideTorch, LookUp, torch.Tensor], torch.Tensor]:
    def loss(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(1, requires_grad=True)  # a reentrant segment needs an input that requires grad
        first, second = ids[:, :2], ids[:, 1:]
        errors = [
            checkpoint(
                lambda scale, ids: beside.errors(look_up(ids) * scale, ids),
                scale,
                part,
                use_reentrant=use_reentrant,
            )
            for part in (first, second)
        ]
        return (errors[0] + errors[1]).mean() + beside.errors(look_up(first), first).mean()

    return loss


def nested_checkpoints(beside: BesideTorch, look_up: LookUp, ids: torch.Tensor) -> torch.Tensor:
    def inner(vectors: torch.Tensor) -> torch.Tensor:
        return vectors + look_up(ids)

    def outer(vectors: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, vectors * 0.5, use_reentrant=True) * 2.0 + look_up(ids)

    start = torch.zeros(DIMENSION, requires_grad=True)
    return beside.errors(checkpoint(outer, start, use_reentrant=True) / 4.0, ids).mean()


LOSSES = {
    "mean loss": mean_loss,
    "sum loss": sum_loss,
    "two lookups": two_lookups,
    "two losses": two_losses,
    "lookup without loss": lookup_without_loss,
    "reentrant checkpoint": checkpointed(use_reentrant=True),
    "non-reentrant checkpoint": checkpointed(use_reentrant=False),
    "nested reentrant checkpoints": nested_checkpoints,
}


# Of the inner of two nested checkpoints, whose first forward runs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_updates_at_the_end_of_backward_equal_torch(
    beside: BesideTorch, loss: Callable[[BesideTorch, LookUp, torch.Tensor], torch.Tensor]
) -> None:
    for step in range(STEPS):
        ids = draw(step, 4, 3)
        loss(beside, beside.ours, ids).backward()
        beside.their_optimizer.zero_grad()
        loss(beside, beside.theirs, ids).backward()
        beside.their_optimizer.step()
    assert beside.largest_difference() < TOLERANCE
    assert beside.module.embedding.step == STEPS


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_batches_of_every_row_equal_the_dense_optimizers_of_torch(storage: de.Storage, name: str) -> None:
    beside = BesideTorch(storage, name, dense=True)
    for step in range(STEPS):
        ids = torch.cat([torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(step)), draw(step, 8)])
        sum_loss(beside, beside.ours, ids).backward()
        beside.their_optimizer.zero_grad()
        sum_loss(beside, beside.theirs, ids).backward()
        beside.their_optimizer.step()
    assert beside.largest_difference() < TOLERANCE


def test_accumulation_over_four_backwards_equals_torch(beside: BesideTorch) -> None:
    optimizer = SparseOptimizer(beside.module)
    for step in range(STEPS):
        optimizer.zero_grad()
        beside.their_optimizer.zero_grad()
        for part in range(4):
            ids = draw(4 * step + part, 3, 2)
            (mean_loss(beside, beside.ours, ids) / 4).backward()
            (mean_loss(beside, beside.theirs, ids) / 4).backward()
        optimizer.step()
        beside.their_optimizer.step()
    assert beside.largest_difference() < TOLERANCE
    assert beside.module.embedding.step == STEPS


def test_two_losses_backpropagated_one_after_the_other_equal_torch(beside: BesideTorch) -> None:
    optimizer = SparseOptimizer(beside.module)
    for step in range(STEPS):
        ids = draw(step, 4, 3)
        for look_up, opt in ((beside.ours, optimizer), (beside.theirs, beside.their_optimizer)):
            opt.zero_grad()
            vectors = look_up(ids)
            beside.errors(vectors, ids).mean().backward(retain_graph=True)
            (0.1 * (vectors**2).sum()).backward()
            opt.step()
    assert beside.largest_difference() < TOLERANCE


def test_learning_rate_schedules_equal_torch(beside: BesideTorch) -> None:
    optimizer = SparseOptimizer(beside.module)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100) for opt in (optimizer, beside.their_optimizer)
    ]
    for step in range(STEPS):
        ids = draw(step, 4, 3)
        for look_up, opt, scheduler in zip(
            (beside.ours, beside.theirs), (optimizer, beside.their_optimizer), schedulers, strict=True
        ):
            opt.zero_grad()
            mean_loss(beside, look_up, ids).backward()
            opt.step()
            scheduler.step()
    assert beside.largest_difference() < TOLERANCE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_equals_torch(storage: de.Storage, name: str) -> None:
    beside = BesideTorch(storage, name, padding=0)
    for step in range(STEPS):
        ids = draw(step, 4, 3)
        mean_loss(beside, beside.ours, ids).backward()
        beside.their_optimizer.zero_grad()
        mean_loss(beside, beside.theirs, ids).backward()
        beside.their_optimizer.step()
    assert beside.largest_difference() < TOLERANCE
    assert not beside.module.embedding.contains(beside.keys[:1].numpy())[0]


def bags_of(step: int, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and offsets; some bags are empty, the first and the last ones too."""
    generator = np.random.default_rng(step)
    counts = generator.integers(0, 4, bags)
    return draw(step, int(counts.sum())), torch.from_numpy(np.concatenate(([0], np.cumsum(counts)[:-1])))


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pooled_features_equal_embedding_bags(
    storage: de.Storage, name: str, pooling: str, padding: int | None
) -> None:
    ours, theirs = OPTIMIZERS[name]
    feature = Feature(DIMENSION, pooling=pooling, group="shared", padding_idx=padding)
    fields = EmbeddingCollection(
        storage, {"ragged": feature, "matrix": feature}, optimizer=ours, initializer=de.Uniform(-0.5, 0.5)
    )
    ids = np.arange(VOCABULARY)
    first = torch.from_numpy(fields.embeddings["ragged"].lookup(ids, insert=False))
    bag = torch.nn.EmbeddingBag.from_pretrained(
        first.clone(), freeze=False, sparse=True, mode=pooling, padding_idx=padding
    )
    optimizer = theirs(bag.parameters())
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 6, DIMENSION, generator=generator)
    for step in range(STEPS):
        ragged, matrix = bags_of(step, 6), draw(step + 1000, 6, 3)
        vectors = fields({"ragged": ragged, "matrix": matrix})
        expected = (bag(*ragged), bag(matrix))
        if step == 0:
            torch.testing.assert_close((vectors["ragged"], vectors["matrix"]), expected)
        optimizer.zero_grad()
        for got in ((vectors["ragged"], vectors["matrix"]), expected):
            (weights * torch.stack(got).sin()).sum().backward()
        optimizer.step()
    difference = np.abs(fields.embeddings["ragged"].lookup(ids, insert=False) - bag.weight.detach().numpy())
    assert difference[padding is not None :].max() < TOLERANCE
