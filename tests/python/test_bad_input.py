# SPDX-License-Identifier: Apache-2.0
"""The bad-input matrices (reliability/bad_input*.py, which test_reliability.py runs) have every argument that there is.

What is public is read off the packages: a new argument fails here until it is in a matrix.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from reliability.bad_input import BadInput
from reliability.bad_input_damo import BadInputOfDamo
from reliability.bad_input_torch import BadInputOfTorch
from reliability.suite import SkippedError

pytestmark = pytest.mark.core

MATRICES: dict[str, type[BadInput]] = {
    "damo_embedding": BadInput,
    "damo_embedding.torch": BadInputOfTorch,
    "damo": BadInputOfDamo,
}
GIVEN_BACK = "a call gives it back: nobody makes one, and it checks nothing"
EXCEPTIONS = {
    **dict.fromkeys(
        ("Checkpoint", "Damage", "Resumed", "RowInfo", "Rows", "SalvageReport", "VerifyReport"), GIVEN_BACK
    ),
    "Admission": "Embedding.admission makes it",
    "SparseOptimizer.zero_grad(set_to_none)": "torch's; all it could mean is the same, so that it is not looked at",
}


def arguments_of(call: Any) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name != "self"]


def entry_points(module: ModuleType) -> Iterator[str]:
    """Each as `entry point(argument)`; a property that can be set by its name."""
    for name in module.__all__:
        thing = getattr(module, name)
        if not isinstance(thing, type):
            yield from (f"{name}({argument})" for argument in arguments_of(thing))
            continue
        if issubclass(thing, BaseException):
            continue  # raised by the package, and made by nobody else
        yield from (f"{name}({argument})" for argument in arguments_of(thing))
        for member in dir(thing):
            owner = next(kind for kind in thing.__mro__ if member in vars(kind))
            # What is inherited is of its owner; what is torch's, or Python's, is not ours.
            if not owner.__module__.startswith("damo") or (member.startswith("_") and member != "__call__"):
                continue
            where = f"{owner.__name__ if owner.__name__ in module.__all__ else name}.{member}"
            attribute = inspect.getattr_static(thing, member)
            if isinstance(attribute, property):
                if attribute.fset is not None:
                    yield where
            elif callable(getattr(thing, member)):
                yield from (f"{where}({argument})" for argument in arguments_of(getattr(thing, member)))


def is_excepted(entry_point: str) -> bool:
    return entry_point in EXCEPTIONS or entry_point.partition("(")[0] in EXCEPTIONS


@pytest.mark.parametrize("package", MATRICES)
def test_every_argument_of_every_entry_point_is_in_its_matrix(package: str) -> None:
    try:
        with MATRICES[package]() as matrix:
            tried = {argument.name.partition(",")[0] for argument in matrix.arguments}
    except SkippedError as missing:
        pytest.skip(str(missing))
    public = set(entry_points(importlib.import_module(package)))
    missing = {one for one in public if not is_excepted(one)} - tried
    assert not missing, f"{len(missing)} arguments of {package} are in no matrix: {', '.join(sorted(missing))}"
    # A name that is of no argument would be refused whatever the value is.
    assert tried <= public, f"no such argument: {', '.join(sorted(tried - public))}"


def test_no_exception_outlives_what_it_is_of() -> None:
    pytest.importorskip("torch")
    public = set().union(*(entry_points(importlib.import_module(package)) for package in MATRICES))
    assert set(EXCEPTIONS) <= public | {one.partition("(")[0] for one in public}


@pytest.mark.parametrize("package", MATRICES)
def test_a_call_of_a_matrix_fails_for_its_wrong_value_alone(package: str) -> None:
    """With the right arguments it goes through: else it would raise whatever is done with the wrong one."""
    kind, place, count = MATRICES[package], 0, 1
    try:
        while place < count:
            with kind() as matrix:  # a new one each time, for such a call changes what is there
                count = len(matrix.calls)
                matrix.calls[place]()
            place += 1
    except SkippedError as missing:
        pytest.skip(str(missing))
