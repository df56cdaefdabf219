# SPDX-License-Identifier: Apache-2.0
"""A little of each suite in reliability/; scripts/soak runs them at any size. And the tester, tested.

Other cases: DAMO_RELIABILITY_SEED=1000 pytest tests/python/test_reliability.py
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reliability import flips, planted, soak, trainee
from reliability.journal import Disk, Event, Loss
from reliability.oracle import Found, Operation, Oracle, Rows
from reliability.suite import SkippedError, Suite, ask, expect, listen, make_base
from reliability.suites import SUITES
from reliability.workload import SMALL, START, Workload, again
from storage_server import fork_server

pytestmark = pytest.mark.core

FIRST = int(os.environ.get("DAMO_RELIABILITY_SEED", "0"))
# suite -> parts, so that the processes of a test run share it; and a stride, so that a few seeds see all kinds
PARTS = {
    "kill": 4, "power-loss": 4, "call-fails": 6, "ext4-power-loss": 2, "disk-full": 2, "flips": 2, "cold-flips": 1,
    "bad-input": 2, "bad-input-torch": 2, "bad-input-damo": 1, "any-order": 4, "torch-kill": 2,
}  # fmt: skip
STRIDE = {"call-fails": 23}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in range(parts)])
def test_what_is_promised_holds(name: str, part: int) -> None:
    """Fails with the command that shows the case again."""
    kind = SUITES[name]
    with ExitStack() as stack:
        try:
            suite = stack.enter_context(kind())
        except SkippedError as missing:  # raised later it is a failure: nothing that the suite needs was missing
            pytest.skip(str(missing))
        place = part
        while suite.done[kind.unit] < kind.small / PARTS[name]:
            seed = FIRST + place * STRIDE.get(name, 1)
            try:
                suite.case(seed)
            except AssertionError as error:
                error.add_note(again(name, seed))
                raise
            place += PARTS[name]
            assert place < part + 100_000, f"{suite.done}"


# ---------------------------------------------------------- the tester, tested


@pytest.mark.parametrize("name", SUITES)
def test_the_record_of_a_suite_begins_anew_when_what_it_imports_changes(name: str) -> None:
    modules = f"{SUITES[name].__module__}, reliability.trainee, storage_server"
    command = [
        sys.executable,
        "-c",
        f"import sys, {modules}; print(*(vars(m).get('__file__') for m in sys.modules.values()))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(soak.TESTS)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    paths = [path for path in soak.depends_on(name) if not path.startswith(":")]
    excluded = [path.removeprefix(":(exclude)") for path in soak.depends_on(name) if path.startswith(":")]
    imported = {file for file in printed if file.startswith(f"{soak.TESTS}/")}
    assert {str(Path(file).relative_to(soak.ROOT)) for file in imported} <= set(paths)
    assert all((soak.ROOT / path).exists() for path in [*paths, *excluded])
    seen = {front for front in soak.FRONTS for file in printed if f"/{front.removeprefix('src/')}/" in file}
    assert not seen & set(excluded), "it sees a front that it is said not to see"
    assert name != "bad-input-damo" or seen == {"src/damo"}  # or this looks for nothing


def test_what_only_a_front_is_does_not_begin_the_record_of_the_others_anew() -> None:
    def files(*names: str) -> set[str]:
        return {line.split("\t")[1] for line in soak.tracked(*names)}

    fronts = {"src/damo_embedding/torch/optimizer.py", "src/damo/storage.py"}
    seen = {name: sorted(files(name) & fronts) for name in ("kill", "torch-kill", "bad-input-torch", "bad-input-damo")}
    assert seen == {
        "kill": [],
        "torch-kill": ["src/damo_embedding/torch/optimizer.py"],
        "bad-input-torch": ["src/damo_embedding/torch/optimizer.py"],
        "bad-input-damo": ["src/damo/storage.py"],
    }
    assert {"src/core/storage.cc", "src/damo_embedding/storage.py", "CMakeLists.txt"} <= files("kill")
    assert fronts <= files(*SUITES), "what all suites see together lacks a front"


def test_a_suite_that_cannot_go_on_has_failed_and_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Suite):
        def case(self, seed: int) -> None:
            raise SkippedError("umount: target is busy")

    monkeypatch.setitem(SUITES, "stops", Stops)
    monkeypatch.setattr(soak.signal, "signal", lambda *_: None)
    todo: queue.Queue[int | None] = queue.Queue()
    results: queue.Queue[Any] = queue.Queue()
    todo.put(7)
    todo.put(None)
    soak.work("stops", todo, results)
    seed, _, failure, _ = results.get_nowait()
    assert seed == 7
    assert "umount: target is busy" in failure
    assert results.empty()


MODULE = """
class A:
    'What A is.'

    def f(self):
        \"\"\"Says a word.

        And another.
        \"\"\"
        return 'a', \"\"\"b\"\"\"  # c
