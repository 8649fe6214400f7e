"""`cli serve`: the back end with its REST API, and the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
