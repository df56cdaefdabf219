# SPDX-License-Identifier: Apache-2.0
"""The PyTorch front: modules whose weights are the rows of a storage.

- `Embedding`: ids of any shape -> vectors, as `torch.nn.Embedding` without a size.
- `EmbeddingCollection` and `Feature`: a dictionary of id features, single or pooled, in one call into the
  core.
- `save_checkpoint` and `load_checkpoint`: a whole training, rows and dense part, of one step.
- `SparseOptimizer`: collects gradients over several backward passes and applies them at `step()`.

docs/torch.md is the guide. In reading order: embedding.py, collection.py, lookup.py, backward_pass.py,
optimizer.py, checkpoint.py.
"""

from __future__ import annotations

from damo_embedding.torch.checkpoint import Resumed, load_checkpoint, save_checkpoint
from damo_embedding.torch.collection import EmbeddingCollection
from damo_embedding.torch.embedding import Embedding
from damo_embedding.torch.feature import Feature
from damo_embedding.torch.optimizer import SparseOptimizer

__all__ = [
    "Embedding",
    "EmbeddingCollection",
    "Feature",
    "Resumed",
    "SparseOptimizer",
    "load_checkpoint",
    "save_checkpoint",
]
