# SPDX-License-Identifier: Apache-2.0
"""The names of the `damo` package that scripts were written for, on top of `damo_embedding`.

Every object here translates its parameters and calls `damo_embedding`; docs/damo.md has the names side by
side. New scripts had better use `damo_embedding` itself.
"""

from damo.embedding import PyEmbedding
from damo.filter import PyFilter
from damo.initializer import PyInitializer
from damo.optimizer import PyOptimizer
from damo.parameters import Parameters
from damo.storage import PyStorage

__all__ = ["Parameters", "PyEmbedding", "PyFilter", "PyInitializer", "PyOptimizer", "PyStorage"]
