"""`cli extract`, `cli probe`, `cli teachers`, `cli make-tiny-teacher`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA_PANEL, TEACHER_PANEL = "Data", "Teacher"
STORED_PANEL, MACHINE_PANEL, RUN_PANEL = "What is stored", "Devices and speed", "The run"

Option = typer.Option


def extract(
    data: Annotated[
        str, typer.Argument(help="Folder, file or database URL of the data set.", metavar="DATA")
    ],
    out: Annotated[Path | None, Option(help="The store to write.", metavar="STORE")] = None,
    config: Annotated[
        Path | None, Option(help="YAML or TOML file with these options; the command line wins.")
    ] = None,
    source: Annotated[
        str | None,
        Option(
            help="auto, folder, yolo, coco, voc, masks, clips, hdf5, table or sql.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        Option(help="NAME=PATH of a split, e.g. val=images/val; repeat it.", rich_help_panel=DATA_PANEL),
    ] = None,
    val_fraction: Annotated[
        float | None,
        Option(
            help="Share cut for validation when the data set has none. [default: 0.1]",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    group_duplicates: Annotated[
        bool | None,
        Option(
            "--group-duplicates/--no-group-duplicates",
            help="Cut validation by content (reads all twice), or by key alone. [default: by key, copies kept together]",
            show_default=False,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    source_option: Annotated[
        list[str] | None,
        Option(
            help="NAME=VALUE for the source, e.g. query='select …' (sql); repeat it.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        Option(help="Frames taken evenly from each clip. [default: 16]", rich_help_panel=DATA_PANEL),
    ] = None,
    teacher: Annotated[
        str | None,
        Option(help="qwen2.5-vl or timm:NAME. [default: qwen2.5-vl]", rich_help_panel=TEACHER_PANEL),
    ] = None,
    teacher_path: Annotated[
        str | None,
        Option(help="Checkpoint folder, weights file or hub name.", rich_help_panel=TEACHER_PANEL),
    ] = None,
    image_size: Annotated[
        int | None,
        Option(
            help="Side of the square the teacher sees, in pixels. [default: 224]",
            rich_help_panel=TEACHER_PANEL,
        ),
    ] = None,
    resize: Annotated[
        str | None,
        Option(help="squash, letterbox or center-crop. [default: squash]", rich_help_panel=TEACHER_PANEL),
    ] = None,
    exact_preprocessing: Annotated[
        bool | None,
        Option(
            "--exact-preprocessing",
            help="Bit-equal to the Hugging Face image processor; slower on large JPEG.",
            rich_help_panel=TEACHER_PANEL,
        ),
    ] = None,
    bit_depth: Annotated[
        str | None,
        Option(
            help="Bits used of 16-bit gray images: auto (by a sample), full, 8, 12 or 16. [default: auto]",
            metavar="BITS",
            rich_help_panel=TEACHER_PANEL,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        Option(
            help="Images with more pixels are bad images, never decoded. [default: 89478485]",
            rich_help_panel=TEACHER_PANEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None, Option(help="auto, float32 or bfloat16.", rich_help_panel=TEACHER_PANEL)
    ] = None,
    grid: Annotated[
        str | None,
        Option(
            help="Side of the stored grid: auto (16 with boxes or masks, else 0), 0, a number, native.",
            rich_help_panel=STORED_PANEL,
        ),
    ] = None,
    images: Annotated[
        str | None,
        Option(
            help="none, jpeg or raw: with images the store alone is enough.", rich_help_panel=STORED_PANEL
        ),
    ] = None,
    views: Annotated[
        int | None,
        Option(help="Recorded augmented views per image. [default: 0]", rich_help_panel=STORED_PANEL),
    ] = None,
    logits: Annotated[
        str | None,
        Option(
            help="none, probe, zero-shot or zero-shot-calibrated. [default: none]",
            rich_help_panel=STORED_PANEL,
        ),
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed of views and probe folds. [default: 0]", rich_help_panel=STORED_PANEL)
    ] = None,
    device: Annotated[
        str | None,
        Option(
            help="auto, cpu, cuda, or a list like cuda:0,cuda:1 (a process each).",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        Option(
            help="Images a forward pass, or auto. Halved when memory runs out.", rich_help_panel=MACHINE_PANEL
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="Run the teacher through torch.compile. [default: on GPUs, for qwen2.5-vl]",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Option(
            help="Decoding processes; 0 decodes in a thread. [default: four of five cores, 16 at most]",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    shard_rows: Annotated[
        int | None,
        Option(
            help="Rows of a shard, a power of two: the unit that devices share.",
            rich_help_panel=MACHINE_PANEL,
        ),
    ] = None,
    shard_range: Annotated[
        str | None,
        Option(help="Encode only shards A:B of the plan (SLURM arrays).", rich_help_panel=MACHINE_PANEL),
    ] = None,
    scheduler: Annotated[
        str | None,
        Option(help="Address of a dask scheduler, e.g. tcp://host:8786.", rich_help_panel=MACHINE_PANEL),
    ] = None,
    max_bad: Annotated[
        str | None,
        Option(help="Bad images that end the run: 1% or a count. [default: 1%]", rich_help_panel=RUN_PANEL),
    ] = None,
    check_content: Annotated[
        bool | None,
        Option(
            "--check-content",
            help="Read every file to find changed ones, and try bad images again; otherwise size and time decide.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    dry_run: Annotated[
        bool | None,
        Option(
            "--dry-run",
            help="Print sizes, an estimated time and what has changed, and stop.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        Option("--overwrite", help="Start anew; the store at --out is deleted.", rich_help_panel=RUN_PANEL),
    ] = None,
    break_lock: Annotated[
        bool | None,
        Option("--break-lock", help="Take over a lock whose owner is gone.", rich_help_panel=RUN_PANEL),
    ] = None,
    json: Annotated[
        bool, Option("--json", help="One JSON object on stdout.", rich_help_panel=RUN_PANEL)
    ] = False,
) -> None:
    """cli extract photos --out photos.zarr --teacher-path Qwen2.5-VL-7B-Instruct

    Encode every image of DATA with the teacher, once, into STORE. Running the same command again resumes, or
    follows the data set: changed, removed, renamed and new images and annotations, reusing what is encoded. Without the real weights, try things with random ones:

    cli make-tiny-teacher tiny

    cli extract photos --out photos.zarr --teacher-path tiny --dry-run
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "json")}
    from commands.extracting import run_extract

    run_extract(given, config, json)


