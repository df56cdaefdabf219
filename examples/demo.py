#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The main job, end to end, on real data and at scale. `scripts/demo` sets a machine up and runs this.

DAMO_ML100K names the folder with ml-100k.inter, ml-100k.user and ml-100k.item. The parts are in the folder
`demo` beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from demo import kill, oom, oov, price, report, right, serve, workspace
from demo.runner import Runner
from demo.settings import settings
from demo.summary import Claim, Results, claims, result_json, table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Damo-Embedding's main job on real data and at scale.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="where everything is left (default: demo-out)"
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("DAMO_ML100K"), help="the folder of MovieLens-100K")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="everything once at a small size, for tests: its figures mean nothing",
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("the folder of MovieLens-100K is missing: run scripts/demo, or give --data or DAMO_ML100K")
    return arguments


def run(out: Path, data: Path, quick: bool) -> Results:
    """All parts in order, each followed by the lines that say what it showed."""
    runner, sizes = Runner(out, quick), settings(quick)
    started = time.perf_counter()
    results = Results(quick=quick, settings=sizes)

    def show(part: str) -> None:
        workspace.write_json(out / "details.json", results.details())
        for claim in claims(results, part):
            print(f"  {claim.mark()} {claim.text}", flush=True)

    def begin(title: str) -> None:
        print(f"\n{title}", flush=True)

    begin("1 Right: DeepFM on MovieLens-100K, without a vocabulary")
    results.right = right.run(runner, data)
    show("right")
    begin("2 OOV: the same ratings in time order, predicted before they are learnt")
    results.oov = oov.run(runner, data)
    show("oov")
    begin("3 OOM: a stream of events, a table that outgrows its memory budget")
    results.oom = oom.run(runner)
    show("oom")
    begin("4 Price: while the table fits into memory")
    results.price = price.run(runner)
    show("price")
    begin("5 Kill: SIGKILL half-way, and on from the checkpoint")
    results.kill = kill.run(runner, sizes)
    show("kill")
    begin("6 Serve: the dump of the big table")
    results.serve = serve.run(runner)
    show("serve")
    results.seconds = time.perf_counter() - started
    return results


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out
    workspace.prepare(out)
    try:
        results = run(out, Path(arguments.data).resolve(), arguments.quick)
        workspace.write_json(out / "details.json", results.details())
        workspace.write_json(out / "result.json", result_json(results))
        report.write(out, results)
    except KeyboardInterrupt:
        print(f"\nStopped. The storages in {out} were closed: damo_embedding.Storage(path) opens them again.")
        return 130
    print()
    print(table(results))
    print(f"\n{results.seconds:.0f} s. {out}/report.html shows it, {out}/result.json holds the figures, and")
    print(f"scripts/recompute {out} computes them once more from the files there.")
    failed: list[Claim] = [claim for claim in claims(results) if claim.holds is False]
    if failed and not arguments.quick:
        print(f"\n{len(failed)} of the claims above did not hold in this run.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
