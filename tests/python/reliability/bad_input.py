# SPDX-License-Identifier: Apache-2.0
"""Every argument of every entry point with every kind of wrong value: a typed error, and the storage is as it was.

The matrix is generated: what a value must be, to be right for an argument, is written here; all else is wrong.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

import damo_embedding as de
from comparing import files_of
from reliability.suite import Suite, scratch

DIMENSION = 4
MANY = 2**64


def values() -> list[Any]:
    """Wrong for most arguments, right for a few."""
    f32 = np.float32
    broken = np.ones((2, DIMENSION), f32)
    broken[1, 2] = np.nan
    locked = np.ones((2, DIMENSION), f32)
    locked.flags.writeable = False
    return [
        None, True, False, 0, 1, -1, 3, 255, 256, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, MANY - 1, MANY, -(2**63) - 1,
        10**40, 10**400, 0.0, 0.5, 1.0, 1.5, -0.5, 1e39, 1e308, math.nan, math.inf, -math.inf, 1j,
        "", "x", "user", "\0", "a\0b", "1GiB", "-1GiB", "1e9", "one", "1 TiBs", "logged", "zeros", "é" * 200, "/" * 300,
        "n" * 5_000, "9" * 400, "/no/such/place/at/all", b"", b"x", b"\xff\xfe", bytearray(b"x"), memoryview(b"x"),
        [], [1, 2], [1.5], ["1"], [None], [[1], [2, 3]], [[1, 2]], (), (1,), {}, {"a": 1}, {1, 2}, range(2), iter([1]),
        object(), int, len, lambda: None, datetime.date(2020, 1, 1), Path("/no/such/place/at/all"), Path(""), ...,
        np.int8(1), np.int64(-1), np.uint64(MANY - 1), f32(0.5), np.float64(np.nan), np.bool_(True), np.str_("x"),
        np.datetime64("2020-01-01"), np.array(1), np.array([], np.float64), np.array([1.0]), np.array([1 + 1j]),
        np.array([True, False]), np.array(["a", "b"]), np.array([b"a"]), np.array([object()]), np.array([1, None]),
        np.array([MANY], object), np.array([1, 2], ">i8"), np.array(["2020-01-01"], "M8[D]"),
        np.array([(1, 2)], "i4,i4"),
        np.ones((2, DIMENSION)), np.ones((2, DIMENSION), np.float16), np.ones((2, DIMENSION), np.int64),
        np.ones((2, DIMENSION), f32), np.ones((2, DIMENSION), ">f4"), np.ones((2, DIMENSION + 1), f32),
        np.ones((3, DIMENSION), f32), np.ones((DIMENSION, 2), f32).T, np.ones((2, 2 * DIMENSION), f32)[:, ::2],
        np.ones(2 * DIMENSION, f32), np.ones((2, DIMENSION, 1), f32), np.ones((0, DIMENSION), f32), broken,
            np.full_like(broken, -np.inf),
        locked, np.ma.masked_array([1, 2], [True, False]), np.ones((2, 2), np.int64).view(np.recarray),
        de.SGD(lr=0.1), de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), de.Zeros(), de.SGD, de.Zeros, de.StorageError("x"),
    ]  # fmt: skip


Rule = Callable[[Any], bool]


def is_integer(value: Any, low: int = -(10**400), high: int = 10**400) -> bool:
    if isinstance(value, bool) or getattr(value, "shape", ()) != () or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        return low <= operator.index(value) <= high
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return False


def integer(low: int, high: int) -> Rule:
    return lambda value: is_integer(value, low, high)


def number(low: float, high: float) -> Rule:
    def right(value: Any) -> bool:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            return False
        try:
            return low <= float(value) <= high
        except OverflowError:
            return False

    return right


def keys(value: Any) -> bool:
    """What NumPy makes an array of integers of."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return False
    if array.size == 0 and not isinstance(value, np.ndarray) and array.dtype == np.float64:
        return True
    return array.dtype.kind in "iu" and array.dtype.isnative


