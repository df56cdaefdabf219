# SPDX-License-Identifier: Apache-2.0
"""A module whose weights are the rows of one group."""

from __future__ import annotations

from typing import Literal, NoReturn

import torch

from damo_embedding.embedding import Embedding as CoreEmbedding
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.initializers import Initializer
from damo_embedding.lifetimes import Ttl
from damo_embedding.optimizers import Optimizer
from damo_embedding.storage import Storage
from damo_embedding.torch.group import DEFAULT_INITIALIZER, no_copy, open_group, settings_repr
from damo_embedding.torch.ids import keys_of, padding_key
from damo_embedding.torch.lookup import Lookup, Missing, checked_missing, look_up


class Embedding(torch.nn.Module):
    """Vectors of ids, from a group of a storage: `torch.nn.Embedding` without a number of embeddings.

    Every 64-bit id has a row from its first training lookup, or from the one in which `admission` lets it in.
    The module has no parameters: the rows live in the storage, and the group's own optimizer updates them. All
    lookups of a group within one `backward()` are summed and applied once, when that `backward()` ends; with a
    `SparseOptimizer` over the module, at its `step()`.

    In `eval()` and under `torch.no_grad()` nothing is inserted, counted or evicted, and nothing trains.

    Args:
        storage: an open `damo_embedding.Storage`.
        group: 0-255 or a name. Modules with the same group and equal settings share its rows; other settings
            are an error.
        dimension: length of a vector.
        optimizer: what updates the rows, such as `damo_embedding.Adam(lr=1e-3)`.
        initializer: first weights of a new row.
        padding_idx: the id that stands for nothing: zeros, no row, no gradient. Any key, negative ones too.
        seed: of the first weights.
        missing: what an id without a row reads as, in `eval()` and where `admission` has not let it in: "initial",
            the vector that training would start from, or "zeros".
        ttl: how long a row lives after its last update, as for `damo_embedding.Embedding`.
        admission: which ids get a row, such as `damo_embedding.CountingBloomFilter(capacity=10**7, count=3)`: from
            the third time on that training sees them. Gradients of the others are ignored. As for
            `damo_embedding.Embedding`.

    Shape:
        - ids: any shape, int64, int32 or uint64. On another device than the CPU they are copied to it.
        - output: the shape of ids + (dimension,), float32 (under autocast too), on the device of ids.

    Raises:
        RuntimeError: in backward(create_graph=True), for rows have no second derivative.
        ValueError: out of backward(), when a gradient is NaN or infinite; nothing is applied then.

    torch.compile runs a lookup outside of its graphs (a graph break), for rows are not tensors.

    Example:
        >>> item = Embedding(storage, group="item", dimension=16, optimizer=de.Adam(lr=1e-3), padding_idx=0)
        >>> item(torch.tensor([[7, 1 << 40, 0]])).shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        storage: Storage,
        *,
        group: int | str,
        dimension: int,
        optimizer: Optimizer,
        initializer: Initializer = DEFAULT_INITIALIZER,
        padding_idx: int | None = None,
        seed: int = 0,
        missing: Missing = "initial",
        ttl: Ttl | None = None,
        admission: CountingBloomFilter | Literal["all"] | None = None,
    ) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.missing = checked_missing(missing)
        self._padding = padding_key(padding_idx)
        self._group = open_group(
            storage,
            group=group,
            dimension=dimension,
            optimizer=optimizer,
            initializer=initializer,
            seed=seed,
            ttl=ttl,
            admission=admission,
        )

    @property
    def embedding(self) -> CoreEmbedding:
        """The NumPy front of the same rows: inspect, contains, scan, prefetch, erase."""
        return self._group.embedding

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        keys = keys_of(ids, "ids")
        (vectors,) = look_up(
            [Lookup(self._group, keys, ids.shape, self._padding)],
            training=self.training,
            zeros=self.missing == "zeros",
        )
        return vectors if ids.device.type == "cpu" else vectors.to(ids.device)

    def extra_repr(self) -> str:
        return settings_repr(self._group, self.padding_idx, self.missing)

    def __getstate__(self) -> NoReturn:
        raise no_copy(self, self._group.storage)
