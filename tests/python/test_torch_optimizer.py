# SPDX-License-Identifier: Apache-2.0
"""SparseOptimizer: gradients add up and are applied at step(), and torch's tools for optimizers work on
them."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import damo_embedding as de  # noqa: E402
from damo_embedding.torch import Embedding, EmbeddingCollection, Feature, SparseOptimizer  # noqa: E402

DIMENSION = 4
KEYS = np.array([1, 2, 3])


@pytest.fixture
def item(storage: de.Storage) -> Embedding:
    return Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=1.0))


def stored(module: Embedding) -> np.ndarray:
    return module.embedding.lookup(KEYS, insert=False)


def moved(module: Embedding, before: np.ndarray) -> list[float]:
    """How far each row went down, the same for each of its weights."""
    distance = before - stored(module)
    np.testing.assert_allclose(distance, np.repeat(distance[:, :1], DIMENSION, axis=1), rtol=0, atol=1e-4)
    return [round(float(value), 4) for value in distance[:, 0]]


def test_gradients_wait_for_the_step_and_are_applied_once(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    before = stored(item)
    item(torch.tensor([1, 1, 2])).sum().backward()
    item(torch.tensor([2])).sum().backward()
    assert item.embedding.step == 0
    assert moved(item, before) == [0.0, 0.0, 0.0]
    optimizer.step()
    assert item.embedding.step == 1
    assert moved(item, before) == [2.0, 2.0, 0.0]
    optimizer.step()
    assert item.embedding.step == 1


@pytest.mark.parametrize("case", ["two backward passes", "clipping", "a gradient of the caller's"])
def test_gradients_that_wait_are_their_own(item: Embedding, case: str) -> None:
    """Autograd gave the same memory to a parameter, whose gradient was then changed in place."""
    position = torch.nn.Parameter(torch.zeros(3, DIMENSION))
    weights = torch.arange(1.0, 13.0).view(1, 3, DIMENSION)
    optimizer = SparseOptimizer(item)
    before, expected = stored(item), weights[0].clone()

    def backward() -> None:
        ((item(torch.tensor([[1, 2, 3]])) + position.unsqueeze(0)) * weights).sum().backward()

    if case == "two backward passes":
        backward()
        backward()
        expected *= 2
    elif case == "clipping":
        backward()
        torch.nn.utils.clip_grad_norm_([position], 1e-3)
    else:
        gradient = weights.clone()
        item(torch.tensor([[1, 2, 3]])).backward(gradient)
        gradient.fill_(100.0)
    optimizer.step()
    np.testing.assert_allclose(before - stored(item), expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_gradient_that_is_not_finite_keeps_every_storage_from_its_update(
    storage: de.Storage, tmp_path: Path, with_optimizer: bool
) -> None:
    """The storages were asked one after the other, and a second step() applied the first one's gradients again."""
    with de.Storage(tmp_path / "second.damo", memory="16MiB") as second:
        a, b = (
            Embedding(one, group="x", dimension=DIMENSION, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
            for one in (storage, second)
        )
        ids = torch.tensor([1])
        for bad in (a, b):
            optimizer = SparseOptimizer([a, b]) if with_optimizer else None
            for _ in range(2):
                a_sum, b_sum = ((one(ids) * (float("nan") if one is bad else 1.0)).sum() for one in (a, b))
                loss = a_sum + b_sum
                if optimizer is None:
                    with pytest.raises(ValueError, match="NaN or infinite"):
                        loss.backward()
                else:
                    loss.backward()
                    with pytest.raises(ValueError, match="NaN or infinite"):
                        optimizer.step()
            assert a.embedding.step == b.embedding.step == 0
            if optimizer is not None:
                optimizer.zero_grad()


def test_a_step_of_two_storages_is_tried_again_for_the_one_that_failed(storage: de.Storage, tmp_path: Path) -> None:
    with de.Storage(tmp_path / "second.damo", memory="16MiB") as second:
        a, b = (
            Embedding(one, group="x", dimension=DIMENSION, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
            for one in (storage, second)
        )
        optimizer = SparseOptimizer([a, b])
        (a(torch.tensor([1])).sum() + b(torch.tensor([1])).sum()).backward()
        fails = True

        def rate(step: int) -> float:
            if fails:
                raise RuntimeError("no rate")
            return 1.0

        optimizer.param_groups[1]["scheduled_lr"] = optimizer.param_groups[1]["lr"]
        b.embedding.lr = rate
        with pytest.raises(RuntimeError, match="no rate"):
            optimizer.step()
        fails = False
        optimizer.step()
        assert a.embedding.step == b.embedding.step == 1


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_where_the_log_has_room_for_one_group_alone_no_group_learns(
    storage: de.Storage, path: Path, with_optimizer: bool
) -> None:
    """And the same step, with room, is an update of each."""
    a, b = (
        Embedding(storage, group=name, dimension=DIMENSION, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
        for name in "ab"
    )
    optimizer = SparseOptimizer([a, b]) if with_optimizer else None
    few, many = torch.tensor([1]), torch.arange(5_000)
    loss = a(few).sum() + b(many).sum()
    apply = loss.backward if optimizer is None else optimizer.step
    if optimizer is not None:
        loss.backward()
    log = max(path.glob("*/log/*.log"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 4_096, before[1]))
    try:
        with pytest.raises(de.StorageError, match="File too large"):
            apply()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert a.embedding.step == b.embedding.step == 0
    assert not a.embedding.lookup([1], insert=False).any()
    if optimizer is not None:
        optimizer.step()
        assert a.embedding.step == b.embedding.step == 1
        assert (a.embedding.lookup([1], insert=False) == -1).all()
        assert (b.embedding.lookup(many.numpy(), insert=False) == -1).all()


def test_a_state_of_other_groups_is_refused(storage: de.Storage) -> None:
    a, b = (Embedding(storage, group=name, dimension=DIMENSION, optimizer=de.SGD(lr=1.0)) for name in "ab")
    state = SparseOptimizer([a, b]).state_dict()
    with pytest.raises(ValueError, match=r"of the groups \['a', 'b'\], this optimizer has \['b', 'a'\]"):
        SparseOptimizer([b, a]).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: 5, "state_dict is int, expected the dictionary that state_dict"),
        (lambda _: {}, "state_dict has no state and no param_groups"),
        (lambda state: {**state, "state": []}, "state is list"),
        (lambda state: {**state, "param_groups": [5]}, r"param_groups is \[5\], expected a list of dictionaries"),
        (lambda state: {**state, "param_groups": [{"name": "item"}]}, "a group has no lr and no params"),
        (lambda state: {**state, "param_groups": []}, r"the state is of the groups \[\]"),
        (lambda state: {**state, "param_groups": [{**state["param_groups"][0], "lr": "1"}]}, "lr is '1'"),
        (lambda state: {**state, "param_groups": [{**state["param_groups"][0], "params": 0}]}, "params is 0"),
    ],
)
def test_what_is_no_state_is_refused_at_the_door(storage: de.Storage, change: Any, message: str) -> None:
    optimizer = SparseOptimizer(Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=1.0)))
    before = optimizer.state_dict()
    with pytest.raises((TypeError, ValueError), match=rf"\[load_state_dict\] {message}"):
        optimizer.load_state_dict(change(before))
    assert optimizer.state_dict() == before
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)  # as torch's own optimizers may have it
    other = SparseOptimizer(Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=1.0)))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("rate", [np.array(0.25), np.array([0.25]), torch.tensor([0.25])], ids=repr)
