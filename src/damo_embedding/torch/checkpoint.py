# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a whole training: rows, dense weights, optimizers, random numbers and the reader, of one step."""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from damo_embedding.checkpoints import Checkpoint, newest_first, pass_over, verify_checkpoint
from damo_embedding.errors import CorruptionError, NewerVersionError, StorageError
from damo_embedding.integers import parse_int
from damo_embedding.storage import PathLike, Storage, parse_path
from damo_embedding.torch.group import groups_of
from damo_embedding.torch.optimizer import _groups_of
from damo_embedding.torch.plain import Tensors, decode, encode

__all__ = ["Resumed", "load_checkpoint", "save_checkpoint"]

_DOCUMENT, _TENSORS = "training.json", "dense.safetensors"
_VERSION = 1


class Stateful(Protocol):
    """What has a state_dict: an optimizer, a learning-rate scheduler, a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Takes a state over."""


# One, several, or several by name.
Optimizers = Stateful | Sequence[Stateful] | Mapping[str, Stateful] | None


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on."""

    path: str  # the checkpoint
    step: int
    reader_state: Any  # what save_checkpoint was given
    operations_set_aside: int  # of the storage, after the checkpoint: rows that had run ahead of the dense part


def save_checkpoint(
    directory: PathLike,
    model: torch.nn.Module,
    optimizer: Optimizers,
    storage: Storage,
    step: int,
    reader_state: Any = None,
    keep: int | None = None,
) -> None:
    """Keeps a training as it is now, all of it of one step, in a new directory: whole or not at all.

    It is a checkpoint of the storage (`Storage.restore` and `open_or_restore` take it, too) with two more files,
    which its checksums cover: `dense.safetensors` and `training.json`. Nothing in it is pickled. Call it between
    two steps, where no gradient waits: gradients are not part of it.

    Args:
        directory: Must not exist; its parent must.
        model: Its `state_dict()`, the dense part, is saved; rows of its embeddings are those of `storage`.
        optimizer: What has a `state_dict()` beside the model: an optimizer, or a list or dictionary of optimizers,
            the `SparseOptimizer`, learning-rate schedulers, a GradScaler. None: nothing.
        storage: The storage of all embeddings of the model.
        step: A number of yours, at least 0.
        reader_state: Where the reader stands: numbers, texts, None, tensors, arrays, and lists, tuples and
            dictionaries of these.
        keep: How many checkpoints to leave beside each other, as for `Storage.checkpoint`.

    The states of torch's random numbers (CPU, and of every GPU), NumPy's global ones and Python's are saved, too.
    A generator of your own belongs into `reader_state`. A rate set by `embedding.lr = ...` is not saved, nor is
    `storage.now`: set them as the training does.

    Raises:
        TypeError: A state has something that is neither number, text nor tensor; says what and where.
        ValueError: An embedding is of another storage, or gradients of a SparseOptimizer wait for `step()`.
        StorageError: `directory` exists already, or the disk is full; nothing is left behind.

    Example:
        >>> save_checkpoint(f"checkpoints/{step}", model, [dense, rows], storage, step, keep=3)  # doctest: +SKIP
    """
    operation = "save_checkpoint"
    _check(operation, model, storage)
    for group in groups_of(storage):
        if group.pending is not None and group.pending.items:
            raise ValueError(
                f'[{operation}] gradients of group "{group.label}" wait for the SparseOptimizer, and would not be in'
                " the checkpoint: call its step() or zero_grad() before"
            )
    step = parse_int(operation, "step", step, 0, 2**63 - 1)
    tensors: Tensors = {}
    state = model.state_dict()
    document = {
        "version": _VERSION,
        "step": step,
        "model": encode(operation, "model", state, tensors),
        "model metadata": encode(operation, "model metadata", getattr(state, "_metadata", None), tensors),
        "optimizers": [
            {
                "name": name,
                "type": type(one).__name__,
                "state": encode(operation, f"optimizer {name}", one.state_dict(), tensors),
            }
            for name, one in _named(operation, optimizer).items()
        ],
        "random": encode(operation, "random", _random_states(), tensors),
        "reader_state": encode(operation, "reader_state", reader_state, tensors),
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))

    def fill(staged: str) -> None:
        safetensors = _safetensors(operation)
        try:
            safetensors.save_file(tensors, os.path.join(staged, _TENSORS))
            Path(staged, _DOCUMENT).write_text(text)
        except OSError as error:
            raise StorageError(f"[{operation}] {directory}: {error}") from error
        except safetensors.SafetensorError as error:  # a full disk, say
            raise StorageError(f"[{operation}] {directory}: {error}") from error

    storage._checkpoint(directory, step, None, keep, fill)


def load_checkpoint(
    checkpoints: PathLike,
    model: torch.nn.Module,
    optimizer: Optimizers,
    storage: Storage,
    *,
    strict: bool = True,
) -> Resumed | None:
    """Goes on from the newest whole checkpoint that `save_checkpoint` made: the whole training is as it was then.

    All is verified before anything changes, and on an error everything is as it was. (Where Ctrl-C, or an error of the
    system, comes when the rows have been replaced already, all is as in the checkpoint.) Then the storage has the rows
    of the checkpoint, in its own directory: its embeddings, and the modules and optimizers that use them, go on with
    these. Operations that the storage did after the checkpoint (a killed training had run ahead) are set aside: their
    number is in the result. Gradients are dropped.

    Args:
        checkpoints: The directory that the checkpoints lie in, which may be absent; or one checkpoint. Those that
            are not whole are passed over with a RuntimeWarning each.
        model, optimizer: Built as they were for `save_checkpoint`.
        storage: Open; as the killed training left it, or a new one.
        strict: As for `load_state_dict` of the model.

    Returns:
        The step, the reader's state and what was set aside; None when there has never been a checkpoint: then nothing
        has changed, and saving one now, of step 0, gives every kill something to go back to.

    Raises:
        CorruptionError: There are checkpoints and not one is whole, or the one given is not.
        NewerVersionError: A checkpoint is of a newer version of this package: upgrade, or move it away.
        SchemaMismatchError: A group of the checkpoint has another layout or admission filter than the model's.
        RuntimeError: The model's state_dict has other names or shapes.
        ValueError: The optimizers are others, an embedding is of another storage, admission filters have no room in its
            memory, or this thread is in a dump of it.
        StorageError: The storage holds rows, and the checkpoint is of another storage; or there is no checkpoint, so
            that the rows would be ahead of the dense part: remove the storage's directory to begin anew.

    Example:
        >>> resumed = load_checkpoint("checkpoints", model, [dense, rows], storage)  # doctest: +SKIP
        >>> first = resumed.step if resumed else 0  # doctest: +SKIP
    """
    operation = "load_checkpoint"
    _check(operation, model, storage)
    optimizers = _named(operation, optimizer)
    if not isinstance(strict, bool):
        raise TypeError(f"[{operation}] strict is {strict!r}, expected True or False")
    place = parse_path(operation, "checkpoints", checkpoints)
    sequence = storage.stats()["sequence"]
    for candidate in newest_first(operation, place):
        try:
            found = verify_checkpoint(candidate.path)
            document, tensors = _read(found)
        except NewerVersionError:  # older ones would lose the steps between
            raise
        except CorruptionError as wrong:
            pass_over(operation, wrong, 3)
            continue
        if sequence > 0 and found._lineage != storage._core.id[: len(found._lineage)]:
            raise StorageError(
                f"[{operation}] {found.path} is of another storage than {storage.path}, which has rows: give an"
                " absent or empty directory to the storage, or its own checkpoints"
            )
        _take_over(operation, found, document, tensors, model, optimizers, storage, strict)
        return Resumed(found.path, document["step"], document["reader_state"], max(0, sequence - found.sequence))
    if sequence > 0:
        raise StorageError(
            f"[{operation}] there is no checkpoint in {place}, but {storage.path} has {sequence} operations: its rows"
            " would be ahead of the dense weights. Remove its directory to begin anew, and save a checkpoint of step 0"
            " before the first step; or do without load_checkpoint"
        )
    return None


def _take_over(
    operation: str,
    found: Checkpoint,
    document: dict[str, Any],
    tensors: Tensors,
    model: torch.nn.Module,
    optimizers: dict[str, Stateful],
    storage: Storage,
    strict: bool,
) -> None:
    saved = {one["name"]: one for one in document["optimizers"]}
    ours = {name: type(one).__name__ for name, one in optimizers.items()}
    theirs = {name: one["type"] for name, one in saved.items()}
    if ours != theirs:
        raise ValueError(
            f"[{operation}] the optimizers are {_shown(ours)}, those of {found.path} are {_shown(theirs)}: give the"
            " same ones, by the same names or in the same order"
        )
    state = OrderedDict(document["model"])
    state._metadata = document["model metadata"]  # type: ignore[attr-defined]
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value
              for name, value in model.state_dict().items()}  # fmt: skip
    optimizers_before = {name: copy.deepcopy(one.state_dict()) for name, one in optimizers.items()}
    random_before = _random_states()
    rows_are_back = bytearray(1)
    try:
        model.load_state_dict(state, strict=strict)
        for name, one in optimizers.items():
            one.load_state_dict(saved[name]["state"])
        _set_random_states(operation, document["random"])
        storage._go_back_to(found.path, rows_are_back)  # last: what comes before it can be taken back
    except BaseException as error:
        if rows_are_back[0]:
            # Ctrl-C, say. Not the dense part of before beside these rows: all is of the checkpoint.
            error.add_note(f"[{operation}] the rows, the dense part and the random numbers are those of {found.path}")
        else:
            model.load_state_dict(before)
            for name, one in optimizers.items():
                one.load_state_dict(optimizers_before[name])
            _set_random_states(operation, random_before)
        raise
    finally:
        if rows_are_back[0]:
            model.zero_grad()
            for group in groups_of(storage):
                if group.pending is not None:
                    group.pending.clear()


def _read(found: Checkpoint) -> tuple[dict[str, Any], Tensors]:
    """The dense part, decoded; the checksums of its files have been verified."""
    operation = "load_checkpoint"
    file = os.path.join(found.path, _DOCUMENT)
    if not os.path.exists(file):
        raise CorruptionError(
            f"{found.path} has no {_DOCUMENT}: it is of a storage alone, which Storage.restore brings back"
        )
    safetensors = _safetensors(operation)
    try:
        document = json.loads(Path(file).read_bytes())
        if document["version"] != _VERSION:
            raise NewerVersionError(
                f"[{operation}] {file} has version {document['version']}, this package reads {_VERSION}: upgrade"
                " damo-embedding"
            )
        tensors: Tensors = safetensors.load_file(os.path.join(found.path, _TENSORS))
        return {name: decode(value, tensors) for name, value in document.items()}, tensors
    except (ValueError, TypeError, KeyError, AttributeError, OSError, safetensors.SafetensorError) as error:
        raise CorruptionError(
            f"{file} or {_TENSORS} beside it is not as save_checkpoint writes it: {type(error).__name__}: {error}"
        ) from error


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(operation: str, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) != gpus:
        warnings.warn(
            f"[{operation}] the random numbers of {len(states['cuda'])} GPUs were saved, here are {gpus}: those of the"
            " GPUs are not set",
            RuntimeWarning,
            stacklevel=4,
        )
    elif gpus:
        torch.cuda.set_rng_state_all(states["cuda"])


def _check(operation: str, model: torch.nn.Module, storage: Storage) -> None:
    """All groups of the model are of `storage`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"[{operation}] model is {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(storage, Storage):
        raise TypeError(f"[{operation}] storage is {type(storage).__name__}, expected a Storage")
    for group in _groups_of([model]):
        if group.storage is not storage:
            raise ValueError(
                f'[{operation}] group "{group.label}" of the model is in the storage {group.storage.path!r}, not in'
                f" {storage.path!r}: give the storage that the model uses"
            )


