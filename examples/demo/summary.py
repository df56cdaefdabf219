# SPDX-License-Identifier: Apache-2.0
"""What the parts have shown: as claims, as the figures of result.json, as the last table on the screen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from demo.settings import Settings, size_in_bytes

MIB = 1 << 20
Part = dict[str, Any]


@dataclass
class Results:
    """What each part returned."""

    quick: bool
    settings: Settings
    right: Part = field(default_factory=dict)
    oov: Part = field(default_factory=dict)
    oom: Part = field(default_factory=dict)
    price: Part = field(default_factory=dict)
    kill: Part = field(default_factory=dict)
    serve: Part = field(default_factory=dict)
    seconds: float = 0.0

    def details(self) -> Part:
        return asdict(self)

    @property
    def budget(self) -> int:
        return size_in_bytes(self.settings.stream.memory)

    @property
    def table_bytes(self) -> int:
        """Keys, weights and optimizer state alone: what the data itself takes, without headers, index or file
        format.
        """
        ours = self.oom["ours"]
        return int(ours["rows"] * ours["row_bytes"])


@dataclass(frozen=True)
class Claim:
    part: str
    text: str
    holds: bool | None = None  # None: a figure to look at, not a promise

    def mark(self) -> str:
        return {True: "ok ", False: "NO ", None: "   "}[self.holds]


def claims(results: Results, part: str | None = None) -> list[Claim]:
    """Everything that can be said of the parts that have run, or of one of them."""
    sayings = {"right": _right, "oov": _oov, "oom": _oom, "price": _price, "kill": _kill, "serve": _serve}
    return [
        Claim(name, text, holds)
        for name, say in sayings.items()
        if (part is None or name == part) and getattr(results, name)
        for text, holds in say(results)
    ]


Sayings = list[tuple[str, bool | None]]


def _right(results: Results) -> Sayings:
    lines: Sayings = []
    for features, label in (("all", "all features"), ("user_item", "user and item only")):
        both = results.right[features]
        ours, torchs = both["ours"]["mean"], both["torch"]["mean"]
        text = (
            f"{label}: test AUC {ours:.4f}, torch.nn.Embedding with a vocabulary {torchs:.4f} "
            f"(mean of {len(both['ours']['seeds'])} random 80/20 splits; within 0.003, both above 0.78)"
        )
        lines.append((text, abs(ours - torchs) <= 0.003 and min(ours, torchs) >= 0.78))
    return lines


def _oov(results: Results) -> Sayings:
    ours, frozen = results.oov["ours"], results.oov["torch"]
    share = ours["events_of_new_users"] / ours["events"]
    text = (
        f"progressive AUC {ours['auc']:.4f}; nn.Embedding with the training vocabulary and an OOV row "
        f"{frozen['auc']:.4f}"
    )
    return [
        (f"{share:.0%} of the last {ours['events']:,} ratings are by users nobody had seen", None),
        (text, ours["auc"] > frozen["auc"]),
    ]


def _oom(results: Results) -> Sayings:
    ours, forgetful, torchs = results.oom["ours"], results.oom["forgetful"], results.oom["torch"]
    size, budget, died = results.settings.stream, results.budget, torchs["died_at_rows"]
    times, growth = results.table_bytes / budget, ours["memory_growth_bytes"]
    gap = ours["ceiling"] - ours["auc"]
    end = "ended too" if died is None else f"died at row {died + 1:,}"
    return [
        (
            f"{ours['rows']:,} rows, {results.table_bytes / MIB:,.0f} MiB of keys, weights and state: "
            f"{times:.1f} times the budget of {size.memory}",
            times >= 8,
        ),
        (
            f"memory grew by {growth / MIB:.1f} MiB; the budget plus 10 % is {budget * 1.1 / MIB:.1f} MiB",
            growth <= 1.1 * budget,
        ),
        (
            f"{ours['from_disk']:.0%} of the lookups hit rows that came back from disk",
            ours["from_disk"] >= 0.2,
        ),
        (
            f"with at most {size.cap} more of private memory (RLIMIT_DATA, for both) ours ended, and "
            f"torch.nn.Embedding {end}",
            died is not None,
        ),
        (
            f"AUC of the last tenth {ours['auc']:.4f}; the teacher's own, the ceiling: "
            f"{ours['ceiling']:.4f}, {gap:.4f} away",
            gap <= 0.02,
        ),
        (f"with every evicted row reset it is {forgetful['auc']:.4f}", forgetful["auc"] < ours["auc"]),
        (
            f"the update counts of all rows add up to {ours['updates']:,}, the distinct ids of all steps to "
            f"{ours['distinct']:,}",
            ours["updates"] == ours["distinct"],
        ),
    ]


def _price(results: Results) -> Sayings:
    price, cold = results.price, results.oom["ours"]["samples_per_second"]
    times = results.table_bytes / results.budget
    return [
        (
            f"{price['samples_per_second']:,.0f} samples/s; nn.Embedding + SparseAdam "
            f"{price['samples_per_second_torch']:,.0f} ({price['rows']:,} rows; each at its best)",
            None,
        ),
        (f"{cold:,.0f} samples/s at {times:.1f} times the memory budget", None),
    ]


def _kill(results: Results) -> Sayings:
    kill = results.kill
    verdict = "equal" if kill["equal"] else "DIFFER FROM"
    text = (
        f"killed after step {kill['killed_at']}, resumed at step {kill['resumed_at']}: {kill['rows']:,} "
        f"rows with their state and {kill['dense']:,} dense numbers {verdict} those of a run left alone, bit by bit"
    )
    return [(text, kill["equal"])]


def _serve(results: Results) -> Sayings:
    serve = results.serve
    text = (
        f"{serve['rows']:,} rows in a file of {serve['bytes'] / MIB:,.0f} MiB, read back: weights "
        f"{'equal' if serve['identical'] else 'DIFFER'}"
    )
    return [(text, serve["identical"])]


def result_json(results: Results) -> dict[str, Any]:
    ours = results.oom["ours"]
    return {
        "auc": results.right["all"]["ours"]["mean"],
        "auc_torch": results.right["all"]["torch"]["mean"],
        "auc_online": results.oov["ours"]["auc"],
        "auc_frozen_vocab": results.oov["torch"]["auc"],
        "auc_stream": ours["auc"],
        "auc_stream_ceiling": ours["ceiling"],
        "rows": ours["rows"],
        "table_bytes": results.table_bytes,
        "memory_budget_bytes": results.budget,
        "memory_growth_bytes": ours["memory_growth_bytes"],
        "disk_bytes": results.serve["disk_bytes"],
        "torch_died_at_rows": results.oom["torch"]["died_at_rows"],
        "samples_per_second": results.price["samples_per_second"],
        "samples_per_second_torch": results.price["samples_per_second_torch"],
        "samples_per_second_cold": ours["samples_per_second"],
        "killed_and_equal": results.kill["equal"],
        "dump_rows": results.serve["rows"],
        "dump_identical": results.serve["identical"],
    }


def table(results: Results) -> str:
    """The figures of result.json for a person, in two columns: ours, and what it stands beside."""
    figures, user_item = result_json(results), results.right["user_item"]
    ours, died = results.oom["ours"], figures["torch_died_at_rows"]
    times = results.table_bytes / results.budget

    def auc(value: float) -> str:
        return f"{value:.4f}"

    def count(value: float) -> str:
        return f"{value:,.0f}"

    def mib(value: float) -> str:
        return f"{value / MIB:,.1f} MiB"

    def yes(value: bool) -> str:
        return "yes" if value else "NO"

    lines = [
        ("", "damo_embedding", "", ""),
        (
            "test AUC, all features",
            auc(figures["auc"]),
            auc(figures["auc_torch"]),
            "nn.Embedding, vocabulary",
        ),
        (
            "test AUC, user and item",
            auc(user_item["ours"]["mean"]),
            auc(user_item["torch"]["mean"]),
            "the same",
        ),
        (
            "AUC, users never seen",
            auc(figures["auc_online"]),
            auc(figures["auc_frozen_vocab"]),
            "frozen vocabulary",
        ),
        (
            "AUC, end of the stream",
            auc(figures["auc_stream"]),
            auc(figures["auc_stream_ceiling"]),
            "teacher's ceiling",
        ),
        ("", "", auc(results.oom["forgetful"]["auc"]), "evicted rows reset"),
        ("rows", count(figures["rows"]), "all" if died is None else count(died), "nn.Embedding died at"),
        ("table", mib(figures["table_bytes"]), mib(figures["memory_budget_bytes"]), "memory budget"),
        ("memory growth", mib(figures["memory_growth_bytes"]), mib(1.1 * results.budget), "budget + 10 %"),
        ("on disk", mib(figures["disk_bytes"]), "", ""),
        ("lookups served from disk", f"{ours['from_disk']:.0%}", "", ""),
        (
            "samples/s in memory",
            count(figures["samples_per_second"]),
            count(figures["samples_per_second_torch"]),
            "nn.Embedding + SparseAdam",
        ),
        (f"samples/s at {times:.1f} x the budget", count(figures["samples_per_second_cold"]), "", ""),
        (
            "killed, resumed, equal",
            yes(figures["killed_and_equal"]),
            count(results.kill["rows"]),
            "rows compared",
        ),
        (
            "dump read back, equal",
            yes(figures["dump_identical"]),
            count(figures["dump_rows"]),
            "rows compared",
        ),
    ]
    a, b, c = (max(len(line[i]) for line in lines) for i in range(3))
    text = [f"  {w:<{a}}  {x:>{b}}  {y:>{c}}  {z}".rstrip() for w, x, y, z in lines]
    return "\n".join([text[0], "  " + "-" * max(map(len, text)), *text[1:]])
