# SPDX-License-Identifier: Apache-2.0
"""save_checkpoint and load_checkpoint: the whole training of one step, verified first, whole or not at all."""

from __future__ import annotations

import enum
import json
import math
import os
import random as python_random
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from comparing import files_of, rows_of

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from damo_embedding.torch import (  # noqa: E402
    Embedding,
    Resumed,
    SparseOptimizer,
    load_checkpoint,
    save_checkpoint,
)
from damo_embedding.torch.plain import decode, encode  # noqa: E402

NOW = 2**40


def opened(path: Path) -> de.Storage:
    storage = de.Storage(path, memory="16MiB", threads=1)
    storage.now = NOW
    return storage


class Training:
    """A model with rows and a dense part, and all that goes with it."""

    def __init__(self, storage: de.Storage, width: int = 8) -> None:
        self.storage = storage
        self.item = Embedding(storage, group="item", dimension=4, optimizer=de.Adam(lr=0.1))
        self.model = torch.nn.ModuleDict(
            {
                "item": self.item,
                "head": torch.nn.Sequential(
                    torch.nn.Linear(4, width),
                    torch.nn.BatchNorm1d(width),
                    torch.nn.Dropout(0.5),
                    torch.nn.Linear(width, 1),
                ),
            }
        )
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.rows = SparseOptimizer(self.model)
        self.decay = torch.optim.lr_scheduler.MultiStepLR(self.dense, [2, 4])
        self.states = {"dense": self.dense, "rows": self.rows, "decay": self.decay}

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            ids = torch.randint(0, 30, (16,))
            self.dense.zero_grad()
            self.model["head"](self.item(ids)).square().sum().backward()
            self.dense.step()
            self.rows.step()
            self.decay.step()

    def save(self, directory: Path, step: int, **options: Any) -> None:
        save_checkpoint(directory, self.model, self.states, self.storage, step, **options)

    def load(self, place: Path, **options: Any) -> Resumed | None:
        return load_checkpoint(place, self.model, self.states, self.storage, **options)

    def bits(self) -> tuple[Any, ...]:
        """All that a checkpoint is of, in a form that == compares."""
        tensors: dict[str, torch.Tensor] = {}
        states = {name: one.state_dict() for name, one in self.states.items()}
        text = json.dumps(encode("test", "", [self.model.state_dict(), states], tensors))
        drawn = torch.get_rng_state().numpy().tobytes(), python_random.getstate(), repr(np.random.get_state())  # noqa: NPY002
        return (
            text,
            {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
            rows_of(self.item.embedding),
            self.item.embedding.step,
            drawn,
        )


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def training(path: Path) -> Any:
    torch.manual_seed(0)
    with opened(path) as storage:
        yield Training(storage)


# ------------------------------------------------------------------ resuming


def test_everything_is_as_it_was_and_goes_on_as_it_did(training: Training, kept: Path) -> None:
    training.learn(3)
    training.save(kept / "3", 3, reader_state={"file": "day-1", "line": 48, "order": np.arange(3)})
    at_three = training.bits()
    training.learn(2)
    at_five = training.bits()
    resumed = training.load(kept)  # the same objects, which had run ahead
    assert resumed is not None
    assert (resumed.path, resumed.step) == (str(kept / "3"), 3)
    assert resumed.operations_set_aside > 0
    assert resumed.reader_state["line"] == 48
    assert resumed.reader_state["order"].tolist() == [0, 1, 2]
    assert training.bits() == at_three
    training.learn(2)
    assert training.bits() == at_five


def test_another_process_goes_on_with_objects_of_its_own(training: Training, kept: Path, tmp_path: Path) -> None:
    training.learn(3)
    training.save(kept / "3", 3)
    training.learn(2)
    expected = training.bits()
    torch.manual_seed(99)
    with opened(tmp_path / "another.damo") as storage:  # a new one: the old is lost
        other = Training(storage)
        resumed = other.load(kept)
        assert resumed is not None
        assert resumed.operations_set_aside == 0
        other.learn(2)
        assert other.bits() == expected


def test_the_newest_whole_checkpoint_is_taken(training: Training, kept: Path) -> None:
    for step in range(1, 5):
        training.learn(1)
        training.save(kept / str(step), step, keep=3)
    assert sorted(os.listdir(kept)) == ["2", "3", "4"]
    data = bytearray((kept / "4" / "dense.safetensors").read_bytes())
    data[-1] ^= 1
    (kept / "4" / "dense.safetensors").write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"passed over.*4/dense\.safetensors is damaged") as told:
        resumed = training.load(kept)
    assert told[0].filename == __file__
    assert resumed is not None
    assert resumed.step == 3


