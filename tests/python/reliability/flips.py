# SPDX-License-Identifier: Apache-2.0
"""Damage: single bits, cut-off ends and blocks of zeros, in every kind of file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xxhash

from reliability import trainee
from reliability.oracle import Found, Operation, Oracle, Rows, compare_rows
from reliability.suite import DiedError, ServedSuite, ask, expect, listen, make_base, scratch
from reliability.workload import SMALL, START, TIGHT, Shape, Workload
from storage_server import Session

OPTIONS: dict[str, Any] = {"memory": "16MiB", "threads": 1, "log_bytes": "1MiB"}
DAMAGES = ("a bit", "a bit", "a bit", "the end cut off", "zeros", "another byte")


# A directory: its files by their relative names, and the directories in it, which have no content.
Tree = dict[str, bytes | None]


def read_tree(directory: Path) -> Tree:
    tree: Tree = {}
    for above, directories, files in os.walk(directory):
        within = "" if above == str(directory) else os.path.relpath(above, directory) + "/"
        tree |= {within + name: None for name in directories}
        for name in files:
            with open(os.path.join(above, name), "rb") as file:
                tree[within + name] = file.read()
    return tree


def write_tree(tree: Tree, directory: Path) -> None:
    """Makes the directory."""
    os.mkdir(directory)
    for name, content in tree.items():  # a directory comes before what is in it
        path = f"{directory}/{name}"
        if content is None:
            os.mkdir(path)
            continue
        with open(path, "xb", buffering=0) as file:
            assert file.write(content) == len(content)


def ours(tree: Tree) -> Tree:
    """What a storage that is refused must leave as it is. RocksDB turns its manifest over when it is opened."""
    return {name: content for name, content in tree.items() if name != "LOCK" and "/rocksdb/" not in name}


@dataclass
class Specimen:
    """A storage at rest. It comes back with exactly `high` when nothing is damaged."""

    shape: Shape
    storage: Tree
    checkpoint: Tree
    oracle: Oracle
    low: int  # how far its log is synced
    high: int


def damage(random: np.random.Generator, tree: Tree, name: str) -> str:
    """Changes a file; says how, or "" when it is as it was."""
    before = tree[name]
    assert before is not None
    content = bytearray(before)
    kind = DAMAGES[int(random.integers(len(DAMAGES)))]
    at = int(random.integers(len(content))) if content else 0
    if kind == "the end cut off":
        del content[at:]
    elif content:
        if kind == "a bit":
            content[at] ^= 1 << int(random.integers(8))
        elif kind == "zeros":
            end = min(len(content), at + int(random.choice([8, 64, 512])))
            content[at:end] = bytes(end - at)
        else:
            content[at] = int(random.integers(256))
    if content == before:
        return ""
    tree[name] = bytes(content)
    return f"{kind} at {at} of {len(before)}"


def damage_row(random: np.random.Generator, tree: Tree, name: str) -> str:
    """Changes a bit of a row in a table file, and makes its block's checksum right: as memory could, before it is made.

    As damage(); "" also when there is no row near a place that was drawn.
    """
    before = tree[name]
    assert before is not None
    content = bytearray(before)
    begin = 0
    for _ in range(int(random.integers(3))):
        end = _block_end(content, begin)
        begin = 0 if end is None else end + TRAILER
    end = _block_end(content, begin)
    if end is None:
        return ""
    # Entries of varints (shared and further bytes of the key, bytes of the value), key, value; then restart points.
    at, entries_end, values = begin, end - 4 - 4 * int.from_bytes(content[end - 4 : end], "little"), []
    while at < entries_end:
        shared, at = _varint(content, at)
        more, at = _varint(content, at)
        size, at = _varint(content, at)
        if shared + more != KEY:
            return ""  # not a block of rows
        values.append((at + more, size))
        at += more + size
    values = [(place, size) for place, size in values if size > 0]  # else it is erased
    if not values:
        return ""
    place, size = values[int(random.integers(len(values)))]
    changed = place + int(random.integers(size))
    content[changed] ^= 1 << int(random.integers(8))
    content[end + 1 : end + TRAILER] = _block_checksum(content, begin, end)
    tree[name] = bytes(content)
    return f"a bit of a row at {changed} of {len(content)}, under a checksum that is right,"


# Of a block: a byte that says how it is compressed (0: it is not), and its checksum.
TRAILER = 5
KEY = 20  # ours, and eight bytes of RocksDB


def _block_checksum(content: bytearray, begin: int, end: int) -> bytes:
    return (xxhash.xxh3_64_intdigest(content[begin:end]) & 0xFFFFFFFF).to_bytes(4, "little")


def _block_end(content: bytearray, begin: int) -> int | None:
    """Where the block that begins there ends, by its checksum."""
    for end in range(begin + 8, min(len(content) - TRAILER, begin + 20_000)):
        if content[end] == 0 and content[end + 1 : end + TRAILER] == _block_checksum(content, begin, end):
            return end
    return None


def _varint(content: bytearray, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


class Damaged(ServedSuite):
    """One session opens copy after copy; a damaged one must not bring it down."""

    SPECIMENS: ClassVar[int] = 4
    closed: ClassVar[bool]  # whether the specimens were closed, or killed

    def __enter__(self) -> Self:
        super().__enter__()
        self._specimens: dict[tuple[int, str], Specimen] = {}
        self._session: Session | None = None
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._session is not None:
            self._session.kill()
        super().__exit__(*exception)

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self.server.session()
        return self._session

    def specimen(self, number: int, shape: Shape = SMALL) -> Specimen:
        if (number, shape.name) not in self._specimens:
            with scratch() as directory:
                self._specimens[number, shape.name] = self._make(number, shape, make_base(directory / "base"))
        return self._specimens[number, shape.name]

    def _make(self, number: int, shape: Shape, base: Path) -> Specimen:
        workload = Workload([number, 31], shape)
        oracle = Oracle(shape.groups, START)
        checkpoint = base / "checkpoints" / "all"
        session = self.server.session()
        try:
            ask(session, trainee.open_storage, base, shape.name, OPTIONS)
            # A reopening leaves the files of filters; the end is what was never synced.
            operations = [*workload.fill(), *workload.draw(15, without=("checkpoint", "dump")), Operation("reopen")]
            operations += workload.draw(15, without=("checkpoint", "dump"))
            operations += workload.draw(8, without=("commit", "reopen", "scan", "dump", "checkpoint", "drop_group"))
            session.start("call", trainee.train, operations[:-8], oracle.now)
            told = listen(session)
            assert told.ended, f"{told}"
            assert not told.raised, f"{told}"
            expect(oracle, operations[:-8], told)
            session("call", trainee.checkpoint_to, checkpoint)
            session.start("call", trainee.train, operations[-8:], oracle.now)
            expect(oracle, operations[-8:], listen(session))
            low = session("call", trainee.synced_sequence)
            if self.closed:
                ask(session, trainee.close)
                low = oracle.sequence
        finally:
            session.kill()
        assert low <= oracle.sequence
        oracle.rows_at = cache(oracle.rows_at)  # type: ignore[method-assign]  # nothing happens to it any more
        return Specimen(shape, read_tree(base / "table.damo"), read_tree(checkpoint), oracle, low, oracle.sequence)

    def recover(self, base: Path, checkpoint: Path | None = None) -> Found | tuple[str, str]:
        """What is there, or the error that says it is damaged."""
        try:
            answer = ask(self.session, trainee.try_to_recover, base, SMALL.name, OPTIONS, checkpoint)
        except DiedError as died:
            self._session = None
            raise AssertionError("the process died") from died
        assert isinstance(answer, Found | tuple)
        return answer


class Flips(Damaged):
    name = "flips"
    title = "single-bit flips, truncations and zeros in our own files"
    promise = "CorruptionError with nothing changed, or exactly the rows; the unsynced end of the log may be cut"
    unit = "damaged files"
    small = 300
    full = 200_000
    closed = False

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 32])
        specimen = self.specimen(int(random.integers(self.SPECIMENS)))
        of_checkpoint = random.random() < 0.3
        tree = dict(specimen.checkpoint if of_checkpoint else specimen.storage)
        name = self._pick_of_checkpoint(random, tree) if of_checkpoint else self._pick(random, tree)
        how = damage(random, tree, name)
        if not how:
            return
        try:
            with scratch() as base:
                if of_checkpoint:
                    self._restore_damaged(tree, base)
                else:
                    self._open_damaged(specimen, tree, name, base)
        except AssertionError as wrong:
            wrong.add_note(f"{how} in {name}{' of a checkpoint' if of_checkpoint else ''}")
            raise

    def _pick(self, random: np.random.Generator, tree: Tree) -> str:
        logs = self._logs(tree)
        (manifest,) = (name for name in tree if name.count("/") == 1 and name.endswith("/MANIFEST"))
        generation = manifest.removesuffix("MANIFEST")
        names = ["CURRENT", manifest, f"{generation}rocksdb/COMMITTED", *logs, *logs]
        names += [name for name in [f"{generation}presence"] if name in tree]
        names += sorted(name for name in tree if name.startswith(f"{generation}filter-"))
        return names[int(random.integers(len(names)))]

    @staticmethod
    def _logs(tree: Tree) -> list[str]:
        return sorted(name for name in tree if "/log/" in name)

    @staticmethod
    def _pick_of_checkpoint(random: np.random.Generator, tree: Tree) -> str:
        """CHECKPOINT and the small files as often as the large ones."""
        listed = sorted(name for name, content in tree.items() if content is not None)
        return listed[int(random.integers(len(listed)))] if random.random() < 0.5 else "CHECKPOINT"

    def _open_damaged(self, specimen: Specimen, tree: Tree, name: str, base: Path) -> None:
        storage = make_base(base) / "table.damo"
        write_tree(tree, storage)
        found = self.recover(base)
        kind = "log" if "/log/" in name else name.rpartition("/")[2].split("-")[0]
        if isinstance(found, tuple):
            assert found[0] == "CorruptionError", f"opening raised {found}"
            assert kind != "presence", f"a damaged filter is no error, but {found}"
            assert ours(read_tree(storage)) == ours(tree), f"{found}, but files have changed"
        else:
            low = specimen.low if name == self._logs(tree)[-1] else specimen.high
            specimen.oracle.compare(found, low, specimen.high)
        self._count(kind, found)

    def _restore_damaged(self, tree: Tree, base: Path) -> None:
        checkpoint = make_base(base) / "damaged"
        write_tree(tree, checkpoint)
        found = self.recover(base, checkpoint)
        assert isinstance(found, tuple), "it was restored all the same"
        assert found[0] == "CorruptionError", f"restoring raised {found}"
        assert not (base / "table.damo").exists(), "something was restored"
        assert read_tree(checkpoint) == tree, f"{found}, but files of the checkpoint have changed"
        self._count("checkpoint", found)

    def _count(self, name: str, found: Found | tuple[str, str]) -> None:
        self.done["damaged files"] += 1
        self.done[f"{name}: {'noticed' if isinstance(found, tuple) else 'no harm'}"] += 1


class ColdFlips(Damaged):
    name = "cold-flips"
    title = "random flips in the files of a storage's RocksDB, before it is opened and while it is"
    promise = "each row is right, or its reading raises CorruptionError; never a missing, a default or another row"
    unit = "damaged files"
    small = 100
    full = 5_000
    closed = True

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 33])
        if random.random() < 1 / 3:
            self._while_open(seed, random)
        else:
            self._before_opening(random)

    def _pick(self, random: np.random.Generator, files: list[str]) -> str:
        """A table more often than another file."""
        tables = [name for name in files if name.endswith(".sst")]
        pick = tables if tables and random.random() < 0.7 else files
        return pick[int(random.integers(len(pick)))]

    def _before_opening(self, random: np.random.Generator) -> None:
        specimen = self.specimen(int(random.integers(self.SPECIMENS)))
        tree = dict(specimen.storage)
        name = self._pick(random, sorted(name for name, content in tree.items() if "/rocksdb/" in name and content))
        if name.endswith(".sst") and random.random() < 0.2:
            how = [damage_row(random, tree, name)]
        else:
            how = [damage(random, tree, name) for _ in range(int(random.integers(1, 4)))]
        if not any(how):
            return
        keys = _keys(specimen.oracle.rows_at(specimen.high))
        with scratch() as base, self._blaming(how, name):
            write_tree(tree, make_base(base) / "table.damo")
            answer = ask(self.session, trainee.try_to_read_all, base, SMALL.name, OPTIONS, keys)
            _check(answer, specimen.oracle.rows_at(specimen.high))
        self._count(name, "", bool(answer["errors"]))

    def _while_open(self, seed: int, random: np.random.Generator) -> None:
        """Bits change in a file of a storage that is open; it is trained, read, closed, opened again."""
        # Of the second shape more rows than memory holds: they go to the disk meanwhile and come back.
        specimen = self.specimen(int(random.integers(2)), SMALL if random.random() < 0.5 else TIGHT)
        shape, oracle = specimen.shape, specimen.oracle.from_here(specimen.high)
        workload = Workload([seed, 34], shape)
        without = ("checkpoint", "dump", "reopen", "verify", "set_now", "expire")
        operations = workload.draw(int(random.integers(3, 25)), without=without)
        with scratch() as base:
            write_tree(specimen.storage, make_base(base) / "table.damo")
            ask(self.session, trainee.open_storage, base, shape.name, OPTIONS)
            directory = next((base / "table.damo").glob("generation-*/rocksdb"))
            files = [path.name for path in directory.iterdir() if path.is_file() and path.stat().st_size]
            name = self._pick(random, sorted(files))
            how = [flip(random, directory / name) for _ in range(int(random.integers(1, 4)))]
            with self._blaming(how, f"{name}, while it was open"):
                noticed = self._train_read_and_open_again(base, shape, oracle, operations)
        self._count(name, ", open", noticed)

    def _train_read_and_open_again(self, base: Path, shape: Shape, oracle: Oracle, operations: list[Operation]) -> bool:
        """Whether anything was raised."""
        self.session.start("call", trainee.train, operations, oracle.now)
        told = listen(self.session)
        if told.died:
            raise DiedError("train")
        expected = expect(oracle, operations[: told.issued + 1], told)
        sequence, before, half_done = oracle.sequence, oracle.sequence, False
        errors = [(name, text) for name, text, _ in told.raised.values()]
        for place, (name, text, sequence) in told.raised.items():
            before, after = expected.sequence(place - 1), expected.sequence(place)
            verb = operations[place].verb
            assert sequence in (before, after), f"{verb} raised {name}: {text}, after {sequence} operations"
            # What cannot be read is told before anything has happened. But a compaction may stop an update of more
            # rows than memory holds amid its parts: it is logged, whoever opens the storage again has all of it, and
            # nothing is built upon it before.
            half_done = before < sequence and verb != "compact"
            if half_done:
                in_parts = shape is TIGHT and verb != "commit"
                assert in_parts, f"{verb} raised {name}, but it is logged: {text}"
                assert "opened again" in text, f"{verb} is half done and does not say so: {text}"
        # What has expired by now is there for nobody who reads, but for who opens it again and takes no time from it.
        now, opened = (oracle.rows_at(sequence, clock) for clock in (oracle.now, None))
        checkpoint = base / "checkpoints" / "1"
        failed = ask(self.session, trainee.try_to_checkpoint, checkpoint)
        answer = ask(self.session, trainee.try_to_read_on, _keys(now))
        if half_done:
            assert failed is not None, "a checkpoint was made of what is half done"
            assert not answer["scans"], "what is half done was scanned"
            _check_errors(answer["errors"])
            _check_lookups(answer, oracle.rows_at(before, oracle.now), now)
            self.done["open: left half done"] += 1
        else:
            _check(answer, now)
        closed = ask(self.session, trainee.try_to_close)
        errors += [error for error in (failed, closed) if error is not None]
        _check_errors(errors)
        errors += answer["errors"]
        for restored in [None] if failed else [None, checkpoint]:
            place = base if restored is None else make_base(base / "restored")
            answer = ask(self.session, trainee.try_to_read_all, place, shape.name, OPTIONS, _keys(opened), restored)
            _check(answer, opened)
            errors += answer["errors"]
        return bool(errors)

    @contextmanager
    def _blaming(self, how: list[str], name: str) -> Iterator[None]:
        try:
            yield
        except DiedError as died:
            self._session = None
            raise AssertionError(f"the process died in {died}: {how} in {name}") from died
        except AssertionError as wrong:
            if self._session is not None:  # it may have the storage open still
                self._session.kill()
                self._session = None
            wrong.add_note(f"{how} in {name}")
            raise

    def _count(self, name: str, when: str, noticed: bool) -> None:
        file = name.rpartition("/")[2]
        kind = ".sst" if file.endswith(".sst") else file.split("-")[0]
        self.done["damaged files"] += 1
        self.done[f"{kind}{when}: {'noticed' if noticed else 'no harm'}"] += 1


def flip(random: np.random.Generator, path: Path) -> str:
    """Changes a bit where the file is."""
    with path.open("r+b", buffering=0) as file:
        at = int(random.integers(path.stat().st_size))
        (byte,) = os.pread(file.fileno(), 1, at)
        bit = int(random.integers(8))
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
    return f"bit {bit} at {at} of {path.stat().st_size}"


def _keys(rows: dict[int, Rows]) -> dict[int, Any]:
    return {group: found.keys for group, found in rows.items() if len(found.keys)}


def _check_errors(errors: list[tuple[str, str]]) -> None:
    for name, text in errors:
        assert name == "CorruptionError", f"{name}: {text}"
        says_where = any(part in text for part in ("table.damo/", "checkpoints/", " key "))
        assert says_where, f"it names neither a file nor a key: {text}"


def _check_lookups(answer: dict[str, Any], before: dict[int, Rows], after: dict[int, Rows]) -> None:
    """Of an update that is half done: each row is what it was before or is after it, those that it makes left out."""
    for (group, begin), weights in answer["lookups"].items():
        old = dict(zip(before[group].keys.tolist(), before[group].weights, strict=True))
        chunk = slice(begin, begin + len(weights))
        keys = after[group].keys[chunk].tolist()
        for key, new, found in zip(keys, after[group].weights[chunk], weights, strict=True):
            expected = {new.tobytes(), old[key].tobytes()} if key in old else {found.tobytes()}
            assert found.tobytes() in expected, f"group {group}, key {key}: a lookup returned other weights"


def _check(answer: dict[str, Any], rows: dict[int, Rows]) -> None:
    _check_errors(answer["errors"])
    for (group, begin), weights in answer["lookups"].items():
        expected = rows[group].weights[begin : begin + len(weights)]
        assert weights.tobytes() == expected.tobytes(), f"group {group}: a lookup returned other weights"
    for group, found in answer["scans"].items():
        compare_rows(f"group {group}", found, rows[group])
    for group, count in answer["rows"].items():
        assert count == len(rows[group].keys), f"group {group} has {count} rows, expected {len(rows[group].keys)}"
