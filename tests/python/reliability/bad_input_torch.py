# SPDX-License-Identifier: Apache-2.0
"""The bad-input matrix of the front for torch: its modules, its optimizer, its checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Self

import numpy as np

import damo_embedding as de
from reliability.bad_input import (
    DIMENSION,
    EMBEDDING,
    MANY,
    Argument,
    BadInput,
    Rule,
    either,
    integer,
    is_relative,
    nothing,
    one_of,
)
from reliability.suite import SkippedError


class BadInputOfTorch(BadInput):
    name = "bad-input-torch"
    title = "bad-input matrix of the front for torch"
    unit = "arguments"
    small = full = 48

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

    def _arguments(self) -> list[Argument]:
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

        def is_module(value: Any) -> bool:
            return isinstance(value, torch.nn.Module)

        def is_optimizer(value: Any) -> bool:
            """Or something that has a state, or none at all."""
            if isinstance(value, list | tuple | dict):
                return all(map(is_module, value))
            return value is None or isinstance(value, torch.optim.Optimizer | torch.nn.Module)

        padding: Rule = either(one_of(None), integer(-(2**63), MANY - 1))
        shared = {name: rule for name, rule in EMBEDDING.items() if name not in ("dimension", "group")}
        missing = {"missing": one_of("initial", "zeros")}
        # The name of a call, the call with named arguments, those that are right, the rules.
        makers: list[tuple[str, Any, dict[str, Any], dict[str, Rule]]] = [
            (
                "Embedding",
                front.Embedding,
                {"storage": storage, "group": 9, "dimension": DIMENSION, "optimizer": adam},
                {**EMBEDDING, **missing, "padding_idx": padding},
            ),
            (
                "EmbeddingCollection",
                front.EmbeddingCollection,
                {"storage": storage, "features": {"z": front.Feature(DIMENSION)}, "optimizer": adam},
                {**shared, **missing, "features": nothing},
            ),
            (
                "Feature",
                lambda **named: front.EmbeddingCollection(storage, {"z": front.Feature(**named)}, optimizer=adam),
                {"dimension": DIMENSION},
                {
                    name: either(one_of(None), rule)
                    for name, rule in EMBEDDING.items()
                    if name not in ("storage", "dimension")
                }
                | {"dimension": EMBEDDING["dimension"], "pooling": one_of(None, "sum", "mean"), "padding_idx": padding},
            ),
            (
                "save_checkpoint",
                front.save_checkpoint,
                {"directory": new, "model": model, "optimizer": optimizers, "storage": storage, "step": 1},
                {
                    "directory": is_relative,
                    "model": is_module,
                    "optimizer": is_optimizer,
                    "storage": nothing,
                    "step": integer(0, 2**63 - 1),
                    "reader_state": is_plain,
                    "keep": either(one_of(None), integer(1, 2**31 - 1)),
                },
            ),
            (
                "load_checkpoint",
                front.load_checkpoint,
                {"checkpoints": place, "model": model, "optimizer": optimizers, "storage": storage},
                # Another module has other names: torch's own error.
                {
                    "checkpoints": lambda value: isinstance(value, Path) and value == Path(),  # where the test stands
                    "model": is_module,
                    "optimizer": nothing,
                    "storage": nothing,
                    "strict": one_of(True, False),
                },
            ),
        ]
        found = [
            Argument(f"{name}({argument})", lambda value, f=f, r=right, a=argument: f(**{**r, a: value}), rule)
            for name, f, right, rules in makers
            for argument, rule in rules.items()
        ]
        item, fields, (sparse, _) = model.item, model.fields, optimizers
        found += [
            Argument("forward(ids)", item, is_ids),
            Argument("forward(inputs)", fields, nothing),
            Argument("forward(a feature)", lambda value: fields({"a": value, "b": (ids, offsets)}), is_ids),
            Argument("forward(a pooled feature)", lambda value: fields({"a": ids, "b": value}), is_bags),
            Argument("forward(offsets)", lambda value: fields({"a": ids, "b": (ids, value)}), nothing),
            Argument("SparseOptimizer(modules)", front.SparseOptimizer, nothing),
            Argument("step(closure)", sparse.step, lambda value: value is None or callable(value)),
            Argument("add_param_group(param_group)", sparse.add_param_group, nothing),
            Argument("add_param_group(params)", lambda value: sparse.add_param_group({"params": value}), nothing),
        ]
        return found