def one_of(*right: Any) -> Rule:
    return lambda value: any(value is one or (type(value) is type(one) and value == one) for one in right)


def nothing(value: Any) -> bool:
    return False


def anything(value: Any) -> bool:
    return True


def either(*rules: Rule) -> Rule:
    return lambda value: any(rule(value) for rule in rules)


def rate(value: Any) -> bool:
    """A number, or what can be called with a step: what it gives is looked at when it is asked."""
    return number(0, 3.4e38)(value) or (callable(value) and not isinstance(value, type))


def rate_of_optimizer(value: Any) -> bool:
    """A rate, but not 0 as float32: that is for single steps."""
    return rate(value) and (callable(value) or float(value) >= 1.2e-38)


def size(value: Any) -> bool:
    """Bytes of a budget that is refused neither as too small nor as too large."""
    if isinstance(value, str):
        return value == "1GiB"
    return not isinstance(value, bool) and isinstance(value, int) and 2**24 <= value < 2**48


def ttl(value: Any) -> bool:
    """None, seconds, a length of time."""
    return value is None or is_integer(value, 1, 2**40) or isinstance(value, datetime.timedelta)


EMBEDDING: dict[str, Rule] = {
    "storage": nothing,
    "optimizer": lambda value: isinstance(value, de.SGD | de.Adam),
    "initializer": lambda value: isinstance(value, de.Uniform | de.Zeros),
    "dimension": integer(1, 4096),
    "group": either(integer(0, 255), lambda value: isinstance(value, str) and 1 <= len(value.encode()) <= 255),
    "seed": integer(0, MANY - 1),
    "ttl": ttl,
    "admission": one_of(None, "all"),
}
boolean: Rule = lambda value: isinstance(value, bool | np.bool_)  # noqa: E731
text = one_of("x", "user")
extra = either(one_of(None), lambda value: isinstance(value, bytes | str))


@dataclass(frozen=True)
class Argument:
    """`call(value)`, and when it must not raise. A value that is right is not tried: this is about wrong ones."""

    name: str
    call: Callable[[Any], Any]
    right: Rule
    also: tuple[type[BaseException], ...] = ()  # what it may raise beside the errors of all


