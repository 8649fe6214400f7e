"""Several GPUs through ultralytics' own DDP launcher. UNTESTED: written where no GPU was at hand.

The launcher starts one process a GPU, each of which builds a `StoreTrainer` anew. What a rank needs is in the run
folder: config.json, and last.pt when it is resumed. Rank 0 writes what a single process would write.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from store.reader import open_store
from train.config import TrainConfig
from train.engine.yolo.trainer import TrainingJob, ignore
from train.events import SilentObserver
from train.rundir import CONFIG, METRICS

log = logging.getLogger(__name__)


def job_of_rank(run: Path) -> TrainingJob:
    """The job that the launching process described in `run`/config.json."""
    from ultralytics.utils import RANK

    from train.engine.yolo.assemble import build_job
    from train.engine.yolo.offline import prepare_ultralytics
    from train.engine.yolo.recorder import Recorder, describe_run
    from train.engine.yolo.run import resume_state

    prepare_ultralytics()
    options = json.loads((run / CONFIG).read_text(encoding="utf-8"))["options"]
    config = TrainConfig(**options)
    state = resume_state(run)
    job = build_job(config, run, open_store(config.store), state)
    first_epoch = 0 if state is None else state["epoch"] + 1
    job.epoch_finished = ignore
    if RANK in (-1, 0):
        job.epoch_finished = Recorder(
            run, config, describe_run(job), SilentObserver(), first_epoch
        ).epoch_finished
    return job


def records_of(run: Path) -> list[dict[str, Any]]:
    """What rank 0 wrote to metrics.jsonl."""
    return [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
