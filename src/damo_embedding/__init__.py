# SPDX-License-Identifier: Apache-2.0
"""Embedding tables as large as the disk, with no vocabulary to declare.

`Storage` opens a directory, `Embedding` is one table in it: `lookup` and `apply_gradients`. Needs NumPy
alone; `damo_embedding.torch` is the PyTorch front.
"""

from damo_embedding.admission import Admission
from damo_embedding.checkpoints import Checkpoint
from damo_embedding.dump_reader import read_dump
from damo_embedding.embedding import Embedding, RowInfo, Rows
from damo_embedding.errors import (
    AlreadyOpenError,
    ClosedError,
    CorruptionError,
    DamoError,
    ForkedHandleError,
    NewerVersionError,
    ReadOnlyError,
    SchemaMismatchError,
    StorageError,
)
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.hashing import hash_keys
from damo_embedding.initializers import (
    Constant,
    Initializer,
    KaimingNormal,
    KaimingUniform,
    Normal,
    Ones,
    TruncatedNormal,
    Uniform,
    XavierNormal,
    XavierUniform,
    Zeros,
)
from damo_embedding.lifetimes import Steps
from damo_embedding.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    Optimizer,
    RMSprop,
    RowWiseAdagrad,
)
from damo_embedding.rescue import Damage, SalvageReport, VerifyReport
from damo_embedding.schedules import (
    CosineDecay,
    ExponentialDecay,
    InverseTimeDecay,
    LinearCosineDecay,
    LinearWarmup,
    NaturalExponentialDecay,
    PolynomialDecay,
    Schedule,
)
from damo_embedding.storage import Storage

__version__ = "0.1.0"

__all__ = [
    "FTRL",
    "SGD",
    "AMSGrad",
    "Adagrad",
    "Adam",
    "AdamW",
    "Admission",
    "AlreadyOpenError",
    "Checkpoint",
    "ClosedError",
    "Constant",
    "CorruptionError",
    "CosineDecay",
    "CountingBloomFilter",
    "Damage",
    "DamoError",
    "Embedding",
    "ExponentialDecay",
    "ForkedHandleError",
    "Initializer",
    "InverseTimeDecay",
    "KaimingNormal",
    "KaimingUniform",
    "LinearCosineDecay",
    "LinearWarmup",
    "Lion",
    "NaturalExponentialDecay",
    "NewerVersionError",
    "Normal",
    "Ones",
    "Optimizer",
    "PolynomialDecay",
    "RMSprop",
    "ReadOnlyError",
    "RowInfo",
    "RowWiseAdagrad",
    "Rows",
    "SalvageReport",
    "Schedule",
    "SchemaMismatchError",
    "Steps",
    "Storage",
    "StorageError",
    "TruncatedNormal",
    "Uniform",
    "VerifyReport",
    "XavierNormal",
    "XavierUniform",
    "Zeros",
    "hash_keys",
    "read_dump",
]