class BadInput(Suite):
    name = "bad-input"
    title = "bad-input matrix: argument x wrong value x entry point"
    promise = "TypeError, ValueError or a DamoError, and every byte of the storage is as it was"
    unit = "arguments"
    small = full = 131  # all: some 14,000 calls

    def __enter__(self) -> Self:
        self._scratch = scratch()
        self.directory = self._scratch.__enter__()
        self.storage = de.Storage(self.directory / "open.damo", memory="16MiB", threads=1)
        self.embedding = de.Embedding(
            self.storage, de.Adam(lr=0.1), de.Uniform(-1.0, 1.0), dimension=DIMENSION, group="user"
        )
        self.embedding.apply_gradients([1, 2, 3], np.ones((3, DIMENSION), np.float32))
        self.storage.commit(step=1)
        self.storage.checkpoint(self.directory / "checkpoint")
        self.arguments = self._arguments()
        assert len(self.arguments) == self.small, f"there are {len(self.arguments)} arguments: say so in `small`"
        return self

    def __exit__(self, *exception: Any) -> None:
        self.arguments.clear()  # with what they hold
        self.storage.close()
        self._scratch.__exit__(*exception)

    def values(self) -> list[Any]:
        return values()

    def _arguments(self) -> list[Argument]:
        storage, embedding, directory = self.storage, self.embedding, self.directory
        fresh, out = directory / "fresh.damo", np.ones((2, DIMENSION), np.float32)
        both = np.array([1, 2])

        def open_or_restore(path: Path, **options: Any) -> de.Storage:
            return de.Storage.open_or_restore(path, directory / "absent", **options)

        openings: dict[str, Callable[..., de.Storage]] = {
            "Storage": de.Storage,
            "create": de.Storage.create,
            "open": de.Storage.open,
            "open_or_restore": open_or_restore,
        }
        found = [
            # A path that is no directory that could be made, or that is not text, is wrong; the others are not tried.
            Argument(f"{name}({argument})", lambda value, f=f, a=argument: f(fresh, **{a: value}), rule)
            for name, f in openings.items()
            for argument, rule in (
                ("memory", size),
                ("durability", one_of("commit", "logged", "durable")),
                ("threads", either(one_of(None), integer(1, 1024))),
                (
                    "log_bytes",
                    either(one_of(None, "1GiB"), lambda value: isinstance(value, int) and 2**20 <= value < 2**62),
                ),
                ("ttl", ttl),
                ("disk", either(one_of(None), lambda value: is_integer(value, 2**32, 2**62 - 1))),
            )
        ]
        restore = de.Storage.restore
        found += [
            Argument(f"{name}(read_only)", lambda value, f=f: f(fresh, read_only=value), one_of(True, False))
            for name, f in (("Storage", de.Storage), ("open", de.Storage.open))
        ]
        found += [Argument(f"{name}(path)", f, lambda value: is_relative(value)) for name, f in openings.items()]
        found += [
            Argument("restore(checkpoint)", lambda value: restore(value, fresh), nothing),
            Argument("restore(path)", lambda value: restore(directory / "checkpoint", value), is_relative),
            Argument("restore(memory)", lambda value: restore(directory / "checkpoint", fresh, memory=value), size),
            Argument(
                "restore(threads)",
                lambda value: restore(directory / "checkpoint", fresh, threads=value),
                either(one_of(None), integer(1, 1024)),
            ),
            Argument(
                "open_or_restore(checkpoints)",
                lambda value: de.Storage.open_or_restore(fresh, value),
                lambda value: isinstance(value, str | Path),
            ),
            Argument(
                "open_or_restore(replace_damaged)",
                lambda value: open_or_restore(fresh, replace_damaged=value),
                one_of(True, False),
            ),
            Argument("checkpoints(directory)", de.Storage.checkpoints, lambda value: isinstance(value, str | Path)),
            Argument("verify(strict)", lambda value: storage.verify(strict=value), one_of(True, False)),
            Argument("salvage(path)", lambda value: de.Storage.salvage(value, fresh), nothing),
            Argument("salvage(out)", lambda value: de.Storage.salvage(directory / "checkpoint", value), nothing),
            Argument("drop_group(group)", storage.drop_group, either(one_of("user"), integer(255, 255))),
            Argument("expire(now)", storage.expire, either(one_of(None), integer(0, 2**62))),
            Argument("now", lambda value: setattr(storage, "now", value), integer(0, 2**62)),
            Argument("commit(step)", lambda value: storage.commit(value), either(one_of(None), integer(0, 2**63 - 1))),
            Argument("commit(extra)", lambda value: storage.commit(1, value), extra),
            Argument("checkpoint(directory)", storage.checkpoint, is_relative),
            Argument(
                "checkpoint(step)",
                lambda value: storage.checkpoint(directory / "new", value),
                either(one_of(None), integer(0, 2**63 - 1)),
            ),
            Argument("checkpoint(extra)", lambda value: storage.checkpoint(directory / "new", 1, value), extra),
            Argument(
                "checkpoint(keep)",
                lambda value: storage.checkpoint(directory / "new", 1, keep=value),
                either(one_of(None), integer(1, 2**31 - 1)),
            ),
            Argument("dump(path)", storage.dump, is_relative),
            Argument(
                "dump(group)",
                lambda value: storage.dump(directory / "d", group=value),
                either(one_of(None, "user"), integer(255, 255)),
            ),
            Argument(
                "dump(min_count)", lambda value: storage.dump(directory / "d", min_count=value), integer(0, 2**32 - 1)
            ),
            Argument(
                "dump(expire_days)",
                lambda value: storage.dump(directory / "d", expire_days=value),
                either(one_of(None), integer(0, 10**9)),
            ),
            Argument("read_dump(path)", de.read_dump, nothing, (OSError,)),
            Argument("lookup(keys)", embedding.lookup, keys),
            Argument(
                "lookup(out)",
                lambda value: embedding.lookup(both, value),
                lambda value: value is None or _is_output(value),
            ),
            Argument(
                "lookup(missing)", lambda value: embedding.lookup(both, missing=value), one_of("zeros", "initial")
            ),
            Argument(
                "lookup of new keys(out)",
                lambda value: embedding.lookup([7, 8], value),
                lambda value: value is None or _is_output(value),
            ),
            Argument("apply_gradients(keys)", lambda value: embedding.apply_gradients(value, out), is_two_keys),
            Argument(
                "apply_gradients(gradients)", lambda value: embedding.apply_gradients(both, value), _are_gradients
            ),
            Argument(
                "apply_gradients of new keys(gradients)",
                lambda value: embedding.apply_gradients([7, 8], value),
                _are_gradients,
            ),
            Argument(
                "apply_gradients(lr)",
                lambda value: embedding.apply_gradients(both, out, lr=value),
                either(one_of(None), number(0, 3.4e38)),
            ),
            Argument("import_rows(keys)", lambda value: embedding.import_rows(value, out), is_two_keys),
            Argument("import_rows(weights)", lambda value: embedding.import_rows(both, value), _are_gradients),
            Argument("import_rows(state)", lambda value: embedding.import_rows(both, out, value), one_of(None)),
            Argument(
                "import_rows(state of an entry)",
                lambda value: embedding.import_rows(both, out, {"exp_avg": out, "exp_avg_sq": value}),
                _are_gradients,
            ),
            Argument("import_rows(counts)", lambda value: embedding.import_rows(both, out, counts=value), _two_counts),
            Argument("prefetch(keys)", embedding.prefetch, keys),
            Argument("contains(keys)", embedding.contains, keys),
            Argument("erase(keys)", embedding.erase, keys),
            Argument("inspect(key)", embedding.inspect, integer(-(2**63), MANY - 1)),
            Argument("scan(batch)", embedding.scan, integer(1, 2**24)),
            Argument("lr", lambda value: setattr(embedding, "lr", value), rate),
            Argument(
                "hash_keys(field)", lambda value: de.hash_keys(value, ["a"]), lambda value: isinstance(value, str)
            ),
            Argument("schedule(step)", de.CosineDecay(lr=0.1, decay_steps=10), integer(0, MANY - 1)),
            Argument("hash_keys(seed)", lambda value: de.hash_keys("f", ["a"], seed=value), integer(0, MANY - 1)),
        ]
        make: dict[str, Any] = {
            "storage": storage,
            "optimizer": de.SGD(lr=0.1),
            "initializer": de.Zeros(),
            "dimension": DIMENSION,
            "group": 9,
            "seed": 0,
        }
        found += [
            Argument(f"Embedding({name})", lambda value, n=name: de.Embedding(**{**make, n: value}), rule)
            for name, rule in EMBEDDING.items()
        ]
        for kind, arguments in (
            (de.SGD, {"lr": rate_of_optimizer, "weight_decay": number(0, 3.4e38)}),
            (
                de.Adagrad,
                {"lr": rate_of_optimizer}
                | {name: number(0, 3.4e38) for name in ("eps", "weight_decay", "initial_accumulator_value")},
            ),
            (
                de.Adam,
                {
                    "lr": rate_of_optimizer,
                    "eps": number(0, 3.4e38),
                    "weight_decay": number(0, 3.4e38),
                    "betas": nothing,
                    "bias_correction": nothing,
                },
            ),
            (de.RowWiseAdagrad, {"lr": rate_of_optimizer, "lr_decay": number(0, 3.4e38)}),
            (de.AMSGrad, {"lr": rate_of_optimizer, "betas": nothing}),
            (de.AdamW, {"lr": rate_of_optimizer, "betas": nothing, "weight_decay": number(0, 3.4e38)}),
            (de.Lion, {"lr": rate_of_optimizer, "betas": nothing, "weight_decay": number(0, 3.4e38)}),
            (
                de.RMSprop,
                {"lr": rate_of_optimizer, "alpha": number(0, 1), "momentum": number(0, 1), "centered": boolean},
            ),
            (de.FTRL, {"lr": rate_of_optimizer}),
            (
                de.CountingBloomFilter,
                {
                    "capacity": integer(1, 2**40),
                    "count": integer(1, 15),
                    "fpr": number(1e-9, 0.5),
                    "halve_every": either(one_of(None), integer(1, MANY - 1)),
                    "reload": boolean,
                    "path": either(one_of(None), is_relative),
                },
            ),
            (de.Constant, {"value": number(-3.4e38, 3.4e38)}),
            (de.Uniform, {"low": number(-3.4e38, 3.4e38), "high": number(-3.4e38, 3.4e38)}),
            (de.Normal, {"mean": number(-1e37, 1e37), "std": number(0, 1e37)}),
            (de.XavierUniform, {"gain": number(0, 1e37)}),
            (de.KaimingNormal, {"a": number(0, 1e37)}),
            (
                de.PolynomialDecay,
                {"decay_steps": integer(1, 2**53)} | {name: number(0, 3.4e38) for name in ("lr", "end_lr", "power")},
            ),
            (de.ExponentialDecay, {"decay_rate": number(0, 3.4e38)}),
            (
                de.LinearWarmup,
                {"warmup_steps": integer(1, 2**53), "then": rate, "start_lr": number(0, 3.4e38)},
            ),
        ):
            needed: dict[str, Any] = {
                de.CountingBloomFilter: {"capacity": 100},
                de.Uniform: {"low": -1.0, "high": 1.0},
                de.PolynomialDecay: {"lr": 0.1, "decay_steps": 10},
                de.ExponentialDecay: {"lr": 0.1, "decay_steps": 10, "decay_rate": 0.5},
                de.LinearWarmup: {"warmup_steps": 10, "then": 0.1},
            }.get(kind, {})
            for argument, rule in arguments.items():

                def build(value: Any, kind: Any = kind, argument: str = argument, needed: Any = needed) -> Any:
                    return kind(**{**needed, argument: value})

                found.append(Argument(f"{kind.__name__}({argument})", build, rule))
        return found

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
        return self.storage.stats()["sequence"], self.embedding.lr, len(self.embedding), lookup.tobytes()

    def _signature(self) -> list[tuple[str, int, int, int]]:
        """Changes with every write: as sharp as the bytes, and quick."""
        found = [(str(file), file.lstat()) for file in sorted(self.directory.rglob("*"))]
        return [(name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in found]


def is_relative(value: Any) -> bool:
    """A path that could be made where the test stands."""
    try:
        path = os.fspath(value)
    except TypeError:
        return False
    return (
        isinstance(path, str)
        and path != ""
        and "\0" not in path
        and len(os.path.basename(path)) < 256
        and "/" not in path
    )


def _is_output(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.dtype.isnative
        and value.shape == (2, DIMENSION)
        and value.flags.c_contiguous
        and value.flags.writeable
    )


def is_two_keys(value: Any) -> bool:
    return keys(value) and np.asarray(value).shape == (2,)


def _two_counts(value: Any) -> bool:
    if value is None:
        return True
    array = np.asarray(value) if not isinstance(value, list) or value == [1, 2] else np.empty(0)
    return array.dtype.kind in "iu" and array.shape == (2,)


def _are_gradients(value: Any) -> bool:
    array = np.asarray(value) if isinstance(value, np.ndarray) else None
    return (
        array is not None
        and array.dtype == np.float32
        and array.shape == (2, DIMENSION)
        and bool(np.isfinite(array).all())
    )
