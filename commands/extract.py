"""`cli extract`, `cli probe`, `cli teachers`, `cli make-tiny-teacher`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import AsJson, offer_options
from console.output import get_logger, print_json, print_table
from console.progress import clock
from extract.config import ExtractConfig, load_config

SHOWN_BAD = 5  # bad samples that a dry run shows
#: What a dry run found at a URL.
AT_URL = {
    "starts": "can be written to; a run starts from the beginning",
    "resumes": "a run resumes what was begun there",
    "complete": "the store is complete",
}


def extract(
    config: Annotated[
        Path | None, typer.Option(help="YAML, TOML or JSON file with these options; the command line wins.")
    ] = None,
    json: AsJson = False,
    **options: Any,
) -> None:
    """cli extract photos --out photos.zarr --teacher-path Qwen2.5-VL-7B-Instruct

    Encode every image of DATA with the teacher, once, into STORE. Running the same command again resumes, or
    follows the data set: changed, removed, renamed and new images and annotations, reusing what is encoded.
    Without the real weights, try it with random ones:

    cli make-tiny-teacher tiny

    cli extract photos --out photos.zarr --teacher-path tiny --dry-run
    """
    settings = load_config(options, config)
    from extract.run import extract_and_measure

    result = extract_and_measure(settings)
    if json:
        print_json(result.as_dict())
    elif result.estimate is not None:
        print_estimate(result.as_dict())
    else:
        print_result(result.as_dict())


offer_options(extract, ExtractConfig)


def print_estimate(result: Mapping[str, Any]) -> None:
    """The result of `--dry-run`."""
    figures = result["estimate"]
    splits = ", ".join(f"{rows:,} {name}" for name, rows in result["splits"].items())
    print(f"{result['rows']:,} images ({splits}), batches of {figures['batch_size']}")
    if result["changes"]:
        print(f"the data set has changed since the store was made: {result['changes_text']}")
        rows = [{"samples": name, "count": n} for name, n in result["changes"].items() if name != "encode"]
        print_table(rows, ["samples", "count"])
    if figures["to_encode"] < result["rows"]:
        print(f"to encode: {figures['to_encode']:,} images, the others are in the store")
    rows = [
        {"array": name, "bytes an image": size, "total": f"{size * result['rows'] / 1e6:,.1f} MB"}
        for name, size in figures["bytes_per_sample"].items()
    ]
    print_table(rows, ["array", "bytes an image", "total"])
    room = "enough" if figures["fits"] else "NOT ENOUGH"
    needed = f"{figures['needed_bytes'] / 1e6:,.1f} MB"
    more = f", {needed} more" if figures["to_encode"] < result["rows"] else ""
    if figures["state"] is not None:
        print(f"{result['store']}: {AT_URL[figures['state']]}")
        more = f", staging folder: {needed} or more"
    print(
        f"store: {figures['total_bytes'] / 1e6:,.1f} MB{more}, free disk: "
        f"{figures['free_bytes'] / 1e6:,.1f} MB ({room})"
    )
    print(
        f"time: {clock(figures['estimated_seconds'])} (estimated from {figures['timed_samples']} samples: teacher "
        f"{figures['encode_ms_per_image']:.2f} ms, decoding {figures['decode_ms_per_image_and_core']:.2f} ms an image "
        f"with {figures['decoding_workers']} decoding)"
    )
    bad = figures["bad_samples"]
    print(f"checked: {figures['checked_samples']} samples with their targets, {len(bad)} bad")
    for item in bad[:SHOWN_BAD]:
        print(f"  bad: {item['split']} {item['key']}: {item['reason']}")
    if len(bad) > SHOWN_BAD:
        print(f"  and {len(bad) - SHOWN_BAD} more")
    print("dry run: nothing was written")


def print_probe(result: Mapping[str, Any]) -> None:
    """What the stored features are worth."""
    if result["task"] in ("segmentation", "detection"):
        print_cell_probe(result)
        return
    averaged = ", averaged over similar images" if result["propagated"] else ""
    line = f"linear probe: {result['out_of_fold_top1']:.1%} out of fold{averaged} ({result['folds']} folds, "
    line += f"{result['rows']:,} rows, {result['classes']} classes)"
    if result["measured_on"] is not None:
        line += f"; on {result['measured_on']} {result['probe_top1']:.1%}, k-NN {result['knn_top1']:.1%}"
    print(line)


def print_cell_probe(result: Mapping[str, Any]) -> None:
    """What the probe of cells reaches: mean IoU of masks, or for boxes objectness and classes."""

    def figures(prefix: str) -> str:
        if result["task"] == "segmentation":
            at_cells = f"{result[f'{prefix}_cell_miou']:.1%} at the grid's resolution"
            return f"mean IoU {result[f'{prefix}_miou']:.1%}, {at_cells}"
        objectness, accuracy = result[f"{prefix}_objectness_ap"], result[f"{prefix}_class_accuracy"]
        return f"objectness AP {objectness:.1%}, class accuracy {accuracy:.1%}"

    print(
        f"probe of cells ({result['network']}): {figures('out_of_fold')} out of fold ({result['folds']} folds, "
        f"{result['rows']:,} labeled rows, {result['classes']} classes)"
    )
    if result["measured_on"] is not None:
        print(f"on {result['measured_on']}: {figures('probe')}")


def print_result(result: Mapping[str, Any]) -> None:
    """A few lines for people: what is in the store, how fast it was, what to do next."""
    splits = ", ".join(f"{rows:,} {name}" for name, rows in result["splits"].items())
    state = "complete" if result["complete"] else "incomplete"
    print(f"{result['store']}: {state}, {result['rows']:,} images ({splits}), {result['bad']:,} bad")
    if result["encoded"]:
        rate, seconds = result["images_per_second"], result["seconds"]
        print(f"encoded {result['encoded']:,} images in {seconds:.1f} s ({rate:.1f} images/s)")
    else:
        print("nothing to encode")
    if result["changes"]:
        print(f"followed the data set: {result['changes_text']}")
    if result["probe"]:
        print_probe(result["probe"])
    if result["bad"]:
        print(f"bad images: {result['store']}/bad_images.jsonl")
    if result["complete"]:
        print(f"next: {next_step(result)}")


def next_step(result: Mapping[str, Any]) -> str:
    others = [name for name in result["splits"] if name != "train"]
    if not others:
        return "training needs a val split as well: the same command with --val-fraction 0.3 --overwrite"
    command = train_command(result["store"], result["task"])
    if len(result["teachers"]) > 1:
        command += f" --teachers {','.join(result['teachers'])}"
    return command if "val" in others else f"{command} --val-split {others[0]}"


def probe(
    store: Annotated[
        str,
        typer.Argument(
            help="A complete store (a folder or a URL) with labels, masks or boxes.", metavar="STORE"
        ),
    ],
    student: Annotated[
        str | None,
        typer.Option(help="Also train this student without the teacher for 4 % of its epochs, and compare."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the training that is planned; default: cli train's.", min=1)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the student's input; default: cli train's.", min=8)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the short control; default: cli train's.", min=0)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to fit and train: auto, cpu, cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the folds and of the control.")] = 0,
    json: AsJson = False,
) -> None:
    """cli probe photos.zarr

    What the teacher's features are worth, before anyone trains: accuracy of a linear probe and of k-NN for classes (of
    clips over their frames), mean IoU of a probe of every grid cell for masks, whether cells know objects and their
    classes for boxes. Writes the probe's predictions for every row, labeled or not: class logits to
    `logits/probe`, or where the store has masks soft class maps to `maps/probe`. The predictions for a row come from a
    probe that was not fitted on it. A complete store at a URL is never changed, because others may be reading it: its
    result is printed, and its predictions are not kept (cli copy it to a folder, probe that, and copy it back).

    cli probe photos.zarr --student resnet18 --epochs 60

    Will the teacher help this student? Compares the teacher's ceiling with a short control and prints a verdict.
    """
    from extract.logits import probe_store
    from extract.result import note, read_measured
    from store.format import RANDOM_WEIGHTS_NOTICE
    from store.metadata import is_url
    from store.reader import open_store

    began = time.monotonic()
    result = probe_store(store, seed=seed, device=device)
    verdict = None
    if student is not None:
        from commands.verdict import judge_student, verdict_lines

        options = {"epochs": epochs, "image_size": image_size, "learning_rate": learning_rate}
        judged = judge_student(
            store, student, result, time.monotonic() - began, {**options, "device": device, "seed": seed}
        )
        verdict = {**vars(judged), "text": verdict_lines(vars(judged))}
        if not is_url(store):
            known = read_measured(Path(store)).get("verdicts") or {}
            note(Path(store), verdicts={**known, judged.student: verdict})  # the report repeats it
    if open_store(store).manifest.teacher.random_weights:
        get_logger("extract").warning("%s: teacher of %s", store, RANDOM_WEIGHTS_NOTICE)
    if json:
        print_json({"store": store, **result, "verdict": verdict})
    else:
        print_probe(result)
        kept = (
            " (a store at a URL is not changed): cli copy it to a folder and probe that to keep the predictions"
            if is_url(store)
            else ""
        )
        print(f"{store}: {result['array']} written" if result["array"] else f"{store}: nothing written{kept}")
        for line in verdict["text"] if verdict else ():
            print(line)


def teachers(
    check: Annotated[
        str | None,
        typer.Option(
            help="Load this checkpoint twice, here and by transformers or timm, and compare.", metavar="PATH"
        ),
    ] = None,
    teacher: Annotated[str, typer.Option(help="What the checkpoint is.")] = "qwen2.5-vl",
    images: Annotated[
        Path | None, typer.Option(help="Folder of images for --check.", metavar="FOLDER")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many of them.", min=1)] = 8,
    image_size: Annotated[int, typer.Option(help="Side of the square the teacher sees.", min=14)] = 224,
    device: Annotated[str, typer.Option(help="Device for --check.")] = "auto",
    json: AsJson = False,
) -> None:
    """cli teachers

    List the teachers: width, patch, blocks, native size and license. --json adds how to get the weights.

    cli teachers --check Qwen3-VL-8B-Instruct --teacher qwen3-vl --images photos
    """
    if check is not None:
        check_checkpoint(check, teacher, images, samples, image_size, device, json)
        return
    from extract.teachers import list_teachers

    rows = list_teachers()
    if json:
        print_json({"teachers": rows})
        return
    print_table(rows, ["name", "width", "patch", "blocks", "native", "license"])
    print(
        "\nwidth: numbers per grid cell. patch, native: pixels. Any other timm encoder works too: timm:NAME"
    )
    for license, terms in sorted({(row["license"], row["terms"]) for row in rows if row["terms"]}):
        print(f"{license}: {terms}")


def check_checkpoint(
    path: str,
    teacher: str,
    images: Path | None,
    samples: int,
    image_size: int,
    device: str,
    json: bool,
) -> None:
    """Print how far our features are from the library's own. Raises TeacherError when they are not the same."""
    from dataclasses import asdict

    from extract.teachers import TeacherError
    from extract.teachers.parity import SAME_COSINE, check_teacher

    if images is None:
        raise TeacherError("--check needs --images FOLDER: a folder with a few of your images")
    found = check_teacher(teacher, path, images, image_size=image_size, device=device, count=samples)
    if json:
        print_json({**asdict(found), "same": found.same})
    else:
        print(f"{path} as {teacher}, weights {found.fingerprint}, against {found.reference}")
        print(
            f"images               {found.images} at {found.image_size} pixels, {found.tokens:,} tokens, float32"
        )
        print(f"largest difference   {found.max_difference:.2e} (largest feature {found.largest_value:.4g})")
        print(f"cosine of a token    mean {found.mean_cosine:.8f}, lowest {found.min_cosine:.8f}")
    if not found.same:
        raise TeacherError(
            f"{path}: the features differ from those of {found.reference}: lowest cosine {found.min_cosine:.6f} in "
            f"{found.worst_image}, expected {SAME_COSINE} at least; please report it with the checkpoint's name"
        )


