# SPDX-License-Identifier: Apache-2.0
"""damo_embedding.torch: what the modules read, when rows come to be, and when they are updated."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import damo_embedding as de  # noqa: E402
from damo_embedding.torch import Embedding, EmbeddingCollection, Feature  # noqa: E402

DIMENSION = 4
SGD = de.SGD(lr=1.0)


@pytest.fixture
def item(storage: de.Storage) -> Embedding:
    return Embedding(storage, group="item", dimension=DIMENSION, optimizer=SGD)


def stored(module: Embedding, keys: list[int]) -> np.ndarray:
    """The rows as they are now, changing nothing."""
    return module.embedding.lookup(np.array(keys, np.int64), insert=False)


class _Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("half-way")


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_any_shape_give_a_vector_each(item: Embedding, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids = torch.arange(-2, int(np.prod(shape)) - 2).reshape(shape).to(dtype)
    vectors = item(ids)
    assert vectors.shape == (*shape, DIMENSION)
    assert vectors.dtype is torch.float32
    assert vectors.requires_grad
    rows = item.embedding.lookup(ids.reshape(-1).long().numpy())
    np.testing.assert_array_equal(vectors.detach().numpy(), rows.reshape(vectors.shape))


def test_ids_that_are_not_contiguous_are_read_in_their_order(item: Embedding) -> None:
    ids = torch.arange(12).reshape(3, 4)
    torch.testing.assert_close(item(ids.T), item(ids).transpose(0, 1))
    torch.testing.assert_close(item(torch.tensor(5).expand(3)), item(torch.tensor([5, 5, 5])))


def test_a_uint64_id_is_the_key_of_its_bits(item: Embedding) -> None:
    bits = np.array([1 << 63, (1 << 64) - 1, 7], np.uint64)
    torch.testing.assert_close(item(torch.from_numpy(bits)), item(torch.from_numpy(bits.view(np.int64))))
    assert len(item.embedding) == 3


def test_vectors_are_float32_under_autocast_and_other_default_dtypes(item: Embedding) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = item(torch.tensor([1, 2]))
        assert vectors.dtype is torch.float32
        (vectors @ torch.ones(DIMENSION, 2)).sum().backward()
    assert item.embedding.step == 1
    torch.set_default_dtype(torch.float64)
    try:
        assert item(torch.tensor([1, 2])).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_vectors_can_be_changed_in_place(item: Embedding) -> None:
    before = stored(item, [1, 2])
    vectors = item(torch.tensor([[1], [2]]))
    vectors[1].mul_(3.0)
    vectors.add_(1.0).sum().backward()
    np.testing.assert_allclose(stored(item, [1, 2]), before - [[1.0], [3.0]], rtol=0, atol=1e-6)


def test_the_default_initializer_is_uniform_in_a_twentieth(item: Embedding) -> None:
    first = item(torch.arange(1000)).detach()
    assert -0.05 <= first.min() < -0.045
    assert 0.045 < first.max() <= 0.05


def test_a_training_lookup_inserts_and_gives_rows_it_can_train(item: Embedding) -> None:
    item(torch.tensor([5, 5, 9]))
    assert len(item.embedding) == 2
    assert item.embedding.step == 0


@pytest.mark.parametrize("missing", ["initial", "zeros"])
def test_eval_changes_nothing_and_reads_unknown_ids_as_asked(storage: de.Storage, missing: str) -> None:
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=SGD, missing=missing)
    module(torch.tensor([1])).sum().backward()
    trained = stored(module, [1])
    module.eval()
    vectors = module(torch.tensor([1, 2]))
    assert not vectors.requires_grad
    assert len(module.embedding) == 1
    np.testing.assert_array_equal(vectors.numpy()[:1], trained)
    module.train()
    first = module(torch.tensor([2])).detach()
    torch.testing.assert_close(vectors[1:], torch.zeros(1, DIMENSION) if missing == "zeros" else first, rtol=0, atol=0)


def test_without_gradients_nothing_is_inserted(item: Embedding) -> None:
    with torch.no_grad():
        vectors = item(torch.tensor([1, 2]))
    with torch.inference_mode():
        item(torch.tensor([3]))
    assert len(item.embedding) == 0
    torch.testing.assert_close(item(torch.tensor([1, 2])).detach(), vectors, rtol=0, atol=0)


def test_padding_reads_as_zeros_and_has_no_row_and_no_gradient(storage: de.Storage) -> None:
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=SGD, padding_idx=-1)
    vectors = module(torch.tensor([[7, -1], [-1, 0]]))
    assert not vectors[0, 1].any()
    assert not vectors[1, 0].any()
    assert vectors[0, 0].any()
    before = stored(module, [7, 0])
    vectors.sum().backward()
    np.testing.assert_allclose(stored(module, [7, 0]), before - 1.0, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(module.embedding.contains(np.array([7, -1, 0])), [True, False, True])
    module(torch.tensor([-1, -1])).sum().backward()
    assert len(module.embedding) == 2


def test_a_padding_beyond_int64_is_the_key_of_its_bits(storage: de.Storage) -> None:
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=SGD, padding_idx=(1 << 64) - 1)
    assert not module(torch.tensor([-1])).any()


# ----------------------------------------------------------------- updating


def test_all_lookups_of_a_backward_are_summed_into_one_update(storage: de.Storage) -> None:
    # Adagrad tells one update by a sum from two updates.
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.Adagrad(lr=1.0))
    twin = Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.Adagrad(lr=1.0))
    before = stored(module, [3, 4])
    first, second, third = module(torch.tensor([3, 3, 4])), module(torch.tensor([3])), twin(torch.tensor([4]))
    (first.sum() + 2.0 * second.sum() + 5.0 * third.sum()).backward()
    assert module.embedding.step == 1
    row = module.embedding.inspect(3)
    assert row is not None
    np.testing.assert_array_equal(row.state["sum"], np.full(DIMENSION, 16.0, np.float32))
    np.testing.assert_allclose(stored(module, [3, 4]), before - 1.0, rtol=0, atol=1e-6)


def test_gradients_are_not_divided_by_the_batch(item: Embedding) -> None:
    before = stored(item, [1, 2])
    item(torch.tensor([1, 2])).sum().backward()
    np.testing.assert_allclose(stored(item, [1, 2]), before - 1.0, rtol=0, atol=1e-6)
    item(torch.tensor([1, 2])).mean().backward()
    np.testing.assert_allclose(stored(item, [1, 2]), before - 1.0 - 1 / 8, rtol=0, atol=1e-6)


def test_backward_follows_the_schedule_of_the_group(storage: de.Storage) -> None:
    halving = de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5)
    collection = EmbeddingCollection(
        storage,
        {"user": Feature(DIMENSION), "item": Feature(DIMENSION, optimizer=de.SGD(lr=lambda step: 2.0**step))},
        optimizer=de.SGD(lr=halving),
    )
    user, item = (collection.embeddings[name] for name in ("user", "item"))
    before = user.lookup([1], insert=False), item.lookup([1], insert=False)
    for _ in range(3):
        vectors = collection({"user": torch.tensor([1]), "item": torch.tensor([1])})
        (vectors["user"].sum() + vectors["item"].sum()).backward()
    np.testing.assert_allclose(before[0] - user.lookup([1]), np.full((1, DIMENSION), 1.75), rtol=1e-5)
    np.testing.assert_allclose(before[1] - item.lookup([1]), np.full((1, DIMENSION), 7.0), rtol=1e-5)
    assert (user.lr, item.lr) == (0.125, 8.0)


def test_a_schedule_that_raises_comes_out_of_backward_and_no_group_is_updated(
    storage: de.Storage, item: Embedding
) -> None:
    def raises(step: int) -> float:
        raise KeyError("no rate")

    user = Embedding(storage, group="user", dimension=DIMENSION, optimizer=de.SGD(lr=raises))
    before = stored(item, [1])
    with pytest.raises(KeyError, match="no rate"):
        (item(torch.tensor([1])).sum() + user(torch.tensor([1])).sum()).backward()
    assert item.embedding.step == user.embedding.step == 0
    np.testing.assert_array_equal(stored(item, [1]), before)
    user.embedding.lr = 1.0
    (item(torch.tensor([1])).sum() + user(torch.tensor([1])).sum()).backward()
    assert item.embedding.step == user.embedding.step == 1


def test_a_group_has_one_setting(storage: de.Storage, item: Embedding) -> None:
    with pytest.raises((ValueError, de.SchemaMismatchError), match="item"):
        Embedding(storage, group="item", dimension=DIMENSION + 1, optimizer=SGD)
    with pytest.raises((ValueError, de.SchemaMismatchError), match="item"):
        Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.Adam())
    with pytest.raises((ValueError, de.SchemaMismatchError), match="item"):
        Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=0.5))
    assert item.embedding.lr == 1.0


def test_a_second_backward_over_a_kept_graph_is_a_second_update(item: Embedding) -> None:
    before = stored(item, [1])
    loss = item(torch.tensor([1])).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert item.embedding.step == 2
    np.testing.assert_allclose(stored(item, [1]), before - 2.0, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert item.embedding.step == 2


def test_a_lookup_without_backward_is_no_update(item: Embedding) -> None:
    item(torch.tensor([1, 2]))
    item(torch.tensor([3])).detach().sum()
    item(torch.tensor([1])).sum().backward()
    assert item.embedding.step == 1
    assert [item.embedding.inspect(key).update_count for key in (1, 2, 3)] == [1, 0, 0]


def test_gradients_asked_for_other_tensors_update_nothing(item: Embedding) -> None:
    weight = torch.ones(DIMENSION, requires_grad=True)
    loss = (item(torch.tensor([1])) * weight).sum()
    torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward(inputs=[weight])
    assert item.embedding.step == 0


def test_hooks_and_tensors_that_keep_their_gradient_see_it(item: Embedding) -> None:
    before = stored(item, [1])
    vectors = item(torch.tensor([1]))
    vectors.retain_grad()
    vectors.register_hook(lambda gradient: gradient * 3.0)
    vectors.sum().backward()
    torch.testing.assert_close(vectors.grad, torch.full((1, DIMENSION), 3.0))
    np.testing.assert_allclose(stored(item, [1]), before - 3.0, rtol=0, atol=1e-6)


def test_a_backward_that_fails_applies_nothing_and_leaves_nothing(item: Embedding) -> None:
    before = stored(item, [1, 2])
    vectors = item(torch.tensor([1]))
    # Autograd comes to the later lookup first: its gradient is collected when the failure comes.
    failing = _Fails.apply(item(torch.tensor([1])))
    with pytest.raises(KeyError, match="half-way") as raised:
        (vectors.sum() + failing.sum() + item(torch.tensor([1])).sum()).backward()
    assert raised.value.__traceback__ is not None  # an exception that is kept must not keep the gradients
    assert item.embedding.step == 0
    item(torch.tensor([2])).sum().backward()
    assert item.embedding.step == 1
    np.testing.assert_allclose(stored(item, [1, 2]), before - [[0.0], [1.0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_comes_out_of_backward_and_nothing_is_applied(
    storage: de.Storage, item: Embedding, value: float
) -> None:
    user = Embedding(storage, group="user", dimension=DIMENSION, optimizer=SGD)
    before = stored(item, [1, 42]), stored(user, [7])
    scale = torch.tensor([[1.0], [value]])
    with pytest.raises(ValueError, match="42"):
        ((item(torch.tensor([1, 42])) * scale).sum() + user(torch.tensor([7])).sum()).backward()
    np.testing.assert_array_equal(stored(item, [1, 42]), before[0])
    np.testing.assert_array_equal(stored(user, [7]), before[1])
    assert item.embedding.step == user.embedding.step == 0
    item(torch.tensor([1])).sum().backward()
    np.testing.assert_allclose(stored(item, [1]), before[0][:1] - 1.0, rtol=0, atol=1e-6)


def test_a_second_derivative_is_refused_and_gradient_penalties_work(item: Embedding) -> None:
    before = stored(item, [1])
    with pytest.raises(RuntimeError, match="create_graph"):
        (item(torch.tensor([1])) ** 2).sum().backward(create_graph=True)
    assert item.embedding.step == 0
    vectors = item(torch.tensor([1]))
    (slope,) = torch.autograd.grad((vectors**3).sum(), vectors, create_graph=True)
    slope.sum().backward()  # d/dw 3 w^2 = 6 w
    np.testing.assert_allclose(stored(item, [1]), before - 6.0 * before, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_segment_is_part_of_the_outer_backward(item: Embedding, use_reentrant: bool) -> None:
    before = stored(item, [1])
    scale = torch.ones(1, requires_grad=True)
    inside = checkpoint(lambda scale: item(torch.tensor([1])) * scale, scale, use_reentrant=use_reentrant)
    (inside.sum() + item(torch.tensor([1])).sum()).backward()
    assert item.embedding.step == 1
    np.testing.assert_allclose(stored(item, [1]), before - 2.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments_alone_make_one_update(item: Embedding, use_reentrant: bool) -> None:
    before = stored(item, [1])
    scale = torch.ones(1, requires_grad=True)
    vectors = scale
    for _ in range(3):
        vectors = checkpoint(lambda x: x + item(torch.tensor([1])) * scale, vectors, use_reentrant=use_reentrant)
    vectors.sum().backward()
    assert item.embedding.step == 1
    np.testing.assert_allclose(stored(item, [1]), before - 3.0, rtol=0, atol=1e-6)


def test_a_checkpointed_segment_that_fails_applies_nothing(item: Embedding) -> None:
    scale = torch.ones(1, requires_grad=True)

    def segment(scale: torch.Tensor) -> torch.Tensor:
        return _Fails.apply(item(torch.tensor([1])) * scale) + item(torch.tensor([2])) * scale

    with pytest.raises(KeyError, match="half-way"):
        (checkpoint(segment, scale, use_reentrant=True).sum() + item(torch.tensor([3])).sum()).backward()
    assert item.embedding.step == 0
    item(torch.tensor([2])).sum().backward()
    assert [item.embedding.inspect(key).update_count for key in (1, 2, 3)] == [0, 1, 0]


def test_a_backward_inside_of_a_backward_loses_nothing(item: Embedding) -> None:
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                ctx.loss = item(torch.tensor([1])).sum()
            return x * 1.0

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
            ctx.loss.backward()
            return gradient

    before = stored(item, [1, 2])
    Inner.apply(item(torch.tensor([2]))).sum().backward()
    np.testing.assert_allclose(stored(item, [1, 2]), before - 1.0, rtol=0, atol=1e-6)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_lookups_that_are_never_backpropagated_hold_nothing(item: Embedding) -> None:
    ids = torch.arange(64) % 32
    for _ in range(1000):
        item(ids)
    before = _resident_bytes()
    for _ in range(10_000):
        item(ids)
    assert _resident_bytes() - before < 4 << 20  # 10,000 kept graphs are over 20 MB
    assert len(item.embedding) == 32


def test_threads_train_one_group_without_losing_a_gradient(item: Embedding) -> None:
    ids = torch.arange(50)
    before = stored(item, list(range(50)))
    start = threading.Barrier(4)

    def train() -> None:
        start.wait()
        for _ in range(25):
            (item(ids) * 0.5).sum().backward()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert item.embedding.step == 100
    np.testing.assert_allclose(stored(item, list(range(50))), before - 50.0, rtol=0, atol=1e-4)


class _Batches(torch.utils.data.Dataset):
    """Holds the model, as a dataset in user code may, and does not use it."""

    def __init__(self, model: Embedding) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, 100])


# Python 3.12 and later warn of any fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_leave_the_rows_alone(item: Embedding) -> None:
    before = stored(item, [*range(8), 100])
    loader = torch.utils.data.DataLoader(_Batches(item), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for ids in loader:
        item(ids).sum().backward()
    assert item.embedding.step == 4
    np.testing.assert_allclose(
        stored(item, [*range(8), 100]), before - np.array([1.0] * 8 + [8.0])[:, None], rtol=0, atol=1e-5
    )


def test_a_compiled_model_trains(item: Embedding) -> None:
    before = stored(item, [1, 2])

    def model(ids: torch.Tensor) -> torch.Tensor:
        return (item(ids + 0) * 2.0).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        torch.compile(model, backend="eager")(torch.tensor([1, 2])).backward()
    assert item.embedding.step == 1
    np.testing.assert_allclose(stored(item, [1, 2]), before - 2.0, rtol=0, atol=1e-6)


# -------------------------------------------------------------- collections


def test_a_collection_reads_what_its_embeddings_read(storage: de.Storage) -> None:
    fields = EmbeddingCollection(
        storage,
        {"user": Feature(8), "item": Feature(4, seed=3), "last": Feature(4, group="item", seed=3)},
        optimizer=SGD,
    )
    item = Embedding(storage, group="item", dimension=4, optimizer=SGD, seed=3)
    vectors = fields({"user": torch.tensor([[1], [2]]), "last": torch.tensor(6), "item": torch.tensor([5, 6])})
    assert list(vectors) == ["user", "item", "last"]
    assert {name: tuple(value.shape) for name, value in vectors.items()} == {
        "user": (2, 1, 8),
        "item": (2, 4),
        "last": (4,),
    }
    torch.testing.assert_close(vectors["last"], vectors["item"][1], rtol=0, atol=0)
    torch.testing.assert_close(vectors["item"], item(torch.tensor([5, 6])), rtol=0, atol=0)


def test_features_that_share_a_group_make_one_update(storage: de.Storage) -> None:
    fields = EmbeddingCollection(
        storage, {"item": Feature(4), "bag": Feature(4, group="item", pooling="sum")}, optimizer=SGD
    )
    rows = fields.embeddings["item"]
    before = rows.lookup(np.array([5, 6]), insert=False)
    vectors = fields({"item": torch.tensor([5]), "bag": (torch.tensor([5, 6, 6]), torch.tensor([0, 1]))})
    (vectors["item"].sum() + vectors["bag"].sum()).backward()
    assert rows.step == 1
    np.testing.assert_allclose(rows.lookup(np.array([5, 6]), insert=False), before - 2.0, rtol=0, atol=1e-6)


def test_a_feature_that_the_loss_does_not_use_is_not_updated(storage: de.Storage) -> None:
    fields = EmbeddingCollection(storage, {"user": Feature(4), "item": Feature(4)}, optimizer=SGD)
    fields({"user": torch.tensor([1]), "item": torch.tensor([1])})["user"].sum().backward()
    assert (fields.embeddings["user"].step, fields.embeddings["item"].step) == (1, 0)


def test_bags_of_padding_and_empty_bags_are_zeros_without_a_row(storage: de.Storage) -> None:
    fields = EmbeddingCollection(
        storage,
        {name: Feature(4, pooling=name, group="tags", padding_idx=0) for name in ("sum", "mean")},
        optimizer=SGD,
    )
    ids, offsets = torch.tensor([0, 0, 8, 0, 9]), torch.tensor([0, 2, 2, 5])
    vectors = fields({"sum": (ids, offsets), "mean": torch.tensor([[0, 0, 0], [8, 0, 9]])})
    row = fields.embeddings["sum"].lookup(np.array([8, 9]), insert=False)
    torch.testing.assert_close(vectors["sum"][2].detach(), torch.from_numpy(row.sum(0)))
    torch.testing.assert_close(vectors["mean"][1].detach(), torch.from_numpy(row.mean(0)))
    assert not vectors["sum"][[0, 1, 3]].any()
    assert not vectors["mean"][0].any()
    (vectors["sum"].sum() + vectors["mean"].sum()).backward()
    np.testing.assert_allclose(
        fields.embeddings["sum"].lookup(np.array([8, 9]), insert=False), row - 1.5, rtol=0, atol=1e-6
    )
    assert len(fields.embeddings["sum"]) == 2


@pytest.mark.parametrize("ids", [torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)])
def test_a_batch_without_bags_or_without_ids_is_fine(storage: de.Storage, ids: torch.Tensor) -> None:
    fields = EmbeddingCollection(storage, {"tags": Feature(4, pooling="mean")}, optimizer=SGD)
    assert fields({"tags": (ids, torch.empty(0, dtype=torch.int64))})["tags"].shape == (0, 4)
    vectors = fields({"tags": (ids, torch.zeros(3, dtype=torch.int64))})["tags"]
    assert vectors.shape == (3, 4)
    assert not vectors.any()
    vectors.sum().backward()
    assert fields({"tags": ids.reshape(2, 0)})["tags"].shape == (2, 4)
    assert fields({"tags": ids.reshape(0, 2)})["tags"].shape == (0, 4)
    assert len(fields.embeddings["tags"]) == 0


def test_eval_of_a_collection_changes_nothing(storage: de.Storage) -> None:
    fields = EmbeddingCollection(storage, {"tags": Feature(4, pooling="sum")}, optimizer=SGD, missing="zeros").eval()
    assert not fields({"tags": torch.tensor([[1, 2]])})["tags"].any()
    assert len(fields.embeddings["tags"]) == 0


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([1, 2], "ids is a list, expected a torch.Tensor"),
        (np.array([1]), "ids is a ndarray, expected a torch.Tensor"),
        (torch.tensor([1.0]), "ids is a tensor of float32, expected int64, int32 or uint64"),
        (torch.tensor([True]), "ids is a tensor of bool"),
        (torch.tensor([1], dtype=torch.uint8), "ids is a tensor of uint8"),
        (torch.tensor([[1, 0]]).to_sparse(), "ids has the layout sparse_coo"),
    ],
)
def test_ids_that_are_not_ids_are_refused(item: Embedding, ids: object, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        item(ids)
    assert len(item.embedding) == 0


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({}, "missing: user, tags"),
        ({"user": torch.tensor([1])}, "missing: tags"),
        (
            {"user": torch.tensor([1]), "tags": torch.tensor([[1]]), "x": torch.tensor([1])},
            "unknown: x; expected user, tags",
        ),
        ({"user": (torch.tensor([1]), torch.tensor([0])), "tags": torch.tensor([[1]])}, '"user" is a tuple'),
        ({"user": torch.tensor([1]), "tags": torch.tensor([1])}, '"tags" is ids of shape'),
        (
            {"user": torch.tensor([1]), "tags": (torch.tensor([[1]]), torch.tensor([0]))},
            "tuple with ids of shape",
        ),
        ({"user": torch.tensor([1]), "tags": (torch.tensor([1]), [0])}, "offsets a list"),
        (
            {"user": torch.tensor([1]), "tags": (torch.tensor([1]), torch.tensor([0.0]))},
            "offsets .* of torch.float32",
        ),
        ({"user": torch.tensor([1]), "tags": (torch.tensor([1]), torch.tensor([1]))}, "expected 0 first"),
        (
            {"user": torch.tensor([1]), "tags": (torch.tensor([1, 2]), torch.tensor([0, 2, 1]))},
            "at least the one before",
        ),
        ({"user": torch.tensor([1]), "tags": (torch.tensor([1]), torch.tensor([0, 2]))}, "at most 1"),
        (
            {"user": torch.tensor([1]), "tags": (torch.tensor([1]), torch.empty(0, dtype=torch.int64))},
            "expected 0 first",
        ),
        ({"user": torch.tensor([1]), "tags": (torch.tensor([1]), torch.tensor([0]), 1)}, "tuple of 3"),
    ],
)
def test_inputs_that_do_not_fit_the_features_are_refused(
    storage: de.Storage, inputs: dict[str, object], error: str
) -> None:
    fields = EmbeddingCollection(storage, {"user": Feature(4), "tags": Feature(4, pooling="sum")}, optimizer=SGD)
    with pytest.raises((TypeError, ValueError), match=error):
        fields(inputs)
    assert len(fields.embeddings["user"]) == 0


def test_settings_that_are_wrong_are_refused(storage: de.Storage) -> None:
    with pytest.raises(ValueError, match=r'missing is .* expected "initial" or "zeros"'):
        Embedding(storage, group="a", dimension=4, optimizer=SGD, missing="none")
    with pytest.raises(ValueError, match=r"padding_idx is .* expected -9223372036854775808 to 18446744073709551615"):
        Embedding(storage, group="a", dimension=4, optimizer=SGD, padding_idx=1 << 64)
    with pytest.raises(TypeError, match=r"padding_idx is 0\.5"):
        Feature(4, padding_idx=0.5)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        Feature(4, pooling="max")
    with pytest.raises(TypeError, match="dimension is '4'"):
        Feature("4")
    with pytest.raises(TypeError, match='"a" has no optimizer'):
        EmbeddingCollection(storage, {"a": Feature(4)})
    with pytest.raises(ValueError, match="features is empty"):
        EmbeddingCollection(storage, {}, optimizer=SGD)
    with pytest.raises(TypeError, match="expected a name and a Feature"):
        EmbeddingCollection(storage, {"a": 4}, optimizer=SGD)
    assert storage.groups() == {} or not storage.groups()


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"optimizer": de.Adam}, {"group": 256}, {"initializer": 0.0}])
def test_a_collection_with_a_wrong_feature_makes_no_group(storage: de.Storage, wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\[embedding\] {next(iter(wrong))} is"):
        EmbeddingCollection(storage, {"a": Feature(4), "b": Feature(4, **wrong)}, optimizer=SGD)
    assert storage.groups() == {}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"dimension": 8}, "dimension of one is 4, of the other 8"),
        ({"optimizer": de.Adam()}, r"optimizer of one is SGD\(.*, of the other Adam"),
        ({"optimizer": de.SGD(lr=0.5)}, r"optimizer of one is SGD\(.*, of the other SGD"),
        ({"initializer": de.Zeros()}, "initializer of one is Uniform.*, of the other Zeros"),
        ({"seed": 3}, "seed of one is 0, of the other 3"),
    ],
)
def test_features_that_share_a_group_and_do_not_fit_leave_no_group(
    storage: de.Storage, other: dict[str, Any], what: str
) -> None:
    """Found when the group of the first one was there: put right, the features did not fit the group."""
    features = {"a": Feature(4, group="item"), "b": Feature(**{"dimension": 4, "group": "item", **other})}
    with pytest.raises(de.SchemaMismatchError, match=rf"\"a\" and \"b\" share the group 'item', but the {what}"):
        EmbeddingCollection(storage, features, optimizer=SGD)
    assert storage.groups() == {}


def test_a_module_is_not_copied_or_pickled(storage: de.Storage, item: Embedding) -> None:
    fields = EmbeddingCollection(storage, {"user": Feature(4)}, optimizer=SGD)
    for module in (item, fields, torch.nn.Sequential(item)):
        with pytest.raises(TypeError, match="cannot be copied or pickled: its rows are in the storage"):
            copy.deepcopy(module)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(module)
    assert item.state_dict() == {}


def test_what_is_printed_is_what_is_not_default(storage: de.Storage) -> None:
    plain = Embedding(storage, group=3, dimension=4, optimizer=SGD)
    assert repr(plain) == f"Embedding(group=3, dimension=4, {SGD!r})"
    other = Embedding(
        storage,
        group="b",
        dimension=4,
        optimizer=SGD,
        initializer=de.Uniform(0.0, 1.0),
        padding_idx=0,
        seed=5,
        missing="zeros",
    )
    assert repr(other).endswith("Uniform(low=0.0, high=1.0), padding_idx=0, seed=5, missing='zeros')")
    fields = EmbeddingCollection(storage, {"tags": Feature(4, pooling="mean")}, optimizer=SGD)
    assert f"tags: group='tags', dimension=4, {SGD!r}, pooling='mean'" in repr(fields)


def test_a_group_that_was_dropped_is_none_of_the_module_that_is_made_anew(storage: de.Storage) -> None:
    """It got the dropped one as long as an older module had it: model = Model(storage) makes the new one first."""
    old = Embedding(storage, group="x", dimension=4, optimizer=de.SGD(lr=1.0))
    old(torch.tensor([1]))
    storage.drop_group("x")
    for _ in range(2):
        new = Embedding(storage, group="x", dimension=8, optimizer=de.SGD(lr=1.0))
        assert new(torch.tensor([1])).shape == (1, 8)
    with pytest.raises(ValueError, match="was dropped"):
        old(torch.tensor([1]))
