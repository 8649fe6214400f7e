"""What averaging a probe's answers over similar images is worth (extract/propagation.py): how many of the unlabeled
images of a study get their true class, which the store of all labels knows.

    python benchmarks/propagation.py --data DIR --work DIR [--studies clothing-few,clips-few,digits] [--draws 5]

Stores are those of benchmarks/learning.py, in the same folders. Each draw is another selection of labeled images.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.learning import Bench
from benchmarks.learning_studies import DATA_STUDIES, Study
from extract.logits import add_probe, answers_of, fit_on, usable_labels
from store.format import PROBE
from store.reader import open_store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--studies", default="clothing-few,clips-few,digits")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    bench = Bench(options.work, data=options.data)
    print(f"{'study':14} {'draw':>4} {'unlabeled':>9} {'probe':>7} {'averaged':>9}")
    for name in options.studies.split(","):
        rows = [measure(bench, DATA_STUDIES[name], draw) for draw in range(options.draws)]
        for draw, (count, alone, averaged) in enumerate(rows):
            print(f"{name:14} {draw:4} {count:9,} {alone:7.1%} {averaged:9.1%}")
        alone, averaged = np.mean([row[1:] for row in rows], axis=0)
        print(f"{name:14} {'mean':>4} {'':9} {alone:7.1%} {averaged:9.1%}", flush=True)


def measure(bench: Bench, study: Study, draw: int) -> tuple[int, float, float]:
    """Number of unlabeled images, and the shares of the probe's and of the stored classes that are right."""
    path = bench.store(study, draw, unlabeled=True)
    add_probe(path)
    store = open_store(path)
    complete = open_store(bench.store(replace(study, labels=None), 0, unlabeled=True))
    train, everything = store["train"], complete["train"]
    truth = everything.read("targets/label")[everything.rows_of(list(train.keys))]
    labels, usable = usable_labels(store)
    classes = len(store.manifest.class_names)
    alone = answers_of(fit_on(train, np.flatnonzero(usable), labels, classes, 0), train)
    averaged = train.read(f"logits/{PROBE}")
    unlabeled = np.asarray(train.valid & ~usable)
    right = [float((x[unlabeled].argmax(axis=1) == truth[unlabeled]).mean()) for x in (alone, averaged)]
    return int(unlabeled.sum()), right[0], right[1]


if __name__ == "__main__":
    main()
