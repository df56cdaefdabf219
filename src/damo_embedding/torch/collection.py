# SPDX-License-Identifier: Apache-2.0
"""Many features, one call into the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch

from damo_embedding.embedding import Embedding as CoreEmbedding
from damo_embedding.embedding import parse_settings
from damo_embedding.errors import SchemaMismatchError
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.initializers import Initializer
from damo_embedding.lifetimes import Ttl
from damo_embedding.optimizers import Optimizer
from damo_embedding.storage import Storage
from damo_embedding.torch.feature import Feature
from damo_embedding.torch.group import DEFAULT_INITIALIZER, Group, no_copy, open_group, settings_repr
from damo_embedding.torch.ids import keys_of, padding_key
from damo_embedding.torch.lookup import Lookup, Missing, checked_missing, look_up
from damo_embedding.torch.pooling import bags_at, bags_of_width

# Ids of a feature, or the ids of all bags and where in them each bag begins.
Ids = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class EmbeddingCollection(torch.nn.Module):
    """Vectors of the features of a model, looked up together: a dictionary of ids in, one of vectors out.

    Each feature is what an `Embedding` (or, with pooling, a `torch.nn.EmbeddingBag`) over its group would be;
    rules for training, `eval()` and updates are those of `Embedding`.

    Args:
        storage: an open `damo_embedding.Storage`.
        features: a `Feature` for each name.
        optimizer: what updates the rows of features without an optimizer of their own.
        initializer: first weights of features without an initializer of their own.
        seed: of the first weights of features without a seed of their own.
        missing: what an id without a row reads as, in `eval()` and where `admission` has not let it in: "initial" or
            "zeros".
        ttl, admission: of features without one of their own, as for `Embedding`. Each group has its own filter.

    Shape:
        - a feature without pooling: ids of any shape -> the shape of ids + (dimension,).
        - a pooled feature: a tuple of ids [n] and offsets [bags], where bag b begins at offsets[b] and the
          last one ends with the ids; or ids [bags, width], a bag a row. Either -> [bags, dimension]; an empty
          bag gives zeros.

    Example:
        >>> features = {"user": Feature(16), "tags": Feature(16, pooling="mean")}
        >>> fields = EmbeddingCollection(storage, features, optimizer=de.Adam(lr=1e-3))
        >>> tags = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
        >>> vectors = fields({"user": torch.tensor([5, 9]), "tags": tags})
        >>> vectors["tags"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        storage: Storage,
        features: Mapping[str, Feature],
        *,
        optimizer: Optimizer | None = None,
        initializer: Initializer = DEFAULT_INITIALIZER,
        seed: int = 0,
        missing: Missing = "initial",
        ttl: Ttl | None = None,
        admission: CountingBloomFilter | Literal["all"] | None = None,
    ) -> None:
        super().__init__()
        self.missing = checked_missing(missing)
        if not isinstance(features, Mapping):
            raise TypeError(
                f"[EmbeddingCollection] features is {type(features).__name__}, expected a Feature for each name"
            )
        self.features = dict(features)
        if not self.features:
            raise ValueError("[EmbeddingCollection] features is empty, expected a Feature for each name")
        for name, feature in self.features.items():
            if not isinstance(name, str) or not isinstance(feature, Feature):
                raise TypeError(
                    f"[EmbeddingCollection] features has {name!r}: {feature!r}, expected a name and a Feature"
                )
            if feature.optimizer is None and optimizer is None:
                raise TypeError(f'[EmbeddingCollection] feature "{name}" has no optimizer: give it one, or all one')
        self._storage = storage
        settings: dict[str, dict[str, Any]] = {
            name: {
                "group": name if feature.group is None else feature.group,
                "dimension": feature.dimension,
                "optimizer": optimizer if feature.optimizer is None else feature.optimizer,
                "initializer": initializer if feature.initializer is None else feature.initializer,
                "seed": seed if feature.seed is None else feature.seed,
                "ttl": ttl if feature.ttl is None else feature.ttl,
                "admission": admission if feature.admission is None else feature.admission,
            }
            for name, feature in self.features.items()
        }
        _check_settings(settings)  # all of them before the first is made
        self._groups: dict[str, Group] = {name: open_group(storage, **one) for name, one in settings.items()}
        self._padding = {name: padding_key(feature.padding_idx) for name, feature in self.features.items()}

    @property
    def embeddings(self) -> dict[str, CoreEmbedding]:
        """The NumPy front of each feature's rows: inspect, contains, scan, prefetch, erase."""
        return {name: group.embedding for name, group in self._groups.items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: Mapping[str, Ids]) -> dict[str, torch.Tensor]:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"[forward] inputs is {type(inputs).__name__}, expected ids for each feature: a dictionary")
        if inputs.keys() != self.features.keys():
            raise ValueError(f"[forward] features {_difference(inputs, self.features)}")
        lookups = [self._lookup(name, inputs[name]) for name in self.features]
        vectors = look_up(lookups, training=self.training, zeros=self.missing == "zeros")
        devices = (_ids(inputs[name]).device for name in self.features)
        return {
            name: out if device.type == "cpu" else out.to(device)
            for name, out, device in zip(self.features, vectors, devices, strict=True)
        }

    def _lookup(self, name: str, value: Ids) -> Lookup:
        feature, padding = self.features[name], self._padding[name]
        what = f'feature "{name}"'
        if feature.pooling is None and isinstance(value, tuple):
            raise TypeError(
                f'[forward] {what} is a tuple, expected a tensor of ids; Feature(..., pooling="sum") has bags'
            )
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"[forward] {what} is a tuple of {len(value)}, expected (ids [n], offsets [bags])")
        ids = _ids(value)
        keys = keys_of(ids, what)
        bags = None
        if feature.pooling is not None:
            if isinstance(value, tuple) and ids.dim() == 1:
                bags = bags_at(value[1], keys, feature.pooling, padding, what)
            elif not isinstance(value, tuple) and ids.dim() == 2:
                bags = bags_of_width(ids.shape[0], ids.shape[1], keys, feature.pooling, padding)
            else:
                came = "a tuple with ids" if isinstance(value, tuple) else "ids"
                raise ValueError(
                    f"[forward] {what} is {came} of shape {tuple(ids.shape)}, "
                    "expected a tuple (ids [n], offsets [bags]) or ids [bags, width]"
                )
        return Lookup(self._groups[name], keys, ids.shape, padding, bags)

    def extra_repr(self) -> str:
        lines = []
        for name, feature in self.features.items():
            pooling = f", pooling={feature.pooling!r}" if feature.pooling is not None else ""
            lines.append(f"{name}: {settings_repr(self._groups[name], feature.padding_idx, self.missing)}{pooling}")
        return "\n".join(lines)

    def __getstate__(self) -> NoReturn:
        raise no_copy(self, self._storage)