def probe(
    store: Annotated[Path, typer.Argument(help="A complete store with class labels.", metavar="STORE")],
    seed: Annotated[int, Option(help="Seed of the folds.")] = 0,
    json: Annotated[bool, Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """cli probe photos.zarr

    Measure the stored features (k-NN, linear probe) and write the probe's out-of-fold logits to `logits/probe`:
    a row's logits come from a probe that never saw it.
    """
    from commands.extracting import run_probe

    run_probe(store, seed, json)


def teachers(
    json: Annotated[bool, Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """cli teachers

    List the teachers, the width of their features and how to get their weights.
    """
    from console.output import print_json, print_table
    from extract.teachers import list_teachers

    rows = list_teachers()
    if json:
        print_json({"teachers": rows})
        return
    for row in rows:
        print_table([{"field": name, "value": value} for name, value in row.items()], ["field", "value"])
        print()


def make_tiny_teacher(
    folder: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.", metavar="DIR")],
    depth: Annotated[int, Option(help="Blocks of the vision tower.")] = 2,
    seed: Annotated[int, Option(help="Seed of the random weights.")] = 0,
) -> None:
    """cli make-tiny-teacher tiny

    Write a Qwen2.5-VL checkpoint with a small vision tower and random weights: it shows the machinery and teaches
    nothing.
    """
    from extract.teachers.tiny import make_tiny_teacher as make
    from store.format import RANDOM_WEIGHTS_NOTICE

    path = make(folder, depth=depth, seed=seed)
    print(f"{path}: {RANDOM_WEIGHTS_NOTICE}")
    print(f"next: cli extract DATA --out features.zarr --teacher-path {path}")
