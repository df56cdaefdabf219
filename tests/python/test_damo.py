# SPDX-License-Identifier: Apache-2.0
"""The damo package as a whole: its names, its place in the wheel, and the scripts of examples/seed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import damo

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "seed").glob("*.py"))

SIGNATURES = {
    "Parameters": "()",
    "Parameters.insert": "(name, value)",
    "Parameters.to_json": "()",
    "PyStorage": "(data_dir, ttl_seconds)",
    "PyStorage.dump": "(path, condition=None)",
    "PyStorage.checkpoint": "(path)",
    "PyStorage.load_from_checkpoint": "(path)",
    "PyInitializer": "(parameters)",
    "PyInitializer.call": "(array)",
    "PyOptimizer": "(parameters, scheduler_parameters=None)",
    "PyOptimizer.call": "(weights, gradients, step)",
    "PyEmbedding": "(storage, optimizer, initializer, dimension, group=0)",
    "PyEmbedding.lookup": "(keys, weights)",
    "PyEmbedding.apply_gradients": "(keys, gradients)",
    "PyFilter": "(parameters)",
    "PyFilter.add": "(key, num=1)",
    "PyFilter.check": "(key)",
}


def test_names_and_arguments_are_those_that_scripts_use() -> None:
    found = {}
    for name in damo.__all__:
        kind = getattr(damo, name)
        assert kind.__doc__
        methods = {f"{name}.{key}": value for key, value in vars(kind).items() if not key.startswith("_")}
        for full, function in {name: kind.__init__, **methods}.items():
            assert function.__doc__ or full == name
            arguments = list(inspect.signature(function).parameters.values())[1:]
            found[full] = f"({', '.join(str(argument.replace(annotation=argument.empty)) for argument in arguments)})"
    assert found == SIGNATURES
    assert set(damo.__all__) == {name.partition(".")[0] for name in SIGNATURES}


def test_importing_it_asks_for_numpy_alone() -> None:
    script = (
        "import sys; before = set(sys.modules); import damo\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(name for name in new if not name.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["damo", "damo_embedding", "numpy"]


def test_the_wheel_has_it_and_it_is_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["scikit-build"]["wheel"]["packages"] == ["src/damo_embedding", "src/damo"]
    assert "damo" in settings["mypy"]["packages"]
    assert (Path(damo.__file__).parent / "py.typed").exists()


def test_there_is_a_script_for_each_module() -> None:
    assert {script.stem for script in SCRIPTS} == {
        *("parameters", "storage", "initializer", "optimizer", "schedules", "embedding", "filter"),
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_written_for_the_documented_names_runs_unchanged(script: Path, tmp_path: Path) -> None:
    assert "damo_embedding" not in script.read_text()
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "DAMO_MEMORY": "64MiB"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
