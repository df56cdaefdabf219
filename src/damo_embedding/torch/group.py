# SPDX-License-Identifier: Apache-2.0
"""A group as all modules of a process share it.

Two modules with the same group and equal settings use the same rows, as two uses of one `nn.Embedding` do:
their gradients of one backward pass make one update, and one SparseOptimizer manages both. What they share is
here.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Literal

from damo_embedding.embedding import Embedding
from damo_embedding.filters import CountingBloomFilter
from damo_embedding.initializers import Initializer, Uniform
from damo_embedding.lifetimes import Ttl
from damo_embedding.optimizers import Optimizer
from damo_embedding.storage import Storage

if TYPE_CHECKING:
    from damo_embedding._core import Table
    from damo_embedding.torch.pending import Pending

DEFAULT_INITIALIZER = Uniform(-0.05, 0.05)

_lock = threading.Lock()  # protects _groups
# By name, or by number where there is none: a checkpoint may have given a name another number.
_Groups = weakref.WeakValueDictionary[str | int, "Group"]
_groups: weakref.WeakKeyDictionary[Storage, _Groups] = weakref.WeakKeyDictionary()


class Group:
    """`embedding` is the front of its rows, `pending` takes its gradients while a SparseOptimizer lives."""

    def __init__(self, storage: Storage, embedding: Embedding) -> None:
        self.storage = storage
        self.embedding = embedding
        self.dimension = embedding.dimension
        # The optimizer alone holds it: when that is gone, so are the gradients, and backward() updates the
        # rows again.
        self._pending: weakref.ref[Pending] | None = None

    @property
    def table(self) -> Table:
        """The core's; another one when the storage went back to a checkpoint."""
        return self.embedding._table

    @property
    def label(self) -> str:
        """The name, or the number of a group without one."""
        return self.embedding.name or str(self.embedding.group)

    @property
    def pending(self) -> Pending | None:
        return None if self._pending is None else self._pending()

    def manage(self, pending: Pending) -> None:
        """From now on gradients go to `pending`."""
        self._pending = weakref.ref(pending)


def open_group(
    storage: Storage,
    *,
    group: int | str,
    dimension: int,
    optimizer: Optimizer,
    initializer: Initializer,
    seed: int,
    ttl: Ttl | None,
    admission: CountingBloomFilter | Literal["all"] | None,
) -> Group:
    """The shared group. A group that is bound to other settings is an error."""
    embedding = Embedding(
        storage,
        optimizer,
        initializer,
        dimension=dimension,
        group=group,
        seed=seed,
        ttl=ttl,
        admission=admission,
    )
    with _lock:
        groups = _groups.setdefault(storage, _Groups())
        key = embedding.name or embedding.group
        shared = groups.get(key)
        # A group that was dropped is none of the new one.
        if shared is None or shared.table.table_id != embedding._table.table_id:
            groups[key] = shared = Group(storage, embedding)
    return shared


def groups_of(storage: Storage) -> list[Group]:
    """All that modules of this process share now."""
    with _lock:
        return list(_groups.get(storage, _Groups()).values())


def settings_repr(group: Group, padding_idx: int | None, missing: str) -> str:
    """The settings that are not default, for extra_repr."""
    embedding = group.embedding
    name = embedding.name or embedding.group
    parts = [f"group={name!r}", f"dimension={group.dimension}", repr(embedding.optimizer)]
    if embedding.initializer != DEFAULT_INITIALIZER:
        parts.append(repr(embedding.initializer))
    if padding_idx is not None:
        parts.append(f"padding_idx={padding_idx}")
    if embedding.seed != 0:
        parts.append(f"seed={embedding.seed}")
    if embedding.ttl != "never":
        parts.append(f"ttl={embedding.ttl!r}")
    if (admission := embedding.admission) is not None:
        parts.append(f"admission={admission!r}")
    if missing != "initial":
        parts.append(f"missing={missing!r}")
    return ", ".join(parts)


def no_copy(what: object, storage: Storage) -> TypeError:
    """The error for who copies or pickles a module or an optimizer."""
    return TypeError(
        f"[copy] {type(what).__name__} cannot be copied or pickled: its rows are in the storage "
        f"{storage.path!r}; save dense weights with state_dict(), rows with storage.checkpoint(), and build "
        "a second module where you need one: the same group shares the rows"
    )
