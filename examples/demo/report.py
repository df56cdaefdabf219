# SPDX-License-Identifier: Apache-2.0
"""report.html: one page that needs nothing but itself."""

from __future__ import annotations

import os
import platform
from html import escape
from pathlib import Path

import numpy as np

from demo.metrics import auc_in_windows
from demo.plots import LIMIT, OTHER, OURS, THIRD, plot
from demo.summary import MIB, Results, claims, result_json

WINDOWS = 28


def write(directory: Path, results: Results) -> None:
    (directory / "report.html").write_text(_page(directory, results), encoding="utf-8")


def _page(directory: Path, results: Results) -> str:
    figures, size = result_json(results), results.settings.stream
    died = figures["torch_died_at_rows"]
    cards = [
        (
            "AUC on users never seen",
            f"{figures['auc_online']:.3f}",
            f"{figures['auc_frozen_vocab']:.3f} with a frozen vocabulary",
        ),
        (
            "The table takes",
            f"{results.table_bytes / results.budget:.1f} times",
            f"its memory: {figures['rows']:,} rows under {size.memory}",
        ),
        (
            "nn.Embedding, under the same cap,",
            "lives" if died is None else f"dies at {died / 1e6:.2f} M",
            f"rows; ours has {figures['rows'] / 1e6:.2f} M in the end",
        ),
        (
            "Killed, resumed, and then",
            "equal" if figures["killed_and_equal"] else "different",
            f"in every bit of {results.kill['rows']:,} rows",
        ),
    ]
    sections = [
        ("right", "1 Right", _RIGHT, [_right_table(results)]),
        ("oov", "2 Out of vocabulary", _OOV, [_oov_plot(results)]),
        (
            "oom",
            "3 Out of memory",
            _oom_text(results),
            [_stream_plot(directory, results), *_growth(directory, results)],
        ),
        ("price", "4 Price", _PRICE, [_price_table(results)]),
        ("kill", "5 Kill", _KILL, []),
        ("serve", "6 Serve", _SERVE, []),
    ]
    return _PAGE.format(
        style=_STYLE,
        seconds=results.seconds,
        machine=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        warning=_WARNING if results.quick else "",
        cards="".join(f"<div class=card><h3>{a}</h3><b>{b}</b><p>{c}</p></div>" for a, b, c in cards),
        sections="".join(_section(results, *section) for section in sections),
        figures=_figures(figures),
    )


