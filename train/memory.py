"""A training whose batch does not fit: it ends with advice, or out of memory continues with smaller batches (--auto-batch)."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from processes.stop import nothing_to_save
from train.config import TrainConfig
from train.errors import TrainError
from train.fit import FitRequest, FitResult, Trainer
from train.loop.machine import MEMORY_ADVICE, OutOfMemoryError, explain_device_error, is_out_of_memory
from train.run_folder import RunFolder

#: Of torch.nn.functional.batch_norm, which a batch of one sample with a map of 1 × 1 cells causes.
BATCH_NORM_ERROR = "Expected more than 1 value per channel"


def fit_in_memory(trainer: Trainer, request: FitRequest) -> FitResult:
    """Train to the end. Raises OutOfMemoryError with advice, and what training raises."""
    request = replace(request, config=resumed_batches(request.config, request.folder))
    while True:
        try:
            return trainer.fit(request)
        except ValueError as error:
            if BATCH_NORM_ERROR not in str(error):
                raise
            raise TrainError(
                f"batch_size {trainer.batch_size}, image_size {request.config.image_size}: batch normalization got one "
                "value per channel and needs more: pass a larger --batch-size or --image-size"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                known = explain_device_error(error)
                if known is None:
                    raise
                raise known from error
            smaller = trainer.reduce_batch(request.config, request.folder)
            if smaller is None:
                raise OutOfMemoryError(f"{MEMORY_ADVICE} (batch_size {trainer.batch_size})") from error
        # The deadline still holds the training that failed, and with it all its memory; the error did, up to here.
        request.deadline.save = nothing_to_save
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        request = replace(request, config=smaller)


def resumed_batches(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """A run whose batch was reduced resumes with it: positions in an epoch count its steps."""
    if not (config.auto_batch and config.resume and folder.last.exists()):
        return config
    before = folder.read_resolved()
    names = ("batch_size", "grad_accum_steps")
    return config.replace(**{name: before[name] for name in names if name in before})
