# SPDX-License-Identifier: Apache-2.0
"""Python values as JSON and a table of tensors: what a state_dict holds, to the last bit, and nothing that could run.

Numbers, texts, None, lists and dictionaries with text for keys are as JSON has them. The rest is an object with one
key, that begins with "$":

    {"$tuple": [...]}                    {"$dict": [[key, value], ...]}, {"$counter": ...}
    {"$float": "7ff8000000000000"}       a float that is not finite, by its bits
    {"$bytes": "base64"}
    {"$tensor": name}, {"$array": name}, {"$scalar": name}    of torch, of NumPy: in the table of tensors
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["Tensors", "decode", "encode"]

Tensors = dict[str, torch.Tensor]

_DEEPEST = 100
_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


def encode(operation: str, where: str, value: object, tensors: Tensors) -> Any:
    """`value` as JSON; its tensors go into `tensors`, on the CPU, by their path.

    Raises:
        TypeError: something in it has no such form; says what and where.
    """
    return _Encoder(operation, tensors).encode(where, value, 0)


class _Encoder:
    def __init__(self, operation: str, tensors: Tensors) -> None:
        self._operation = operation
        self._tensors = tensors
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}

    def encode(self, where: str, value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise self._refused(where, f"nests more than {_DEEPEST} deep")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is list:
            return self._items(where, value, depth)
        if kind is tuple:
            return {"$tuple": self._items(where, value, depth)}
        if kind in (dict, OrderedDict, defaultdict):
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: self.encode(f"{where}/{key}", item, depth + 1) for key, item in value.items()}
            return {"$dict": self._pairs(where, value, depth)}
        if kind is Counter:
            return {"$counter": self._pairs(where, value, depth)}
        if kind in (bytes, bytearray):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(where, value)}
        if isinstance(value, np.ndarray | np.generic):
            try:
                tensor = torch.from_numpy(np.array(value))  # a copy
            except (TypeError, ValueError):  # ValueError: of the other byte order
                raise self._refused(where, f"is an array of {value.dtype}") from None
            return {"$array" if isinstance(value, np.ndarray) else "$scalar": self._add(where, tensor)}
        raise self._refused(where, f"is {value!r} of type {kind.__name__}")

    def _items(self, where: str, values: Any, depth: int) -> list[Any]:
        return [self.encode(f"{where}/{i}", item, depth + 1) for i, item in enumerate(values)]

    def _pairs(self, where: str, value: Mapping[Any, Any], depth: int) -> list[list[Any]]:
        return [
            [self.encode(f"{where}/key", key, depth + 1), self.encode(f"{where}/{key}", item, depth + 1)]
            for key, item in value.items()
        ]

    def _add(self, where: str, tensor: torch.Tensor) -> str:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise self._refused(where, f"is a tensor of type {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise self._refused(where, f"is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}")
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in self._seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()  # a file of tensors has each for itself
        self._seen.add(plain.untyped_storage().data_ptr())
        name = where
        while name in self._tensors:
            name += "'"
        self._tensors[name] = plain
        return name

    def _refused(self, where: str, what: str) -> TypeError:
        return TypeError(
            f"[{self._operation}] {where} {what}, which has no form without pickle: expected numbers, texts, bytes,"
            " None, dense tensors and arrays of numbers, and lists, tuples and dictionaries of these"
        )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `encode` was given. KeyError, ValueError or TypeError when `value` is nothing that it returns."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag.startswith("$"):
            return _DECODERS[tag](content, tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


_Decoder = Callable[[Any, Mapping[str, torch.Tensor]], Any]


def _decode_pairs(pairs: Any, tensors: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    return {decode(key, tensors): decode(item, tensors) for key, item in pairs}


_DECODERS: dict[str, _Decoder] = {
    "$tuple": lambda content, tensors: tuple(decode(item, tensors) for item in content),
    "$dict": _decode_pairs,
    "$counter": lambda content, tensors: Counter(_decode_pairs(content, tensors)),
    "$float": lambda content, _: struct.unpack(">d", bytes.fromhex(content))[0],
    "$bytes": lambda content, _: base64.b64decode(content, validate=True),
    "$tensor": lambda content, tensors: tensors[content],
    "$array": lambda content, tensors: tensors[content].numpy().copy(),
    "$scalar": lambda content, tensors: tensors[content].numpy()[()],
}
