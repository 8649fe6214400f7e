"""What the teacher's features are worth to a student: distilled against trained on labels alone.

Real images; the teacher is EfficientNet-Lite2 with its ImageNet weights (1280 wide), its features extracted once.
Emoji: learn Twitter's drawings, be judged on Google's (9 categories). Scenes: photographed objects pasted into
photographs, exact masks. Students start from random weights.

Both sides of every comparison see the same images, augmentation and number of steps. Each has its own learning rate,
the best of one grid on the validation split (with a seed that is not reported). Printed are the means on the test
split, the mean of the paired differences with its 95 % interval (Student's t), and the accuracy of a linear probe on
the teacher's features, fitted on the same labels, as the ceiling.

    python benchmarks/learning.py [--studies few,all,scenes,mixed] [--seeds 5] [--ablation] [--fidelity]
                                  [--work DIR] [--device DEVICE] [--jobs N] [--quick] [--json]

    python benchmarks/learning.py --data DIR --work DIR [--studies clothing-few,camvid-few,bccd-few,…]

With --data: clothing photos, CamVid street scenes and BCCD blood cells (docs/benchmarks.md), with few labels and all
other images unlabeled, or with all labels; and scanned digits, of which the teacher knows little. The control is
`cli train --control-only` on the same store: as many updates on the labels. Each seed gets another selection of labeled images.

Finished trainings are kept in --work and not repeated, so a run that was interrupted continues.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.learning_data import write_emoji_table, write_scenes
from benchmarks.learning_sets import DATA_SETS, lay_out
from benchmarks.learning_studies import (
    ABLATION,
    CONTROL,
    CONTROL_ONLY,
    DATA_STUDIES,
    NOT_STANDARDIZED,
    STUDIES,
    USUAL,
    Study,
)
from benchmarks.learning_teacher import TEACHER_SIZE, fidelity, probe_ceiling
from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights

TUNING_SEED = 100
REPEAT = 8  # a control on few images: as many steps, but not ten times the validations
# 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Training(NamedTuple):
    """One training: a study, the options of its side beyond those of both sides, learning rate and seed.

    `raw`: from targets that are not standardized.
    """

    study: Study
    options: dict[str, Any]
    learning_rate: float
    seed: int
    raw: bool = False

    @property
    def control(self) -> bool:
        return self.options in (CONTROL, CONTROL_ONLY)


@dataclass
class Bench:
    """Stores and finished trainings in one folder.

    `rates`: learning rates to choose from instead of those of the studies. `draws`: how many selections of labeled images;
    None: one a seed. `jobs`: stores and trainings at a time, each in a process of its own.
    """

    work: Path
    quick: bool = False
    rates: tuple[float, ...] = ()
    draws: int | None = None
    data: Path | None = None
    device: str = "cpu"
    jobs: int = 1
    done: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.work / "results.jsonl"
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
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

    def settings(self, training: Training) -> dict[str, Any]:
        """Options of `cli train`."""
        study, seed = training.study, training.seed
        chosen = {**study.common, **training.options, "learning_rate": training.learning_rate, "seed": seed}
        chosen["epochs"] = 1 if self.quick else study.epochs
        if self.quick and "pretrain_epochs" in chosen:
            chosen["pretrain_epochs"] = 1
        if study.unlabeled and training.control:
            # The same number of steps: fewer images make shorter epochs.
            draw = self.draw(seed)
            chosen["epochs"] = round(
                chosen["epochs"] * self.size(study, draw, True) / self.size(study, draw, False)
            )
        return chosen

    def identity(self, training: Training) -> str:
        """Names a training in `results.jsonl`."""
        study = training.study
        parts: list[Any] = [
            study.name,
            study.student,
            study.labels_per_class or study.labels,
            self.draw(training.seed),
        ]
        parts += [self.quick, training.raw, self.settings(training)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def train(self, training: Training) -> dict[str, Any]:
        """The record of a training; `val` and `test`: the study's metric, of the best epoch on the validation split."""
        self.train_all([training])
        return self.done[self.identity(training)]

    def train_all(self, trainings: Sequence[Training]) -> None:
        """Train those that are not done yet, `jobs` at a time."""
        missing = {self.identity(training): training for training in trainings}
        missing = {name: training for name, training in missing.items() if name not in self.done}
        for record in self.each(self.make_record, list(missing.values())):
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.done[record["id"]] = record

    def each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results of `work`, in processes of their own if there are several jobs, as they end."""
        if self.jobs == 1 or len(items) <= 1:
            yield from map(work, items)
            return
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()

    def make_stores(self, trainings: Sequence[Training]) -> None:
        """The stores of trainings; first those that others are copied from or tested on."""
        first, wanted = {}, {}
        for training in trainings:
            study, unlabeled = training.study, training.study.unlabeled and not training.control
            kind = STUDIES["scenes" if study.scenes else "all"]
            first[study.data, study.scenes] = replace(study, labels=None) if study.data else kind
            draw = self.draw(training.seed) if study.labels_per_class or study.labels else 0
            wanted[study.name, draw, unlabeled] = study
        list(self.each(self.make_store, [(study, 0, False) for study in first.values()]))
        list(self.each(self.make_store, [(study, draw, some) for (_, draw, some), study in wanted.items()]))

    def make_store(self, order: tuple[Study, int, bool]) -> None:
        study, draw, unlabeled = order
        self.store(study, draw, unlabeled=unlabeled)

    def make_record(self, training: Training) -> dict[str, Any]:
        """Train and test once."""
        logging.disable(logging.INFO)
        study, draw = training.study, self.draw(training.seed)
        chosen = self.settings(training)
        store = self.store(study, draw, unlabeled=study.unlabeled and not training.control)
        if training.raw:
            store = without_statistics(store)
        out = self.work / f"run-{os.getpid()}"
        measured = run(store, self.test_store(study), study, chosen, out, self.device)
        shutil.rmtree(out)
        return {
            "id": self.identity(training),
            "study": study.name,
            "labels": study.labels_per_class or study.labels,
            "control": training.control,
            "raw": training.raw,
            "device": self.device,
            **chosen,
            **measured,
        }

    def size(self, study: Study, draw: int, unlabeled: bool) -> int:
        """Training images of a study's store."""
        from store.reader import open_store

        return len(open_store(self.store(study, draw, unlabeled=unlabeled))["train"])

    def tuning(self, study: Study, options: dict[str, Any]) -> list[Training]:
        """One training for each learning rate, unless there is but one."""
        rates = self.rates or study.rates
        return [Training(study, options, rate, TUNING_SEED) for rate in rates if len(rates) > 1]

    def best_rate(self, study: Study, options: dict[str, Any]) -> float:
        """The learning rate that is best on the validation split."""
        trainings = self.tuning(study, options)
        if not trainings:
            return (self.rates or study.rates)[0]
        return max(trainings, key=lambda training: self.train(training)["val"]).learning_rate


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
            out=str(out),
            source=source,  # type: ignore[arg-type]
            teacher=PRETRAINED_TEACHER,
            teacher_path=str(pretrained_teacher_weights()),
            workers=0,
            **options,
        )
    )


