# SPDX-License-Identifier: Apache-2.0
"""The bad-input matrix of the front for torch: its modules, its optimizer, its checkpoints."""

from __future__ import annotations

import importlib.util
import numbers
from pathlib import Path
from typing import Any, Self

import numpy as np

import damo_embedding as de
from reliability.bad_input import Argument, BadInput, Call
from reliability.bad_values import (
    DIMENSION,
    EMBEDDING,
    MANY,
    Rule,
    flag,
    integer,
    is_relative,
    keep,
    name_of_group,
    nothing,
    one_of,
    or_none,
)
from reliability.suite import SkippedError


class BadInputOfTorch(BadInput):
    name = "bad-input-torch"
    title = "bad-input matrix of the front for torch"
    unit = "arguments"
    small = full = 56

    def __enter__(self) -> Self:
        for package in ("torch", "safetensors"):
            if importlib.util.find_spec(package) is None:
                raise SkippedError(f"{package} is not installed")
        return super().__enter__()

    def values(self) -> list[Any]:
        import torch

        ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 1])
        return [
            *super().values(), torch.tensor(1), torch.tensor(True), torch.tensor([1.5]), torch.tensor([True]),
            torch.tensor([1j]), torch.tensor([[5]]), torch.tensor(2**64 - 1, dtype=torch.uint64),
            torch.tensor(0, device="meta"), torch.eye(2, dtype=torch.int64).to_sparse().to(torch.uint64),
            torch.tensor([1, 2], dtype=torch.int16), torch.eye(2).to_sparse(), torch.ones(2, requires_grad=True),
            torch.zeros(2, dtype=torch.int64, device="meta"), torch.int64, torch.device("cpu"),
            torch.nn.Linear(2, 2), torch.nn.ReLU, torch.optim.SGD([torch.ones(1)], lr=0.1), [torch.nn.ReLU()],
            [ids], (ids, offsets), (ids, 5), (5, offsets), (ids, torch.tensor([1, 0])), (ids, torch.tensor([0, 3])),
            (ids, torch.tensor([0.0])), (ids[None], offsets), {"a": ids}, {"a": ids, "b": ids}, {"a": 5, "b": 5},
            {"a": (), "b": ()}, {"a": (ids,), "b": (ids,)}, {"a": ids, "b": (ids, offsets), "c": ids},
            {"params": []}, {"params": [torch.ones(1)]},
        ]  # fmt: skip

    def _calls(self) -> tuple[list[Call], list[Argument]]:
        import torch

        from damo_embedding import torch as front

        storage, directory, adam = self.storage, self.directory, de.Adam(lr=0.1)
        ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 1])

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.item = front.Embedding(
                    storage, group="user", dimension=DIMENSION, optimizer=adam, initializer=first
                )
                features = {"a": front.Feature(DIMENSION), "b": front.Feature(DIMENSION, pooling="mean")}
                self.fields = front.EmbeddingCollection(storage, features, optimizer=adam)
                self.top = torch.nn.Linear(DIMENSION, 1)

        first = de.Uniform(-1.0, 1.0)
        model = Model().eval()
        optimizers = [front.SparseOptimizer(model), torch.optim.SGD(model.parameters(), lr=0.1)]
        place, new = directory / "trained", directory / "new"
        front.save_checkpoint(place, model, optimizers, storage, 1)

        def is_ids(value: Any) -> bool:
            return (
                isinstance(value, torch.Tensor)
                and value.layout is torch.strided
                and not value.is_meta
                and value.dtype in (torch.int64, torch.int32, torch.uint64)
            )

        def is_bags(value: Any) -> bool:
            """Of the values above: ids in two dimensions; ids in one, with `offsets`."""
            return (is_ids(value) and value.dim() == 2) or (
                isinstance(value, tuple)
                and len(value) == 2
                and all(is_ids(part) and part.dim() == 1 for part in value)
                and value[1].tolist() == offsets.tolist()
            )

        def is_plain(value: Any) -> bool:
            """What has a form without pickle."""
            if isinstance(value, torch.Tensor):
                return value.layout is torch.strided and not (value.is_meta or value.dtype.is_complex)
            if isinstance(value, np.ndarray | np.generic):
                return value.dtype.kind in "biuf" and value.dtype.isnative
            if type(value) is dict:
                return all(is_plain(key) and is_plain(item) for key, item in value.items())
            if type(value) in (list, tuple):
                return all(map(is_plain, value))
            return value is None or type(value) in (bool, int, float, str, bytes, bytearray)

        def is_dictionary(value: Any) -> bool:
            return isinstance(value, dict)

        def is_one_number(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 1 and type(value[0]) is int

        def is_rate(value: Any) -> bool:
            """Of any size: a schedule may end with it."""
            if isinstance(value, torch.Tensor):
                value = value.detach().item() if value.numel() == 1 and not value.is_meta else None
            elif isinstance(value, np.ndarray):
                value = value.item() if value.size == 1 else None
            return isinstance(value, numbers.Real) and not isinstance(value, bool)

        def is_module(value: Any) -> bool:
            return isinstance(value, torch.nn.Module)

        def is_optimizer(value: Any) -> bool:
            """Or something that has a state, or none at all."""
            if isinstance(value, list | tuple | dict):
                return all(map(is_module, value))
            return value is None or isinstance(value, torch.optim.Optimizer | torch.nn.Module)

        padding: Rule = or_none(integer(-(2**63), MANY - 1))
        shared = {name: rule for name, rule in EMBEDDING.items() if name not in ("dimension", "group")}
        missing = {"missing": one_of("initial", "zeros")}
        own = {name: or_none(rule) for name, rule in EMBEDDING.items() if name not in ("storage", "dimension")}
        pooling = {"pooling": one_of(None, "sum", "mean")}
        item, fields, (sparse, _) = model.item, model.fields, optimizers
        item(ids), fields({"a": ids, "b": (ids, offsets)})
        self.sparse, state = sparse, sparse.state_dict()
        training = {"model": model, "optimizer": optimizers, "storage": storage}
        calls = [
            Call(
                "Embedding",
                front.Embedding,
                {"storage": storage, "group": 9, "dimension": DIMENSION, "optimizer": adam},
                {**EMBEDDING, **missing, "padding_idx": padding},
            ),
            Call(
                "EmbeddingCollection",
                front.EmbeddingCollection,
                {"storage": storage, "features": {"z": front.Feature(DIMENSION)}, "optimizer": adam},
                {**shared, **missing, "features": nothing},
            ),
            # Some of it is looked at when the collection is made.
            Call(
                "Feature",
                lambda **named: front.EmbeddingCollection(
                    storage, {"y": front.Feature(DIMENSION), "z": front.Feature(**named)}, optimizer=adam
                ),
                {"dimension": DIMENSION},
                {**own, **pooling, "dimension": EMBEDDING["dimension"], "padding_idx": padding},
            ),
            Call(
                "save_checkpoint",
                front.save_checkpoint,
                {"directory": new, **training, "step": 1},
                {
                    "directory": is_relative,
                    "model": is_module,
                    "optimizer": is_optimizer,
                    "storage": nothing,
                    "step": integer(0, 2**63 - 1),
                    "reader_state": is_plain,
                    "keep": keep,
                },
            ),
            Call(
                "load_checkpoint",
                front.load_checkpoint,
                {"checkpoints": place, **training},
                # Another module has other names: torch's own error.
                {
                    "checkpoints": lambda value: isinstance(value, Path) and value == Path(),  # where the test stands
                    "model": is_module,
                    "optimizer": nothing,
                    "storage": nothing,
                    "strict": flag,
                },
            ),
            Call("Embedding.forward", item.forward, {"ids": ids}, {"ids": is_ids}),
            Call(
                "EmbeddingCollection.forward",
                fields.forward,
                {"inputs": {"a": ids, "b": (ids, offsets)}},
                {"inputs": nothing},
            ),
            Call("SparseOptimizer", front.SparseOptimizer, {"modules": model}, {"modules": nothing}),
            Call("SparseOptimizer.step", sparse.step, {}, {"closure": or_none(callable)}),
            Call(
                "SparseOptimizer.load_state_dict",
                sparse.load_state_dict,
                {"state_dict": state},
                {"state_dict": nothing},
            ),
        ]
        inputs, params = "EmbeddingCollection.forward(inputs)", "SparseOptimizer.add_param_group(param_group)"

        def named(value: Any) -> None:
            features = {"y": front.Feature(DIMENSION), value: front.Feature(DIMENSION)}
            front.EmbeddingCollection(storage, features, optimizer=adam)

        def state_with(value: Any, name: str) -> None:
            sparse.load_state_dict({**state, name: value})

        def group_with(value: Any, name: str) -> None:
            state_with([{**groups[0], name: value}, *groups[1:]], "param_groups")

        groups, loaded = state["param_groups"], "SparseOptimizer.load_state_dict(state_dict)"
        return calls, [
            Argument(f"{loaded}, state", lambda value: state_with(value, "state"), is_dictionary),
            Argument(f"{loaded}, param_groups", lambda value: state_with(value, "param_groups"), nothing),
            Argument(f"{loaded}, a group", lambda value: state_with([value, *groups[1:]], "param_groups"), nothing),
            Argument(f"{loaded}, name", lambda value: group_with(value, "name"), one_of("user")),
            Argument(f"{loaded}, params", lambda value: group_with(value, "params"), is_one_number),
            Argument(f"{loaded}, lr", lambda value: group_with(value, "lr"), is_rate),
            Argument(f"{inputs}, a feature", lambda value: fields({"a": value, "b": (ids, offsets)}), is_ids),
            Argument(f"{inputs}, a pooled feature", lambda value: fields({"a": ids, "b": value}), is_bags),
            Argument(f"{inputs}, offsets", lambda value: fields({"a": ids, "b": (ids, value)}), nothing),
            Argument("EmbeddingCollection(features), a name", named, name_of_group),
            Argument(params, sparse.add_param_group, nothing),
            Argument(f"{params}, params", lambda value: sparse.add_param_group({"params": value}), nothing),
        ]

    def _content(self) -> Any:
        return super()._content(), repr(self.sparse.state_dict())

    def __exit__(self, *exception: Any) -> None:
        del self.sparse
        super().__exit__(*exception)
