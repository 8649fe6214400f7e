"""What benchmarks/learning.py asks of the teacher itself: ceilings for the students, and stored against live features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.learning_sets import probe_miou
from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights

if TYPE_CHECKING:
    from benchmarks.learning import Bench
    from benchmarks.learning_studies import Study

TEACHER_SIZE = 160
PROBE_STRENGTH = 0.003  # of the per-cell probe's regularization (scikit-learn's C), on standardized features


def probe_ceiling(bench: Bench, study: Study, draw: int) -> float | None:
    """The study's metric on the test split, of a linear probe on the teacher's features and the study's labels.

    Of masks of --data: `cli probe`'s figure on the validation split; None for boxes.
    """
    from store.format import LABEL, LOGITS, POOLED
    from store.quality import probe_accuracy
    from store.reader import open_store

    if study.data and study.metric == "top1":
        tested = open_store(bench.store(study, draw, unlabeled=True))["test"]
        return float((tested.read(f"{LOGITS}/probe").argmax(1) == tested.read(LABEL)).mean())
    if study.data:
        return probe_miou(bench.store(study, draw, unlabeled=True))
    if study.scenes:
        return cell_probe_ceiling(bench, study)
    learnt = open_store(bench.store(study, draw, unlabeled=study.unlabeled))["train"]
    parts = []
    for split in (learnt, open_store(bench.test_store(study))["test"]):
        features = split.read(POOLED).astype(np.float32) * split.scale[POOLED]
        labels = split.read(LABEL)
        parts += [features[labels >= 0], labels[labels >= 0]]
    return probe_accuracy(*parts)


def cell_probe_ceiling(bench: Bench, study: Study) -> float:
    """mIoU on the test split of a probe that gives every grid cell one class, that of most of its pixels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import jaccard_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, masks = cells_and_masks(bench, study, "train")
    tested, truth = cells_and_masks(bench, study, "test")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_STRENGTH, max_iter=1000))
    probe.fit(features.reshape(-1, features.shape[-1]), majority(masks, features.shape[1]).ravel())
    cells = probe.predict(tested.reshape(-1, tested.shape[-1])).reshape(tested.shape[:3])
    side = truth.shape[1]
    nearest = np.arange(side) * cells.shape[1] // side
    predicted = cells[:, nearest][:, :, nearest]
    return float(jaccard_score(truth.ravel(), predicted.ravel(), average="macro"))


def cells_and_masks(bench: Bench, study: Study, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A split's grids float32 [N, g, g, D] in true units, and its masks uint8 [N, H, W]."""
    from PIL import Image

    from store.format import GRID
    from store.reader import open_store

    split = open_store(bench.test_store(study))[name]
    folder = bench.work / "scenes" / "masks" / name
    masks = [np.asarray(Image.open(folder / Path(key).name)) for key in split.keys]
    return split.read(GRID).astype(np.float32) * split.scale[GRID], np.stack(masks)


def majority(masks: np.ndarray, cells: int) -> np.ndarray:
    """The most frequent class of every cell: masks [N, H, W] → [N, cells, cells]."""
    classes = np.arange(masks.max() + 1)
    edges = np.arange(cells) * masks.shape[1] // cells
    one_hot = (masks[..., None] == classes).astype(np.int32)
    counts = np.add.reduceat(np.add.reduceat(one_hot, edges, axis=1), edges, axis=2)
    return classes[counts.argmax(-1)]


def fidelity(bench: Bench, study: Study) -> dict[str, float]:
    """Stored grids against live encoding, standardized, cosine of every token."""
    from PIL import Image

    from extract.teachers import load_teacher
    from store.format import GRID
    from store.reader import open_store

    path = bench.store(study, 0, unlabeled=False)
    split = open_store(path)["val"]
    teacher: Any = load_teacher(
        PRETRAINED_TEACHER,
        str(pretrained_teacher_weights()),
        device="cpu",
        dtype="float32",
        image_size=TEACHER_SIZE,
    )
    images = [Image.open(bench.work / "scenes" / split.keys[row]).convert("RGB") for row in range(len(split))]
    live = np.asarray(teacher.encode(images).grid)
    statistics = split.statistics[GRID]
    stored = split.read(GRID).astype(np.float32) * split.scale[GRID]
    spread = np.where(statistics.std > 0, statistics.std, 1)
    a, b = ((grid - statistics.mean) / spread for grid in (stored, live))
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return {
        "tokens": int(cosine.size),
        "mean": float(cosine.mean()),
        "percentile_1": float(np.percentile(cosine, 1)),
    }