def test_one_of_a_newer_version_is_not_passed_over(
    training: Training, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.learn(1)
    training.save(kept / "1", 1)
    training.learn(1)
    with monkeypatch.context() as newer:
        newer.setattr("damo_embedding.torch.checkpoint._VERSION", 100)
        training.save(kept / "2", 2)
    training.learn(1)
    before = training.bits()
    with pytest.raises(de.NewerVersionError, match="has version 100, this package reads 1: upgrade damo-embedding"):
        training.load(kept)
    assert training.bits() == before
    shutil.rmtree(kept / "2")
    resumed = training.load(kept)
    assert resumed is not None
    assert resumed.step == 1


def test_what_was_set_while_training_stays_set(training: Training, kept: Path) -> None:
    training.learn(1)
    training.save(kept / "1", 1)
    training.item.embedding.lr = 0.5
    training.load(kept)
    assert training.item.embedding.lr == 0.5
    assert training.storage.now == NOW
    assert training.storage.restored_from is not None


def test_a_checkpoint_of_a_training_is_one_of_its_storage(training: Training, kept: Path, tmp_path: Path) -> None:
    training.learn(2)
    training.save(kept / "2", 2)
    with de.Storage.open_or_restore(tmp_path / "copy", kept, memory="16MiB") as storage:
        assert storage.last_commit == (2, b"")
        assert rows_of(Training(storage).item.embedding) == rows_of(training.item.embedding)


def test_without_a_checkpoint_a_new_training_begins(training: Training, kept: Path) -> None:
    assert training.load(kept) is None
    assert training.load(kept / "absent") is None
    training.learn(1)
    with pytest.raises(de.StorageError, match=r"no checkpoint in .*checkpoints, but .* has \d+ operations"):
        training.load(kept)


class Gpus:
    """As many as there are states of random numbers, for the calls that ask for them."""

    def __init__(self, *states: int) -> None:
        self.states = [torch.full((16,), state, dtype=torch.uint8) for state in states]

    def set(self, states: list[torch.Tensor]) -> None:
        assert len(states) == len(self.states)
        self.states = [state.clone() for state in states]

    @property
    def numbers(self) -> list[int]:
        return [int(state[0]) for state in self.states]

    @contextmanager
    def there(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: bool(self.states))
            patch.setattr(torch.cuda, "device_count", lambda: len(self.states))
            patch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
            patch.setattr(torch.cuda, "set_rng_state_all", self.set)
            yield


def test_the_random_numbers_of_gpus_go_on(training: Training, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(1, 2)
    with gpus.there():
        training.save(kept / "1", 1)
        gpus.set(Gpus(3, 4).states)
        training.load(kept)
        assert gpus.numbers == [1, 2]

        def refuse(*arguments: Any) -> None:
            assert gpus.numbers == [1, 2]
            raise de.StorageError("no")

        gpus.set(Gpus(5, 6).states)
        monkeypatch.setattr(training.storage, "_go_back_to", refuse)
        with pytest.raises(de.StorageError, match="no"):
            training.load(kept)
        assert gpus.numbers == [5, 6]


@pytest.mark.parametrize(("saved", "here"), [((1, 2), (7,)), ((1,), (7, 8)), ((1, 2), ()), ((), (7,))])
def test_those_of_another_number_of_gpus_are_left_with_a_warning(
    training: Training, kept: Path, saved: tuple[int, ...], here: tuple[int, ...]
) -> None:
    training.learn(1)
    with Gpus(*saved).there():
        training.save(kept / "1", 1)
    before = training.bits()
    training.learn(1)
    gpus = Gpus(*here)
    said = (
        rf"^\[load_checkpoint\] the random numbers of {len(saved)} GPUs were saved, here are {len(here)}: .* not set$"
    )
    with gpus.there(), pytest.warns(RuntimeWarning, match=said) as told:
        assert training.load(kept) is not None
    assert told[0].filename == __file__
    assert gpus.numbers == list(here)
    assert training.bits() == before


# ------------------------------------------------------------------- refused


def test_a_failure_changes_nothing(training: Training, kept: Path, tmp_path: Path) -> None:
    training.learn(2)
    training.save(kept / "2", 2)
    training.learn(1)
    before = training.bits()
    for name in ("dense.safetensors", "training.json", "MANIFEST"):
        shutil.copytree(kept / "2", tmp_path / name)
        file = tmp_path / name / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(de.CorruptionError, match="is not whole"), pytest.warns(RuntimeWarning, match=name):
            training.load(tmp_path / name)
        assert training.bits() == before
    storage = training.storage
    wider = torch.nn.ModuleDict({"item": training.item, "head": Training(storage, width=9).model["head"]})
    shape = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(kept, wider, training.states, storage)
    assert all(torch.equal(value, shape[name]) for name, value in wider.state_dict().items())
    with pytest.raises(ValueError, match=r"the optimizers are 0: AdamW, those of .* are dense: AdamW, rows: SparseOpt"):
        load_checkpoint(kept, training.model, training.dense, storage)
    assert rows_of(training.item.embedding) == before[2]


@pytest.mark.parametrize("rate", [np.array(0.05), -1e-9, float("nan")], ids=repr)
def test_a_rate_that_a_schedule_ended_with_is_loaded_and_put_back(training: Training, kept: Path, rate: Any) -> None:
    """Found with 1 - step / steps: the last checkpoint could not be loaded, nor a load that failed taken back."""
    training.learn(1)
    training.rows.param_groups[0]["lr"] = rate
    training.save(kept / "1", 1)
    before = training.bits()
    wider = torch.nn.ModuleDict({"item": training.item, "head": Training(training.storage, width=9).model["head"]})
    rows = SparseOptimizer(wider)
    rows.param_groups[0]["lr"] = rate
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(kept, wider, {**training.states, "rows": rows}, training.storage)
    assert repr(rows.param_groups[0]["lr"]) == repr(rate)
    training.rows = training.states["rows"] = SparseOptimizer(training.model)
    training.load(kept)
    assert training.bits() == before


def test_a_group_of_another_layout_changes_nothing(training: Training, kept: Path, tmp_path: Path) -> None:
    save_checkpoint(kept / "1", training.model, None, training.storage, 1)
    with opened(tmp_path / "other.damo") as storage:
        item = Embedding(storage, group="item", dimension=5, optimizer=de.Adam(lr=0.1))
        with pytest.raises(de.SchemaMismatchError, match="dimension 4, opened with 5"):
            load_checkpoint(kept, item, None, storage, strict=False)
        item(torch.tensor([1]))
        assert len(item.embedding) == 1


FILTER = {"capacity": 1_000, "count": 2}


@pytest.mark.parametrize(
    ("there", "here", "memory", "error"),
    [
        (FILTER, {**FILTER, "count": 3}, "64MiB", de.SchemaMismatchError),
        ({"capacity": 2_000_000, "count": 2}, None, "16MiB", ValueError),
    ],
    ids=["of other settings", "too large for the memory"],
)
def test_a_filter_that_does_not_go_with_this_storage_changes_nothing(
    kept: Path, tmp_path: Path, there: dict[str, Any], here: dict[str, Any] | None, memory: str, error: type[Exception]
) -> None:
    """Found when the rows were replaced already: they were of one step, and the dense part of another."""

    def module(storage: de.Storage, settings: dict[str, Any] | None) -> Embedding:
        admission = None if settings is None else de.CountingBloomFilter(**settings)
        return Embedding(storage, group="item", dimension=4, optimizer=de.SGD(lr=1.0), admission=admission)

    def model_of(item: Embedding) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"item": item, "head": torch.nn.Linear(4, 1)})

    with de.Storage(tmp_path / "first.damo", memory="64MiB") as storage:
        save_checkpoint(kept / "1", model_of(module(storage, there)), None, storage, 1)
    with de.Storage(tmp_path / "second.damo", memory=memory) as storage:
        model = model_of(module(storage, here))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match="filter"):
            load_checkpoint(kept, model, None, storage)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert storage.restored_from is None
        assert storage.stats()["sequence"] == 0
        if here is None:
            with pytest.raises(
                ValueError, match=r"\[restore\] admission filters take .* open the storage with memory="
            ):
                de.Storage.restore(kept / "1", tmp_path / "third.damo", memory=memory)
            assert not (tmp_path / "third.damo").exists()


