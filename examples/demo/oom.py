# SPDX-License-Identifier: Apache-2.0
"""OOM: a table that outgrows its memory budget eight times, trained to the end.

Beside it, on the same stream: `outgrow`, torch.nn.Embedding under the same cap on memory, and `forget`, our
table losing each row it would have moved to disk.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import damo_embedding as de
from demo import memory
from demo.array_file import ArrayFile
from demo.metrics import auc
from demo.progress import Progress
from demo.runner import Job, Runner
from demo.settings import settings, size_in_bytes
from demo.stream import Stream
from demo.stream_model import StreamTrainer, learn_step, our_embeddings, warm_up
from demo.workspace import bytes_on_disk

SAMPLES = 60  # points of the plots of rows, memory and disk
END = 0.1  # "ends at": the last tenth of the stream


def run(runner: Runner) -> dict[str, Any]:
    [ours] = runner.run(Job("oom", "damo_embedding", {}))
    forgetful, outgrown = runner.run(
        Job("forget", "evicted rows reset", {"rows": ours["hot_rows"]}),
        Job("outgrow", "torch.nn.Embedding, same cap", {}),
    )
    return {"ours": ours, "forgetful": forgetful, "torch": outgrown}


def work(directory: Path, quick: bool, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    size = settings(quick).stream
    out = directory / "stream"
    out.mkdir(exist_ok=True)
    stream = Stream(size)
    torch.set_num_threads(1)  # the core's threads do the work
    stream.batch(0).distinct()
    arrays_of_a_step = warm_up(size)
    progress.total(size.steps)

    events = size.steps * size.batch
    seconds = np.zeros(size.steps)
    distinct = np.zeros(size.steps, np.int64)
    series: dict[str, list[int]] = {"step": [], "rows": [], "memory": [], "peak": [], "disk": []}
    with ExitStack() as files:
        labels = files.enter_context(ArrayFile(out / "labels.npy", np.uint8, events))
        teacher = files.enter_context(ArrayFile(out / "teacher.npy", np.float32, events))
        scores = files.enter_context(ArrayFile(out / "ours.npy", np.float32, events))

        memory.cap_growth(size_in_bytes(size.cap))
        memory.reset_peak()
        before, peak_before = memory.resident(), memory.peak()
        del arrays_of_a_step

        def sample(step: int, rows: int) -> None:
            peak = memory.peak()
            # Where the peak cannot be reset, that of before hides what comes after, unless it is topped: then
            # the samples tell.
            growth = {
                "memory": memory.resident() - before,
                "peak": peak - before if peak > peak_before else 0,
            }
            for name, value in {
                "step": step,
                "rows": rows,
                **growth,
                "disk": bytes_on_disk(out / "storage"),
            }.items():
                series[name].append(value)

        with de.Storage(out / "storage", memory=size.memory, log_bytes=size_in_bytes(size.log)) as storage:
            embeddings = our_embeddings(storage, size)
            trainer, tables = StreamTrainer(embeddings, size), list(embeddings.embeddings.values())
            for step in range(size.steps):
                batch = stream.batch(step)
                logits, seconds[step] = learn_step(storage, trainer, batch, step)
                distinct[step] = batch.distinct()
                labels.append(batch.labels)
                teacher.append(batch.teacher)
                scores.append(logits)
                rows = sum(map(len, tables))
                if step % max(1, size.steps // SAMPLES) == 0:
                    sample(step, rows)
                progress.tick(f"{rows:,} rows")
            storage.commit(step=size.steps)
            stats = storage.stats()
            updates = sum(
                int(part.update_counts.sum(dtype=np.int64)) for table in tables for part in table.scan(batch=8192)
            )
        sample(size.steps - 1, rows)
    np.save(out / "seconds.npy", seconds)
    np.save(out / "distinct.npy", distinct)
    np.savez(out / "series.npz", **{name: np.array(values) for name, values in series.items()})
    return {
        "rows": rows,
        "updates": updates,
        "distinct": int(distinct.sum()),
        "row_bytes": size.dimension * 4 * 3 + 8,
        "memory_growth_bytes": max(series["memory"] + series["peak"]),
        "disk_bytes": bytes_on_disk(out / "storage"),
        "stats": stats,
        "hot_rows": stats["hot_rows"],
        "from_disk": stats["cold_hits"] / (stats["hits"] + stats["misses"]),
        **ends(out, "ours"),
        "samples_per_second": samples_per_second(seconds, size.batch),
    }


def ends(out: Path, name: str) -> dict[str, float]:
    """The AUC over the last tenth of the stream, and the teacher's own over the same events."""
    labels, teacher, scores = (np.load(out / f"{each}.npy", mmap_mode="r") for each in ("labels", "teacher", name))
    start = len(scores) - int(len(scores) * END)
    end = len(scores)
    return {
        "auc": auc(labels[start:end], scores[start:]),
        "ceiling": auc(labels[start:end], teacher[start:end]),
    }


def samples_per_second(seconds: np.ndarray, batch: int) -> float:
    """Over the last quarter of the stream, when most of the table is on disk."""
    last = seconds[-(len(seconds) // 4) :]
    return float(batch * len(last) / last.sum())
