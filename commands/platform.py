"""`cli distill`: the training platform's command. Its options have their own grammar (backend/task/options.py)."""

from __future__ import annotations

import typer


def distill(context: typer.Context) -> None:
    """cli distill --task_id 7 --api_base_url http://localhost:8080/api --teacher_path Qwen2.5-VL-7B-Instruct
    --student_model resnet18 --dataset_id flowers --output_dir output/7 --gpu_devices cpu

    What the training platform starts: extract, train, evaluate, report. `cli distill --help` prints all options.
    """
    from backend.task.main import main

    raise typer.Exit(main(context.args, program="cli distill"))


# Everything goes to our own parser: repeated options, bare booleans, unknown options, --help.
distill.context_settings = {  # type: ignore[attr-defined]
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": [],
}
