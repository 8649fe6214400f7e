"""How well classes can be told apart by a label-free student's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from store.reader import Store
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data.batches import BatchLoader
from train.data.splits import TrainingData
from train.data.views import AUGMENTATIONS
from train.distill.objective import Objective
from train.distill.projector import pooled_rows
from train.loop.assemble import Built, build_loader


def feature_quality(
    built: Built, config: TrainConfig, store: Store, data: TrainingData, best: Path
) -> dict[str, float]:
    """k-NN and linear-probe accuracy of a label-free student's pooled features, both fitted on the training split.

    Of the student in `best`, which is loaded. Empty without labels, and on ranks other than 0.
    """
    from store.quality import knn_accuracy, probe_accuracy

    labeled = data.train_labels is not None and data.val_labels is not None
    # Only rank 0 writes the summary, and another machine may not have best.pt.
    if not labeled or not built.parts.accelerator.is_main_process:
        return {}
    built.student.load_state_dict(load_checkpoint(best)["model_state_dict"])
    arguments = []
    for training, labels in ((True, data.train_labels), (False, data.val_labels)):
        assert labels is not None
        plain = Objective(built.parts.objective.task)
        loader = build_loader(
            config, store, data, plain, built.parts.accelerator, AUGMENTATIONS["none"], training=training
        )
        rows, features = student_features(built, loader)
        arguments += [features, labels[rows]]
    if any((labels < 0).all() for labels in arguments[1::2]):
        return {}
    return {"knn_top1": knn_accuracy(*arguments), "probe_top1": probe_accuracy(*arguments)}


@torch.no_grad()
def student_features(built: Built, loader: BatchLoader) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows int64 [N] and pooled features float32 [N, D] of everything a loader shows, this process alone."""
    loader.batches.rank, loader.batches.world = 0, 1
    student, device = built.student.eval(), built.parts.accelerator.device
    rows, features = [], []
    for batch in loader.epoch(0):
        images = built.parts.normalize(batch.images.to(device))
        lengths = batch.lengths
        output = student(images) if lengths is None else student(images, lengths)
        mask = None if lengths is None else torch.arange(images.shape[1])[None] < lengths[:, None]
        pooled = pooled_rows(output.features, None if mask is None else mask.to(device))
        rows.append(batch.rows)
        features.append(pooled.float().cpu().numpy())
    return np.concatenate(rows), np.concatenate(features)