def _named(operation: str, optimizers: Optimizers) -> dict[str, Stateful]:
    if optimizers is None:
        return {}
    if isinstance(optimizers, Mapping):
        named = dict(optimizers)
    elif isinstance(optimizers, list | tuple):
        named = {str(i): one for i, one in enumerate(optimizers)}
    else:
        named = {"0": optimizers}  # type: ignore[dict-item]
    for name, one in named.items():
        if not isinstance(name, str):
            raise TypeError(f"[{operation}] the optimizer's name {name!r} is {type(name).__name__}, expected a str")
        if not (callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))):
            raise TypeError(
                f"[{operation}] optimizer {name} is {type(one).__name__}, expected an optimizer, a scheduler, or a"
                " list or dictionary of them"
            )
    return named


def _shown(optimizers: dict[str, str]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in optimizers.items()) or "none"


def _safetensors(operation: str) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        _without_safetensors(operation)
    return _Safetensors(safetensors.torch.save_file, safetensors.torch.load_file, safetensors.SafetensorError)


@dataclass(frozen=True)
class _Safetensors:
    save_file: Any
    load_file: Any
    SafetensorError: type[Exception]


def _without_safetensors(operation: str) -> NoReturn:
    raise ModuleNotFoundError(
        f'[{operation}] the package safetensors is missing: pip install safetensors, or pip install ".[torch]"'
    )
