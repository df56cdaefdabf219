# SPDX-License-Identifier: Apache-2.0
"""What a power loss could leave of a directory, worked out from the journal of faults.cc.

The model is that of POSIX, with what the file systems of Linux keep in addition. A file has what its last fsync or
fdatasync covered, and of what was written since any part: each page of 4 KiB as it was after any of its writes. A
directory has the names of its last fsync, and of what changed since a first part: changes of one directory are not
reordered. A file that was never synced may be empty, have holes, or be gone; a rename may be missing although the
renamed file was synced. After a sync that failed, what it should have covered counts as written to the system, which
will not write it again: another sync that succeeds leaves it out. The sync of a directory is believed when it succeeds
after one that failed: where there is a journal it has ended, and nothing succeeds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PAGE = 4096
_CREATE, _TRUNCATE = os.O_CREAT, os.O_TRUNC


@dataclass(frozen=True)
class Event:
    """One entry of the journal: its type, its numbers, its texts (paths, or the bytes of a write)."""

    type: str
    numbers: tuple[int, ...]
    texts: tuple[bytes | memoryview, ...]


# type -> numbers, texts
_FORM = {
    "O": (2, 1),  # open: handle, flags; path
    "W": (2, 1),  # write: handle, offset; bytes
    "T": (2, 0),  # truncate: handle, length
    "A": (2, 0),  # allocate: handle, end
    "S": (1, 1),  # sync of a file: handle; path
    "F": (1, 0),  # sync of a file that failed: handle
    "Y": (1, 1),  # sync of a directory: handle; path
    "R": (0, 2),  # rename: from, to
    "L": (0, 2),  # link: from, to
    "U": (0, 1),  # removal: path
    "M": (0, 1),  # mkdir: path
    "K": (2, 0),  # a mark of the test: its letter, a number
}


def read_journal(path: Path) -> list[Event]:
    data = memoryview(path.read_bytes())
    events, at = [], 0
    while at < len(data):
        kind = chr(data[at])
        count, texts = _FORM[kind]
        at += 1
        numbers = struct.unpack_from(f"<{count}Q", data, at)
        at += 8 * count
        found: list[bytes | memoryview] = []
        for _ in range(texts):
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8
            piece = data[at : at + size]
            found.append(piece if kind == "W" else bytes(piece))
            at += size
        events.append(Event(kind, numbers, tuple(found)))
    return events


@dataclass(eq=False)
class File:
    synced: bytearray = field(default_factory=bytearray)
    # What came since: (time, offset, bytes), or (time, length, None) for a change of the length.
    pending: list[tuple[int, int, bytes | memoryview | None]] = field(default_factory=list)
    given_up: int = 0  # of the first of them: a sync failed
    live: bytearray | None = None  # as processes see it; None: all of the above

    def change(self, time: int, offset: int, data: bytes | memoryview | None) -> None:
        self.pending.append((time, offset, data))
        if self.live is not None:
            _apply(self.live, offset, data)

    def sync(self) -> None:
        for _, offset, data in self.pending[self.given_up :]:
            _apply(self.synced, offset, data)
        self.pending.clear()
        self.given_up = 0

    def fail_to_sync(self) -> None:
        if self.live is None:
            self.live = bytearray(self.synced)
            for _, offset, data in self.pending:
                _apply(self.live, offset, data)
        self.given_up = len(self.pending)

    def length(self) -> int:
        if self.live is not None:
            return len(self.live)
        length = len(self.synced)
        for _, offset, data in self.pending:
            length = offset if data is None else max(length, offset + len(data))
        return length


@dataclass(eq=False)
class Directory:
    synced: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[int, dict[str, Node | None]]] = field(default_factory=list)  # None: the name goes
    live: dict[str, Node] = field(default_factory=dict)


Node = File | Directory


def _apply(content: bytearray, offset: int, data: bytes | memoryview | None) -> None:
    if data is None:  # a new length
        if offset < len(content):
            del content[offset:]
        else:
            content.extend(bytes(offset - len(content)))
        return
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class Disk:
    """The files below one directory, with what is on the disk and what is on its way there."""

    def __init__(self, origin: Path) -> None:
        """From a directory that is all on the disk."""
        self.root = self._load(origin, {})
        self.time = 0
        self._handles: dict[int, Node] = {}

    def _load(self, directory: Path, known: dict[int, File]) -> Directory:
        node = Directory()
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                node.live[entry.name] = self._load(Path(entry.path), known)
            elif entry.is_file(follow_symlinks=False):
                inode = entry.inode()
                if inode not in known:
                    known[inode] = File(bytearray(Path(entry.path).read_bytes()))
                node.live[entry.name] = known[inode]
        node.synced = dict(node.live)
        return node

    # ------------------------------------------------------------- history

    def _find(self, path: str) -> Node | None:
        node: Node = self.root
        for name in path.split("/"):
            if name == ".":
                continue
            if not isinstance(node, Directory) or name not in node.live:
                return None
            node = node.live[name]
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        parent = self._find(above or ".")
        assert isinstance(parent, Directory), path
        return parent, name

    def _change(self, directory: Directory, changes: dict[str, Node | None]) -> None:
        directory.pending.append((self.time, changes))
        for name, node in changes.items():
            if node is None:
                directory.live.pop(name, None)
            else:
                directory.live[name] = node

    def happen(self, event: Event) -> None:
        self.time += 1
        match event.type:
            case "O":
                self._open(event.numbers[0], event.numbers[1], bytes(event.texts[0]).decode())
            case "W":
                self._file(event).change(self.time, event.numbers[1], event.texts[0])
            case "T":
                self._file(event).change(self.time, event.numbers[1], None)
            case "A":
                file = self._file(event)
                if event.numbers[1] > file.length():
                    file.change(self.time, event.numbers[1], None)
            case "S":
                self._file(event).sync()
            case "F":
                self._file(event).fail_to_sync()
            case "Y":
                directory = self._handles[event.numbers[0]]
                assert isinstance(directory, Directory)
                directory.synced = dict(directory.live)
                directory.pending.clear()
            case "K":
                pass
            case _:
                self._rename_and_such(event)

    def _file(self, event: Event) -> File:
        node = self._handles[event.numbers[0]]
        assert isinstance(node, File)
        return node

    def _open(self, handle: int, flags: int, path: str) -> None:
        node = self._find(path)
        if node is None:
            # One that this model does not know was made by the C library itself; RocksDB's LOG is.
            node = File()
            if flags & _CREATE:
                parent, name = self._parent(path)
                self._change(parent, {name: node})
        elif flags & _TRUNCATE:
            assert isinstance(node, File)
            node.change(self.time, 0, None)
        self._handles[handle] = node

    def _rename_and_such(self, event: Event) -> None:
        paths = [bytes(text).decode() for text in event.texts]
        parent, name = self._parent(paths[-1])
        match event.type:
            case "M":
                self._change(parent, {name: Directory()})
            case "U":
                self._change(parent, {name: None})
            case "L" | "R":
                node = self._find(paths[0])
                if node is None:
                    return  # as above
                if event.type == "L":
                    self._change(parent, {name: node})
                    return
                source, old_name = self._parent(paths[0])
                assert source is parent, f"a rename from one directory into another: {paths}"
                self._change(parent, {old_name: None, name: node})

    # ---------------------------------------------------------- power loss

    def after(self, loss: Loss, target: Path) -> None:
        """Writes what the loss leaves to `target`, an empty directory."""
        self._write(self.root, loss, target, {})

    def _write(self, directory: Directory, loss: Loss, target: Path, written: dict[int, Path]) -> None:
        entries = dict(directory.synced)
        for _, changes in directory.pending[: loss.names(directory)]:
            for name, node in changes.items():
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        for name, node in entries.items():
            path = target / name
            if isinstance(node, Directory):
                path.mkdir()
                self._write(node, loss, path, written)
            elif id(node) in written:
                os.link(written[id(node)], path)
            else:
                path.write_bytes(loss.content(node))
                written[id(node)] = path


class Loss:
    """Which part of what was not synced is lost. `kind` is one of KINDS."""

    KINDS = ("nothing", "everything", "a moment", "anything")

    def __init__(self, kind: str, random: np.random.Generator, time: int) -> None:
        self.kind = kind
        self.random = random
        # "a moment": the disk is as it was then, but for what was synced since; as of a file system with a journal.
        self.moment = int(random.integers(0, time + 1))

    def _kept(self, pending: Iterable[int], count: int) -> int:
        """How many of the first changes are not lost."""
        if self.kind == "nothing":
            return count
        if self.kind == "everything":
            return 0
        if self.kind == "a moment":
            return sum(time <= self.moment for time in pending)
        return int(self.random.choice([0, count, self.random.integers(0, count + 1)]))

    def names(self, directory: Directory) -> int:
        return self._kept((time for time, _ in directory.pending), len(directory.pending))

    def content(self, file: File) -> bytearray:
        count = len(file.pending)
        if self.kind == "nothing" and file.live is not None:
            return file.live
        if self.kind != "anything" or count == 0 or self.random.random() < 0.5:
            content = bytearray(file.synced)
            for _, offset, data in file.pending[: self._kept((time for time, _, _ in file.pending), count)]:
                _apply(content, offset, data)
            return content
        return self._any_pages(file)

    def _any_pages(self, file: File) -> bytearray:
        """A length the file had, and of each page what it was after any number of its writes."""
        lengths = [len(file.synced)]
        for _, offset, data in file.pending:
            lengths.append(offset if data is None else max(lengths[-1], offset + len(data)))
        length = int(self.random.choice(lengths))
        content = bytearray(file.synced)
        if len(content) < length:
            content.extend(bytes(length - len(content)))
        # Most pages hold all or nothing; a few something between.
        pages = (max(*lengths, length) + PAGE - 1) // PAGE
        until = self.random.choice([0, len(file.pending)], pages, p=[0.3, 0.7])
        between = self.random.random(pages) < 0.1
        until[between] = self.random.integers(0, len(file.pending) + 1, int(between.sum()))
        for number, (_, offset, data) in enumerate(file.pending):
            if data is None:
                # Shorter at some time: what lay behind is zeros if the file is longer again.
                for page in range(offset // PAGE, pages):
                    begin, end = max(offset, page * PAGE), min((page + 1) * PAGE, len(content))
                    if until[page] > number and begin < end:
                        content[begin:end] = bytes(end - begin)
                continue
            for page in range(offset // PAGE, (offset + len(data) + PAGE - 1) // PAGE):
                begin, end = max(offset, page * PAGE), min(offset + len(data), (page + 1) * PAGE, length)
                if until[page] > number and begin < end:
                    content[begin:end] = data[begin - offset : end - offset]
        del content[length:]
        return content