def _section(results: Results, part: str, title: str, text: str, figures: list[str]) -> str:
    marks = {True: "<i class=yes>✓</i>", False: "<i class=no>✗</i>", None: "<i>·</i>"}
    lines = "".join(
        f"<li>{marks[claim.holds]}<span>{escape(claim.text)}</span></li>" for claim in claims(results, part)
    )
    drawn = "".join(f"<figure>{each}</figure>" for each in figures)
    return f"<section><h2>{title}</h2><p>{text}</p><ul>{lines}</ul><div class=plots>{drawn}</div></section>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column names the rows and whose others are figures."""
    cells = [f"<td>{cell}</td>" for cell in head[1:]]
    lines = [f"<tr class=head><th>{head[0]}</th>{''.join(cells)}</tr>"]
    for first, *others in rows:
        lines.append(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _right_table(results: Results) -> str:
    rows = []
    for features, label in (("all", "all features"), ("user_item", "user and item only")):
        for system, name in (("ours", "damo_embedding"), ("torch", "torch.nn.Embedding")):
            one = results.right[features][system]
            rows.append([f"{name}, {label}", *(f"{value:.4f}" for value in one["seeds"]), f"<b>{one['mean']:.4f}</b>"])
    splits = [f"split {i + 1}" for i in range(len(rows[0]) - 2)]
    return _table(["Test AUC", *splits, "mean"], rows)


def _oom_text(results: Results) -> str:
    size = results.settings.stream
    return (
        f"{size.steps * size.batch:,} generated events: {size.visitors:,} visitors and {size.ads:,} ads by "
        "Zipf's law, clicks drawn from a logistic teacher that is planted in the ids. nn.Embedding has no vocabulary "
        "here, so it grows by doubling, under the same cap on memory. “Evicted rows reset” is our table with as many "
        "rows in memory, each losing what it has learnt where it would have gone to disk."
    )


def _price_table(results: Results) -> str:
    names = {"ours": "damo_embedding", "torch": "nn.Embedding + SparseAdam"}
    rows = []
    for name, speed in sorted(results.price["speed"].items()):
        system, threads = name.split("-")
        rows.append([names[system], threads, f"{speed:,.0f}"])
    times = results.table_bytes / results.budget
    cold = results.oom["ours"]["samples_per_second"]
    rows.append([f"damo_embedding, {times:.1f} times the memory budget", str(os.cpu_count()), f"{cold:,.0f}"])
    return _table(["Samples a second", "threads", ""], rows)


def _oov_plot(results: Results) -> str:
    with plot("oov", "AUC over time, predicted before learnt", "ratings of the last fifth", "AUC") as drawn:
        for system, label, colour in (
            ("ours", "damo_embedding", OURS),
            ("torch", "frozen vocabulary + OOV row", OTHER),
        ):
            part = results.oov[system]
            drawn.axes.plot(part["ends"], part["windows"], color=colour, label=label, linewidth=2)
    return drawn.svg


def _stream_plot(directory: Path, results: Results) -> str:
    out = directory / "stream"
    labels = np.load(out / "labels.npy")
    with plot("stream", "AUC over the stream, predicted before learnt", "million events", "AUC") as drawn:
        for name, label, colour in (
            ("teacher", "the teacher's ceiling", LIMIT),
            ("ours", "damo_embedding", OURS),
            ("forgetful", "evicted rows reset", THIRD),
        ):
            ends, windows = auc_in_windows(labels, np.load(out / f"{name}.npy"), WINDOWS)
            style = "--" if name == "teacher" else "-"
            drawn.axes.plot(np.array(ends) / 1e6, windows, style, color=colour, label=label, linewidth=2)
        died = results.oom["torch"]["died_at_step"]
        if died is not None:
            at = died * results.settings.stream.batch / 1e6
            drawn.axes.axvline(at, color=OTHER, linestyle=":", linewidth=2, label="nn.Embedding dies")
    return drawn.svg


def _growth(directory: Path, results: Results) -> list[str]:
    with np.load(directory / "stream" / "series.npz") as file:
        series = {name: file[name] for name in file.files}
    events = (series["step"] + 1) * results.settings.stream.batch / 1e6
    budget, died = results.budget, results.oom["torch"]
    with plot("vocabulary", "Vocabulary: rows in the table", "million events", "million rows") as rows:
        rows.axes.plot(events, series["rows"] / 1e6, color=OURS, label="damo_embedding", linewidth=2)
        if died["died_at_rows"] is not None:
            at = died["died_at_step"] * results.settings.stream.batch / 1e6
            rows.axes.plot(
                [at], [died["died_at_rows"] / 1e6], "X", color=OTHER, markersize=10, label="nn.Embedding dies"
            )
        rows.axes.set_ylim(bottom=0)
    with plot("memory", "Memory: growth of the process", "million events", "MiB") as memory:
        memory.axes.plot(events, series["memory"] / MIB, color=OURS, label="resident memory", linewidth=2)
        memory.axes.axhline(budget / MIB, color=LIMIT, linestyle="--", label="budget")
        memory.axes.axhline(budget * 1.1 / MIB, color=LIMIT, linestyle=":", label="budget + 10 %")
        memory.axes.set_ylim(bottom=0)
    with plot("disk", "Disk: rows and log", "million events", "MiB") as disk:
        disk.axes.plot(events, series["disk"] / MIB, color=OURS, label="files of the storage", linewidth=2)
        table = series["rows"] * results.oom["ours"]["row_bytes"] / MIB
        disk.axes.plot(events, table, color=THIRD, label="keys, weights and state", linewidth=2)
        disk.axes.axhline(budget / MIB, color=LIMIT, linestyle="--", label="memory budget")
        disk.axes.set_ylim(bottom=0)
    return [rows.svg, memory.svg, disk.svg]


def _figures(figures: dict[str, object]) -> str:
    def text(value: object) -> str:
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "none"}[value]
        if isinstance(value, float):
            return f"{value:.4f}" if value < 1 else f"{value:,.0f}"
        return f"{value:,}"

    return _table(["Key", "value"], [[f"<code>{name}</code>", text(value)] for name, value in figures.items()])


