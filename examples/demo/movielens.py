# SPDX-License-Identifier: Apache-2.0
"""MovieLens-100K as events of named fields, and the fields' values as 64-bit keys.

The data set belongs to GroupLens (F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History
and Context", ACM TiiS 5(4), 2015); its licence is for research, so it is read where it lies and never copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import damo_embedding as de

USER_AND_ITEM = ("user", "item")
Batch = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Ragged:
    """Several values an event, end to end: those of event i are `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def take(self, events: NDArray[np.int64]) -> Ragged:
        lengths = np.diff(self.offsets)[events]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.offsets[events] - offsets[:-1], lengths)
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)

    def beside(self, column: NDArray[Any]) -> NDArray[Any]:
        """A column with one value an event, repeated to lie beside `values`."""
        return np.repeat(column, np.diff(self.offsets))


Column = NDArray[Any] | Ragged


@dataclass(frozen=True)
class Events:
    """Fields of keys (or of a vocabulary's indices), labels and times of the same events."""

    fields: dict[str, NDArray[np.int64] | Ragged]
    labels: NDArray[np.float32]
    times: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, names: tuple[str, ...]) -> Events:
        return Events({name: self.fields[name] for name in names}, self.labels, self.times)

    def batch(self, events: NDArray[np.int64]) -> Batch:
        batch: Batch = {}
        for name, column in self.fields.items():
            if isinstance(column, Ragged):
                part = column.take(events)
                batch[name] = (torch.from_numpy(part.values), torch.from_numpy(part.offsets[:-1]))
            else:
                batch[name] = torch.from_numpy(column[events])
        return batch


def read(directory: Path) -> Events:
    """The ratings of a directory with ml-100k.inter, .user and .item. A rating of 4 or 5 stars is a positive
    label.

    No vocabulary is built: a value becomes a key by hashing, here and in any other program that hashes it.
    """
    ratings, users, items = (_read_table(directory / f"ml-100k.{kind}") for kind in ("inter", "user", "item"))
    of_user = _positions(users["user_id"], ratings["user_id"])
    of_item = _positions(items["item_id"], ratings["item_id"])

    age = np.char.mod("%d", users["age"].astype(np.int64) // 5 * 5)[of_user]
    occupation = users["occupation"][of_user]
    genres = _split(items["class"]).take(of_item)
    columns: dict[str, Column] = {
        "user": ratings["user_id"],
        "item": ratings["item_id"],
        "age": age,
        "gender": users["gender"][of_user],
        "occupation": occupation,
        "region": users["zip_code"].astype("U2")[of_user],
        "year": items["release_year"][of_item],
        "genres": genres,
        "occupation x genres": _cross(genres, occupation),
        "age x genres": _cross(genres, age),
    }
    keys: dict[str, NDArray[np.int64] | Ragged] = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            keys[name] = Ragged(de.hash_keys(name, column.values), column.offsets)
        else:
            keys[name] = de.hash_keys(name, column)
    labels = (ratings["rating"].astype(np.float32) >= 4).astype(np.float32)
    return Events(keys, labels, ratings["timestamp"].astype(np.float64).astype(np.int64))


class Vocabulary:
    """What torch.nn.Embedding needs before it can start: the index of every key it will ever know. Index 0 is
    for all others.
    """

    def __init__(self, events: Events, known: NDArray[np.int64]) -> None:
        self._keys: dict[str, NDArray[np.int64]] = {}
        for name, column in events.fields.items():
            self._keys[name] = np.unique(column.take(known).values if isinstance(column, Ragged) else column[known])

    def sizes(self) -> dict[str, int]:
        return {name: len(keys) + 1 for name, keys in self._keys.items()}

    def encode(self, events: Events) -> Events:
        fields: dict[str, NDArray[np.int64] | Ragged] = {}
        for name, column in events.fields.items():
            if isinstance(column, Ragged):
                fields[name] = Ragged(self._index(name, column.values), column.offsets)
            else:
                fields[name] = self._index(name, column)
        return Events(fields, events.labels, events.times)

    def _index(self, name: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        known = self._keys[name]
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, place + 1, 0).astype(np.int64)


def _read_table(path: Path) -> dict[str, NDArray[np.str_]]:
    """A file of tab-separated columns whose first line names them, as in `user_id:token`."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise SystemExit(
            f"error: {path} is missing. It comes with the package recbole==1.2.1: scripts/demo fetches it; "
            "or set DAMO_ML100K to the folder recbole/dataset_example/ml-100k of its unpacked wheel"
        ) from None
    names = [column.split(":")[0] for column in lines[0].split("\t")]
    rows = [line.split("\t") for line in lines[1:]]
    return {name: np.array(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _positions(table: NDArray[np.str_], wanted: NDArray[np.str_]) -> NDArray[np.int64]:
    """Where each wanted value stands in the table."""
    order = np.argsort(table)
    return order[np.searchsorted(table, wanted, sorter=order)]


def _split(texts: NDArray[np.str_]) -> Ragged:
    words = [text.split() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in words])])
    return Ragged(np.array([word for each in words for word in each]), offsets)


def _cross(many: Ragged, column: NDArray[np.str_]) -> Ragged:
    """A crossed feature: each of the event's values together with the column's value."""
    return Ragged(np.char.add(np.char.add(many.beside(column), "|"), many.values), many.offsets)
