# SPDX-License-Identifier: Apache-2.0
"""damo.PyEmbedding: a logistic regression over two fields. `python examples/seed/embedding.py [DIRECTORY]`"""

import os
import sys
import tempfile

import numpy as np

import damo

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
storage = damo.PyStorage(os.path.join(directory, "data"), 86400 * 100)

optimizer_parameters = damo.Parameters()
optimizer_parameters.insert("name", "adagrad")
optimizer_parameters.insert("gamma", 0.2)
schedule_parameters = damo.Parameters()
schedule_parameters.insert("name", "cosine_decay")
schedule_parameters.insert("decay_steps", 1000)
initializer_parameters = damo.Parameters()
initializer_parameters.insert("name", "xavier")
optimizer = damo.PyOptimizer(optimizer_parameters, schedule_parameters)
initializer = damo.PyInitializer(initializer_parameters)

dimension = 4
users = damo.PyEmbedding(storage, optimizer, initializer, dimension, 0)
items = damo.PyEmbedding(storage, optimizer, initializer, dimension, 1)

random = np.random.default_rng(0)
losses = []
for step in range(300):
    user = random.integers(0, 50, 256).astype(np.uint64)
    item = random.integers(0, 50, 256).astype(np.uint64)
    label = (user % 2 == item % 2).astype(np.float32)
    user_weights = np.zeros(256 * dimension, dtype=np.float32)
    item_weights = np.zeros(256 * dimension, dtype=np.float32)
    users.lookup(user, user_weights)
    items.lookup(item, item_weights)
    u, v = user_weights.reshape(-1, dimension), item_weights.reshape(-1, dimension)
    chance = 1 / (1 + np.exp(-(u * v).sum(axis=1)))
    losses.append(-np.log(np.where(label == 1, chance, 1 - chance)).mean())
    error = (chance - label)[:, np.newaxis].astype(np.float32)
    users.apply_gradients(user, (error * v).reshape(-1))
    items.apply_gradients(item, (error * u).reshape(-1))
    if step % 100 == 99:
        print("step", step + 1, "loss", round(float(np.mean(losses[-100:])), 3))
assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:10])