def _ids(value: Ids) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _difference(came: Mapping[str, object], expected: Mapping[str, object]) -> str:
    missing = [name for name in expected if name not in came]
    unknown = [name for name in came if name not in expected]
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown: {', '.join(map(str, unknown))}"] if unknown else []
    return f"{'; '.join(parts)}; expected {', '.join(expected)}"


def _check_settings(settings: dict[str, dict[str, Any]]) -> None:
    """Also of features that share a group: the first would leave it as it wants it, when the core sees the second."""
    shared: dict[tuple[int | None, str], tuple[str, dict[str, Any]]] = {}
    for name, one in settings.items():
        number, label, dimension, optimizer, rates, initializer, range_, seed, _, _ = parse_settings(**one)
        fixed = {
            "dimension": dimension,
            "optimizer": (optimizer, rates),
            "initializer": (initializer, range_),
            "seed": seed,
        }
        other, expected = shared.setdefault((number, label), (name, fixed))
        for what in fixed:
            if fixed[what] != expected[what]:
                raise SchemaMismatchError(
                    f'[EmbeddingCollection] features "{other}" and "{name}" share the group {one["group"]!r}, but the'
                    f" {what} of one is {settings[other][what]!r}, of the other {one[what]!r}: give both the same, or"
                    " each a group"
                )
