# SPDX-License-Identifier: Apache-2.0
"""A counting Bloom filter with a file: what survives, what is refused, and that nothing else is touched.

Cutting off at every length and 10,000 flips take a minute; in every run it is a sample:

    DAMO_DAMAGE=full pytest -rP tests/python/test_filter_file.py
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damo_embedding as de
from reference_filter import load, seal_head, seal_mark, seal_record

pytestmark = pytest.mark.core

FULL = os.environ.get("DAMO_DAMAGE") == "full"
SETTINGS: dict[str, Any] = {"capacity": 300, "count": 2, "fpr": 1e-2, "halve_every": 500}
START = 4096 + 4096 + 8  # of the log, with these settings
END = 2**64 - 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a filter may be made."""
    return tmp_path / "seen.filter"


@pytest.fixture
def whole(file: Path) -> bytes:
    """The bytes of a closed filter with three records in its log, which lies at `file`."""
    rng = np.random.default_rng(8)
    with de.CountingBloomFilter(path=file, **SETTINGS) as seen:
        for num in (1, 2, 3):
            seen.add(rng.integers(-(2**63), 2**63, 20), num)
    return file.read_bytes()


def open_file(file: Path, **options: Any) -> de.CountingBloomFilter:
    return de.CountingBloomFilter(path=file, **{**SETTINGS, **options})


def test_it_goes_on_where_it_was_left(file: Path) -> None:
    expected = de.CountingBloomFilter(**SETTINGS)
    for day in range(5):
        with open_file(file) as seen:
            assert seen.adds == expected.adds
            assert seen.path == str(file)
            for _ in range(3):
                keys = np.arange(day * 50, day * 50 + 90)
                seen.add(keys)
                expected.add(keys)
            everything = np.arange(1000)
            assert np.array_equal(seen.estimate(everything), expected.estimate(everything))
    assert {path.name for path in file.parent.iterdir()} == {"seen.filter", "seen.filter.lock"}


def test_the_file_is_as_documented(file: Path) -> None:
    model_keys = np.arange(1000)
    with open_file(file) as seen:
        seen.add(model_keys[:400], 2)
        seen.add(-1, 3)
        seen.add(model_keys[:100])
        settings, model = load(file.read_bytes())
        assert settings == SETTINGS
        assert model.adds == seen.adds
        assert seen.estimate(model_keys).tolist() == [model.estimate(key) for key in model_keys.tolist()]
        assert model.estimate(2**64 - 1) == seen.estimate(-1) > 0
    assert load(file.read_bytes())[1].tobytes() == model.tobytes()


def test_counters_that_have_swallowed_their_log_are_as_documented(file: Path) -> None:
    settings = {"capacity": 60_000, "count": 3, "fpr": 1e-2, "halve_every": None}
    with de.CountingBloomFilter(path=file, **settings) as seen:
        # 4 MiB of log and a little more: 65,536 keys a record, of few distinct keys.
        keys = np.tile(np.arange(1000, dtype=np.int64), 530)
        seen.add(keys)
        assert file.stat().st_size < 2**20
        seen.add([7, 2**40])
        found, model = load(file.read_bytes())
        assert found == {**settings, "halve_every": 0}
        assert model.adds == seen.adds == len(keys) + 2
        assert [model.estimate(key) for key in (0, 7, 999, 2**40, 5000)] == [15, 15, 15, 1, 0]


def test_truncated_at_any_length_it_is_refused_and_left_as_it_is(file: Path, whole: bytes) -> None:
    lengths = range(0, len(whole), 1 if FULL else 29)
    for size in lengths:
        file.write_bytes(whole[:size])
        with pytest.raises(de.CorruptionError, match=r"seen\.filter is damaged at offset \d+"):
            open_file(file)
        assert file.read_bytes() == whole[:size]
    print(f"{len(lengths)} of {len(whole)} lengths: all refused")
    file.write_bytes(whole)
    open_file(file).close()


def test_with_any_bit_flipped_it_is_refused(file: Path, whole: bytes) -> None:
    rng = np.random.default_rng(20240607)
    flips = 10_000 if FULL else 500
    refused = 0
    for bit in rng.integers(0, 8 * len(whole), flips).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(de.CorruptionError, match=r"seen\.filter (is damaged|has filter format \d+) at offset \d+"):
            open_file(file)
        refused += 1
        if refused % 100 == 0:
            assert file.read_bytes() == data
    assert refused == flips
    print(f"{refused} flips: all refused")
    file.write_bytes(whole)
    assert open_file(file).adds == 120


