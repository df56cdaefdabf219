# SPDX-License-Identifier: Apache-2.0
"""Every size of the demo, once as it is meant and once small enough for a test."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MovieLensSettings:
    seeds: int = 3
    epochs: int = 4
    batch: int = 1024
    dimension: int = 16
    lr: float = 5e-3  # of the rows
    dense_lr: float = 1e-3
    online_batch: int = 128  # how many ratings are predicted before they are learnt
    memory: str = "64MiB"


@dataclass(frozen=True)
class StreamSettings:
    """Events of two ids. Few ids come often and most come rarely, as everywhere where people click."""

    steps: int = 240
    batch: int = 16384
    visitors: int = 30_000_000
    visitor_exponent: float = 1.0
    visitor_scale: float = 0.5
    ads: int = 200_000
    ad_exponent: float = 0.6
    ad_scale: float = 2.0
    dimension: int = 16
    lr: float = 0.03
    dense_lr: float = 1e-3
    seed: int = 2
    memory: str = "32MiB"
    forgetful_memory: str = "256MiB"
    log: str = "128MiB"
    cap: str = "192MiB"  # how far either process may grow, in private memory, once its table is opened


@dataclass(frozen=True)
class Settings:
    movielens: MovieLensSettings = field(default_factory=MovieLensSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    price_visitors: int = 60_000  # so few that every row stays in memory
    price_ads: int = 20_000
    price_memory: str = "256MiB"
    price_seconds: float = 2.0
    price_rounds: int = 2
    kill_steps: int = 16


FULL = Settings()
QUICK = Settings(
    movielens=MovieLensSettings(seeds=1, epochs=1, batch=256),
    stream=StreamSettings(steps=12, batch=1024, visitors=1_000_000, ads=5_000),
    price_visitors=2_000,
    price_ads=500,
    price_seconds=0.1,
    price_rounds=1,
    kill_steps=8,
)


def settings(quick: bool) -> Settings:
    return QUICK if quick else FULL


def size_in_bytes(size: str) -> int:
    """ "64MiB" -> 67108864."""
    for unit, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        if size.endswith(unit):
            return int(float(size.removesuffix(unit)) * factor)
    return int(size)
