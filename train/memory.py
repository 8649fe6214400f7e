"""A training that runs out of memory: it ends with advice, or continues with smaller batches (--auto-batch)."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from processes.deadline import nothing_to_save
from train.config import TrainConfig
from train.fit import FitRequest, FitResult, Trainer
from train.loop.machine import MEMORY_ADVICE, OutOfMemoryError, explain_device_error, is_out_of_memory
from train.run_folder import RunFolder


def fit_in_memory(trainer: Trainer, request: FitRequest) -> FitResult:
    """Train to the end. Raises OutOfMemoryError with advice, and what training raises."""
    request = replace(request, config=resumed_batches(request.config, request.folder))
    while True:
        try:
            return trainer.fit(request)
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