def run(
    store: Path, test_store: Path, study: Study, options: dict[str, Any], out: Path, device: str
) -> dict[str, Any]:
    """One training and its test."""
    from train.config import TrainConfig
    from train.deliver.evaluate import evaluate_run
    from train.run import run_training

    start = time.perf_counter()
    settings = {**options, "workers": 0, "device": device, "overwrite": True}
    summary = run_training(TrainConfig(store=str(store), student=study.student, out=out, **settings))
    tested = evaluate_run(out, test_store, split="test", workers=0, device=device)
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


def alone(study: Study) -> dict[str, Any]:
    """Options of the control."""
    return CONTROL_ONLY if study.data else CONTROL


def sides(bench: Bench, study: Study, seeds: int) -> tuple[list[Training], list[Training]]:
    """The trainings of a comparison, distilled and control, each with its best learning rate."""
    distilled, control = (
        [Training(study, options, bench.best_rate(study, options), seed) for seed in range(seeds)]
        for options in (study.distilled, alone(study))
    )
    return distilled, control


def train_studies(bench: Bench, studies: Sequence[Study], seeds: int) -> None:
    """All trainings of the comparisons, as many at a time as the bench has jobs."""
    tuning = [t for s in studies for options in (s.distilled, alone(s)) for t in bench.tuning(s, options)]
    bench.make_stores(tuning)
    bench.train_all(tuning)
    trainings = [t for study in studies for side in sides(bench, study, seeds) for t in side]
    bench.make_stores(trainings)
    bench.train_all(trainings)


