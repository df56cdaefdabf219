# SPDX-License-Identifier: Apache-2.0
"""Lookups as autograd sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from damo_embedding.torch import backward_pass
from damo_embedding.torch.group import Group
from damo_embedding.torch.ids import Keys
from damo_embedding.torch.pooling import Bags

if TYPE_CHECKING:
    from damo_embedding._core import Batch, Table
    from damo_embedding.torch.backward_pass import Found


# What an id without a row reads as in evaluation.
Missing = Literal["initial", "zeros"]


def checked_missing(missing: Missing) -> Missing:
    if not isinstance(missing, str) or missing not in get_args(Missing):
        raise ValueError(f'[torch] missing is {missing!r}, expected "initial" or "zeros"')
    return missing


@dataclass(frozen=True, slots=True)
class Lookup:
    """What one feature asks for."""

    group: Group
    keys: Keys
    shape: torch.Size  # of the ids; the result of a lookup without bags is shape + (dimension,)
    padding: int | None
    bags: Bags | None = None


def look_up(lookups: list[Lookup], *, training: bool, zeros: bool) -> tuple[torch.Tensor, ...]:
    """The vectors of all lookups, which are of one storage: one call into the core.

    `training` inserts unknown keys and, when gradients are on, gives tensors that train the rows. Without
    gradients nothing is inserted, and an unknown key reads as the vector that training would start from. That
    is what the first forward of a checkpointed segment needs: its second one, with gradients, reads the same.
    """
    if not training:
        return _read(lookups, insert=False, zeros=zeros)[0]
    backward_pass.join()
    if not torch.is_grad_enabled():
        return _read(lookups, insert=False, zeros=False)[0]
    # Autograd comes to a function's backward only by way of an input that requires grad.
    anchor = torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)
    vectors: tuple[torch.Tensor, ...] = _TrainingLookup.apply(  # type: ignore[no-untyped-call]
        anchor, lookups, zeros
    )
    return vectors


def _read(lookups: list[Lookup], *, insert: bool, zeros: bool) -> tuple[tuple[torch.Tensor, ...], list[Batch | None]]:
    vectors: list[torch.Tensor] = []
    items: list[tuple[Table, object, object, int | None]] = []
    for lookup in lookups:
        keys, dimension = lookup.keys, lookup.group.dimension
        shape = (*lookup.shape, dimension) if lookup.bags is None else (len(keys), dimension)
        # Of its final shape: a view would refuse to be changed in place.
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        vectors.append(out)
        items.append((lookup.group.table, keys, out.numpy().reshape(len(keys), dimension), lookup.padding))
    batches = lookups[0].group.storage._core.forward_many(items, insert, zeros)
    pooled = (
        out if lookup.bags is None else lookup.bags.pool(out) for lookup, out in zip(lookups, vectors, strict=True)
    )
    return tuple(pooled), batches


class _TrainingLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, lookups: list[Lookup], zeros: bool) -> tuple[torch.Tensor, ...]:
        vectors, ctx.batches = _read(lookups, insert=True, zeros=zeros)
        ctx.lookups = lookups
        # A feature that the loss does not use gets None, no update, rather than an update by zero.
        ctx.set_materialize_grads(False)
        return vectors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None]:
        _ = ctx.saved_tensors  # none, but autograd says so here when the graph is freed, as for nn.Embedding
        if torch.is_grad_enabled():
            raise RuntimeError(
                "[backward] create_graph=True came to an embedding, whose rows have no second derivative; "
                "use torch.autograd.grad(..., inputs) with inputs that come after the lookup"
            )
        found: list[Found] = []
        for lookup, batch, gradient in zip(ctx.lookups, ctx.batches, gradients, strict=True):
            if gradient is None:
                continue
            if lookup.bags is not None:
                values = lookup.bags.spread(gradient)
            else:
                rows = gradient.reshape(len(lookup.keys), lookup.group.dimension).contiguous()
                # Of its own: autograd may give the same memory to a parameter as its `grad`, which optimizers,
                # clipping and hooks change in place before the rows have seen it.
                if rows.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr():
                    rows = rows.clone()
                values = rows.numpy()
            found.append((lookup.group, (batch, values)))
        # Last, because nothing may fail once the pass has the gradients.
        backward_pass.collect(found)
        return None, None, None