def test_a_rate_of_one_number_is_stepped_with_saved_and_loaded(item: Embedding, rate: Any) -> None:
    """Found with an array: a checkpoint that could be saved and not loaded."""
    optimizer = SparseOptimizer(item)
    optimizer.param_groups[0]["lr"] = rate
    before = stored(item)
    item(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert moved(item, before) == [0.25, 0.0, 0.0]
    other = SparseOptimizer(item)
    other.load_state_dict(optimizer.state_dict())
    before = stored(item)
    item(torch.tensor([1])).sum().backward()
    other.step()
    assert moved(item, before) == [0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rate", "error"),
    [(-0.25, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("0.25", TypeError), (True, TypeError)],
)
def test_a_step_refuses_a_rate_that_is_none_and_applies_nothing(
    storage: de.Storage, rate: Any, error: type[Exception]
) -> None:
    modules = torch.nn.ModuleList(
        [Embedding(storage, group=name, dimension=DIMENSION, optimizer=de.SGD(lr=1.0)) for name in ("a", "b")]
    )
    optimizer = SparseOptimizer(modules)
    for module in modules:
        module(torch.tensor([1])).sum().backward()
    optimizer.param_groups[1]["lr"] = rate
    sequence = storage.stats()["sequence"]
    with pytest.raises(error, match=r"lr is"):
        optimizer.step()
    assert storage.stats()["sequence"] == sequence
    if error is ValueError:  # as a schedule may end with; who only reads has no use for it
        SparseOptimizer(modules).load_state_dict(optimizer.state_dict())


def test_zero_grad_drops_what_no_step_has_applied(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    before = stored(item)
    item(torch.tensor([1])).sum().backward()
    optimizer.zero_grad()
    item(torch.tensor([2])).sum().backward()
    optimizer.step()
    assert moved(item, before) == [0.0, 1.0, 0.0]


def test_a_closure_is_evaluated_with_gradients(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    before = stored(item)

    def closure() -> float:
        optimizer.zero_grad()
        loss = item(torch.tensor([1])).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == pytest.approx(float(before[0].sum()))
    assert moved(item, before) == [1.0, 0.0, 0.0]


def test_all_groups_of_a_model_are_managed_each_once(storage: de.Storage, item: Embedding) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = item
            self.fields = EmbeddingCollection(
                storage,
                {"user": Feature(4, optimizer=de.Adam(lr=0.5)), "item": Feature(DIMENSION)},
                optimizer=de.SGD(lr=1.0),
            )
            self.dense = torch.nn.Linear(4, 1)

    model = Model()
    optimizer = SparseOptimizer(model)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("item", 1.0),
        ("user", 0.5),
    ]
    assert SparseOptimizer([model.dense, model.fields]).param_groups[0]["name"] == "user"


def test_a_module_of_a_managed_group_is_managed_too(storage: de.Storage, item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    twin = Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=1.0))
    before = stored(item)
    twin(torch.tensor([1])).sum().backward()
    assert item.embedding.step == 0
    optimizer.step()
    assert moved(item, before) == [1.0, 0.0, 0.0]


def test_groups_of_two_optimizers_are_updated_by_their_own(storage: de.Storage, item: Embedding) -> None:
    user = Embedding(storage, group="user", dimension=DIMENSION, optimizer=de.SGD(lr=1.0))
    optimizer = SparseOptimizer(item)
    (item(torch.tensor([1])).sum() + user(torch.tensor([1])).sum()).backward()
    assert (item.embedding.step, user.embedding.step) == (0, 1)
    optimizer.step()
    assert (item.embedding.step, user.embedding.step) == (1, 1)


def test_a_newer_optimizer_takes_over_and_the_older_one_says_so(item: Embedding) -> None:
    older = SparseOptimizer(item)
    item(torch.tensor([1])).sum().backward()
    newer = SparseOptimizer(item)
    before = stored(item)
    item(torch.tensor([2])).sum().backward()
    with pytest.raises(RuntimeError, match='group "item" has a newer SparseOptimizer'):
        older.step()
    newer.step()
    assert moved(item, before) == [0.0, 1.0, 0.0]


def test_when_the_optimizer_is_gone_backward_updates_again(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    item(torch.tensor([1])).sum().backward()
    del optimizer
    gc.collect()
    before = stored(item)
    item(torch.tensor([2])).sum().backward()
    assert moved(item, before) == [0.0, 1.0, 0.0]


def test_a_step_that_raises_applies_nothing_and_zero_grad_recovers(storage: de.Storage, item: Embedding) -> None:
    user = Embedding(storage, group="user", dimension=DIMENSION, optimizer=de.SGD(lr=1.0))
    optimizer = SparseOptimizer([item, user])
    before = stored(item), stored(user)
    (item(torch.tensor([1])).sum() + user(torch.tensor([3])).sum() * float("nan")).backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"key 3\b"):
            optimizer.step()
    assert item.embedding.step == user.embedding.step == 0
    assert moved(item, before[0]) == moved(user, before[1]) == [0.0, 0.0, 0.0]
    optimizer.zero_grad()
    item(torch.tensor([2])).sum().backward()
    optimizer.step()
    assert moved(item, before[0]) == [0.0, 1.0, 0.0]


def test_the_rate_of_a_step_is_that_of_its_param_group(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    before = stored(item)
    optimizer.param_groups[0]["lr"] = 0.25
    item(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    item(torch.tensor([2])).sum().backward()
    optimizer.step()
    assert moved(item, before) == [0.25, 0.5, 0.0]
    assert item.embedding.lr == 1.0


def test_schedulers_set_the_rate(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = stored(item)
    for _ in range(3):
        optimizer.zero_grad()
        item(torch.tensor([1])).sum().backward()
        optimizer.step()
        scheduler.step()
    assert moved(item, before) == [1.75, 0.0, 0.0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_a_state_dict_has_rates_and_no_rows(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    item(torch.tensor([1])).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.125
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert state == {"state": {}, "param_groups": [{"lr": 0.125, "name": "item", "params": [0]}]}
    other = SparseOptimizer(item)
    other.load_state_dict(state)
    before = stored(item)
    item(torch.tensor([1])).sum().backward()
    other.step()
    assert moved(item, before) == [0.125, 0.0, 0.0]


# ------------------------------------------------------ schedules of our own

HALVING = de.ExponentialDecay(lr=1.0, decay_steps=1, decay_rate=0.5)


@pytest.fixture
def halving(storage: de.Storage) -> Embedding:
    return Embedding(storage, group="halving", dimension=DIMENSION, optimizer=de.SGD(lr=HALVING))


def step(module: Embedding, optimizer: SparseOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        module(torch.tensor([1])).sum().backward()
        optimizer.step()


def test_a_step_follows_the_group_s_schedule_and_shows_the_next_rate(halving: Embedding) -> None:
    optimizer = SparseOptimizer(halving)
    (param_group,) = optimizer.param_groups
    before = stored(halving)
    for expected in (1.0, 0.5, 0.25):
        assert param_group["lr"] == expected
        step(halving, optimizer)
    assert moved(halving, before) == [1.75, 0.0, 0.0]
    optimizer.step()  # without gradients: no update, the rate stays
    assert param_group["lr"] == 0.125
    halving.embedding.lr = 0.5
    step(halving, optimizer)
    assert moved(halving, before) == [2.25, 0.0, 0.0]


def test_a_rate_that_is_set_goes_before_the_schedule_until_it_is_taken_back(halving: Embedding) -> None:
    optimizer = SparseOptimizer(halving)
    (param_group,) = optimizer.param_groups
    before = stored(halving)
    step(halving, optimizer)
    param_group["lr"] = 4.0
    step(halving, optimizer, 2)
    assert (param_group["lr"], param_group["scheduled_lr"]) == (4.0, 0.5)
    assert moved(halving, before) == [9.0, 0.0, 0.0]
    param_group["lr"] = param_group["scheduled_lr"]
    step(halving, optimizer)  # the fourth update of the group
    assert moved(halving, before) == [9.125, 0.0, 0.0]
    assert param_group["lr"] == 0.0625


def test_a_scheduler_of_torch_goes_before_the_schedule(halving: Embedding) -> None:
    optimizer = SparseOptimizer(halving)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 + epoch)
    before = stored(halving)
    for _ in range(3):
        step(halving, optimizer)
        scheduler.step()
    assert moved(halving, before) == [1.0 + 2.0 + 3.0, 0.0, 0.0]


def test_a_state_dict_remembers_whether_the_schedule_is_followed(halving: Embedding) -> None:
    optimizer = SparseOptimizer(halving)
    step(halving, optimizer)
    following = pickle.loads(pickle.dumps(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 2.0
    overridden = pickle.loads(pickle.dumps(optimizer.state_dict()))
    before = stored(halving)
    other = SparseOptimizer(halving)
    other.load_state_dict(following)
    step(halving, other)
    assert moved(halving, before) == [0.5, 0.0, 0.0]
    other.load_state_dict(overridden)
    step(halving, other)
    assert moved(halving, before) == [2.5, 0.0, 0.0]


def test_a_function_that_ends_with_the_training_does_not_spoil_the_last_step(storage: de.Storage) -> None:
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=[1.0, 0.5].__getitem__))
    optimizer = SparseOptimizer(module)
    before = stored(module)
    step(module, optimizer, 2)
    assert moved(module, before) == [1.5, 0.0, 0.0]
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(IndexError):
        optimizer.step()
    assert moved(module, before) == [1.5, 0.0, 0.0]


def test_when_one_schedule_raises_no_group_is_updated(storage: de.Storage, item: Embedding) -> None:
    def raises(step: int) -> float:
        if step == 0:
            return 1.0
        raise KeyError("no rate")

    user = Embedding(storage, group="user", dimension=DIMENSION, optimizer=de.SGD(lr=raises))
    optimizer = SparseOptimizer([item, user])
    for module in (item, user):
        module(torch.tensor([1])).sum().backward()
    optimizer.step()
    before = stored(item)
    for module in (item, user):
        module(torch.tensor([1])).sum().backward()
    for _ in range(2):
        with pytest.raises(KeyError, match="no rate"):
            optimizer.step()
    assert item.embedding.step == user.embedding.step == 1
    assert moved(item, before) == [0.0, 0.0, 0.0]


# ------------------------------------------- gradients that torch's tools see


def test_a_gradient_is_seen_once_for_each_key(storage: de.Storage) -> None:
    module = Embedding(storage, group="item", dimension=DIMENSION, optimizer=de.SGD(lr=1.0), padding_idx=0)
    optimizer = SparseOptimizer(module)
    (stand_in,) = optimizer.parameters()
    assert stand_in.grad is None
    module(torch.tensor([2, 0, 1, 2])).sum().backward()
    module(torch.tensor([1, 3])).sum().backward()
    assert sorted(stand_in.grad[:, 0].tolist()) == [1.0, 2.0, 2.0]
    assert stand_in.grad is stand_in.grad
    before = stored(module)
    module(torch.tensor([3])).sum().backward()
    assert sorted(stand_in.grad[:, 0].tolist()) == [2.0, 2.0, 2.0]
    stand_in.grad *= 2.0
    optimizer.step()
    assert moved(module, before) == [4.0, 4.0, 4.0]
    assert module.embedding.step == 1
    assert stand_in.grad is None


def test_a_gradient_changed_in_place_leaves_other_tensors_alone(item: Embedding) -> None:
    # Both lookups get the same gradient tensor from autograd, and so does `dense`.
    dense = torch.zeros(1, DIMENSION, requires_grad=True)
    optimizer = SparseOptimizer(item)
    before = stored(item)
    (item(torch.tensor([1])) + item(torch.tensor([2])) + dense).sum().backward()
    optimizer.parameters()[0].grad.mul_(10.0)
    optimizer.step()
    assert moved(item, before) == [10.0, 10.0, 0.0]
    assert dense.grad.tolist() == [[1.0] * DIMENSION]


def test_a_gradient_can_be_replaced_by_one_of_its_shape(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    (stand_in,) = optimizer.parameters()
    with pytest.raises(ValueError, match="no gradient to replace"):
        stand_in.grad = torch.zeros(1, DIMENSION)
    before = stored(item)
    item(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected \(2, 4\)"):
        stand_in.grad = torch.zeros(3, DIMENSION)
    stand_in.grad = stand_in.grad.clamp(max=0.5)
    optimizer.step()
    assert moved(item, before) == [0.5, 0.5, 0.0]


def test_clipping_equals_clipping_of_a_dense_embedding(item: Embedding) -> None:
    dense = torch.nn.Linear(DIMENSION, 1)
    twin = torch.nn.Linear(DIMENSION, 1)
    twin.load_state_dict(dense.state_dict())
    theirs = torch.nn.Embedding(4, DIMENSION)
    with torch.no_grad():
        theirs.weight[1:] = torch.from_numpy(stored(item))
    rows = SparseOptimizer(item)
    ids = torch.tensor([1, 1, 2, 3, 1])
    optimizers = rows, torch.optim.SGD([*twin.parameters(), *theirs.parameters()], lr=1.0)
    dense_sgd = torch.optim.SGD(dense.parameters(), lr=1.0)
    (dense(item(ids)) ** 2).sum().backward()
    (twin(theirs(ids)) ** 2).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_([*dense.parameters(), *rows.parameters()], max_norm=0.01)
    expected = torch.nn.utils.clip_grad_norm_([*twin.parameters(), *theirs.parameters()], max_norm=0.01)
    torch.testing.assert_close(norm, expected)
    assert norm > 0.01
    dense_sgd.step()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(torch.from_numpy(stored(item)), theirs.weight.detach()[1:])
    torch.testing.assert_close(dense.weight, twin.weight)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_scales_and_unscales(item: Embedding, unscale: bool) -> None:
    optimizer = SparseOptimizer(item)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = stored(item)
    for ids in ([1, 1], [2]):
        scaler.scale(item(torch.tensor(ids)).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
        assert sorted(optimizer.parameters()[0].grad[:, 0].tolist()) == [1.0, 2.0]
    scaler.step(optimizer)
    scaler.update()
    assert moved(item, before) == [2.0, 1.0, 0.0]
    assert scaler.get_scale() == 1024.0


def test_a_gradient_scaler_skips_the_step_of_an_infinite_gradient(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = stored(item)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(item(torch.tensor([1])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert item.embedding.step == 1
    assert moved(item, before) == [1.0, 0.0, 0.0]


# ------------------------------------------------------------------- errors


def test_a_model_without_embeddings_and_dense_parameters_are_refused(item: Embedding) -> None:
    with pytest.raises(ValueError, match="have no damo_embedding"):
        SparseOptimizer(torch.nn.Linear(2, 1))
    optimizer = SparseOptimizer(item)
    with pytest.raises(TypeError, match="dense tensors; give them to an optimizer"):
        optimizer.add_param_group({"params": torch.nn.Linear(2, 1).parameters()})


def test_an_optimizer_is_not_copied_or_pickled(item: Embedding) -> None:
    optimizer = SparseOptimizer(item)
    with pytest.raises(TypeError, match="SparseOptimizer cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="SparseOptimizer cannot be copied or pickled"):
        pickle.dumps(optimizer)
