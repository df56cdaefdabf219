# SPDX-License-Identifier: Apache-2.0
"""Every argument of every entry point with every kind of wrong value: a typed error, and the storage is as it was.

The matrix is generated: what a value must be, to be right for an argument, is written here and in bad_values.py; all
else is wrong. test_bad_input.py sees to it that no argument is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

import damo_embedding as de
from comparing import files_of
from reliability.bad_values import (
    DIMENSION,
    EMBEDDING,
    MANY,
    OPENING,
    SETTINGS,
    Rule,
    at_least_0,
    below_1,
    column,
    extra,
    flag,
    flag_of_any_library,
    gradients,
    hashable,
    integer,
    is_place,
    is_relative,
    keep,
    keys,
    nothing,
    number_of_group,
    one_of,
    or_none,
    output,
    rate,
    rate_of_function,
    step_of_training,
    text_with_utf8,
    the_group,
    two_counts,
    two_keys,
    values,
)
from reliability.suite import Suite, scratch


@dataclass(frozen=True)
class Argument:
    """`call(value)`, and when it must not raise. A value that is right is not tried: this is about wrong ones."""

    name: str  # as `entry point(argument)`, with what is special about it after a comma
    call: Callable[[Any], Any]
    right: Rule
    also: tuple[type[BaseException], ...] = ()  # what it may raise beside the errors of all


@dataclass(frozen=True)
class Call:
    """An entry point, arguments with which it works, and the rules of those that are tried."""

    name: str
    call: Callable[..., Any]
    right: dict[str, Any]
    rules: dict[str, Rule]
    note: str = ""
    also: tuple[type[BaseException], ...] = ()

    def __call__(self) -> Any:
        return self.call(**self.right)

    def arguments(self) -> list[Argument]:
        note = f", {self.note}" if self.note else ""
        return [
            Argument(f"{self.name}({name}){note}", lambda value, n=name: self.call(**{**self.right, n: value}), rule,
                     self.also)
            for name, rule in self.rules.items()
        ]  # fmt: skip


class BadInput(Suite):
    name = "bad-input"
    title = "bad-input matrix: argument x wrong value x entry point"
    promise = "TypeError, ValueError or a DamoError, and every byte of the storage is as it was"
    unit = "arguments"
    small = full = 196  # all: some 22,000 calls

    def __enter__(self) -> Self:
        self._scratch = scratch()
        self.directory = self._scratch.__enter__()
        self.storage = de.Storage(self.directory / "open.damo", memory="16MiB", threads=1)
        self.filters: list[Any] = []
        adam, first = de.Adam(lr=0.1), de.Uniform(-1.0, 1.0)
        self.embedding = de.Embedding(self.storage, adam, first, dimension=DIMENSION, group="user")
        self.embedding.apply_gradients([1, 2, 3], np.ones((3, DIMENSION), np.float32))
        self.storage.commit(step=1)
        self.storage.checkpoint(self.directory / "checkpoint")
        self.calls, more = self._calls()
        self.arguments = [*itertools.chain(*(call.arguments() for call in self.calls)), *more]
        assert len(self.arguments) == self.small, f"there are {len(self.arguments)} arguments: say so in `small`"
        return self

    def __exit__(self, *exception: Any) -> None:
        self.calls.clear()  # with what they hold
        self.arguments.clear()
        self.storage.close()
        self._scratch.__exit__(*exception)

    def values(self) -> list[Any]:
        return values()

    def _calls(self) -> tuple[list[Call], list[Argument]]:
        """All there are, and what is tried of no call: setters, and what is inside of an argument."""
        embedding, both, out = self.embedding, np.array([1, 2]), np.ones((2, DIMENSION), np.float32)
        rows = {"keys": both, "weights": out}
        calls = [*self._of_openings(), *self._of_storage(), *self._of_embedding(), *self._of_filters()]
        calls += [
            Call(kind.__name__, kind, needed, rules)
            for kind, (needed, rules) in SETTINGS.items()
        ]  # fmt: skip
        calls += [
            Call(
                "Schedule.__call__", de.CosineDecay(lr=0.1, decay_steps=10), {"step": 0}, {"step": integer(0, MANY - 1)}
            ),
            Call(
                "hash_keys",
                de.hash_keys,
                {"field": "f", "values": ["a"]},
                {
                    "field": lambda value: text_with_utf8(value) and value != "",
                    "values": column,
                    "padding": hashable,
                    "seed": integer(0, MANY - 1),
                },
            ),
            Call(
                "Damage.contains",
                de.Damage("a file", "broken", 0, None, (0, MANY - 1)).contains,
                {"group": 0, "key": 1},
                {"group": number_of_group, "key": integer(-(2**63), MANY - 1)},
            ),
        ]

        def follow(value: Any) -> None:
            embedding.lr = lambda step: value
            try:
                embedding.apply_gradients(both, out)
            finally:
                embedding.lr = embedding.optimizer.lr

        betas = {"the first": lambda value: (value, 0.9), "the second": lambda value: [0.9, value]}
        return calls, [
            *(
                Argument(f"{kind.__name__}(betas), {place}", lambda value, k=kind, p=pair: k(betas=p(value)), below_1)
                for kind in (de.Adam, de.AMSGrad, de.AdamW, de.Lion)
                for place, pair in betas.items()
            ),
            Argument(
                "hash_keys(values), one of a list",
                lambda value: de.hash_keys("f", ["a", value]),
                lambda value: hashable(value) or (isinstance(value, float) and math.isnan(value)),
            ),
            Argument("Embedding.lr, of a function", follow, rate_of_function),
            Argument("Storage.now", lambda value: setattr(self.storage, "now", value), integer(0, 2**62)),
            Argument("Embedding.lr", lambda value: setattr(embedding, "lr", value), rate),
            Argument(
                "Embedding.import_rows(state), an entry",
                lambda value: embedding.import_rows(**rows, state={"exp_avg": out, "exp_avg_sq": value}),
                gradients,
            ),
        ]

    def _of_openings(self) -> list[Call]:
        directory = self.directory
        fresh, checkpoint, closed = directory / "fresh.damo", directory / "checkpoint", directory / "closed.damo"
        with de.Storage(closed, memory="16MiB", threads=1) as storage:
            de.Embedding(storage, de.SGD(lr=0.1), de.Zeros(), dimension=DIMENSION, group="user").lookup([1, 2])
            storage.checkpoint(directory / "before")
        # What can be salvaged with a checkpoint alone.
        broken = directory / "broken.damo"
        shutil.copytree(closed, broken, ignore=shutil.ignore_patterns("LOCK"))  # who salvages writes its name there
        (manifest,) = broken.glob("generation-*/MANIFEST")
        manifest.write_bytes(bytes(manifest.stat().st_size))
        # A path that is no directory that could be made, or that is not text, is wrong; the others are not tried.
        path, read_only = {"path": is_relative}, {"read_only": flag}
        return [
            Call("Storage", de.Storage, {"path": fresh}, path | OPENING | read_only),
            Call("Storage.create", de.Storage.create, {"path": fresh}, path | OPENING),
            Call("Storage.open", de.Storage.open, {"path": closed}, {"path": nothing} | OPENING | read_only),
            Call(
                "Storage.open_or_restore",
                de.Storage.open_or_restore,
                {"path": fresh, "checkpoints": directory / "absent"},
                path | {"checkpoints": is_place, "replace_damaged": flag} | OPENING,
            ),
            Call(
                "Storage.restore",
                de.Storage.restore,
                {"checkpoint": checkpoint, "path": fresh},
                {"checkpoint": nothing} | path | OPENING,
            ),
            Call("Storage.checkpoints", de.Storage.checkpoints, {"directory": directory}, {"directory": is_place}),
            Call(
                "Storage.salvage",
                de.Storage.salvage,
                {"path": closed, "out": fresh},
                {"path": nothing, "out": is_relative},
            ),
            Call(
                "Storage.salvage",
                de.Storage.salvage,
                {"path": broken, "out": fresh, "manifest_of": directory / "before"},
                {"manifest_of": nothing},
                "where it is needed",
            ),
        ]

    def _of_storage(self) -> list[Call]:
        storage, directory = self.storage, self.directory
        storage.dump(directory / "dump")
        return [
            Call("Storage.verify", storage.verify, {}, {"strict": flag}),
            Call("Storage.drop_group", storage.drop_group, {"group": "user"}, {"group": the_group}),
            Call("Storage.expire", storage.expire, {}, {"now": or_none(integer(0, 2**62))}),
            Call("Storage.commit", storage.commit, {"step": 1}, {"step": step_of_training, "extra": extra}),
            Call(
                "Storage.checkpoint",
                storage.checkpoint,
                {"directory": directory / "new"},
                {"directory": is_relative, "step": step_of_training, "extra": extra, "keep": keep},
            ),
            Call(
                "Storage.dump",
                storage.dump,
                {"path": directory / "d"},
                {
                    "path": is_relative,
                    "group": or_none(the_group),
                    "min_count": integer(0, 2**32 - 1),
                    "expire_days": or_none(integer(0, 10**9)),
                    "progress": or_none(lambda value: callable(value) and not isinstance(value, type)),
                },
            ),
            Call("read_dump", de.read_dump, {"path": directory / "dump"}, {"path": nothing}, also=(OSError,)),
        ]

    def _of_embedding(self) -> list[Call]:
        embedding, both, out = self.embedding, np.array([1, 2]), np.ones((2, DIMENSION), np.float32)
        make = {
            "storage": self.storage,
            "optimizer": de.SGD(lr=0.1),
            "initializer": de.Zeros(),
            "dimension": DIMENSION,
            "group": 9,
        }
        new = np.array([7, 8])
        return [
            Call("Embedding", de.Embedding, make, EMBEDDING),
            Call(
                "Embedding.lookup",
                embedding.lookup,
                {"keys": both},
                {"keys": keys, "out": output, "insert": flag_of_any_library, "missing": one_of("zeros", "initial")},
            ),
            Call(
                "Embedding.lookup",
                embedding.lookup,
                {"keys": new},
                {"out": output, "insert": flag_of_any_library, "missing": one_of("zeros", "initial")},
                "new keys",
            ),
            Call(
                "Embedding.apply_gradients",
                embedding.apply_gradients,
                {"keys": both, "gradients": out},
                {"keys": two_keys, "gradients": gradients, "lr": or_none(at_least_0)},
            ),
            Call(
                "Embedding.apply_gradients",
                embedding.apply_gradients,
                {"keys": new, "gradients": out},
                {"gradients": gradients, "lr": or_none(at_least_0)},
                "new keys",
            ),
            Call(
                "Embedding.import_rows",
                embedding.import_rows,
                {"keys": both, "weights": out},
                {"keys": two_keys, "weights": gradients, "state": one_of(None), "counts": two_counts},
            ),
            Call("Embedding.prefetch", embedding.prefetch, {"keys": both}, {"keys": keys}),
            Call("Embedding.contains", embedding.contains, {"keys": both}, {"keys": keys}),
            Call("Embedding.erase", embedding.erase, {"keys": both}, {"keys": keys}),
            Call("Embedding.inspect", embedding.inspect, {"key": 1}, {"key": integer(-(2**63), MANY - 1)}),
            Call("Embedding.scan", embedding.scan, {}, {"batch": integer(1, 2**24)}),
        ]

    def _of_filters(self) -> list[Call]:
        """One with a file, and that of a group."""
        few = de.CountingBloomFilter(capacity=100, count=3)
        filtered = de.Embedding(self.storage, de.SGD(lr=0.1), de.Zeros(), DIMENSION, group=200, admission=few)
        filtered.lookup([1, 1, 2])
        assert filtered.admission is not None
        self.filters = [
            de.CountingBloomFilter(capacity=100, path=self.directory / "filter"),
            filtered.admission,
        ]
        self.filters[0].add([1, 1, 2])
        counted = {"keys": keys, "num": integer(0, 2**32 - 1)}
        calls = [Call("CountingBloomFilter.add", self.filters[0].add, {"keys": [1, 2]}, counted)]
        for seen in self.filters:
            owner = type(seen).__name__
            calls += [
                Call(f"{owner}.check", seen.check, {"keys": [1, 2]}, {"keys": keys}),
                Call(f"{owner}.estimate", seen.estimate, {"keys": [1, 2]}, {"keys": keys}),
            ]
        return calls

    def case(self, seed: int) -> None:
        """One argument with all values."""
        argument = self.arguments[seed % len(self.arguments)]
        before, content = files_of(self.directory), self._content()
        untouched = self._signature()
        with contextlib.chdir(self.directory):  # a path that is taken all the same is seen here
            for value in self.values():
                if argument.right(value):
                    continue
                shown = f"{argument.name} with {value!r:.100}"
                try:
                    argument.call(value)
                except (TypeError, ValueError, de.DamoError, *argument.also) as error:
                    said, shows = str(error), "object at 0x" in repr(value)
                    if "object at 0x" in said and not shows:
                        raise AssertionError(f"{shown} said {said}") from error
                except BaseException as error:
                    raise AssertionError(f"{shown} raised {type(error).__name__}: {error}") from error
                else:
                    raise AssertionError(f"{shown} was taken")
                assert self._signature() == untouched, f"{shown} changed a file"
                self.done["calls"] += 1
        assert files_of(self.directory) == before, f"{argument.name} changed a file"
        assert self._content() == content, f"{argument.name} changed what is there"
        self.done["arguments"] += 1

    def _content(self) -> Any:
        """Of what is open: the operations, and what there is in memory, too."""
        lookup = self.embedding.lookup(range(-5, 5), insert=False)
        counted = [(seen.adds, seen.estimate(range(-5, 5)).tobytes()) for seen in self.filters]
        stats = self.storage.stats()
        return stats["sequence"], stats["groups"], self.embedding.lr, lookup.tobytes(), counted

    def _signature(self) -> list[tuple[str, int, int, int]]:
        """Changes with every write: as sharp as the bytes, and quick."""
        found = [(str(file), file.lstat()) for file in sorted(self.directory.rglob("*"))]
        return [(name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in found]
