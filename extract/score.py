"""`--logits zero-shot`: the full VLM scores the class names for every image, in a pass of its own.

`zero-shot-calibrated` subtracts the scores of an empty image; it is an array of its own, so both can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from console.stop import StopRequest
from extract.config import ConfigError, ExtractConfig
from extract.existing import adopt_rows
from extract.logits import ZERO_SHOT, Floats, raise_if_stopped
from extract.outcome import ExtractObserver
from extract.planning import ExtractTask, make_task
from extract.run import decode_workers, load, open_data
from extract.teachers.zero_shot import ZeroShotScorer
from extract.workers import DecodePool
from store.extend import add_arrays
from store.finalize import finalize_store
from store.format import logits_array
from store.writer import StoreWriter


def add_zero_shot(config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest) -> None:
    """Write `logits/zero-shot` (or `zero-shot-calibrated`) [N, C]; an interrupted run goes on where it was.

    Raises:
        ConfigError: for a teacher without a language model, or a data set without class names.
    """
    from extract.teachers.qwen2_5_vl import Qwen25VLTeacher, load_zero_shot

    source, teacher = open_data(config), load(config)
    if not source.class_names or not isinstance(teacher, Qwen25VLTeacher):
        raise ConfigError(f"--logits {config.logits} needs Qwen2.5-VL and a data set with class names")
    calibrate = config.logits != ZERO_SHOT
    scorer = load_zero_shot(str(config.teacher_path), teacher, source.class_names, calibrate=calibrate)
    task, _ = adopt_rows(make_task(config, source, teacher), config.out)
    array = logits_array(config.logits, len(source.class_names))
    job = add_arrays(config.out, [array])
    done, total = 0, task.rows
    for split in task.splits:
        with StoreWriter(config.out, split, job=job) as writer:
            done += writer.next_row
            for logits in score_split(config, task, writer, scorer):
                writer.append({array.name: logits}, valid=np.asarray(np.isfinite(logits).all(axis=1)))
                done += len(logits)
                for observer in observers:
                    observer.progress(done, total, "scoring")
                if stop.requested:
                    writer.commit()
                    raise_if_stopped(config, stop)
    finalize_store(config.out, job=job)


def score_split(
    config: ExtractConfig, task: ExtractTask, writer: StoreWriter, scorer: ZeroShotScorer
) -> Iterator[Floats]:
    """Logits float32 [B, C] of the rows that are not written yet; NaN for bad images."""
    samples = task.splits[writer.split]
    cuts = ((first, samples.between(first, end)) for first, end in writer.batches())
    with DecodePool(task.job, writer.job.batch_rows, decode_workers(config)) as pool:
        for batch in pool.batches(cuts):
            logits = scorer.score_images(torch.from_numpy(batch.pixels[:, 0].copy()))
            pool.release(batch)
            values = logits.float().cpu().numpy()
            values[[result.reason is not None for result in batch.results]] = np.nan
            yield values