def make_tiny_teacher(
    folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.", metavar="DIR")],
    depth: Annotated[int, typer.Option(help="Blocks of the vision tower.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    family: Annotated[str, typer.Option(help="qwen2.5-vl, qwen3-vl or qwen3.5.")] = "qwen2.5-vl",
) -> None:
    """cli make-tiny-teacher tiny

    Write a checkpoint of Qwen2.5-VL, Qwen3-VL or Qwen3.5 with a small vision tower and random weights: it shows the
    steps and teaches nothing.
    """
    from extract.teachers.tiny import make_tiny_teacher as make
    from store.format import RANDOM_WEIGHTS_NOTICE

    path = make(folder, depth=depth, seed=seed, family=family)
    print(f"{path}: {RANDOM_WEIGHTS_NOTICE}")
    teacher = "" if family == "qwen2.5-vl" else f" --teacher {family}"
    print(f"next: cli extract DATA --out features.zarr{teacher} --teacher-path {path}")


# -- what to do next ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suggestion:
    """`student` is for a real training; `small`, with the options `quick`, is for the demo.

    `options`: what a training of this task needs, or gains from. `control`: whether there is something to learn without the
    teacher. `classes`: whether an image has one class, so that the teacher's logits can be those of a probe. `images`: whether a
    store can hold the images.
    """

    student: str
    small: str
    quick: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    control: bool = True
    classes: bool = False
    images: bool = True


_TIMM = "timm:resnet10t"
# Small images and few steps from random weights, which the recipe's smaller learning rate is too slow for.
_TIMM_QUICK = {"image-size": "48", "learning-rate": "3e-3"}
# The features of all images first, then the labels alone: better for detectors and clips than both together
# (docs/benchmarks.md).
_PHASE_ONE = {"pretrain-epochs": "40", "soft-label-weight": "0", "hard-label-weight": "1"}
_QUICK_PHASE_ONE = {"pretrain-epochs": "2"}
SUGGESTIONS = {
    "classification": Suggestion("resnet18", _TIMM, _TIMM_QUICK, classes=True),
    "features": Suggestion("resnet18", _TIMM, _TIMM_QUICK, {"task": "features"}, control=False),
    "detection": Suggestion("yolov8n", "yolov8n", {"image-size": "64", **_QUICK_PHASE_ONE}, _PHASE_ONE),
    "segmentation": Suggestion("unet/small", "unet/small", {"image-size": "64"}),
    "sequence": Suggestion(
        *("lstm/small", "lstm/small", {"image-size": "48", **_QUICK_PHASE_ONE}, _PHASE_ONE),
        classes=True,
        images=False,
    ),
}


def train_command(store: str, task: str) -> str:
    """The command line that trains a student from a store whose manifest names this task."""
    suggestion = SUGGESTIONS[task]
    run = "runs/" + suggestion.student.replace("/", "-")
    words = ["cli", "train", store, "--student", suggestion.student, "--out", run]
    for name, value in suggestion.options.items():
        words += [f"--{name}", value]
    return shlex.join(words)
