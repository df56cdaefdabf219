# SPDX-License-Identifier: Apache-2.0
"""The public names are what they say, and importing them asks for NumPy alone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import damo_embedding as de

PACKAGE = Path(de.__file__).parent


def public_names(module: types.ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }


def test_all_is_what_the_package_has() -> None:
    assert sorted(de.__all__) == sorted(public_names(de))
    assert len(set(de.__all__)) == len(de.__all__)


def test_all_of_the_torch_front_is_what_it_has() -> None:
    pytest.importorskip("torch")
    front = importlib.import_module("damo_embedding.torch")
    assert set(front.__all__) == public_names(front)


@pytest.mark.parametrize("name", sorted(set(de.__all__)))
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(de, name)
    assert thing.__module__.startswith("damo_embedding")
    assert thing.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", ["Storage", "Embedding", "CountingBloomFilter"])
def test_every_public_method_is_documented(name: str) -> None:
    methods = {key: value for key, value in vars(getattr(de, name)).items() if not key.startswith("_")}
    assert not [key for key, value in methods.items() if not getattr(value, "__doc__", None)]


def test_errors_are_one_tree() -> None:
    errors = [thing for thing in map(de.__dict__.get, de.__all__) if isinstance(thing, type)]
    errors = [thing for thing in errors if issubclass(thing, Exception)]
    assert len(errors) == 9
    assert all(issubclass(error, de.DamoError) for error in errors)


IMPORT = """
import sys
before = set(sys.modules)
import damo_embedding
found = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(found - set(sys.stdlib_module_names)))
"""


def test_import_asks_for_numpy_alone() -> None:
    # -I: neither this directory nor the user's packages help
    done = subprocess.run([sys.executable, "-I", "-c", IMPORT], capture_output=True, text=True, check=True, timeout=60)
    modules = set(done.stdout.split())
    assert "damo_embedding" in modules
    assert {name for name in modules if not name.startswith("_")} == {"damo_embedding", "numpy"}


def test_the_torch_front_is_the_only_one_that_imports_torch() -> None:
    importers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if any(name.partition(".")[0] == "torch" for name in names):
                importers.add(file.parent.name)
    assert importers <= {"torch"}


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
