"""`cli train`, `cli evaluate` and `cli students`."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from train.config import TrainConfig, load_config
from train.errors import ConfigError
from train.recipes import RECIPES
from train.rundir import check_run_folder

PANELS = {
    "Data and student": "task num_classes student_path pretrained data_root train_split val_split dropout freeze_encoder "
    "attention_pooling distill_layers foreground_weight yolo_settings",
    "Optimisation": "epochs batch_size learning_rate optimizer lr_scheduler warmup_epochs weight_decay "
    "grad_accum_steps max_grad_norm image_size precision ema_decay label_smoothing early_stopping_patience "
    "mixup_alpha cutmix_alpha augment gradient_checkpointing compile",
    "Distillation": "distillation_type hard_label_weight soft_label_weight feature_weight logit_weight "
    "feature_loss_type feature_target distill_loss_type temperature teacher_logits align_feature align_head views",
    "LoRA": "lora_rank lora_alpha lora_dropout lora_target_modules lora_bias",
    "The run": "device workers seed deterministic auto_batch control control_only resume overwrite tracker checkpoint_interval "
    "checkpoint_minutes",
}

# What `per_class` holds, by task.
PER_CLASS_METRICS = {
    "classification": "recall",
    "sequence": "recall",
    "segmentation": "IoU",
    "detection": "mAP50-95",
}


def train(
    store: Annotated[
        str | None,
        typer.Argument(
            help="The store of teacher features; --resume knows it.", metavar="STORE", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML, TOML or JSON file of options; options win.")
    ] = None,
    gpu_devices: Annotated[
        str | None, typer.Option(help="Like 0,1: short for --device cuda:0,cuda:1; or cpu.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    **options: Any,
) -> None:
    """cli train flowers.zarr --student resnet18 --out runs/resnet18

    Train one student against stored teacher features; no teacher is needed. What is not given comes from the
    student's recipe (cli students NAME), else from the defaults shown here.

    cli train flowers.zarr --student vit-tiny --out runs/vit --epochs 50 --control

    cli train flowers.zarr --student timm:mobilenetv4_conv_small --out runs/mobile --config recipe.yaml

    cli train --resume --out runs/resnet18
    """
    from console.log import configure_logging

    configure_logging()
    if gpu_devices:
        if options.get("device") is not None:
            raise ConfigError("--gpu-devices and --device both say where to train: give one of them")
        options["device"] = devices_from_numbers(gpu_devices)
    settings = load_config({"store": store, **options}, config)
    if os.environ.get("RANK", "0") == "0":
        check_run_folder(settings)
    # ultralytics starts the processes of YOLO students.
    if len(settings.devices) > 1 and "RANK" not in os.environ and settings.student_type != "yolov8":
        from console.stop import StopRequest
        from processes.ranks import run_ranks

        with StopRequest() as stop:
            raise typer.Exit(run_ranks(sys.argv, settings.devices, stop).exit_code)
    from train.run import run_training

    summary = run_training(settings)
    if os.environ.get("RANK", "0") == "0":
        print_summary(summary, settings.out, json_)


def devices_from_numbers(text: str) -> str:
    """`0,1` → `cuda:0,cuda:1`; `cpu` stays."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return ",".join(f"cuda:{name}" if name.isdigit() else name for name in names)


def option_parameter(name: str, panel: str) -> inspect.Parameter:
    """A command-line option for a field of TrainConfig: the field says the default and the help.

    Values stay text: pydantic reads them, so that all wrong ones are reported together.
    """
    item = TrainConfig.model_fields[name]
    dashed = name.replace("_", "-")
    is_flag = item.annotation is bool
    declaration = f"--{dashed}/--no-{dashed}" if is_flag else f"--{dashed}"
    choices = choices_of(item.annotation)
    listed = f" {', '.join(choices)}." if choices else ""
    info = typer.Option(
        declaration,
        help=f"{item.description}{listed}{shown_default(name)}",
        rich_help_panel=panel,
        show_default=False,
        metavar=None if is_flag else type_name(item.annotation),
    )
    kind = bool | None if is_flag else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
    )


def choices_of(annotation: Any) -> list[str]:
    """The texts that a field takes, when it takes no others."""
    members = [member for kind in (annotation, *get_args(annotation)) for member in get_args(kind)]
    return list(dict.fromkeys(member for member in members if isinstance(member, str)))


def type_name(annotation: Any) -> str:
    """What a value is, as the other commands' help writes it: `<int>`, `<float>`, `<path>`, `<choice>` or `<str>`."""
    if choices_of(annotation):
        return "<choice>"
    kinds = {annotation, *get_args(annotation)}
    names = {int: "<int>", float: "<float>", Path: "<path>"}
    return next((name for kind, name in names.items() if kind in kinds), "<str>")