def test_a_ctrl_c_that_comes_when_the_rows_are_back_leaves_all_of_the_checkpoint(
    training: Training, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python raises it when the call returns: the dense part of before was put beside the rows of the checkpoint."""
    training.learn(2)
    training.save(kept / "2", 2)
    expected = training.bits()
    training.learn(3)

    def restore(*arguments: Any) -> None:
        _core_restore(*arguments)
        raise KeyboardInterrupt

    _core_restore = de._core.restore
    monkeypatch.setattr(de._core, "restore", restore)
    with pytest.raises(KeyboardInterrupt) as raised:
        training.load(kept)
    assert "are those of" in raised.value.__notes__[0]
    assert training.bits() == expected
    found = training.storage.restored_from
    assert found is not None
    assert found.step == 2


def test_a_ctrl_c_in_the_close_before_the_rows_are_replaced_changes_nothing(training: Training, kept: Path) -> None:
    """The storage was left closed."""
    training.learn(2)
    training.save(kept / "2", 2)
    training.learn(1)
    before, core = training.bits(), training.storage._core

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def close(self) -> None:
            core.close()
            raise KeyboardInterrupt

    training.storage._core = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        training.load(kept)
    assert training.bits() == before
    training.learn(1)


def test_a_load_within_a_dump_is_refused(training: Training, kept: Path, tmp_path: Path) -> None:
    """It waited for the dump, which waited for it."""
    training.learn(1)
    training.save(kept / "1", 1)

    def progress(done: int, total: int) -> None:
        training.load(kept)

    with pytest.raises(ValueError, match=r"\[restore\] .* is being dumped by this thread"):
        training.storage.dump(tmp_path / "dump", progress=progress)
    training.learn(1)


def test_a_clock_that_ran_far_ahead_stands_at_the_checkpoint_s(kept: Path, path: Path) -> None:
    """Setting it again was refused, after the rows had been replaced."""
    with de.Storage(path, memory="16MiB", ttl="1000d") as storage:
        item = Embedding(storage, group="item", dimension=4, optimizer=de.SGD(lr=1.0))
        storage.now = NOW
        item(torch.tensor([1])).sum().backward()
        save_checkpoint(kept / "1", item, None, storage, 1)
        for _ in range(4):
            storage.now += 100 * 86_400
            item(torch.tensor([1])).sum().backward()
        assert load_checkpoint(kept, item, None, storage) is not None
        assert storage.now == NOW
        assert item.embedding.step == 1


def test_a_clock_that_expire_set_stays_set(kept: Path, path: Path) -> None:
    with de.Storage(path, memory="16MiB", ttl="30d") as storage:
        item = Embedding(storage, group="item", dimension=4, optimizer=de.SGD(lr=1.0))
        storage.expire(1_400_000_000)  # a time of old events
        item(torch.tensor([1])).sum().backward()
        save_checkpoint(kept / "1", item, None, storage, 1)
        load_checkpoint(kept, item, None, storage)
        assert storage.now == 1_400_000_000


def test_a_name_may_get_another_number(kept: Path, tmp_path: Path) -> None:
    """A module made after the load got the rows of the group whose number it had been."""

    def module(storage: de.Storage, name: str) -> Embedding:
        return Embedding(
            storage,
            group=name,
            dimension=4,
            optimizer=de.SGD(lr=1.0),
            initializer=de.Constant({"a": 1.0, "b": 2.0}[name]),
        )

    with de.Storage(tmp_path / "first.damo", memory="16MiB") as storage:
        model = torch.nn.ModuleDict({name: module(storage, name) for name in "ab"})
        save_checkpoint(kept / "1", model, None, storage, 1)
    with de.Storage(tmp_path / "second.damo", memory="16MiB") as storage:
        model = torch.nn.ModuleDict({name: module(storage, name) for name in "ba"})
        load_checkpoint(kept, model, None, storage)
        for name, value in (("a", 1.0), ("b", 2.0)):
            again = module(storage, name)
            assert again.embedding.name == name
            assert (again(torch.tensor([7])) == value).all()
            assert (model[name](torch.tensor([7])) == value).all()


def test_a_dropped_group_does_not_come_back_with_a_load(path: Path, kept: Path) -> None:
    """Its old Embedding was opened again: with other settings it ended the load when the rows were replaced."""
    with de.Storage(path, memory="16MiB") as storage:
        dropped = de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), 4, "x")
        item = Embedding(storage, group="y", dimension=4, optimizer=de.SGD(lr=1.0))
        save_checkpoint(kept / "1", item, None, storage, 1)
        storage.drop_group("x")
        again = de.Embedding(storage, de.SGD(lr=0.2), de.Zeros(), 4, "x")
        save_checkpoint(kept / "2", item, None, storage, 2)
        load_checkpoint(kept, item, None, storage)
        assert again.lookup([1]).shape == (1, 4)
        storage.drop_group("x")
        save_checkpoint(kept / "3", item, None, storage, 3)
        load_checkpoint(kept, item, None, storage)
        assert list(storage.groups().values()) == ["y"]
        with pytest.raises(de.ClosedError):  # what it was of is no more
            dropped.lookup([1])


def test_a_group_by_its_number_keeps_it_beside_names(path: Path, kept: Path) -> None:
    """A name with settings of its own was opened first, and took the number."""
    with de.Storage(path, memory="16MiB") as storage:
        save_checkpoint(kept / "1", torch.nn.Linear(1, 1), None, storage, 1)
        numbered = de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), 4, 255)
        named = de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), 4, "c", ttl="30d")
        load_checkpoint(kept, torch.nn.Linear(1, 1), None, storage)
        assert (numbered.group, named.group) == (255, 254)


def test_gradients_from_before_a_load_reach_no_row_after_it(path: Path, kept: Path) -> None:
    """The second load gave a table the address of one from before the first, and the gradients with it."""
    with de.Storage(path, memory="16MiB") as storage:
        a, b = (
            Embedding(storage, group=name, dimension=4, optimizer=de.SGD(lr=1.0), initializer=de.Zeros())
            for name in "ab"
        )
        model = torch.nn.ModuleDict({"a": a, "b": b})
        ids = torch.arange(50)
        a(ids).sum().backward()
        b(ids).sum().backward()
        save_checkpoint(kept / "1", model, None, storage, 1)
        for loads in range(1, 7):
            loss = a(ids).sum()
            for _ in range(loads):
                load_checkpoint(kept, model, None, storage)
            b(ids)
            with pytest.raises(ValueError, match="batch"):
                loss.backward()
            for module in (a, b):
                assert (module.embedding.lookup(ids.numpy(), insert=False) == -1.0).all()


def test_gradients_of_modules_beside_the_model_count_as_well(path: Path, kept: Path) -> None:
    with de.Storage(path, memory="16MiB") as storage:
        a, b = (Embedding(storage, group=name, dimension=4, optimizer=de.SGD(lr=1.0)) for name in "ab")
        rows = SparseOptimizer(torch.nn.ModuleDict({"a": a, "b": b}))
        save_checkpoint(kept / "1", a, None, storage, 1)
        b(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match='gradients of group "b" wait'):
            save_checkpoint(kept / "2", a, None, storage, 2)
        load_checkpoint(kept, a, None, storage)
        rows.step()
        assert b.embedding.step == 0


def test_the_rows_of_another_storage_are_never_replaced(training: Training, kept: Path, tmp_path: Path) -> None:
    training.save(kept / "1", 1)
    with opened(tmp_path / "other.damo") as storage:
        other = Training(storage)
        other.learn(1)
        with pytest.raises(de.StorageError, match=r"is of another storage than .*other\.damo, which has rows"):
            other.load(kept)
        assert len(other.item.embedding) > 0


def test_what_cannot_be_saved_leaves_nothing(training: Training, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"\[save_checkpoint\] reader_state/file is .*object.* no form without"):
        training.save(kept / "1", 1, reader_state={"file": object()})
    training.item(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match='gradients of group "item" wait for the SparseOptimizer'):
        training.save(kept / "1", 1)
    training.rows.zero_grad()
    with opened(tmp_path / "other.damo") as other, pytest.raises(ValueError, match='group "item" of the model is in'):
        save_checkpoint(kept / "1", training.model, None, other, 1)
    for wrong in (-1, 1.5, True, None, "1"):
        with pytest.raises((TypeError, ValueError), match="step"):
            training.save(kept / "1", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer 0 is int"):
        save_checkpoint(kept / "1", training.model, 3, training.storage, 1)  # type: ignore[arg-type]
    assert os.listdir(kept) == []
    training.save(kept / "1", 1)
    before = files_of(kept)
    with pytest.raises(de.StorageError, match="exists already"):
        training.save(kept / "1", 1)
    assert files_of(kept) == before


def test_nothing_is_pickled(training: Training, kept: Path) -> None:
    training.learn(1)
    training.save(kept / "1", 1)
    training.storage.checkpoint(kept / "2")
    files, of_rows = ({file.name for file in (kept / name).iterdir()} for name in "12")
    assert files - of_rows == {"training.json", "dense.safetensors"}
    assert of_rows == {"CHECKPOINT", "MANIFEST", "rocksdb"}
    json.loads((kept / "1" / "training.json").read_text())
    dense = (kept / "1" / "dense.safetensors").read_bytes()
    json.loads(dense[8 : 8 + int.from_bytes(dense[:8], "little")])


def test_a_checkpoint_of_a_storage_alone_is_not_one_of_a_training(training: Training, kept: Path) -> None:
    training.storage.checkpoint(kept / "1")
    with (
        pytest.raises(de.CorruptionError, match="is not whole"),
        pytest.warns(RuntimeWarning, match=r"no training\.json"),
    ):
        training.load(kept / "1")


# --------------------------------------------------------------------- plain


def test_plain_values_come_back_as_they_were() -> None:
    shared = torch.arange(4.0)
    value = {
        "none": None, "bool": True, "int": 2**100, "float": 0.1, "zero": -0.0, "text": "é\ud800\"", "bytes": b"\0\xff",
        "list": [1, [2.5, "x"]], "tuple": (1, (2,)), "numbers": {0: "a", (1, 2): "b"}, "$odd": 1,
        "counter": Counter([3, 3]),
        "tensor": torch.tensor([1, 2], dtype=torch.int16), "scalar": torch.tensor(3.0), "none left": torch.empty(0, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16), "view": shared[1:3], "same": shared,
        "turned": torch.ones(2, 3).T,
        "array": np.array([[1, 2]], np.uint32), "number": np.float64(2.5), "ordered": OrderedDict(a=1), "empty": {},
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    back = decode(json.loads(json.dumps(encode("test", "", value, tensors), allow_nan=False)), tensors)
    assert back.keys() == value.keys()
    for name, one in value.items():
        if isinstance(one, torch.Tensor):
            assert back[name].dtype == one.dtype
            assert torch.equal(back[name], one)
        elif isinstance(one, np.ndarray):
            assert back[name].dtype == one.dtype
            assert np.array_equal(back[name], one)
        else:
            assert back[name] == one
            assert type(back[name]) is type(one) or name == "ordered"
    assert math.copysign(1, back["zero"]) == -1
    for number in (math.nan, math.inf, -math.inf):
        again = decode(json.loads(json.dumps(encode("test", "", number, {}), allow_nan=False)), {})
        assert repr(again) == repr(number)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), len, Colour.RED, 1j, torch.ones(2).to_sparse(), torch.ones(1, device="meta"), np.array(["a"]),
     torch.ones(1, dtype=torch.complex64), slice(1)],
)  # fmt: skip
def test_what_has_no_plain_form_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"\[test\] top/a/0 .*has no form without pickle"):
        encode("test", "top", {"a": [value]}, {})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="nests more than 100 deep"):
        encode("test", "top", endless, {})