def test_random_damage_of_many_bytes_is_refused(file: Path, whole: bytes) -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        at, size = int(rng.integers(0, len(whole))), int(rng.integers(1, 400))
        piece = rng.bytes(size) if rng.random() < 0.7 else bytes(size)
        data = whole[:at] + piece[: len(whole) - at] + whole[at + size :]
        file.write_bytes(data)
        if data == whole:
            continue
        with pytest.raises(de.CorruptionError):
            open_file(file)
    file.write_bytes(whole)
    open_file(file).close()


@pytest.mark.parametrize("content", [b"", b"short", b"no filter at all" * 1000, b"DAMOMANI" + bytes(10_000)])
@pytest.mark.parametrize("reload", [True, False])
def test_a_file_that_is_no_filter_is_refused_and_kept(file: Path, content: bytes, reload: bool) -> None:
    file.write_bytes(content)
    with pytest.raises(de.CorruptionError, match=r"seen\.filter is damaged at offset \d+: it is (not|too short)"):
        open_file(file, reload=reload)
    assert file.read_bytes() == content
    assert {path.name for path in file.parent.iterdir()} == {"seen.filter"}


def test_a_path_that_cannot_be_a_file_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "seen", Path("/dev/null")):
        for reload in (True, False):
            with pytest.raises(de.StorageError, match=r"\[open\]"):
                open_file(path, reload=reload)
    assert list(tmp_path.iterdir()) == []


def test_one_of_a_newer_version_is_refused_with_the_advice_to_upgrade(file: Path, whole: bytes) -> None:
    newer = seal_head(whole[:8] + b"\2" + whole[9:])
    file.write_bytes(newer)
    with pytest.raises(de.CorruptionError, match=r"has filter format 2 at offset 8, .* then upgrade damo-embedding"):
        open_file(file)
    assert file.read_bytes() == newer


def test_one_whose_layout_is_not_that_of_its_settings_is_refused(file: Path, whole: bytes) -> None:
    for at in (28, 48):  # counters per line, pages
        file.write_bytes(seal_head(whole[:at] + bytes([whole[at] + 1]) + whole[at + 1 :]))
        with pytest.raises(de.CorruptionError, match="a layout that is not the one of its settings"):
            open_file(file)


def test_a_mark_or_a_record_that_cannot_be_is_refused_though_its_checksum_agrees(file: Path, whole: bytes) -> None:
    end = len(whole)
    marks = [(end + 8, end), (end, end + 8), (end, START - 8), (END, END), (end - 8, end - 8), (START - 1, START - 1)]
    for new_end, synced in marks:
        file.write_bytes(seal_mark(whole, end=new_end, synced=synced))
        with pytest.raises(de.CorruptionError, match=r"seen\.filter is damaged at offset \d+"):
            open_file(file)
    for head in ((0, 1, 0), (20, 0, 0), (20, 1, 1), (65_537, 1, 0), (2**61 + 20, 1, 0), (END, 1, 0)):
        file.write_bytes(seal_record(whole, START, *head))
        with pytest.raises(de.CorruptionError, match=rf"damaged at offset {START}: "):
            open_file(file)
    file.write_bytes(seal_record(whole, START, 20, 1, 0))
    assert open_file(file).adds == 120


@pytest.mark.parametrize("change", [{"capacity": 301}, {"count": 3}, {"fpr": 2e-2}, {"halve_every": None}])
def test_one_of_other_settings_is_refused_and_kept(file: Path, whole: bytes, change: dict[str, Any]) -> None:
    with pytest.raises(de.SchemaMismatchError, match=r"is a filter with capacity=300, count=2, .*; asked for"):
        open_file(file, **change)
    assert file.read_bytes() == whole
    open_file(file).close()


def test_without_reload_a_filter_starts_anew_whatever_its_state(file: Path, whole: bytes) -> None:
    for before in (whole, whole[:100], whole[:-1], bytes([*whole[:20], 99, *whole[21:]])):
        file.write_bytes(before)
        with open_file(file, reload=False, count=5) as seen:
            assert (seen.adds, seen.fill) == (0, 0.0)
            seen.add(1, 5)
        with open_file(file, count=5) as seen:
            assert seen.check(1)
    with de.CountingBloomFilter(capacity=10, path=file.with_name("new"), reload=False) as seen:
        assert seen.adds == 0


def test_only_one_has_it_open(file: Path) -> None:
    with open_file(file) as seen:
        with pytest.raises(de.AlreadyOpenError, match=rf"in this process already \(process {os.getpid()}\)"):
            open_file(file)
        with pytest.raises(de.AlreadyOpenError):
            open_file(file, reload=False)
        seen.add(1)
        code = f"import damo_embedding as de; de.CountingBloomFilter(path={str(file)!r}, **{SETTINGS!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"AlreadyOpenError: [open] {file} is open elsewhere: process {os.getpid()} on " in done.stderr
        assert seen.adds == 1
    open_file(file).close()