_RIGHT = """DeepFM on MovieLens-100K, random 80/20 splits. Every value of every field becomes a key by
hashing; torch.nn.Embedding gets a vocabulary built beforehand. The model, the splits, the first dense weights
and the order of events are the same."""
_OOV = """The same ratings in time order. On the last fifth both models predict some ratings, then learn them,
and so on. A new user gets a row in ours; nn.Embedding has the vocabulary of the first four fifths and one row
a field for everyone else, and trains on as well."""
_PRICE = """The stream's model and batches with so few ids that every row stays in memory, each system with
one thread and with all cores; and the last quarter of the stream above."""
_KILL = """A training process is killed with SIGKILL half-way and goes on from its checkpoint: rows, dense
weights, their optimizer and the reader's position. A run left alone is the yardstick."""
_SERVE = """The serving file of the stream's table, written from the open storage, read back with the Python
reader."""
_WARNING = "<p class=warning>A run with --quick: everything is exercised, and the figures mean nothing.</p>"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Damo-Embedding: the demo</title>
<style>{style}</style></head>
<body><main>
<h1>Damo-Embedding</h1>
<p class=lead>An embedding table as large as the disk, with no vocabulary to declare. {seconds:.0f} seconds on
{machine}.</p>
{warning}
<div class=cards>{cards}</div>
{sections}
<section><h2>All figures</h2><p>Those of result.json. scripts/recompute computes them once more from the files beside
this page.</p><div class=plots><figure>{figures}</figure></div></section>
<footer>MovieLens-100K is by GroupLens: F. M. Harper and J. A. Konstan, “The MovieLens Datasets: History and Context”,
ACM TiiS 5(4), 2015.</footer>
</main></body></html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --card: #ffffff; --ink: #1d2327; --soft: #59636b; --faint: #d5dadd;
  --ours: #0b6fb8; --other: #c4501b; --third: #8a5fb0; --limit: #6d7880; --yes: #1a7f4b; --no: #c22f2f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --card: #1c2226; --ink: #e6eaec; --soft: #a3adb4; --faint: #3a444b;
    --ours: #59b2f2; --other: #f08a5b; --third: #c4a1e6; --limit: #93a0a9; --yes: #5bc98e; --no: #ff7b72;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 2.1rem; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 1.3rem; margin: 48px 0 8px; }
p { max-width: 78ch; margin: 0 0 12px; color: var(--soft); }
.lead { font-size: 1.1rem; margin: 4px 0 24px; }
.warning { color: var(--no); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 16px 18px; }
.card h3 { margin: 0; font-size: 0.9rem; font-weight: 500; color: var(--soft); }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; color: var(--ours); letter-spacing: -0.01em; }
.card p { margin: 0; font-size: 0.9rem; }
ul { list-style: none; padding: 0; margin: 0 0 16px; }
li { display: flex; gap: 10px; padding: 2px 0; }
li i { font-style: normal; flex: none; width: 1em; text-align: center; color: var(--soft); }
i.yes { color: var(--yes); }
i.no { color: var(--no); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 16px; }
figure {
  margin: 0; padding: 14px; min-width: 0;
  background: var(--card); border: 1px solid var(--faint); border-radius: 10px;
}
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th { text-align: left; font-weight: 500; }
tr:last-child > * { border-bottom: 0; }
.head > * { color: var(--soft); font-weight: 400; }
code { font: 0.9em ui-monospace, "DejaVu Sans Mono", monospace; }
footer { margin-top: 48px; font-size: 0.85rem; color: var(--soft); max-width: 90ch; }
@media print { .card, figure { break-inside: avoid; } }
"""
