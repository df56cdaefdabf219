# SPDX-License-Identifier: Apache-2.0
"""The bad-input matrix of the package damo, the names that scripts were written for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

import numpy as np

import damo
import damo.parameters as kinds
from reliability.bad_input import Argument, BadInput, Call
from reliability.bad_values import (
    DIMENSION,
    EMBEDDING,
    Rule,
    above_0,
    any_text,
    at_least_0,
    below_1,
    either,
    flag_of_any_library,
    integer,
    is_integer,
    is_relative,
    keys,
    nothing,
    number,
    number_of_group,
    one_of,
    two_keys,
)

ANY_NUMBER = number(-1e309, 1e309)


# By the name of what is made: what it needs, and the rules.
Objects = dict[str, tuple[dict[str, Any], dict[str, Rule]]]


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


def whole(low: int, high: int) -> Rule:
    """An integer, or a float that is one."""
    return either(
        integer(low, high), lambda value: ANY_NUMBER(value) and float(value).is_integer() and low <= value <= high
    )


def parameters(**values: Any) -> damo.Parameters:
    made = damo.Parameters()
    for name, value in values.items():
        made.insert(name, value)
    return made


class BadInputOfDamo(BadInput):
    name = "bad-input-damo"
    title = "bad-input matrix of the package damo"
    unit = "arguments"
    small = full = 123

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

    def _calls(self) -> tuple[list[Call], list[Argument]]:
        directory = self.directory
        storage = damo.PyStorage(str(directory / "damo"), 0)
        sgd, zeros = parameters(name="sgd"), parameters(name="zeros")
        optimizer, initializer = damo.PyOptimizer(parameters(name="adam")), damo.PyInitializer(zeros)
        embedding = self.looked_up = damo.PyEmbedding(storage, optimizer, initializer, DIMENSION, 0)
        few = parameters(path=str(directory / "damo-filter"), capacity=100)
        seen = self.seen = damo.PyFilter(few)
        both, floats = np.array([1, 2]), np.ones(2 * DIMENSION, np.float32)
        embedding.lookup(both, floats.copy())
        storage.checkpoint(str(directory / "damo-checkpoint"))
        make = {
            "storage": storage,
            "optimizer": optimizer,
            "initializer": initializer,
            "dimension": DIMENSION,
            "group": 9,
        }
        filled, read = is_floats(2 * DIMENSION, filled=True), is_floats(2 * DIMENSION, filled=False)
        calls = [
            Call("Parameters.insert", damo.Parameters().insert, {"name": "name", "value": "sgd"}, {"name": nothing}),
            Call(
                "PyStorage",
                damo.PyStorage,
                {"data_dir": str(directory / "damo"), "ttl_seconds": 0},
                {"data_dir": is_relative, "ttl_seconds": integer(-(2**63), 2**40)},
            ),
            Call(
                "PyStorage.dump",
                storage.dump,
                {"path": str(directory / "d")},
                {"path": is_relative, "condition": one_of(None)},
            ),
            Call("PyStorage.checkpoint", storage.checkpoint, {"path": str(directory / "new")}, {"path": is_relative}),
            Call(
                "PyStorage.load_from_checkpoint",
                storage.load_from_checkpoint,
                {"path": str(directory / "damo-checkpoint")},
                {"path": nothing},
            ),
            Call("PyInitializer", damo.PyInitializer, {"parameters": zeros}, {"parameters": nothing}),
            Call(
                "PyInitializer.call",
                initializer.call,
                {"array": floats.copy()},
                {"array": is_floats(None, filled=True)},
            ),
            Call(
                "PyOptimizer",
                damo.PyOptimizer,
                {"parameters": sgd},
                {"parameters": nothing, "scheduler_parameters": one_of(None)},
            ),
            Call(
                "PyOptimizer.call",
                optimizer.call,
                {"weights": floats.copy(), "gradients": floats, "step": 0},
                {"weights": filled, "gradients": read, "step": integer(0, 2**63 - 1)},
            ),
            Call(
                "PyEmbedding",
                damo.PyEmbedding,
                make,
                {**dict.fromkeys(("storage", "optimizer", "initializer"), nothing), "dimension": EMBEDDING["dimension"],
                 "group": number_of_group},
            ),
            Call(
                "PyEmbedding.lookup",
                embedding.lookup,
                {"keys": both, "weights": floats.copy()},
                {"keys": two_keys, "weights": filled},
            ),
            Call(
                "PyEmbedding.apply_gradients",
                embedding.apply_gradients,
                {"keys": both, "gradients": floats},
                {"keys": two_keys, "gradients": read},
            ),
            Call("PyFilter", damo.PyFilter, {"parameters": few}, {"parameters": nothing}),
            Call("PyFilter.add", seen.add, {"key": 1}, {"key": keys, "num": integer(0, 2**32 - 1)}),
            Call("PyFilter.check", seen.check, {"key": 1}, {"key": keys}),
        ]  # fmt: skip
        return calls, [*self._of_insert(), *self._of_parameters(storage)]

    def _of_insert(self) -> list[Argument]:
        rules: dict[str, Rule] = {
            **dict.fromkeys(kinds._TEXTS, any_text),
            **dict.fromkeys(kinds._FLAGS, flag_of_any_library),
            **dict.fromkeys(kinds._INTS, is_integer),
            **dict.fromkeys(kinds._FLOATS, lambda value: ANY_NUMBER(value) and np.isfinite(float(value))),
            "decay_steps": whole(-(10**400), 10**400),
        }
        return [
            Argument(f"Parameters.insert(value), of {name}", lambda value, n=name: parameters(**{n: value}), rule)
            for name, rule in rules.items()
        ]

    def _of_parameters(self, storage: damo.PyStorage) -> list[Argument]:
        """What is wrong for the object that gets the parameters, if not for them."""
        decay: dict[str, Rule] = {"decay_steps": whole(1, 2**53), "decay_rate": at_least_0}
        adam: dict[str, Rule] = {
            **{"gamma": above_0, "beta1": below_1, "beta2": below_1, "lambda": at_least_0, "epsilon": above_0},
        }
        ftrl: dict[str, Rule] = {"gamma": above_0, "beta": at_least_0, "lambda1": at_least_0, "lambda2": at_least_0}
        adagrad: dict[str, Rule] = {"gamma": above_0, "lambda": at_least_0, "eta": at_least_0, "epsilon": above_0}
        swing: dict[str, Rule] = {
            **{"decay_steps": whole(1, 2**53), "num_periods": at_least_0, "alpha": at_least_0, "beta": at_least_0},
        }
        normal: dict[str, Rule] = {"mean": number(-1e37, 1e37), "stddev": number(0, 1e37)}
        steps: dict[str, Any] = {"decay_steps": 10}
        optimizers: Objects = {
            "sgd": ({}, {"gamma": above_0, "lambda": at_least_0}),
            "ftrl": ({}, ftrl),
            "adagrad": ({}, adagrad),
            "adam": ({}, adam),
            "amsgrad": ({}, adam),
            "adamw": ({}, adam),
            "lion": ({}, {"eta": above_0, "beta1": below_1, "beta2": below_1, "lambda": at_least_0}),
        }
        schedules: Objects = {
            **dict.fromkeys(
                ("exponential_decay", "nature_exponential_decay", "inverse_time_decay"),
                ({**steps, "decay_rate": 0.5}, decay),
            ),
            "polynomial_decay": (
                steps,
                {"decay_steps": whole(1, 2**53), "end_learning_rate": at_least_0, "power": above_0},
            ),
            "cosine_decay": (steps, {"decay_steps": whole(1, 2**53)}),
            **dict.fromkeys(("liner_cosine_decay", "linear_cosine_decay"), (steps, swing)),
        }
        initializers: Objects = {
            "random_uniform": ({}, {"min": number(-1e37, 0.9), "max": number(-0.9, 1e37)}),
            **dict.fromkeys(("random_normal", "random", "truncate_normal"), ({}, normal)),
        }
        filters: Objects = {
            "": (
                {"path": str(self.directory / "damo-filter-2"), "capacity": 100},
                {
                    "path": is_relative,
                    "capacity": integer(1, 2**40),
                    "count": integer(1, 15),
                    "fpr": number(1e-9, 0.5),
                    "reload": flag_of_any_library,
                },
            ),
        }
        conditions: Objects = {
            "": ({}, {"expire_days": integer(0, 10**9), "group": number_of_group, "min_count": integer(0, 2**32 - 1)}),
        }

        def scheduled(given: damo.Parameters) -> damo.PyOptimizer:
            return damo.PyOptimizer(parameters(name="sgd"), given)

        objects: tuple[tuple[str, Callable[[damo.Parameters], Any], Objects, Rule], ...] = (
            ("PyOptimizer(parameters)", damo.PyOptimizer, optimizers, nothing),
            ("PyOptimizer(scheduler_parameters)", scheduled, schedules, one_of("")),
            ("PyInitializer(parameters)", damo.PyInitializer, initializers, one_of("zeros")),
            ("PyFilter(parameters)", damo.PyFilter, filters, nothing),
            (
                "PyStorage.dump(condition)",
                lambda given: storage.dump(str(self.directory / "d"), given),
                conditions,
                nothing,
            ),
        )
        found = []
        for argument, call, kinds_of_it, names in objects:
            # Names of no object, or of others.
            found.append(Argument(f"{argument}, name", lambda value, f=call: f(parameters(name=value)), names))
            for name, (needed, rules) in kinds_of_it.items():
                with_name = {"name": name, **needed} if name else needed
                found += [
                    Argument(
                        f"{argument}, {given}{f' of {name}' if name else ''}",
                        lambda value, f=call, w=with_name, g=given: f(parameters(**{**w, g: value})),
                        rule,
                    )
                    for given, rule in rules.items()
                ]
        return found