def test_one_that_is_dropped_without_close_lets_go_and_loses_nothing(file: Path) -> None:
    seen = open_file(file)
    seen.add([1, 2, 3])
    del seen
    with open_file(file) as again:
        assert again.adds == 3


def test_what_other_programs_do_to_the_file_is_an_error_and_no_signal(file: Path) -> None:
    for number, harm in enumerate((lambda: os.truncate(file, 0), lambda: os.truncate(file, 5000), file.unlink)):
        seen = open_file(file, reload=number == 0)
        seen.add([1, 2])
        harm()
        for call in (lambda seen=seen: seen.add(3), seen.sync):
            with pytest.raises(de.StorageError, match="by another program"):
                call()
        assert seen.adds == 2
        assert seen.estimate(1) == 1
        with pytest.raises(de.StorageError, match="by another program"):
            seen.close()
        assert seen.closed
        seen.close()
        file.write_bytes(b"DAMOFILT")  # so that the next round may start anew


FULL_DISK = """
import resource, signal, sys
import damo_embedding as de
path, settings = sys.argv[1], eval(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
seen = de.CountingBloomFilter(path=path, **settings)
seen.add(range(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
failed = 0
for i in range(100):
    try:
        seen.add(range(100, 120))
    except de.StorageError as error:
        assert "nothing was added" in str(error), error
        failed += 1
assert failed > 50
before = seen.adds
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
seen.add(5)
assert seen.adds == before + 1
print(seen.adds)
"""


def test_where_the_disk_takes_no_more_an_add_fails_whole_and_later_ones_succeed(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(file), repr(SETTINGS)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    with open_file(file) as seen:
        assert seen.adds == int(done.stdout)


def test_after_a_power_loss_a_prefix_from_the_last_sync_on_is_there(file: Path) -> None:
    with open_file(file) as seen:
        seen.add(np.arange(10) + 2**62)
        seen.sync()
        synced = file.stat().st_size
        seen.add(np.arange(10) + 2**61)
        seen.add(np.arange(10) + 2**60)
        data = file.read_bytes()
    assert synced == START + 24 + 80
    elsewhere = seal_mark(data, boot=12345)
    for size, adds in ((len(data), 30), (len(data) - 1, 20), (len(data) - 104, 20), (synced + 1, 10), (synced, 10)):
        for tail in (b"", bytes(len(data) - size)):  # some file systems give the length back, but not the bytes
            file.write_bytes(elsewhere[:size] + tail)
            with open_file(file) as seen:
                assert seen.adds == adds
            settings, model = load(file.read_bytes())  # and now it is of this boot
            assert (settings, model.adds) == (SETTINGS, adds)
        file.write_bytes(data[:size])
        if size < len(data):  # in this boot the mark is right, so it was cut off
            with pytest.raises(de.CorruptionError):
                open_file(file)
    file.write_bytes(elsewhere[: synced - 1])
    with pytest.raises(de.CorruptionError):
        open_file(file)


CRASH_SETTINGS: dict[str, Any] = {"capacity": 20_000, "count": 3, "fpr": 1e-2, "halve_every": 70_001}
BATCH = 4000
CRASHING = """
import sys
import numpy as np
import damo_embedding as de
path, settings, batch = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3])
seen = de.CountingBloomFilter(path=path, **settings)
number = seen.adds // batch
while True:
    seen.add(np.random.default_rng(number).integers(0, 50_000, batch))
    number += 1
    sys.stdout.buffer.write(number.to_bytes(8, "little"))
    sys.stdout.buffer.flush()
"""


@pytest.mark.slow
def test_after_each_of_fifteen_kills_every_call_that_returned_is_counted(file: Path) -> None:
    """Each call is there whole or not at all, over halvings and files written anew; kill -9 comes at any moment."""
    random = np.random.default_rng(3)
    expected = de.CountingBloomFilter(**CRASH_SETTINGS)
    everything = np.arange(60_000)
    replayed = 0
    for _ in range(15):
        command = [sys.executable, "-c", CRASHING, str(file), repr(CRASH_SETTINGS), str(BATCH)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            told = process.stdout.read(8)  # it has begun
            select.select([], [], [], float(random.uniform(0, 0.15)))
            os.kill(process.pid, signal.SIGKILL)
            told += process.stdout.read()
        returned = int.from_bytes(told[-(len(told) % 8) - 8 :][:8], "little")
        with de.CountingBloomFilter(path=file, **CRASH_SETTINGS) as seen:
            survived, rest = divmod(seen.adds, BATCH)
            assert rest == 0
            assert returned <= survived <= returned + 1
            for number in range(replayed, survived):
                expected.add(np.random.default_rng(number).integers(0, 50_000, BATCH))
            replayed = survived
            assert np.array_equal(seen.estimate(everything), expected.estimate(everything))
    assert replayed * BATCH * 8 > 3 * 2**22  # so much log that the file was written anew several times
