# SPDX-License-Identifier: Apache-2.0
"""damo.PyStorage: dump, checkpoint, load. `python examples/seed/storage.py [DIRECTORY]`"""

import os
import struct
import sys
import tempfile

import numpy as np

import damo

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
storage = damo.PyStorage(os.path.join(directory, "data"), 86400 * 100)  # rows live for 100 days after their last update

optimizer_parameters = damo.Parameters()
optimizer_parameters.insert("name", "sgd")
optimizer_parameters.insert("gamma", 0.1)
initializer_parameters = damo.Parameters()
initializer_parameters.insert("name", "zeros")
optimizer = damo.PyOptimizer(optimizer_parameters)
initializer = damo.PyInitializer(initializer_parameters)
embedding = damo.PyEmbedding(storage, optimizer, initializer, 4, 1)

keys = np.arange(10, dtype=np.uint64)
weights = np.zeros(40, dtype=np.float32)
for step in range(3):
    embedding.lookup(keys, weights)
    embedding.apply_gradients(keys[: 10 - 3 * step], np.ones(40 - 12 * step, dtype=np.float32))
    storage.checkpoint(os.path.join(directory, "checkpoint"))  # again and again to the same path

condition = damo.Parameters()
condition.insert("expire_days", 30)
condition.insert("group", 1)
condition.insert("min_count", 2)
storage.dump(os.path.join(directory, "weights.bin"), condition)
with open(os.path.join(directory, "weights.bin"), "rb") as file:
    data = file.read()
dimensions = struct.unpack("<256i", data[:1024])
counts = struct.unpack("<256Q", data[1024:3072])
print("group 1: dimension", dimensions[1], "rows", counts[1])
assert (dimensions[1], counts[1], len(data)) == (4, 7, 3072 + 7 * (12 + 16))
key, group, *row = struct.unpack("<Qi4f", data[3072:3100])
assert (key in range(7), group) == (True, 1)
assert np.allclose(row, -0.2 if key > 3 else -0.3)

embedding.lookup(keys, weights)
expected = weights.copy()
embedding.apply_gradients(keys, np.ones(40, dtype=np.float32))
storage.load_from_checkpoint(os.path.join(directory, "checkpoint"))  # what came after it is gone
embedding.lookup(keys, weights)
assert np.array_equal(weights, expected)

storage.dump(os.path.join(directory, "weights.bin"))  # without a condition: every row
assert os.path.getsize(os.path.join(directory, "weights.bin")) == 3072 + 10 * (12 + 16)
