# SPDX-License-Identifier: Apache-2.0
"""Updates at step() instead of at the end of each backward()."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, overload

import numpy as np
import torch

from damo_embedding.settings import _MAX_FLOAT, _number
from damo_embedding.torch import backward_pass
from damo_embedding.torch.collection import EmbeddingCollection
from damo_embedding.torch.embedding import Embedding
from damo_embedding.torch.group import Group, no_copy
from damo_embedding.torch.pending import Pending, RowGradients


class SparseOptimizer(torch.optim.Optimizer):
    """Adds up the gradients of rows over any number of backward passes and applies them at `step()`.

    The rows' own optimizers (`damo_embedding.Adam` and so on) make the update; this class says when, and at
    which rate. It manages every group of the `Embedding` and `EmbeddingCollection` modules it is given, for
    as long as it lives: while it does, `backward()` updates none of their rows. It is a
    `torch.optim.Optimizer`, so learning-rate schedulers, `torch.amp.GradScaler` and
    `torch.nn.utils.clip_grad_norm_` work with it.

    `param_groups` has one entry a group of rows: `lr`, which a step uses (it starts as that of the group's
    optimizer), `name`, and in `params` a stand-in whose `grad` has a row for each distinct key. Where the
    group's optimizer has a schedule, `lr` follows it, and shows the rate of the next step, until somebody sets
    it to another number, as learning-rate schedulers do; `scheduled_lr` is what the schedule says.

    A step applies each gradient once: after it none is left, with or without `zero_grad()`. A step that
    raises, because a gradient is NaN, say, applies nothing; `zero_grad()` then drops the gradients.

    Args:
        modules: a module or several, searched for `Embedding` and `EmbeddingCollection`.

    Example:
        >>> dense, rows = torch.optim.Adam(model.parameters()), SparseOptimizer(model)
        >>> torch.nn.utils.clip_grad_norm_([*model.parameters(), *rows.parameters()], max_norm=1.0)
    """

    def __init__(self, modules: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
        given = [modules] if isinstance(modules, torch.nn.Module) else _as_list(modules)
        if given is None:
            raise TypeError(
                f"[SparseOptimizer] modules is {type(modules).__name__}, expected a torch.nn.Module or several"
            )
        for module in given:
            if not isinstance(module, torch.nn.Module):
                raise TypeError(f"[SparseOptimizer] modules has {type(module).__name__}, expected torch.nn.Modules")
        found = _groups_of(given)
        if not found:
            raise ValueError(
                "[SparseOptimizer] the modules have no damo_embedding.torch.Embedding or EmbeddingCollection"
            )
        stand_ins = [RowGradients.of(Pending(group)) for group in found]
        super().__init__(
            [
                {"params": [stand_in], **_rate(group), "name": group.label}
                for group, stand_in in zip(found, stand_ins, strict=True)
            ],
            {},
        )
        for group, stand_in in zip(found, stand_ins, strict=True):
            group.manage(stand_in.pending)

    def parameters(self) -> list[RowGradients]:
        """The stand-ins of all groups, for what takes parameters and reads their `grad`."""
        return [stand_in for group in self.param_groups for stand_in in group["params"]]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Applies what the backward passes since the last step have added up: one update of each group.

        A group without gradients is not updated. NaN and infinite gradients, and a rate below 0, raise ValueError;
        nothing is applied then. (Of groups in several storages: where one of these fails for another reason, a full
        disk or a schedule that raises, those before it have their updates.)
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"[step] closure is {type(closure).__name__}, expected a function or None")
            with torch.enable_grad():
                loss = closure()
        updates = {}
        for param_group in self.param_groups:
            for stand_in in param_group["params"]:
                pending: Pending = stand_in.pending
                if pending.group.pending is not pending:
                    raise RuntimeError(
                        f'[step] group "{pending.group.label}" has a newer SparseOptimizer; use that one'
                    )
                if pending.items:
                    rate = _number("step", "lr", _as_number(param_group["lr"]), 0.0, _MAX_FLOAT)
                    lr = None if _follows_schedule(param_group) else rate
                    updates[pending.group] = (pending.items, lr)
        backward_pass.apply(updates)
        self.zero_grad()
        self._show_rates()
        return loss

    def _show_rates(self) -> None:
        for param_group in self.param_groups:
            if not _follows_schedule(param_group):
                continue
            group = param_group["params"][0].pending.group
            try:
                param_group["lr"] = param_group["scheduled_lr"] = group.embedding.lr
            except Exception:
                # The updates are done. Whoever makes the next one, if there is one, meets the same error there.
                continue

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that no step has applied."""
        for stand_in in self.parameters():
            stand_in.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Whatever is wrong is said before anything changes.

        A rate that no step can use (NaN, below 0) is loaded, as it was saved; `step()` refuses it.

        Raises:
            TypeError, ValueError: It is not what `state_dict()` gives; says what is missing.
            ValueError: The groups have other names, or these in another order.
        """
        names = [group["name"] for group in _groups_in(state_dict)]
        ours = [group["name"] for group in self.param_groups]
        if names != ours:
            raise ValueError(
                f"[load_state_dict] the state is of the groups {names}, this optimizer has {ours}: make it with the"
                " same modules in the same order"
            )
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group.get("params") if isinstance(param_group, dict) else None
        params = [params] if isinstance(params, torch.Tensor) else _as_list(params)
        if not params:
            raise TypeError(f"[SparseOptimizer] param_group is {param_group!r:.200}, expected a dictionary with params")
        if not all(isinstance(param, RowGradients) for param in params):
            raise TypeError("[SparseOptimizer] params are dense tensors; give them to an optimizer of torch.optim")
        super().add_param_group({**param_group, "params": params})

    def __getstate__(self) -> NoReturn:
        raise no_copy(self, self.parameters()[0].pending.group.storage)


def _groups_in(state_dict: object) -> list[dict[str, Any]]:
    """The `param_groups` of what `SparseOptimizer.state_dict` gave: with all that a step reads of them."""
    operation = "load_state_dict"
    if not isinstance(state_dict, dict):
        raise TypeError(
            f"[{operation}] state_dict is {type(state_dict).__name__}, expected the dictionary that state_dict() gives"
        )
    _require(operation, "state_dict", state_dict, ("state", "param_groups"))
    if not isinstance(state_dict["state"], dict):
        raise TypeError(f"[{operation}] state is {type(state_dict['state']).__name__}, expected a dictionary")
    groups = state_dict["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise TypeError(f"[{operation}] param_groups is {groups!r:.200}, expected a list of dictionaries")
    for group in groups:
        _require(operation, "a group", group, ("name", "lr", "params"))
        params = group["params"]
        if not isinstance(params, list) or not all(isinstance(param, int) for param in params):
            raise TypeError(f"[{operation}] params is {params!r:.200}, expected the numbers of the stand-ins")
        for name in ("lr", "scheduled_lr"):
            if name in group:
                _check_is_number(operation, name, _as_number(group[name]))
    return groups


def _require(operation: str, what: str, given: dict[str, Any], names: tuple[str, ...]) -> None:
    if absent := [name for name in names if name not in given]:
        raise ValueError(
            f"[{operation}] {what} has no {' and no '.join(absent)}, expected {', '.join(names)}, as state_dict() gives"
        )


def _as_number(value: Any) -> Any:
    """A rate may be a tensor or an array of one number, too."""
    if isinstance(value, torch.Tensor | np.ndarray):
        try:
            return value.item()
        except (RuntimeError, ValueError):  # of several, or without values
            return value
    return value


def _check_is_number(operation: str, name: str, value: Any) -> None:
    """Of any size: nobody may step with what is loaded, and a load that fails puts back what was there."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"[{operation}] {name} is {value!r} ({type(value).__name__}), expected a number")


def _rate(group: Group) -> dict[str, float]:
    lr = group.embedding.lr
    return {"lr": lr} if group.embedding.schedule is None else {"lr": lr, "scheduled_lr": lr}


def _follows_schedule(param_group: dict[str, Any]) -> bool:
    """Whether nobody has set another rate. In the state, so that a training that goes on knows it, too."""
    return "scheduled_lr" in param_group and float(param_group["lr"]) == param_group["scheduled_lr"]


def _groups_of(modules: list[torch.nn.Module]) -> list[Group]:
    """The groups of all modules, each once."""
    found: dict[Group, None] = {}
    for module in modules:
        for part in module.modules():
            if isinstance(part, Embedding):
                found[part._group] = None
            elif isinstance(part, EmbeddingCollection):
                found.update(dict.fromkeys(part._groups.values()))
    return list(found)


def _as_list(values: Any) -> list[Any] | None:
    """None for what has no elements."""
    try:
        return list(values)
    except (TypeError, RuntimeError):  # RuntimeError: of a nested tensor
        return None
