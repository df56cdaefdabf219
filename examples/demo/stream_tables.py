# SPDX-License-Identifier: Apache-2.0
"""The stream's tables without a model: to scan, dump and compare their rows no torch is needed."""

from __future__ import annotations

import damo_embedding as de
from demo.settings import StreamSettings
from demo.stream import FIELDS

INITIALIZER = de.Uniform(-0.01, 0.01)


def our_tables(storage: de.Storage, size: StreamSettings) -> list[de.Embedding]:
    return [
        de.Embedding(storage, de.Adam(lr=size.lr), INITIALIZER, dimension=size.dimension, group=name) for name in FIELDS
    ]
