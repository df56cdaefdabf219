# SPDX-License-Identifier: Apache-2.0
"""Bags of ids pooled into one vector each, as `torch.nn.EmbeddingBag` does.

Pooling is linear, so its backward needs the bags and not the rows: no vector of a single id outlives the
forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from damo_embedding.torch.ids import Keys

POOLINGS = ("sum", "mean")

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bags:
    """Bag b is the positions offsets[b] to offsets[b] + counts[b]. The vectors at padding positions are
    zeros."""

    offsets: torch.Tensor
    counts: Counts
    divisors: npt.NDArray[np.float32] | None  # [bags, 1], for the mean

    def pool(self, vectors: torch.Tensor) -> torch.Tensor:
        """[positions, d] -> [bags, d]; an empty bag gives zeros."""
        pooled = torch.nn.functional.embedding_bag(
            torch.arange(len(vectors), device="cpu"), vectors, self.offsets, mode="sum"
        )
        if self.divisors is not None:
            pooled.div_(torch.from_numpy(self.divisors))
        return pooled

    def spread(self, gradient: torch.Tensor) -> npt.NDArray[np.float32]:
        """The gradient of each position, [positions, d], from that of the bags."""
        values: npt.NDArray[np.float32] = gradient.numpy()
        if self.divisors is not None:
            values = values / self.divisors
        return np.repeat(values, self.counts, axis=0)


def bags_at(offsets: torch.Tensor, keys: Keys, pooling: str, padding: int | None, what: str) -> Bags:
    """Bags that begin at `offsets` in `keys`; the last one ends with the keys."""
    if not (
        isinstance(offsets, torch.Tensor)
        and offsets.layout is torch.strided
        and not (offsets.is_nested or offsets.is_meta)
        and offsets.dtype in (torch.int64, torch.int32)
        and offsets.dim() == 1
    ):
        came = f"a {type(offsets).__name__}"
        if isinstance(offsets, torch.Tensor):
            shape = "nested" if offsets.is_nested else tuple(offsets.shape)
            came = f"{shape} of {offsets.dtype}, {offsets.layout}, on {offsets.device}"
        raise TypeError(f"[forward] {what} has offsets {came}, expected a tensor [bags] of int64 or int32")
    starts = offsets.detach().to("cpu", torch.int64).contiguous()
    counts = np.diff(starts.numpy(), append=len(keys))
    first = int(starts[0]) if len(starts) else len(keys)
    if first != 0 or (len(counts) and counts.min() < 0):
        raise ValueError(
            f"[forward] {what} has offsets that do not cut {len(keys)} ids into bags: "
            f"expected 0 first, then each at least the one before and at most {len(keys)}"
        )
    return Bags(starts, counts, _divisors(starts, counts, keys, padding) if pooling == "mean" else None)


def bags_of_width(rows: int, width: int, keys: Keys, pooling: str, padding: int | None) -> Bags:
    """Bags that are the rows of a matrix of ids."""
    starts = torch.arange(rows, device="cpu") * width
    counts = np.full(rows, width, np.int64)
    return Bags(starts, counts, _divisors(starts, counts, keys, padding) if pooling == "mean" else None)


def _divisors(starts: torch.Tensor, counts: Counts, keys: Keys, padding: int | None) -> npt.NDArray[np.float32]:
    """How many ids a mean counts: padding is none of them. At least 1, so that an empty bag gives zeros."""
    if padding is not None:
        before = np.zeros(len(keys) + 1, np.int64)
        np.cumsum(keys != padding, out=before[1:])
        counts = before[starts.numpy() + counts] - before[starts.numpy()]
    return np.maximum(counts, 1).astype(np.float32)[:, None]
