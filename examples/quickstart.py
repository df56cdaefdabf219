# SPDX-License-Identifier: Apache-2.0
"""Matrix factorization in NumPy: `python examples/quickstart.py [DIRECTORY]`.

A second run goes on where the first one ended.
"""

import sys

import numpy as np

import damo_embedding as de

BATCH, DIMENSION = 1024, 8
random = np.random.default_rng(0)
tastes, styles = random.normal(size=(2_000, 4)), random.normal(size=(500, 4))  # what the model is to find out

with de.Storage(sys.argv[1] if len(sys.argv) > 1 else "quickstart.damo", memory="64MiB") as storage:
    users = de.Embedding(storage, de.Adam(lr=0.02), de.Normal(0, 0.1), DIMENSION, group="user")
    items = de.Embedding(storage, de.Adam(lr=0.02), de.Normal(0, 0.1), DIMENSION, group="item")
    start = 0 if storage.last_commit is None else storage.last_commit[0]
    for step in range(start + 1, start + 301):
        user, item = random.integers(2_000, size=BATCH), random.integers(500, size=BATCH)
        clicked = random.random(BATCH) < 1 / (1 + np.exp(-(tastes[user] * styles[item]).sum(1)))
        user_keys = de.hash_keys("user", user)  # or text, from NumPy, pandas, Arrow: no vocabulary
        item_keys = de.hash_keys("item", item)
        u, v = users.lookup(user_keys), items.lookup(item_keys)  # float32 [1024, 8]; new keys get rows
        chance = 1 / (1 + np.exp(-(u * v).sum(1)))
        error = (chance - clicked).astype(np.float32)[:, np.newaxis]  # of the log loss, by the score
        users.apply_gradients(user_keys, error * v)
        items.apply_gradients(item_keys, error * u)
        if step % 100 == 0:
            loss = -np.log(np.where(clicked, chance, 1 - chance)).mean()
            print(f"step {step}: loss {loss:.3f}, {len(users):,} users, {len(items):,} items")
    storage.commit(step=step)
