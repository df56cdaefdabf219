# SPDX-License-Identifier: Apache-2.0
"""Damage: single bits, cut-off ends and blocks of zeros, in every kind of file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xxhash

from reliability import trainee
from reliability.oracle import Found, Operation, Oracle
from reliability.suite import DiedError, ServedSuite, ask, expect, listen, make_base, scratch
from reliability.workload import SMALL, START, Workload
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
        self._specimens: dict[int, Specimen] = {}
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

    def specimen(self, number: int) -> Specimen:
        if number not in self._specimens:
            with scratch() as directory:
                self._specimens[number] = self._make(number, make_base(directory / "base"))
        return self._specimens[number]

    def _make(self, number: int, base: Path) -> Specimen:
        workload = Workload([number, 31], SMALL)
        oracle = Oracle(SMALL.groups, START)
        checkpoint = base / "checkpoints" / "all"
        session = self.server.session()
        try:
            ask(session, trainee.open_storage, base, SMALL.name, OPTIONS)
            # A reopening leaves the files of filters; the end is what was never synced.
            operations = [*workload.draw(15, without=("checkpoint", "dump")), Operation("reopen")]
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
        return Specimen(read_tree(base / "table.damo"), read_tree(checkpoint), oracle, low, oracle.sequence)

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
    title = "random flips in the files of a storage's RocksDB"
    promise = "each row is right, or its reading raises CorruptionError; never a missing, a default or another row"
    unit = "damaged files"
    small = 100
    full = 5_000
    closed = True

    def case(self, seed: int) -> None:
        random = np.random.default_rng([seed, 33])
        specimen = self.specimen(int(random.integers(self.SPECIMENS)))
        tree = dict(specimen.storage)
        files = sorted(name for name, content in tree.items() if "/rocksdb/" in name and content)
        tables = [name for name in files if name.endswith(".sst")]
        pick = tables if tables and random.random() < 0.7 else files
        name = pick[int(random.integers(len(pick)))]
        if name in tables and random.random() < 0.2:
            how = [damage_row(random, tree, name)]
        else:
            how = [damage(random, tree, name) for _ in range(int(random.integers(1, 4)))]
        if not any(how):
            return
        with scratch() as base:
            write_tree(tree, make_base(base) / "table.damo")
            try:
                answer = ask(self.session, trainee.try_to_read_all, base, SMALL.name, OPTIONS, self._keys(specimen))
                self._check(specimen, answer)
            except DiedError as died:
                self._session = None
                raise AssertionError(f"the process died: {how} in {name}") from died
            except AssertionError as wrong:
                wrong.add_note(f"{how} in {name}")
                raise
        file = name.rpartition("/")[2]
        kind = ".sst" if file.endswith(".sst") else file.split("-")[0]
        self.done["damaged files"] += 1
        self.done[f"{kind}: {'noticed' if answer['errors'] else 'no harm'}"] += 1

    @staticmethod
    def _keys(specimen: Specimen) -> dict[int, Any]:
        rows = specimen.oracle.rows_at(specimen.high)
        return {group: found.keys for group, found in rows.items() if len(found.keys)}

    def _check(self, specimen: Specimen, answer: dict[str, Any]) -> None:
        for name, text in answer["errors"]:
            assert name == "CorruptionError", f"{name}: {text}"
            assert "table.damo/" in text or " key " in text, f"it names neither a file nor a key: {text}"
        rows = specimen.oracle.rows_at(specimen.high)
        for (group, begin), weights in answer["lookups"].items():
            expected = rows[group].weights[begin : begin + len(weights)]
            assert weights.tobytes() == expected.tobytes(), f"group {group}: a lookup returned other weights"
        for group, found in answer["scans"].items():
            specimen.oracle.compare_group(group, found, specimen.high)
        for group, count in answer["rows"].items():
            assert count == len(rows[group].keys), f"group {group} has {count} rows, expected {len(rows[group].keys)}"
