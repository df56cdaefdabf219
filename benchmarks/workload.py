# SPDX-License-Identifier: Apache-2.0
"""The ids of the benchmarks: a bounded Zipf law over scattered keys, the same ones in every run.

Run as a program it prints what the law means: how many of a step's ids are distinct, and how many are new.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BATCH, FIELDS = 8192, 26
STEP = BATCH * FIELDS
EXPONENT = 1.05


def keys_of(ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """A key for each rank: scattered over 63 bits, no two alike, as hashed ids are."""
    x = ranks.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of splitmix64
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    # One to one on 64 bits. With the top bit cleared, as ids most often have it, two of 2 million keys are
    # the same with a chance of 2e-7.
    return (x & np.uint64(2**63 - 1)).view(np.int64)


def zipf_ranks(size: int, vocabulary: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`size` ranks below `vocabulary`, rank r with a probability that goes as 1 / (r + 1) ** EXPONENT."""
    law = _cumulative(vocabulary)
    points = rng.random(size)
    order = np.argsort(points)  # searches in order stay in the cache
    ranks = np.empty(size, np.int64)
    ranks[order] = np.searchsorted(law, points[order], side="right")
    return np.minimum(ranks, vocabulary - 1, out=ranks)


def zipf_steps(steps: int, vocabulary: int, seed: int = 1) -> Iterator[NDArray[np.int64]]:
    """The ranks of `steps` training steps of BATCH examples with FIELDS ids each."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield zipf_ranks(STEP, vocabulary, rng).reshape(BATCH, FIELDS)


_laws: dict[int, NDArray[np.float64]] = {}


def _cumulative(vocabulary: int) -> NDArray[np.float64]:
    if vocabulary not in _laws:
        law = np.cumsum(np.arange(1, vocabulary + 1, dtype=np.float64) ** -EXPONENT)
        _laws[vocabulary] = law / law[-1]
    return _laws[vocabulary]


def main() -> None:
    vocabulary, steps = 2_000_000, 20
    seen = np.zeros(vocabulary, bool)
    print(f"{BATCH:,} examples x {FIELDS} ids a step, Zipf {EXPONENT} over {vocabulary:,} keys")
    print(f"{'step':>4}  {'distinct ids':>12}  {'never seen before':>17}")
    for step, ranks in enumerate(zipf_steps(steps, vocabulary), start=1):
        distinct = np.unique(ranks)
        if step in (1, 2, 5, 10, 20):
            print(f"{step:>4}  {distinct.size:>12,}  {int((~seen[distinct]).sum()):>17,}")
        seen[distinct] = True
    print(f"{int(seen.sum()):,} keys seen in {steps} steps")


if __name__ == "__main__":
    main()