def compare(bench: Bench, study: Study, seeds: int) -> dict[str, Any]:
    """Distilled against control, each with its own learning rate, over the same seeds."""
    trainings = sides(bench, study, seeds)
    distilled, control = ([bench.train(training)["test"] for training in side] for side in trainings)
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
        "by_seed": {"distilled": distilled, "control": control},
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "probe": float(np.mean([value for value in ceilings if value is not None]))
        if any(ceilings)
        else None,
        "learning_rates": {
            name: side[0].learning_rate
            for name, side in zip(("distilled", "control"), trainings, strict=True)
        },
        "draws": len(draws),
    }


def without_statistics(store: Path) -> Path:
    """A copy of the store whose targets are not standardized: mean 0 and spread 1 in every channel."""
    copy = store.with_name(f"{store.stem}-raw.zarr")
    if not copy.exists():
        draft = copy.with_suffix(f".{os.getpid()}")  # several jobs may want it
        shutil.copytree(store, draft)
        # The arrays' own metadata, and the consolidated copy in the root.
        for file in draft.rglob("zarr.json"):
            metadata = json.loads(file.read_text(encoding="utf-8"), object_hook=unstandardize)
            file.write_text(json.dumps(metadata), encoding="utf-8")
        with contextlib.suppress(OSError):  # another job was faster
            draft.rename(copy)
        shutil.rmtree(draft, ignore_errors=True)
    return copy


def unstandardize(entry: dict[str, Any]) -> dict[str, Any]:
    """A JSON object; statistics in it become mean 0 and spread 1."""
    if "statistics" in entry:
        width = len(entry["statistics"]["mean"])
        entry["statistics"] |= {"mean": [0.0] * width, "std": [1.0] * width}
    return entry


def ablate(bench: Bench, study: Study, seeds: int) -> list[dict[str, Any]]:
    """Variants of the distilled side at its learning rate: mean test metric over seeds."""
    rate = bench.best_rate(study, study.distilled)
    variants = {
        name: [
            Training(study, {**study.distilled, **change}, rate, seed, raw=name == NOT_STANDARDIZED)
            for seed in range(seeds)
        ]
        for name, change in ABLATION.items()
    }
    wanted = [training for trainings in variants.values() for training in trainings]
    bench.make_stores(wanted)
    bench.train_all(wanted)
    rows = []
    for name, trainings in variants.items():
        tests = [bench.train(training)["test"] for training in trainings]
        rows.append({"variant": name, "study": study.title, "tests": tests, "mean": float(np.mean(tests))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of clothing, camvid and bccd: studies of these, of clips (made there) and of digits",
    )
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
    parser.add_argument("--device", default="cpu", help="of the trainings, e.g. cuda (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (%(default)s)")
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
    grid = arguments.learning_rates
    known, usual = STUDIES, USUAL
    if arguments.data is not None:
        known, usual = DATA_STUDIES, ",".join(DATA_STUDIES)
    rates = tuple(float(text) for text in grid.split(",")) if grid else ()
    bench = Bench(
        work, arguments.quick, rates, arguments.draws, arguments.data, arguments.device, arguments.jobs
    )
    names = (arguments.studies or usual).split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--studies {','.join(unknown)}: unknown; known are {', '.join(known)}")
    studies = [known[name] for name in names]
    seeds = 2 if arguments.quick else arguments.seeds
    train_studies(bench, studies, seeds)
    result: dict[str, Any] = {"comparison": [compare(bench, study, seeds) for study in studies]}
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
