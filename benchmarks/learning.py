"""What the teacher's features are worth to a student: distilled against trained on labels alone.

Real images; the teacher is EfficientNet-Lite2 with its ImageNet weights (1280 wide), its features extracted once.
Emoji: learn Twitter's drawings, be judged on Google's (9 categories). Scenes: photographed objects pasted into
photographs, exact masks. Students start from random weights.

Both sides of every comparison see the same images, augmentation and number of steps. Each has its own learning rate,
the best of one grid on the validation split (with a seed that is not reported). Printed are the means on the test
split, the mean of the paired differences with its 95 % interval (Student's t), and the accuracy of a linear probe on
the teacher's features, fitted on the same labels, as the ceiling.

    python benchmarks/learning.py [--studies few,all,scenes,mixed] [--seeds 5] [--ablation] [--fidelity]
                                  [--work DIR] [--quick] [--json]

    python benchmarks/learning.py --data DIR --work DIR [--studies clothing-few,camvid-few,bccd-few,…]

With --data: clothing photos, CamVid street scenes and BCCD blood cells (docs/benchmarks.md), with few labels and all
other images unlabeled, or with all labels; and scanned digits, of which the teacher knows little. The control is
`cli train --control-only` on the same store: as many updates on the labels. Each seed gets another selection of labeled images.

Finished trainings are kept in --work and not repeated, so a run that was interrupted continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.learning_data import write_emoji_table, write_scenes
from benchmarks.learning_sets import DATA_SETS, lay_out
from benchmarks.learning_teacher import TEACHER_SIZE, fidelity, probe_ceiling
from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights

LEARNING_RATES = (1e-3, 3e-3, 6e-3)
TUNING_SEED = 100
LABELS_PER_CLASS = 10
REPEAT = 8  # a control on few images: as many steps, but not ten times the validations
# 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

CONTROL: dict[str, Any] = {"distillation_type": "none", "hard_label_weight": 1.0}
CONTROL_ONLY: dict[str, Any] = {"control_only": True}


@dataclass(frozen=True)
class Study:
    """One comparison. `distilled`: options of that side beyond the product's defaults; `common`: of both sides.

    `labels_per_class`, `unlabeled`: see `write_emoji_table`. `control_unlabeled`: the control trains on the labeled
    images alone (the others teach it nothing), for as many steps. `data`, `labels`: a folder of --data, and how many of
    its training images are labeled, see `benchmarks.learning_sets.lay_out`. `rates`: learning rates to choose from.
    """

    name: str
    title: str
    student: str
    metric: str
    epochs: int
    common: dict[str, Any]
    distilled: dict[str, Any] = field(default_factory=dict)
    labels_per_class: int | None = None
    unlabeled: bool = False
    scenes: bool = False
    data: str = ""
    labels: int | None = None
    rates: tuple[float, ...] = LEARNING_RATES


EMOJI = {"image_size": 32, "batch_size": 32, "augment": "mild"}
SCENES = {"image_size": 48, "batch_size": 8, "augment": "full"}
SMALL = "timm:resnet10t"
FEW = LABELS_PER_CLASS
STUDIES = {
    study.name: study
    for study in (
        Study("few", f"{FEW} labels a class", SMALL, "top1", 40, EMOJI, labels_per_class=FEW),
        Study("all", "all labels", SMALL, "top1", 12, EMOJI),
        Study("scenes", "segmentation", "unet/small", "miou", 12, SCENES, scenes=True),
        Study(
            "mixed",
            f"{FEW} labels a class, the other images without labels",
            SMALL,
            "top1",
            12,
            EMOJI,
            labels_per_class=FEW,
            unlabeled=True,
        ),
    )
}
USUAL = "few,all,scenes"

DATA_RATES = (1e-3, 3e-3)
PHOTOS = {"image_size": 64, "batch_size": 32}
STREETS = {"image_size": 48, "batch_size": 8}
CELLS = {"image_size": 160, "batch_size": 8, "optimizer": "adamw"}
STREETS_FIRST = {"pretrain_epochs": 20, "distillation_type": "hybrid"}
STREETS_RATES = (3e-4, 1e-3)
CELLS_FIRST = {"pretrain_epochs": 20}
DATA_STUDIES = {
    study.name: study
    for study in (
        Study(
            "clothing-few",
            "clothing, 10 labels a class, the rest unlabeled",
            SMALL,
            "top1",
            12,
            {**PHOTOS, "mixup_alpha": 0.2},
            {"labeled_share": 0.05},
            data="clothing",
            labels=10,
            rates=DATA_RATES,
        ),
        Study(
            "clothing-all",
            "clothing, all labels",
            SMALL,
            "top1",
            12,
            PHOTOS,
            data="clothing",
            rates=DATA_RATES,
        ),
        Study(
            "camvid-few",
            "CamVid, 30 labeled, the rest unlabeled",
            "unet/small",
            "miou",
            10,
            STREETS,
            STREETS_FIRST,
            data="camvid",
            labels=30,
            rates=STREETS_RATES,
        ),
        Study(
            "camvid-all",
            "CamVid, all labels",
            "unet/small",
            "miou",
            10,
            STREETS,
            STREETS_FIRST,
            data="camvid",
            rates=STREETS_RATES,
        ),
        # The teacher knows less of scanned digits than 50 labels teach: distillation must do no harm.
        Study(
            "digits",
            "digits, 50 labeled, 550 unlabeled",
            SMALL,
            "top1",
            16,
            {"image_size": 32, "batch_size": 32},
            data="digits",
            labels=50,
            rates=DATA_RATES,
        ),
        Study(
            "bccd-few",
            "BCCD, 30 labeled, the rest unlabeled",
            "yolov8n",
            "map50_95",
            60,
            CELLS,
            CELLS_FIRST,
            data="bccd",
            labels=30,
            rates=DATA_RATES,
        ),
        Study(
            "bccd-all",
            "BCCD, all labels",
            "yolov8n",
            "map50_95",
            12,
            CELLS,
            CELLS_FIRST,
            data="bccd",
            rates=DATA_RATES,
        ),
    )
}


class Bench:
    """Stores and finished trainings in one folder. `rates`: learning rates to choose from instead of those of the studies."""

    def __init__(
        self,
        work: Path,
        quick: bool,
        rates: tuple[float, ...] = (),
        draws: int | None = None,
        data: Path | None = None,
    ) -> None:
        self.work, self.quick, self.rates, self.draws, self.data = work, quick, rates, draws, data
        self.results = work / "results.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        if self.results.exists():
            lines = self.results.read_text(encoding="utf-8").splitlines()
            self.done = {record["id"]: record for record in map(json.loads, lines)}

    def store(self, study: Study, draw: int, *, unlabeled: bool) -> Path:
        """The extracted store of a study (a draw of labels), made on first use."""
        if study.data:
            return self.data_store(study, draw)
        draw = draw if study.labels_per_class else 0
        kind = (
            "scenes"
            if study.scenes
            else f"emoji-{study.labels_per_class}-{'mixed' if unlabeled else 'repeated' if study.unlabeled else 'only'}-{draw}"
        )
        path = self.work / f"{kind}.zarr"
        if not (path / "complete").exists():
            data = self.work / kind
            if study.scenes:
                counts = {"train": 120, "val": 48, "test": 120}
                table = write_scenes(data, {k: v // 8 for k, v in counts.items()} if self.quick else counts)
            else:
                every = 12 if self.quick else 1
                repeat = REPEAT if study.unlabeled and not unlabeled else 1
                table = write_emoji_table(data, study.labels_per_class, unlabeled, draw, every, repeat)
            extract(table, path, scenes=study.scenes)
            (path / "complete").touch()
        return path

    def data_store(self, study: Study, draw: int) -> Path:
        """The same of a folder of --data."""
        assert self.data is not None
        kind = f"{study.data}-{study.labels}-{draw}" if study.labels else f"{study.data}-all"
        path = self.work / f"{kind}.zarr"
        if not (path / "complete").exists():
            every = 12 if self.quick else 1
            labels = study.labels and (study.labels if every == 1 else max(2, study.labels // 2))
            found = lay_out(study.data, self.data, self.work / kind, labels, draw, every=every)
            # Every image is encoded once: a selection of labels is a copy of the store of all labels that follows it.
            base = self.data_store(replace(study, labels=None), 0) if study.labels else None
            options = DATA_SETS[study.data].options
            extract_as(found, path, DATA_SETS[study.data].source, base=base, **options)
            (path / "complete").touch()
        return path

    def draw(self, seed: int) -> int:
        """Which selection of labeled images a seed gets."""
        return seed % TUNING_SEED % (self.draws or TUNING_SEED)

    def test_store(self, study: Study) -> Path:
        """The store that holds the study's test split, which is the same for every draw."""
        if study.data:
            return self.store(study, 0, unlabeled=True)
        return self.store(STUDIES["scenes" if study.scenes else "all"], 0, unlabeled=False)

    def train(
        self, study: Study, options: dict[str, Any], learning_rate: float, seed: int, *, raw: bool = False
    ) -> dict[str, Any]:
        """Train once; `val` and `test`: the study's metric, of the best epoch on the validation split.

        `raw`: from targets that are not standardized.
        """
        control = options in (CONTROL, CONTROL_ONLY)
        unlabeled = study.unlabeled and not control
        draw = self.draw(seed)
        chosen = {**study.common, **options, "learning_rate": learning_rate, "seed": seed}
        chosen["epochs"] = 1 if self.quick else study.epochs
        if self.quick and "pretrain_epochs" in chosen:
            chosen["pretrain_epochs"] = 1
        if study.unlabeled and control:
            # The same number of steps: fewer images make shorter epochs.
            chosen["epochs"] = round(
                chosen["epochs"] * self.size(study, draw, True) / self.size(study, draw, False)
            )
        identity = hashlib.sha256(
            json.dumps(
                [
                    study.name,
                    study.student,
                    study.labels_per_class or study.labels,
                    draw,
                    self.quick,
                    raw,
                    chosen,
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()[:16]
        if identity not in self.done:
            record = {
                "id": identity,
                "study": study.name,
                "labels": study.labels_per_class or study.labels,
                "control": control,
                "raw": raw,
                **chosen,
            }
            store = self.store(study, draw, unlabeled=unlabeled)
            record |= run(
                without_statistics(store) if raw else store,
                self.test_store(study),
                study,
                chosen,
                self.work / "run",
            )
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.done[identity] = record
        return self.done[identity]

    def size(self, study: Study, draw: int, unlabeled: bool) -> int:
        """Training images of a study's store."""
        from store.reader import open_store

        return len(open_store(self.store(study, draw, unlabeled=unlabeled))["train"])

    def tune(self, study: Study, options: dict[str, Any]) -> float:
        """The learning rate that is best on the validation split."""
        rates = self.rates or study.rates
        if len(rates) == 1:
            return rates[0]
        scores = {rate: self.train(study, options, rate, TUNING_SEED)["val"] for rate in rates}
        return max(scores, key=scores.__getitem__)


def extract(data: Path, out: Path, *, scenes: bool) -> None:
    """Stage one of emoji or scenes."""
    options = {"grid": "native", "logits": "none"} if scenes else {"grid": 0, "logits": "probe"}
    extract_as(data, out, "masks" if scenes else "table", image_size=TEACHER_SIZE, **options)


def extract_as(data: Path, out: Path, source: str, base: Path | None = None, **options: Any) -> None:
    """Stage one, as `cli extract` does it; `base`: a store to start from, of the same images with other labels."""
    from extract.config import ExtractConfig
    from extract.run import run_extraction

    if out.exists():
        shutil.rmtree(out)
    if base is not None:
        shutil.copytree(base, out, ignore=shutil.ignore_patterns("complete"))
    run_extraction(
        ExtractConfig(
            data=str(data),
            out=out,
            source=source,  # type: ignore[arg-type]
            teacher=PRETRAINED_TEACHER,
            teacher_path=str(pretrained_teacher_weights()),
            workers=0,
            **options,
        )
    )


def run(store: Path, test_store: Path, study: Study, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """One training and its test."""
    from train.config import TrainConfig
    from train.deliver.evaluate import evaluate_run
    from train.run import run_training

    start = time.perf_counter()
    settings = {**options, "workers": 0, "device": "cpu", "overwrite": True}
    summary = run_training(TrainConfig(store=str(store), student=study.student, out=out, **settings))
    tested = evaluate_run(out, test_store, split="test", workers=0, device="cpu")
    return {
        "val": summary["metrics"][study.metric],
        "test": tested["metrics"][study.metric],
        "best_epoch": summary["best_epoch"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return mean, math.nan
    return mean, T_QUANTILE[count - 1] * float(np.std(differences, ddof=1)) / math.sqrt(count)


def compare(bench: Bench, study: Study, options: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Distilled against control, each with its own learning rate, over the same seeds."""
    alone = CONTROL_ONLY if study.data else CONTROL
    rates = {"distilled": bench.tune(study, options), "control": bench.tune(study, alone)}
    distilled, control = [], []
    for seed in range(seeds):
        distilled.append(bench.train(study, options, rates["distilled"], seed)["test"])
        control.append(bench.train(study, alone, rates["control"], seed)["test"])
    mean, half = interval([a - b for a, b in zip(distilled, control, strict=True)])
    drawn = study.labels_per_class or study.labels
    draws = sorted({bench.draw(seed) for seed in range(seeds)}) if drawn else [0]
    ceilings = [probe_ceiling(bench, study, draw) for draw in draws]
    return {
        "study": study.title,
        "student": study.student,
        "metric": study.metric,
        "seeds": seeds,
        "control": float(np.mean(control)),
        "distilled": float(np.mean(distilled)),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "probe": float(np.mean([value for value in ceilings if value is not None]))
        if any(ceilings)
        else None,
        "learning_rates": rates,
        "draws": len(draws),
    }


# Variants of the distilled side. `NOT_STANDARDIZED` trains from a store whose statistics say mean 0 and spread 1.
NOT_STANDARDIZED = "not standardized"
ABLATION: dict[str, dict[str, Any]] = {
    "defaults (mse, weight found, hybrid)": {},
    "feature weight 20": {"feature_weight": 20.0},
    "feature weight 1": {"feature_weight": 1.0},
    "cosine": {"feature_loss_type": "cosine"},
    "smooth_l1": {"feature_loss_type": "smooth_l1"},
    "relation": {"feature_loss_type": "relation"},
    "feature term alone": {"distillation_type": "feature"},
    "logit term alone": {"distillation_type": "logit"},
    "mlp alignment": {"align_head": "mlp"},
    "constant schedule": {"lr_scheduler": "constant"},
    NOT_STANDARDIZED: {},
}


def without_statistics(store: Path) -> Path:
    """A copy of the store whose targets are not standardized: mean 0 and spread 1 in every channel."""
    copy = store.with_name(f"{store.stem}-raw.zarr")
    if not copy.exists():
        shutil.copytree(store, copy)
        for file in copy.rglob(
            "zarr.json"
        ):  # the arrays' own metadata, and the consolidated copy in the root
            metadata = json.loads(file.read_text(encoding="utf-8"), object_hook=unstandardize)
            file.write_text(json.dumps(metadata), encoding="utf-8")
    return copy


def unstandardize(entry: dict[str, Any]) -> dict[str, Any]:
    """A JSON object; statistics in it become mean 0 and spread 1."""
    if "statistics" in entry:
        width = len(entry["statistics"]["mean"])
        entry["statistics"] |= {"mean": [0.0] * width, "std": [1.0] * width}
    return entry


def ablate(bench: Bench, study: Study, seeds: int) -> list[dict[str, Any]]:
    """Variants of the distilled side at its learning rate: mean test metric over seeds."""
    rate = bench.tune(study, study.distilled)
    rows = []
    for name, change in ABLATION.items():
        options = {**study.distilled, **change}
        raw = name == NOT_STANDARDIZED
        tests = [bench.train(study, options, rate, seed, raw=raw)["test"] for seed in range(seeds)]
        rows.append({"variant": name, "study": study.title, "tests": tests, "mean": float(np.mean(tests))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of clothing, camvid and bccd: their studies")
    parser.add_argument(
        "--studies", help="a list of: " + ", ".join([*STUDIES, "or with --data", *DATA_STUDIES])
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rates", help="another grid; a single one is not tuned")
    parser.add_argument("--draws", type=int, help="selections of labeled images; default: one a seed")
    parser.add_argument("--ablation", action="store_true", help="also the variants of the first study")
    parser.add_argument("--ablation-seeds", type=int, default=2)
    parser.add_argument("--fidelity", action="store_true", help="also stored against live features")
    parser.add_argument("--work", type=Path, help="keeps stores and finished trainings")
    parser.add_argument(
        "--quick", action="store_true", help="a few images, one epoch: only shows that it runs"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    if arguments.work:
        report(arguments, arguments.work)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(arguments, Path(folder))


def report(arguments: argparse.Namespace, work: Path) -> None:
    """Run what was asked for and print it."""
    work.mkdir(parents=True, exist_ok=True)
    grid = arguments.learning_rates
    known, usual = STUDIES, USUAL
    if arguments.data is not None:
        known, usual = DATA_STUDIES, ",".join(DATA_STUDIES)
    rates = tuple(float(text) for text in grid.split(",")) if grid else ()
    bench = Bench(work, arguments.quick, rates, arguments.draws, arguments.data)
    names = (arguments.studies or usual).split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--studies {','.join(unknown)}: unknown; known are {', '.join(known)}")
    studies = [known[name] for name in names]
    seeds = 2 if arguments.quick else arguments.seeds
    result: dict[str, Any] = {"comparison": [compare(bench, s, s.distilled, seeds) for s in studies]}
    if arguments.ablation:
        result["ablation"] = ablate(bench, studies[0], arguments.ablation_seeds)
    if arguments.fidelity:
        result["fidelity"] = fidelity(bench, STUDIES["scenes"])
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print_tables(result)


def print_tables(result: dict[str, Any]) -> None:
    """The result as markdown tables, accuracies in percent."""
    print("| study | student | metric | control | distilled | difference (95 %) | probe | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in result["comparison"]:
        ceiling = "–" if row["probe"] is None else f"{100 * row['probe']:.1f}"
        gap = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} … {100 * row['high']:+.1f})"
        print(
            f"| {row['study']} | {row['student']} | {row['metric']} | {100 * row['control']:.1f} "
            f"| {100 * row['distilled']:.1f} | {gap} | {ceiling} | {row['seeds']} |"
        )
    for row in result.get("ablation", []):
        each = ", ".join(f"{100 * value:.1f}" for value in row["tests"])
        print(f"{row['variant']:42s} {100 * row['mean']:.1f}  ({row['study']}: {each})")
    if "fidelity" in result:
        print("stored against live features, standardized cosine per token:", result["fidelity"])


if __name__ == "__main__":
    main()
