"""`cli train`, `cli evaluate` and `cli students`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import AsJson, offer_options
from train.config import TrainConfig, load_config
from train.errors import ConfigError
from train.run_folder import RunFolder
from train.students.families import FAMILIES


def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML, TOML or JSON file of options; options win.")
    ] = None,
    gpu_devices: Annotated[
        str | None, typer.Option(help="Like 0,1: short for --device cuda:0,cuda:1; or cpu.")
    ] = None,
    json: AsJson = False,
    **options: Any,
) -> None:
    """cli train flowers.zarr --student resnet18 --out runs/resnet18

    Train one student against stored teacher features; no teacher is needed. What is not given comes from the
    student's recipe (cli students NAME), else from the defaults shown here.

    cli train flowers.zarr --student vit-tiny --out runs/vit --epochs 50 --control

    cli train flowers.zarr --student timm:mobilenetv4_conv_small --out runs/mobile --config recipe.yaml

    cli train --resume --out runs/resnet18
    """
    if gpu_devices:
        if options.get("device") is not None:
            raise ConfigError("--gpu-devices and --device both choose the devices: give one of them")
        options["device"] = gpu_devices
    settings = load_config(options, config)
    if os.environ.get("RANK", "0") == "0":
        RunFolder(settings.out).check_place(settings)
    if settings.needs_ranks:
        from processes.ranks import run_ranks
        from processes.stop import StopRequest

        with StopRequest() as stop:
            raise typer.Exit(run_ranks(sys.argv, settings.devices, stop).exit_code)
    from train.run import run_training

    summary = run_training(settings)
    if os.environ.get("RANK", "0") == "0":
        print_summary(summary, settings.out, json)


offer_options(train, TrainConfig, {kind: family.recipe for kind, family in FAMILIES.items()})


def print_summary(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """The result on stdout."""
    from console.output import print_json, print_table
    from train.metrics import gain_text, label_of, shown_text

    if as_json:
        print_json(summary)
        return
    control = summary.get("control") or {}
    own = "distilled" if control else "value"  # without its control, a run may be a control itself
    rows = [
        {
            "metric": label_of(name),
            own: shown_text(name, value),
            "control": shown_text(name, control.get("metrics", {}).get(name)),
            "difference": shown_text(name, control.get("difference", {}).get(name), gain_text),
        }
        for name, value in summary["metrics"].items()
    ]
    columns = ["metric", own, *(["control", "difference"] if control else [])]
    title = (
        f"{summary['student']} after {summary['epochs_done']} epochs (best: {summary['best_epoch']}), "
        f"{summary.get('validation_samples', 'unknown number of')} validation samples, in {out}"
    )
    print_table(rows, columns, title)
    if phrase := distillation_phrase(summary):
        print(phrase)
    print(f"next: {next_command(summary, out)}")


def distillation_phrase(summary: dict[str, Any]) -> str | None:
    """What became of the distillation terms where they ended early."""
    from train.metrics import label_of, shown_text

    described = summary.get("distillation") or {}
    if described.get("ended_after_epoch") is None:
        return None
    ((metric, value),) = described["teacher"].items()
    return (
        f"distillation ended after epoch {described['ended_after_epoch']}: the student was better than a probe of the "
        f"teacher's features ({label_of(metric)} {shown_text(metric, value)}), and learned from labels alone since"
    )


def next_command(summary: dict[str, Any], out: Path) -> str:
    """A useful next command; a label-free student has no predictions to write."""
    if summary.get("task") == "features":
        return f"cli report {out}"
    return f"cli predict {out} IMAGES --out predictions, or cli export {out}"


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder, a checkpoint in it, or an exported .onnx file.", metavar="RUN"),
    ],
    store: Annotated[str, typer.Argument(help="A store with targets.", metavar="STORE")],
    split: Annotated[str, typer.Option(help="The split to measure on.")] = "val",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a forward pass.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Where the images are, when the store has none.")
    ] = None,
    json: AsJson = False,
) -> None:
    """cli evaluate runs/resnet18 flowers.zarr --split val

    Measure a trained student or an exported file on a split: the metrics of its task, per class where there are
    classes. Of a label-free student: the cosine to the teacher, and k-NN and probe accuracy where there are labels.
    """
    from console.output import print_json, print_table
    from train.deliver.evaluate import evaluate_run
    from train.metrics import TASK_METRICS, label_of, shown_text

    result = evaluate_run(
        run, store, split=split, batch_size=batch_size, device=device, workers=workers, data_root=data_root
    )
    print(f"next: {after_evaluation(run, store, result)}", file=sys.stderr, flush=True)
    if json:
        print_json(result)
        return
    rows = [
        {"metric": label_of(name), "value": shown_text(name, value)}
        for name, value in result["metrics"].items()
    ]
    print_table(rows, ["metric", "value"], f"{result['student']} on {split} ({result['samples']} samples)")
    if result["per_class"]:
        metric = str(TASK_METRICS[result["task"]].per_class)
        classes = [
            {"class": name, metric: "n/a" if value is None else f"{value:.4g}"}
            for name, value in result["per_class"].items()
        ]
        print_table(classes, ["class", metric], "per class (n/a: no samples of it)")


def after_evaluation(run: Path, store: str, result: dict[str, Any]) -> str:
    """A useful next command."""
    if run.suffix == ".onnx":
        return f"cli predict {run} INPUTS --out predictions"
    if result["task"] in ("classification", "segmentation"):
        return f"cli export {run}, or cli quantize {run} {store}"
    return f"cli export {run}"


def students(
    name: Annotated[list[str] | None, typer.Argument(help="Only these; timm:NAME works too.")] = None,
    json: AsJson = False,
) -> None:
    """cli students

    List the students with measured parameters and multiply-accumulates (MACs) at their default size, and the
    recipe that `cli train` starts from.

    cli students timm:mobilenetv4_conv_small vit-tiny
    """
    from console.output import print_json, print_table
    from train.students.catalog import list_students

    rows = list_students(name or None)
    if json:
        print_json({"students": rows})
        return
    shown = [
        {
            **row,
            "parameters": None if row["parameters"] is None else f"{row['parameters'] / 1e6:.1f} M",
            "macs": None if row["macs"] is None else f"{row['macs'] / 1e9:.2f} G",
            "recipe": recipe_line(row["recipe"]),
        }
        for row in rows
    ]
    # Five columns fit into 80 characters; --json has every value by name.
    columns = {"name": "name", "task": "task", "parameters": "weights", "macs": "MACs", "recipe": "recipe"}
    print_table(shown, columns, "Students (any timm model too: timm:NAME)")


def recipe_line(recipe: dict[str, Any]) -> str:
    """`224 px, adamw 0.0001, batch 32, hybrid cosine`"""
    loss = " ".join(
        str(recipe[name]) for name in ("distillation_type", "feature_loss_type") if recipe.get(name)
    )
    size, batch = recipe["image_size"], recipe["batch_size"]
    rate = f" {recipe['learning_rate']:g}" if "learning_rate" in recipe else ""
    return f"{size} px, {recipe['optimizer']}{rate}, batch {batch}, {loss}"
