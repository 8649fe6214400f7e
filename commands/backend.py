"""The commands of `backend/`: `cli serve`, the server with its REST API and the pages, and `cli distill`, what a platform starts.

The options of `cli distill` have a grammar of their own (backend/task/options.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs QWEN_DISTILL_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    database_url: Annotated[
        str,
        typer.Option(
            envvar="QWEN_DISTILL_DATABASE_URL",
            show_default="tasks.sqlite in the output root",
            show_envvar=False,
            help="Database of the tasks: mysql://…, mariadb://…, postgresql://… or sqlite:///FILE.",
        ),
    ] = "",
    datasets_root: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("datasets"),
    models_root: Annotated[
        Path, typer.Option(help="Folder of the teachers and of students' weights.")
    ] = Path("models"),
    output_root: Annotated[Path, typer.Option(help="Folder that tasks write into.")] = Path("output"),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, show_default="one per GPU, else one", help="Tasks that run at a time."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Run tasks on this dask cluster (tcp://host:8786) instead.")
    ] = None,
) -> None:
    """cli serve --datasets-root /data/datasets --models-root /data/models --output-root /data/output

    Create, start and watch training tasks in a browser or over the REST API (/docs). Tasks run in processes of their
    own: they continue when the server ends, and the server, started again, finds them.
    """
    from backend.server.main import run_server
    from backend.server.settings import load_settings
    from frontend.app import mount

    for root, default in ((datasets_root, "datasets"), (models_root, "models"), (output_root, "output")):
        if root == Path(default):  # so that `cli serve` alone works anywhere
            root.mkdir(exist_ok=True)
    settings = load_settings(
        datasets_root=datasets_root,
        models_root=models_root,
        output_root=output_root,
        host=host,
        port=port,
        database_url=database_url,
        jobs=jobs,
        scheduler=scheduler,
    )
    run_server(settings, mount)
