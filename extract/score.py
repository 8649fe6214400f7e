"""`--logits zero-shot`: the full VLM scores the class names for every image, in a pass of its own.

`zero-shot-calibrated` subtracts the scores of an empty image; it is an array of its own, so both can be compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from console.stop import Stopped, StopRequest
from extract.config import ZERO_SHOT, ConfigError, ExtractConfig
from extract.decode.pool import DecodePool
from extract.encode import AdaptiveBatch, DeviceCopies
from extract.inputs import decode_workers, open_data, open_teacher
from extract.plan import ExtractTask, make_task
from extract.result import ExtractObserver, logits_stop_message
from extract.resume import adopt_rows
from extract.teachers.zero_shot import ZeroShotScorer
from processes.deadline import StopDeadline
from store.create import add_arrays
from store.finalize import finalize_store
from store.format import LOGITS, logits_array
from store.writer import StoreWriter


def add_zero_shot(
    config: ExtractConfig, observers: Sequence[ExtractObserver], stop: StopRequest, deadline: StopDeadline
) -> None:
    """Write `logits/zero-shot` (or `zero-shot-calibrated`) [N, C]; an interrupted run goes on where it was.

    Raises:
        Stopped: when a signal came, with the scores so far committed.
        ConfigError: for a teacher without a language model, or a data set without class names.
    """
    from extract.teachers.qwen2_5_vl import Qwen25VLTeacher, load_zero_shot

    source, teacher = open_data(config), open_teacher(config)
    if not source.class_names or not isinstance(teacher, Qwen25VLTeacher):
        raise ConfigError(f"--logits {config.logits} needs Qwen2.5-VL and a data set with class names")
    calibrate = config.logits != ZERO_SHOT
    scorer = load_zero_shot(str(config.teacher_path), teacher, source.class_names, calibrate=calibrate)
    task = adopt_rows(make_task(config, source, teacher), config.out)
    array = logits_array(config.logits, len(source.class_names))
    job = add_arrays(config.out, [array])
    done, total = 0, task.rows
    for split in task.splits:
        with StoreWriter(config.out, split, job=job) as writer:
            done += writer.next_row
            for logits in score_split(config, task, writer, scorer, deadline):
                writer.append({array.name: logits}, valid=np.asarray(np.isfinite(logits).all(axis=1)))
                done += len(logits)
                for observer in observers:
                    observer.progress(done, total, "scoring")
                if stop.requested:
                    writer.commit()
                    raise Stopped(logits_stop_message(config), stop.exit_code)
    finalize_store(config.out, job=job)


def abandon_in_time(pool: DecodePool, config: ExtractConfig) -> str:
    """The last resort of a stop: nothing is left behind, and the line for the user."""
    pool.abandon()
    return logits_stop_message(config)


def score_split(
    config: ExtractConfig,
    task: ExtractTask,
    writer: StoreWriter,
    scorer: ZeroShotScorer,
    deadline: StopDeadline,
) -> Iterator[npt.NDArray[np.float32]]:
    """Logits float32 [B, C] of the rows that are not written yet; NaN for bad images.

    On CUDA the device scores the next batch while the last one's logits are copied and written.
    """
    samples = task.splits[writer.split]
    cuts = ((first, samples.between(first, end)) for first, end in writer.batches())
    device = scorer.teacher.device
    copies = DeviceCopies(device)
    launched: deque[Scores] = deque()
    with DecodePool(task.job, writer.job.batch_rows, decode_workers(config)) as pool:
        deadline.save = partial(abandon_in_time, pool, config)
        parts = AdaptiveBatch(writer.job.batch_rows, device, config.image_size)
        for batch in pool.batches(cuts):
            images = copies.to_device(torch.from_numpy(batch.pixels[:, 0]))
            logits = torch.cat(parts.run(len(images), partial(score_part, scorer, images)))
            host, ready = copies.to_host({LOGITS: logits})
            bad = [result.reason is not None for result in batch.results]
            pool.release(batch)  # its pixels were copied, or on a CPU scored
            launched.append(Scores(host[LOGITS], ready, bad))
            if len(launched) > copies.depth:
                yield launched.popleft().values()
        for scores in launched:
            yield scores.values()


class Scores(NamedTuple):
    """Logits [B, C] of a batch that the device may still be working on, and which of its images are bad."""

    logits: Tensor
    ready: torch.cuda.Event | None
    bad: list[bool]

    def values(self) -> npt.NDArray[np.float32]:
        """Wait for the device; float32 [B, C], NaN for bad images."""
        if self.ready is not None:
            self.ready.synchronize()
        values: npt.NDArray[np.float32] = self.logits.numpy()
        values[self.bad] = np.nan
        return values


def score_part(scorer: ZeroShotScorer, images: Tensor, some: slice) -> Tensor:
    """Logits float32 [b, C] on the device of some of the images, uint8 [B, 3, S, S]."""
    return scorer.score_images(images[some]).float()