"""
HEADER = """
// What A is.
struct A {
  // A comment.
  int a = 1;  // Another.
};
"""


@pytest.mark.parametrize(
    ("suffix", "text", "before", "after", "same"),
    [
        (".py", MODULE, "What A is.", "What A was.", True),
        (".py", MODULE, "And another.", "And a third.\n        And more.", True),
        (".py", MODULE, "'a'", "'c'", False),
        (".py", MODULE, '"""b"""', '"""b\n\n"""', False),
        (".py", MODULE, "'What A is.'", "'What A is.'; c = 1", False),
        (".py", MODULE, "  # c", "\n\n'c'", False),
        (".h", HEADER, "// A comment.", "// Two comments.\n  // Lines.", True),
        (".h", HEADER, "a = 1;", "a = 2;", False),
        (".h", HEADER, "  // A comment.", "  int b;  // A comment.", False),
        (".h", HEADER + 'auto b = R"(\n  // c\n)";\n', "// c", "// d", False),
        (".h", HEADER + "#define B \\\n  // c\n", "// c", "// d", False),
        (".md", HEADER, "// A comment.", "// Two comments.", False),
    ],
)
def test_a_record_goes_on_where_only_words_changed(suffix: str, text: str, before: str, after: str, same: bool) -> None:
    assert before in text
    changed = text.replace(before, after)
    assert (soak.without_words(suffix, text) == soak.without_words(suffix, changed)) is same


def test_a_test_that_fails_without_a_defect_has_noticed_none(monkeypatch: pytest.MonkeyPatch) -> None:
    defect, test = next(iter(planted.TESTS.items()))
    said = {defect: "FAILED a", "none": ""}
    monkeypatch.setattr(planted, "run_test", lambda name, _: said[name])
    assert planted.noticed(defect, ["kill"], 0, 0, 1.0) == (test, "FAILED a")
    said["none"] = "FAILED b"
    with pytest.raises(SystemExit, match=f"{test} fails without a defect, too: FAILED b"):
        planted.noticed(defect, ["kill"], 0, 0, 1.0)


def test_a_test_that_cannot_run_without_a_defect_has_noticed_none(tmp_path: Path) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text("import pytest\n\n@pytest.fixture\ndef a():\n    raise OSError\n\ndef test_a(a):\n    pass\n")
    assert re.search("ERROR .*test_a", planted.run_test("none", str(broken.with_suffix(""))))
    broken.write_text("def test_a():\n    pass\n")
    assert planted.run_test("none", str(broken.with_suffix(""))) == ""


def oracle_after(count: int) -> Oracle:
    oracle = Oracle(SMALL.groups, START)
    for operation in Workload([1, 2], SMALL).draw(count):
        oracle.perform(operation)
    return oracle


def found_at(oracle: Oracle, sequence: int) -> Found:
    numbers = oracle.numbers_at(sequence)
    return Found(sequence, set(numbers.rows), numbers, oracle.rows_at(sequence), {}, {})


def test_the_oracle_knows_every_moment_of_its_past() -> None:
    whole = oracle_after(60)
    later = Oracle(SMALL.groups, START)
    for operation in Workload([1, 2], SMALL).draw(60):
        later.perform(operation)
        whole.compare(found_at(later, later.sequence), later.sequence, later.sequence)
    middle = whole.sequence // 2
    whole.compare(found_at(whole.from_here(middle), middle), middle, middle)


def test_the_oracle_knows_what_was_before_and_after_a_drop() -> None:
    oracle = Oracle(SMALL.groups, START)
    for operation in Workload([1, 2], SMALL).draw(200, without=("drop_group",)):
        oracle.perform(operation)
    group = 90  # lives nine steps, and has a filter
    before = oracle.sequence
    full = oracle.rows_at(before)[group]
    assert len(full.keys) > 0
    assert oracle.filter_at(group, before).adds > 0
    oracle.perform(Operation("drop_group", group))
    keys = SMALL.keys_of(group)[:5]
    for _ in range(2):
        oracle.perform(Operation("lookup", group, keys))
    last = oracle.sequence
    assert last == before + 3
    assert [len(oracle.rows_at(sequence)[group].keys) for sequence in range(before, last + 1)] == [
        len(full.keys),
        0,
        0,
        5,
    ]
    assert [oracle.filter_at(group, sequence).adds for sequence in range(before + 1, last + 1)] == [0, 5, 10]
    for sequence in range(before, last + 1):
        oracle.from_here(sequence).compare(found_at(oracle, sequence), sequence, sequence)
    # The storage does not count the drop.
    found = found_at(oracle, last)
    key = int(keys[0]) % 2**64
    found.inspected[group, key] = (last - 1, 0)
    oracle.compare(found, last, last)
    found.inspected[group, key] = (last, 0)
    with pytest.raises(AssertionError, match="the row says operation"):
        oracle.compare(found, last, last)


def test_the_groups_that_must_exist_are_those_saved_and_not_dropped() -> None:
    oracle = Oracle(SMALL.groups, START)
    keys = np.arange(3)
    verbs = [("lookup", 0), ("lookup_only", 7), ("scan", 0), ("drop_group", 7), ("contains", 7), ("lookup", 7)]
    expected = expect(oracle, [Operation(verb, group, keys) for verb, group in verbs])
    must_exist = [expected.groups({255}, done, done) for done in range(-1, len(verbs))]
    assert must_exist == [{255}, {0, 255}, {0, 255}, {0, 7, 255}, {0, 255}, {0, 255}, {0, 7, 255}]
    assert expected.groups({7}, 2, 3) == {0}  # while it is dropped


def test_the_oracle_refuses_what_is_not_exactly_the_storage() -> None:
    oracle = oracle_after(60)
    last = oracle.sequence
    oracle.compare(found_at(oracle, last), last, last)

    def refused(found: Found, text: str, low: int = last, high: int = last) -> None:
        with pytest.raises(AssertionError, match=text):
            oracle.compare(found, low, high)

    refused(found_at(oracle, last - 1), "was promised")
    refused(found_at(oracle, last), "were issued", 0, last - 1)
    group = max(oracle.tables, key=lambda number: len(oracle.tables[number]))
    for field in ("weights", "state", "update_counts", "last_updates", "keys"):
        found = found_at(oracle, last)
        rows = found.rows[group]
        if field == "state":
            block = next(iter(rows.state.values()))
        else:
            block = getattr(rows, field)
        # The least bit of one number.
        block.reshape(-1).view(np.uint8)[0] ^= 1
        refused(found, "differ|rows, expected")
    found = found_at(oracle, last)
    found.rows[group] = replace(found.rows[group], **{
        name: getattr(found.rows[group], name)[1:] for name in ("keys", "weights", "update_counts", "last_updates")
    })  # fmt: skip
    refused(found, "lost")
    found = found_at(oracle, last)
    found.numbers = replace(found.numbers, clock=found.numbers.clock + 1)
    refused(found, "clock")


def test_of_an_update_half_done_a_lookup_returns_the_row_of_before_or_of_after() -> None:
    def rows(*weights: float) -> dict[int, Rows]:
        count = len(weights)
        keys, bare = np.arange(count, dtype=np.uint64), np.array(weights, np.float32).reshape(count, 1)
        return {0: Rows(keys, bare, {}, np.zeros(count, np.uint32), np.zeros(count, np.int64))}

    def check(*found: float) -> None:
        answer = {"lookups": {(0, 0): np.array(found, np.float32).reshape(len(found), 1)}}
        flips._check_lookups(answer, rows(1.0, 2.0), rows(3.0, 4.0, 5.0))

    check(1.0, 2.0, 9.0)  # of the third row, which the update makes, nothing is known
    check(3.0, 2.0, 5.0)
    with pytest.raises(AssertionError, match="key 1: a lookup returned other weights"):
        check(1.0, 1.0, 5.0)


def test_the_oracle_does_what_the_documents_say() -> None:
    oracle = Oracle(SMALL.groups, START)
    one = np.array([1], np.int64)
    oracle.perform(Operation("lookup", 0, one))
    oracle.perform(Operation("lookup", 0, one))  # makes no row: no operation
    oracle.perform(Operation("erase", 0, np.array([2])))  # nor does this
    assert oracle.sequence == 1
    oracle.perform(Operation("apply_gradients", 0, one, np.ones((1, 3), np.float32)))
    oracle.perform(Operation("commit", number=5, extra=b"x"))
    assert oracle.sequence == 3
    assert oracle.numbers_at(3).last_commit == (5, b"x")
    assert oracle.numbers_at(1).steps[0] == 0
    assert oracle.numbers_at(2).steps[0] == 1


def test_a_trainee_takes_its_time_with_it_through_a_reopening(tmp_path: Path) -> None:
    oracle = Oracle(SMALL.groups, START)
    oracle.perform(Operation("set_now", number=START + 500))
    operations = [
        Operation("set_now", number=START + 100),  # which is earlier than it was: nothing
        Operation("reopen"),
        Operation("lookup", 0, np.array([1], np.int64)),
        Operation("commit", number=1),
    ]
    options = {"memory": "16MiB", "durability": "logged"}
    with fork_server(None, "reliability.trainee") as server:
        for now in (oracle.now, START):
            session = server.session()
            try:
                ask(session, trainee.open_storage, make_base(tmp_path / "base"), "small", options)
                if now > START:
                    session.start("call", trainee.train, operations, now)
                    expect(oracle, operations, listen(session))
                else:
                    oracle.compare(ask(session, trainee.look), oracle.sequence, oracle.sequence)
                ask(session, trainee.close)
            finally:
                session.kill()
    assert oracle.numbers_at(oracle.sequence).clock == START + 500


def test_a_skip_does_not_hide_what_was_done_before() -> None:
    entry = {
        "code": "a", "commit": "a", "first_seed": 0, "cases": 3, "done": {"power losses": 9}, "failures": [],
        "seconds": 1.0, "skipped": "skipped: mounting needs root",
    }  # fmt: skip
    (line,) = (line for line in soak.page({"ext4-power-loss": entry}).split("\n") if "(`ext4-power-loss`)" in line)
    assert "| 9 power losses; then skipped: mounting needs root | none | `a` | 0 to 2 |" in line
    entry |= {"cases": 0, "done": {}}
    assert "| skipped: mounting needs root | | a | |" in soak.page({"ext4-power-loss": entry})


# A model of a disk: what a power loss leaves.


def disk_after(tmp_path: Path, events: list[Event], kind: str, seed: int = 0) -> dict[str, bytes]:
    origin, target = tmp_path / "origin", tmp_path / f"{kind}-{seed}"
    origin.mkdir(exist_ok=True)
    target.mkdir()
    disk = Disk(origin)
    for event in events:
        disk.happen(event)
    disk.after(Loss(kind, np.random.default_rng(seed), disk.time), target)
    return {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}


CREATE = os.O_WRONLY | os.O_CREAT
WRITTEN = [Event("O", (1, CREATE), (b"a.tmp",)), Event("W", (1, 0), (b"new",))]
RENAMED = Event("R", (), (b"a.tmp", b"a"))
DIRECTORY = [Event("O", (2, os.O_RDONLY), (b".",)), Event("Y", (2,), (b".",))]


def test_unsynced_bytes_and_names_are_lost(tmp_path: Path) -> None:
    synced = Event("S", (1,), (b"a.tmp",))
    assert disk_after(tmp_path, WRITTEN, "everything", 1) == {}
    assert disk_after(tmp_path, [*WRITTEN, *DIRECTORY], "everything", 2) == {"a.tmp": b""}
    assert disk_after(tmp_path, [*WRITTEN, synced, RENAMED], "everything", 3) == {}
    assert disk_after(tmp_path, [*WRITTEN, synced, RENAMED, *DIRECTORY], "everything", 4) == {"a": b"new"}
    assert disk_after(tmp_path, [*WRITTEN, RENAMED], "nothing", 5) == {"a": b"new"}


def test_a_rename_without_a_sync_of_the_file_may_leave_an_empty_one(tmp_path: Path) -> None:
    left = {str(disk_after(tmp_path, [*WRITTEN, RENAMED], "anything", seed)) for seed in range(60)}
    contents = (b"", bytes(3), b"new")  # nothing, a length without its bytes, all
    assert left == {"{}"} | {str({name: content}) for name in ("a", "a.tmp") for content in contents}


def test_pages_reach_the_disk_in_any_order(tmp_path: Path) -> None:
    page = b"x" * 4096
    events = [
        Event("O", (1, CREATE), (b"log",)),
        *DIRECTORY,
        Event("W", (1, 0), (page,)),
        Event("S", (1,), (b"log",)),
        Event("W", (1, 4096), (page,)),
        Event("W", (1, 8192), (page,)),
    ]
    left = {disk_after(tmp_path, events, "anything", seed)["log"] for seed in range(200)}
    zeros = bytes(4096)
    assert {page, page + page, page + page + page, page + zeros + page} <= left
    assert all(content.startswith(page) for content in left)  # what was synced stays
