# SPDX-License-Identifier: Apache-2.0
"""The demo: its parts, and the whole of it at a small size."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from movielens_like import write_ratings

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import damo_embedding as de  # noqa: E402
from demo import workspace  # noqa: E402
from demo.forget import RecentlyUsed  # noqa: E402
from demo.metrics import auc, auc_in_windows  # noqa: E402
from demo.movielens import Ragged, Vocabulary, read  # noqa: E402
from demo.settings import FULL, QUICK, size_in_bytes  # noqa: E402
from demo.stream import Stream, _zipf  # noqa: E402

KEYS = set(
    "auc auc_torch auc_online auc_frozen_vocab auc_stream auc_stream_ceiling rows table_bytes memory_budget_bytes "
    "memory_growth_bytes disk_bytes torch_died_at_rows samples_per_second samples_per_second_torch "
    "samples_per_second_cold killed_and_equal dump_rows dump_identical".split()
)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ml-100k")
    write_ratings(folder)
    return folder


def run_python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_auc_counts_every_pair_once_and_ties_half() -> None:
    generator = np.random.default_rng(0)
    for size, distinct in ((2, 2), (30, 4), (200, 1000)):
        labels = np.r_[0, 1, generator.integers(0, 2, size - 2)]
        scores = generator.integers(0, distinct, size).astype(np.float32)
        pairs = [
            1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            for i in np.flatnonzero(labels == 1)
            for j in np.flatnonzero(labels == 0)
        ]
        assert auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_auc_of_one_class_is_not_a_number() -> None:
    assert np.isnan(auc([1, 1], [0.1, 0.2]))


def test_windows_cover_all_events_in_order() -> None:
    ends, windows = auc_in_windows([0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1], 3)
    assert ends == [2, 4, 6]
    assert windows == [1.0, 0.0, 1.0]


def test_ratings_of_four_stars_are_positive_and_genres_stay_with_their_items(ratings: Path) -> None:
    events = read(ratings)
    lines = (ratings / "ml-100k.inter").read_text().splitlines()[1:]
    items = {}
    for line in (ratings / "ml-100k.item").read_text(encoding="latin-1").splitlines()[1:]:
        cells = line.split("\t")
        items[cells[0]] = cells[3].split()
    genres, crossed = events.fields["genres"], events.fields["occupation x genres"]
    assert isinstance(genres, Ragged)
    assert isinstance(crossed, Ragged)
    chosen = np.array([7, 0, 1499, 7])
    part = genres.take(chosen)
    for place, event in enumerate(chosen):
        user, item, stars, moment = lines[event].split("\t")
        assert events.labels[event] == (float(stars) >= 4)
        assert events.times[event] == int(moment)
        assert events.fields["user"][event] == de.hash_keys("user", [user])[0]
        bag = part.values[part.offsets[place] : part.offsets[place + 1]]
        np.testing.assert_array_equal(bag, de.hash_keys("genres", items[item]))
    assert len(np.unique(crossed.values)) == 2 * len(np.unique(genres.values))


def test_vocabulary_has_index_zero_for_what_it_does_not_know(ratings: Path) -> None:
    events = read(ratings)
    known = np.arange(100)
    vocabulary = Vocabulary(events, known)
    users, encoded = events.fields["user"], vocabulary.encode(events).fields["user"]
    assert isinstance(users, np.ndarray)
    np.testing.assert_array_equal(encoded == 0, ~np.isin(users, users[known]))
    assert vocabulary.sizes()["user"] == len(np.unique(users[known])) + 1


def test_stream_is_a_function_of_its_settings_and_the_step() -> None:
    one, again, next_one = (
        Stream(QUICK.stream).batch(3),
        Stream(QUICK.stream).batch(3),
        Stream(QUICK.stream).batch(4),
    )
    np.testing.assert_array_equal(one.keys["visitor"], again.keys["visitor"])
    np.testing.assert_array_equal(one.labels, again.labels)
    assert not np.array_equal(one.keys["visitor"], next_one.keys["visitor"])


def test_teacher_gives_an_id_the_same_weight_in_every_batch_and_labels_follow_it() -> None:
    batches = [Stream(FULL.stream).batch(step) for step in range(4)]
    visitors, ads, logits, labels = (
        np.concatenate(parts)
        for parts in zip(*((b.ids["visitor"], b.ids["ad"], b.teacher, b.labels) for b in batches), strict=True)
    )
    for visitor in range(1, 4):
        of_visitor = visitors == visitor
        for ad in np.unique(ads[of_visitor])[:5]:
            assert len(np.unique(logits[of_visitor & (ads == ad)])) == 1
    for logit in np.unique(logits):
        clicks = labels[logits == logit]
        chance = 1 / (1 + np.exp(-float(logit)))
        assert clicks.mean() == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / len(clicks)))


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.05])
def test_ranks_follow_zipfs_law(exponent: float) -> None:
    ranks = _zipf(np.random.default_rng(0).random(400_000), 1000, exponent)
    assert ranks.min() == 1
    assert ranks.max() <= 1000
    # The chance of 100..199 against that of 200..399, by the continuous law.
    power = 1 - exponent
    expected = 1 if power == 0 else (200**power - 100**power) / (400**power - 200**power)
    found = ((ranks >= 100) & (ranks < 200)).sum() / ((ranks >= 200) & (ranks < 400)).sum()
    assert found == pytest.approx(expected, rel=0.03)


def test_recently_used_gives_up_the_keys_used_longest_ago() -> None:
    recent = RecentlyUsed(3)
    keys = {"a": np.array([1, 2, 2]), "b": np.array([-7])}
    assert recent.use(keys, 0) == {}
    fallen = recent.use({"a": np.array([2, 3]), "b": np.array([-7])}, 1)
    np.testing.assert_array_equal(fallen["a"], [1])
    assert len(fallen["b"]) == 0
    fallen = recent.use({"a": np.array([1]), "b": np.array([-9, -7])}, 2)
    np.testing.assert_array_equal(np.sort(fallen["a"]), [2, 3])
    assert len(fallen["b"]) == 0


def test_sizes_are_read_with_their_units() -> None:
    assert [size_in_bytes(size) for size in ("1KiB", "32MiB", "2GiB", "7")] == [1024, 32 << 20, 2 << 30, 7]


def test_output_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    workspace.prepare(tmp_path / "out")
    (tmp_path / "out" / "stream").mkdir()
    (tmp_path / "out" / "stream" / "labels.npy").write_text("old")
    workspace.prepare(tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [workspace.MARK]


def test_a_directory_that_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="not the demo's"):
        workspace.prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_way_from_nn_embedding_is_six_lines() -> None:
    before, after = (
        [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
        for name in ("deepfm_nn_embedding.py", "deepfm.py")
    )
    assert len([line for line in after if line not in before]) <= 6
    assert len([line for line in before if line not in after]) <= 6


@pytest.mark.parametrize("script", ["deepfm.py", "deepfm_nn_embedding.py"])
def test_example_script_trains(script: str, ratings: Path, tmp_path: Path) -> None:
    done = run_python(EXAMPLES / script, ratings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_interrupted_demo_leaves_storages_that_open_and_the_next_one_all_that_recompute_needs(
    ratings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    demo = subprocess.Popen(
        [sys.executable, EXAMPLES / "demo.py", "--quick", "--data", ratings, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    storage = out / "oov" / "storage"
    deadline = time.monotonic() + 120
    while not (storage / "CURRENT").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(demo.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Stopped." in said
    with de.Storage.open(storage, memory="16MiB") as reopened:
        assert reopened.stats()["rows"] >= 0

    # The next run works, over what the stopped one left.
    done = run_python(EXAMPLES / "demo.py", "--quick", "--data", ratings, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result.keys() == KEYS
    assert result["killed_and_equal"] is True
    assert result["dump_identical"] is True
    assert result["dump_rows"] == result["rows"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)

    again = run_python(ROOT / "scripts" / "recompute", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "18 figures, 0 differ" in again.stdout

    scores = np.load(out / "stream" / "ours.npy")
    np.save(out / "stream" / "ours.npy", -scores)
    assert run_python(ROOT / "scripts" / "recompute", out).returncode == 1
