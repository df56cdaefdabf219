# SPDX-License-Identifier: Apache-2.0
"""damo.PyFilter: counting, its file, sharing; the filter's own promises are tested in test_filters.py."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo
import damo_embedding as de
from damo import filter as damo_filter
from damo_scripts import parameters


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of these tests goes to the user's own directories."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return tmp_path / "home"


def make(path: Path | None = None, **given: Any) -> damo.PyFilter:
    place = {} if path is None else {"path": str(path)}
    return damo.PyFilter(parameters({"capacity": 1000, "count": 3, **place, **given}))


def test_a_key_is_let_through_from_count_adds_on(tmp_path: Path) -> None:
    seen = make(tmp_path / "f")
    for key, num in ((7, 1), (7, 1), (8, 3), (2**64 - 1, 2), (-5, 15)):
        assert seen.add(key, num) is None
    assert [seen.check(key) for key in (7, 8, 2**64 - 1, -5, 2**64 - 5, 9)] == [False, True, False, True, True, False]
    assert type(seen.check(8)) is bool
    seen.add(7, 1)
    assert seen.check(7) is True


def test_arrays_are_counted_and_checked_at_once(tmp_path: Path) -> None:
    seen = make(tmp_path / "f")
    seen.add(np.array([1, 2, 1]), 2)
    found = seen.check(np.array([[1, 2], [3, 1]], np.uint64))
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [[True, False], [False, True]]


def test_defaults_are_the_documented_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Recorder:
        closed = False

        def __init__(self, **given: Any) -> None:
            made.update(given)

        def close(self) -> None:
            pass

    monkeypatch.setattr(damo_filter.de, "CountingBloomFilter", Recorder)  # the default takes 2 GB
    damo.PyFilter(damo.Parameters())
    assert made.pop("path").endswith("/home/.local/share/damo-embedding/counting-bloom-filter")
    assert made == {"capacity": 2**28, "count": 15, "fpr": 1e-3, "reload": True}
    assert inspect.signature(damo.PyFilter.add).parameters["num"].default == 1


def test_the_default_file_is_in_the_user_s_own_data_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().add(1, 3)
    folder = home / ".local" / "share" / "damo-embedding"
    assert (folder / "counting-bloom-filter").exists()
    assert folder.stat().st_mode & 0o077 == 0
    assert make().check(1)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert not make().check(1)
    assert (tmp_path / "xdg" / "damo-embedding" / "counting-bloom-filter").exists()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # to be ignored, says its specification
    assert make().check(1)


def test_counts_outlive_the_object_and_the_process(tmp_path: Path) -> None:
    script = (
        "import os, sys, damo\n"
        "p = damo.Parameters(); p.insert('capacity', 1000); p.insert('count', 3); p.insert('path', sys.argv[1])\n"
        "f = damo.PyFilter(p); f.add(5, 3)\n"
        "os.kill(os.getpid(), 9) if sys.argv[2] == 'kill' else None\n"
    )
    for name, code in (("exit", 0), ("kill", -9)):
        path = tmp_path / name
        assert subprocess.run([sys.executable, "-c", script, str(path), name], check=False).returncode == code
        assert make(path).check(5)
        assert make(path).check(5)  # and again


def test_a_file_that_is_open_already_is_shared(tmp_path: Path) -> None:
    one = make(tmp_path / "f")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    again = make(tmp_path / "link")
    one.add(5, 2)
    again.add(5, 1)
    assert one.check(5)
    assert again.check(5)
    with pytest.raises(de.SchemaMismatchError, match=r"capacity=1000, count=3.*asked for capacity=1000, count=4"):
        make(tmp_path / "f", count=4)
    assert one.check(5)


def test_a_file_whose_last_user_is_just_going_opens_in_another_thread(tmp_path: Path) -> None:
    one = make(tmp_path / "f")
    one.add(5, 3)
    seen: list[object] = []

    def open_again() -> None:
        try:
            seen.append(make(tmp_path / "f").check(5))
        except BaseException as error:
            seen.append(error)

    def switch_threads(_: object) -> None:  # the user is gone by now, and the file not yet closed
        thread = threading.Thread(target=open_again)
        thread.start()
        thread.join()

    watch = weakref.ref(one._shared, switch_threads)
    del one
    assert watch() is None
    assert seen == [True]


def test_a_file_that_another_thread_is_closing_is_waited_for(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def make_anew() -> None:
        try:
            for _ in range(40):
                make(tmp_path / "f").add(1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make_anew) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert make(tmp_path / "f").check(1)


@pytest.mark.parametrize("alive", [True, False])
def test_reload_false_starts_anew_and_whoever_has_the_file_goes_on_with_it(tmp_path: Path, alive: bool) -> None:
    old = make(tmp_path / "f")
    old.add(5, 3)
    if not alive:
        del old
    with pytest.raises(ValueError, match="count is 16"):
        make(tmp_path / "f", count=16, reload=False)
    assert make(tmp_path / "f").check(5)
    new = make(tmp_path / "f", count=2, reload=False)
    assert not new.check(5)
    new.add(5, 2)
    assert new.check(5)
    assert not alive or old.check(5)


def test_another_file_or_other_settings_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    for reload in (True, False):
        with pytest.raises(de.CorruptionError):
            make(tmp_path / "thesis", reload=reload)
    assert (tmp_path / "thesis").read_text() == "years of work"
    make(tmp_path / "f").add(1, 3)
    with pytest.raises(de.SchemaMismatchError):
        make(tmp_path / "f", fpr=0.01)
    assert make(tmp_path / "f").check(1)


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    old = make(tmp_path / "f")
    old.add(1, 3)
    os.remove(tmp_path / "f")
    assert not make(tmp_path / "f").check(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_makes_its_own(tmp_path: Path) -> None:
    seen = make(tmp_path / "f")
    seen.add(1, 3)
    child = os.fork()
    if child == 0:
        said = 1
        try:
            seen.check(1)
        except de.ForkedHandleError:
            try:
                make(tmp_path / "f")
            except de.AlreadyOpenError:
                own = make(tmp_path / "own")
                own.add(2, 3)
                said = 0 if own.check(2) else 3
        finally:
            os._exit(said)
    assert os.waitpid(child, 0)[1] == 0
    assert seen.check(1)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"capacity": 0}, ValueError, "capacity is 0"),
        ({"count": 0}, ValueError, "count is 0"),
        ({"count": 16}, ValueError, "count is 16, expected 1 to 15"),
        ({"fpr": 0}, ValueError, "fpr is 0"),
        ({"fpr": 1}, ValueError, "fpr is 1"),
        ({"path": ""}, ValueError, "path is ''"),
        ({"name": "filter"}, ValueError, "takes no parameter 'name', expected capacity, count, path, fpr, reload"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(
    given: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        damo.PyFilter(parameters({"path": str(tmp_path / "f"), **given}))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("key", "num", "error"),
    [(1.5, 1, TypeError), ("a", 1, TypeError), (1, -1, ValueError), (1, 1.5, TypeError), (2**64, 1, TypeError)],
)
def test_keys_and_numbers_that_make_no_sense_are_refused(
    key: Any, num: Any, error: type[Exception], tmp_path: Path
) -> None:
    seen = make(tmp_path / "f", count=1)
    with pytest.raises(error, match=r"^\[add\]"):
        seen.add(key, num)
    assert not seen.check(1)


def test_without_a_place_for_its_file_it_asks_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(de.StorageError, match="no place for its file, give a path"):
        damo.PyFilter(damo.Parameters())
