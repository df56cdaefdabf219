# SPDX-License-Identifier: Apache-2.0
"""From tensors of ids to the core's keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from damo_embedding.integers import parse_int

Keys = npt.NDArray[np.int64]


def keys_of(ids: torch.Tensor, what: str) -> Keys:
    """The keys of `ids`, flattened: its own memory where that is contiguous int64 or uint64 on the CPU, else
    a copy.

    The 64 bits of a uint64 id are its key's; an int32 id is the int64 of the same value. `what` names the ids
    in errors.
    """
    if not isinstance(ids, torch.Tensor):
        raise TypeError(
            f"[forward] {what} is a {type(ids).__name__}, expected a torch.Tensor of int64, int32 or uint64"
        )
    if ids.layout is not torch.strided or ids.is_nested:
        kind = "nested" if ids.is_nested else _name(ids.layout)
        raise TypeError(f"[forward] {what} has the layout {kind}, expected a dense tensor: ids.to_dense()")
    if ids.is_meta:
        raise TypeError(f"[forward] {what} is on the device meta, expected ids that are somewhere")
    if ids.dtype is torch.int32:
        ids = ids.to(torch.int64)
    elif ids.dtype is torch.uint64:
        ids = ids.view(torch.int64)
    elif ids.dtype is not torch.int64:
        raise TypeError(
            f"[forward] {what} is a tensor of {_name(ids.dtype)}, expected int64, int32 or uint64; "
            "ids are whole numbers, and damo_embedding.hash_keys makes them from anything else"
        )
    return ids.detach().cpu().contiguous().view(-1).numpy()


def padding_key(padding_idx: int | None) -> int | None:
    """`padding_idx` as the int64 with the key's bits. Any key can be the padding, a negative one too."""
    if padding_idx is None:
        return None
    key = parse_int("torch", "padding_idx", padding_idx, -(1 << 63), (1 << 64) - 1, "an int or None")
    return key - (1 << 64) if key >= 1 << 63 else key


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")
