# SPDX-License-Identifier: Apache-2.0
"""A small made-up folder in the format of MovieLens-100K, so that no test needs the real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GENRES = ("Action", "Comedy", "Drama", "Musical", "Western")


def write_ratings(folder: Path, users: int = 40, items: int = 60, ratings: int = 1500) -> None:
    """Users who like every second item more, in files like ml-100k.inter, .user and .item. One title is Latin-1."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + "".join(
            f"{u}\t{15 + u % 50}\t{'FM'[u % 2]}\t{('student', 'writer')[u % 2]}\t{u:05d}\n" for u in range(1, users + 1)
        )
    )
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(1, items + 1):
        genres = generator.choice(GENRES, generator.integers(1, 4), replace=False)
        title = "Les Misérables" if item == 1 else f"Title {item}"
        lines.append(f"{item}\t{title}\t{1980 + item % 20}\t{' '.join(genres)}")
    (folder / "ml-100k.item").write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for i in range(ratings):
        # Later ratings are by later users, as people join one by one.
        user = 1 + int(generator.integers(0, max(2, users * (i + 1) // ratings)))
        item = int(generator.integers(1, items + 1))
        stars = int(generator.integers(1, 4)) + 2 * ((user + item) % 2)
        lines.append(f"{user}\t{item}\t{min(stars, 5)}\t{880_000_000 + 60 * i}")
    (folder / "ml-100k.inter").write_text("\n".join([*lines, ""]))
