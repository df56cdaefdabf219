# SPDX-License-Identifier: Apache-2.0
"""A stream of generated events that any process can go on with from any step: a visitor sees an ad, and
clicks or not.

Visitors and ads follow Zipf's law. Whether there is a click is drawn from a logistic teacher that is planted
in the ids themselves: a hash of the id gives its weight, so the teacher needs no table. Its own AUC on the
events drawn from it is the ceiling: nobody who sees nothing but the ids can be better on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import damo_embedding as de
from demo.settings import StreamSettings

FIELDS = ("visitor", "ad")
START = 1_700_000_000  # the first event's time; a step takes a second


@dataclass(frozen=True)
class StreamBatch:
    ids: dict[str, NDArray[np.int64]]  # by field: the rank of the visitor or ad, 1 being the most frequent one
    keys: dict[str, NDArray[np.int64]]
    labels: NDArray[np.float32]
    teacher: NDArray[np.float32]  # the logits that the labels were drawn with

    def distinct(self) -> int:
        """How many rows the batch touches."""
        return sum(len(np.unique(keys)) for keys in self.keys.values())


class Stream:
    """`batch(step)` is a function of the settings and the step alone."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings

    def batch(self, step: int) -> StreamBatch:
        size = self._settings
        generator = np.random.default_rng([size.seed, step])
        ids = {
            "visitor": _zipf(generator.random(size.batch), size.visitors, size.visitor_exponent),
            "ad": _zipf(generator.random(size.batch), size.ads, size.ad_exponent),
        }
        logits = size.visitor_scale * _sign(ids["visitor"], 1) + size.ad_scale * _sign(ids["ad"], 2)
        labels = generator.random(size.batch) < 1 / (1 + np.exp(-logits))
        return StreamBatch(
            ids,
            {name: de.hash_keys(name, values) for name, values in ids.items()},
            labels.astype(np.float32),
            logits.astype(np.float32),
        )


def _zipf(uniform: NDArray[np.float64], count: int, exponent: float) -> NDArray[np.int64]:
    """Ranks 1..count, the chance of rank r falling as r**-exponent: the continuous law on [1, count + 1),
    inverted, rounded down.
    """
    if exponent == 1:
        ranks = (count + 1.0) ** uniform
    else:
        power = 1 - exponent
        ranks = (((count + 1.0) ** power - 1) * uniform + 1) ** (1 / power)
    return np.minimum(ranks.astype(np.int64), count)


def _sign(ids: NDArray[np.int64], salt: int) -> NDArray[np.float64]:
    """-1 or +1 for each id, as the last bit of a hash (the finalizer of SplitMix64, Steele et al. 2014)."""
    bits = (ids.astype(np.uint64) << np.uint64(8)) + np.uint64(salt)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits >> np.uint64(63)).astype(np.float64)) * 2 - 1
