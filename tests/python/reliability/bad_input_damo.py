# SPDX-License-Identifier: Apache-2.0
"""The bad-input matrix of the package damo, the names that scripts were written for."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np

import damo
from reliability.bad_input import (
    DIMENSION,
    EMBEDDING,
    Argument,
    BadInput,
    Rule,
    boolean,
    either,
    integer,
    is_integer,
    is_relative,
    is_two_keys,
    keys,
    nothing,
    number,
    one_of,
)

ANY_NUMBER = number(-1e309, 1e309)


def is_floats(size: int | None, filled: bool) -> Rule:
    """An array of one dimension that is read, or filled."""

    def right(value: Any) -> bool:
        return (
            isinstance(value, np.ndarray)
            and value.dtype == np.float32
            and value.dtype.isnative
            and value.ndim == 1
            and (size is None or value.size == size)
            and (not filled or bool(value.flags.writeable))
            and (filled or bool(np.isfinite(value).all()))
        )

    return right


def parameters(**values: Any) -> damo.Parameters:
    made = damo.Parameters()
    for name, value in values.items():
        made.insert(name, value)
    return made


class BadInputOfDamo(BadInput):
    name = "bad-input-damo"
    title = "bad-input matrix of the package damo"
    unit = "arguments"
    small = full = 33

    def __enter__(self) -> Self:
        memory = os.environ.get("DAMO_MEMORY")
        os.environ["DAMO_MEMORY"] = "16MiB"
        try:
            return super().__enter__()
        finally:
            del os.environ["DAMO_MEMORY"]
            if memory is not None:
                os.environ["DAMO_MEMORY"] = memory

    def __exit__(self, *exception: Any) -> None:
        del self.looked_up, self.seen
        super().__exit__(*exception)

    def _content(self) -> Any:
        weights = np.empty(2 * DIMENSION, np.float32)
        self.looked_up.lookup(np.array([1, 2]), weights)
        return super()._content(), weights.tobytes(), self.seen.check(np.arange(-5, 5)).tobytes()

    def _arguments(self) -> list[Argument]:
        directory = self.directory
        storage = damo.PyStorage(str(directory / "damo"), 0)
        optimizer = damo.PyOptimizer(parameters(name="adam"))
        initializer = damo.PyInitializer(parameters(name="zeros"))
        embedding = self.looked_up = damo.PyEmbedding(storage, optimizer, initializer, DIMENSION, 0)
        seen = self.seen = damo.PyFilter(parameters(path=str(directory / "filter"), capacity=100))
        both, floats = np.array([1, 2]), np.ones(2 * DIMENSION, np.float32)
        embedding.lookup(both, floats.copy())
        right = {
            "storage": storage,
            "optimizer": optimizer,
            "initializer": initializer,
            "dimension": DIMENSION,
            "group": 9,
        }
        inserted: dict[str, Rule] = {
            "name": lambda value: isinstance(value, str),
            "path": lambda value: isinstance(value, str),
            "reload": boolean,
            "capacity": is_integer,
            "expire_days": is_integer,
            "decay_steps": either(is_integer, lambda value: ANY_NUMBER(value) and float(value).is_integer()),
            "gamma": lambda value: ANY_NUMBER(value) and np.isfinite(float(value)),
        }
        found = [
            Argument(f"insert(value of {name})", lambda value, n=name: damo.Parameters().insert(n, value), rule)
            for name, rule in inserted.items()
        ]
        found += [
            Argument(f"PyEmbedding({name})", lambda value, n=name: damo.PyEmbedding(**{**right, n: value}), rule)
            for name, rule in (
                ("storage", nothing),
                ("optimizer", nothing),
                ("initializer", nothing),
                ("dimension", EMBEDDING["dimension"]),
                ("group", integer(0, 255)),
            )
        ]
        found += [
            Argument("insert(name)", lambda value: damo.Parameters().insert(value, 1), nothing),
            Argument("PyStorage(data_dir)", lambda value: damo.PyStorage(value, 0), is_relative),
            Argument(
                "PyStorage(ttl_seconds)",
                lambda value: damo.PyStorage(str(directory / "damo"), value),
                integer(-(2**63), 2**40),
            ),
            Argument("dump(path)", storage.dump, is_relative),
            Argument("dump(condition)", lambda value: storage.dump(str(directory / "d"), value), one_of(None)),
            Argument("checkpoint(path)", storage.checkpoint, is_relative),
            Argument("load_from_checkpoint(path)", storage.load_from_checkpoint, nothing),
            Argument("PyInitializer(parameters)", damo.PyInitializer, nothing),
            Argument("initializer.call(array)", initializer.call, is_floats(None, filled=True)),
            Argument("PyOptimizer(parameters)", damo.PyOptimizer, nothing),
            Argument(
                "PyOptimizer(scheduler_parameters)",
                lambda value: damo.PyOptimizer(parameters(name="sgd"), value),
                one_of(None),
            ),
            Argument(
                "optimizer.call(weights)", lambda value: optimizer.call(value, floats, 0), is_floats(8, filled=True)
            ),
            Argument(
                "optimizer.call(gradients)",
                lambda value: optimizer.call(floats.copy(), value, 0),
                is_floats(8, filled=False),
            ),
            Argument(
                "optimizer.call(step)",
                lambda value: optimizer.call(floats.copy(), floats, value),
                integer(0, 2**63 - 1),
            ),
            Argument("lookup(keys)", lambda value: embedding.lookup(value, floats.copy()), is_two_keys),
            Argument("lookup(weights)", lambda value: embedding.lookup(both, value), is_floats(8, filled=True)),
            Argument("apply_gradients(keys)", lambda value: embedding.apply_gradients(value, floats), is_two_keys),
            Argument(
                "apply_gradients(gradients)",
                lambda value: embedding.apply_gradients(both, value),
                is_floats(8, filled=False),
            ),
            Argument("PyFilter(parameters)", damo.PyFilter, nothing),
            Argument("add(key)", seen.add, keys),
            Argument("add(num)", lambda value: seen.add(1, value), integer(0, 2**32 - 1)),
        ]
        return found