def shown_default(name: str) -> str:
    """` [default: 0.5]`, or ` [default: the student's recipe, 0.0001 for resnet]`; nothing for an absent default."""
    default = TrainConfig.model_fields[name].default
    recipes = {kind: recipe.get(name, default) for kind, recipe in RECIPES.items()}
    kind, first = next(iter(recipes.items()))
    if any(value != first for value in recipes.values()):
        return f" [default: the student's recipe, {default_text(first)} for {kind}]"
    return "" if first is None or first is False or first == "" else f" [default: {default_text(first)}]"


def default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def required_parameter(name: str, metavar: str) -> inspect.Parameter:
    """`--student` and `--out` may come from the file as well, so only the configuration requires them."""
    info = typer.Option(f"--{name}", help=TrainConfig.model_fields[name].description, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info]
    )


def complete_signature(function: Any) -> None:
    """Give `function` one keyword per field of TrainConfig in place of its `**options`."""
    own = inspect.signature(function, eval_str=True)
    fixed = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [required_parameter("student", "TYPE/SIZE"), required_parameter("out", "RUN")]
    added += [option_parameter(name, panel) for panel, names in PANELS.items() for name in names.split()]
    first, *rest = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fixed]
    parameters = [first, *added[:2], *rest, *added[2:]]
    function.__signature__ = own.replace(parameters=parameters)
    function.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": None}


complete_signature(train)


def print_summary(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """The result on stdout."""
    from console.output import print_json, print_table
    from train.metrics import gain_text, label_of, shown_text

    if as_json:
        print_json(summary)
        return
    control = summary.get("control") or {}
    rows = [
        {
            "metric": label_of(name),
            "distilled": shown_text(name, value),
            "control": shown_text(name, control.get("metrics", {}).get(name)),
            "difference": shown_text(name, control.get("difference", {}).get(name), gain_text),
        }
        for name, value in summary["metrics"].items()
    ]
    columns = ["metric", "distilled", *(["control", "difference"] if control else [])]
    title = (
        f"{summary['student']} after {summary['epochs_done']} epochs (best: {summary['best_epoch']}), "
        f"{summary.get('validation_samples', 'unknown number of')} validation samples, in {out}"
    )
    print_table(rows, columns, title)
    print(f"next: {next_command(summary, out)}")


def next_command(summary: dict[str, Any], out: Path) -> str:
    """A command that makes sense after a training; its report needs no labels, an export one task."""
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
        Path | None, typer.Option(help="Where the images lie, when the store has none.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """cli evaluate runs/resnet18 flowers.zarr --split val

    Measure a trained student or an exported file on a split: the metrics of its task, per class where there are
    classes. Of a label-free student: the cosine to the teacher, and k-NN and probe accuracy where there are labels.
    """
    from console.log import configure_logging
    from console.output import print_json, print_table
    from train.evaluation import evaluate_run
    from train.metrics import label_of, shown_text

    configure_logging()
    result = evaluate_run(
        run, store, split=split, batch_size=batch_size, device=device, workers=workers, data_root=data_root
    )
    print(f"next: {after_evaluation(run, store, result)}", file=sys.stderr, flush=True)
    if json_:
        print_json(result)
        return
    rows = [
        {"metric": label_of(name), "value": shown_text(name, value)}
        for name, value in result["metrics"].items()
    ]
    print_table(rows, ["metric", "value"], f"{result['student']} on {split} ({result['samples']} samples)")
    if result["per_class"]:
        metric = PER_CLASS_METRICS[result["task"]]
        classes = [
            {"class": name, metric: "n/a" if value is None else f"{value:.4g}"}
            for name, value in result["per_class"].items()
        ]
        print_table(classes, ["class", metric], "per class (n/a: no samples of it)")


def after_evaluation(run: Path, store: str, result: dict[str, Any]) -> str:
    """A command that makes sense after a measurement."""
    if run.suffix == ".onnx":
        return f"cli predict {run} INPUTS --out predictions"
    if result["task"] in ("classification", "segmentation"):
        return f"cli export {run}, or cli quantize {run} {store}"
    return f"cli export {run}"


def students(
    name: Annotated[list[str] | None, typer.Argument(help="Only these; timm:NAME works too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """cli students

    List the students with measured parameters and multiply-accumulates (MACs) at their default size, and the
    recipe that `cli train` starts from.

    cli students timm:mobilenetv4_conv_small vit-tiny
    """
    from console.output import print_json, print_table
    from train.students import list_students

    rows = list_students(name or None)
    if json_:
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
