"""The pages, added to the back end's application."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from nicegui import Client, ui
from nicegui import app as pages

from backend.server.errors import NotFoundError
from backend.server.tasks import Tasks
from frontend import compare_page, new_task_page, stores_page, task_page, tasks_page

FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#3358d4" stroke-width="2.4">'
    '<circle cx="9" cy="12" r="6.5"/><circle cx="18.5" cy="12" r="3.2" fill="#3358d4" stroke="none"/></svg>'
)
REPORT_NAME = re.compile(r"[0-9a-f]{16}")
API = "/model-distillation/"
BUILD_TIMEOUT_S = 30.0


def mount(app: FastAPI) -> None:
    """Add the pages to an application of `backend.server.app.create_app`, after all its own routes.

    Everything they need (scripts, styles, fonts) is in NiceGUI's package: no network is used.
    """
    tasks: Tasks = app.state.tasks
    add_reports(app, tasks.settings.output_root / compare_page.REPORTS)

    @ui.page("/", response_timeout=BUILD_TIMEOUT_S)
    def show_tasks(client: Client) -> None:
        tasks_page.build(client, tasks)

    @ui.page("/new", response_timeout=BUILD_TIMEOUT_S)
    def show_new_task(client: Client) -> None:
        copied = client.request.query_params.get("from")
        with missing_task(client):
            new_task_page.build(client, tasks, copied=copied)

    @ui.page("/tasks/{task_id}", response_timeout=BUILD_TIMEOUT_S)
    def show_task(client: Client, task_id: str) -> None:
        with missing_task(client):
            task_page.build(client, tasks, task_id)

    @ui.page("/tasks/{task_id}/edit", response_timeout=BUILD_TIMEOUT_S)
    def show_edit(client: Client, task_id: str) -> None:
        with missing_task(client):
            new_task_page.build(client, tasks, edited=task_id)

    @ui.page("/stores", response_timeout=BUILD_TIMEOUT_S)
    async def show_stores(client: Client) -> None:
        await stores_page.build(client, tasks)

    @ui.page("/compare", response_timeout=BUILD_TIMEOUT_S)
    def show_compare(client: Client) -> None:
        compare_page.build(client, tasks)

    add_missing_page()
    logging.getLogger("nicegui").setLevel(logging.WARNING)
    ui.run_with(
        app,
        title="Qwen Distill",
        favicon=FAVICON,
        dark=None,
        tailwind=False,
        reconnect_timeout=30.0,
        show_welcome_message=False,
    )


def add_missing_page() -> None:
    """What has no page: a page with a link for a browser, the platform's JSON for everything else."""

    @pages.exception_handler(404)
    async def show_missing(request: Request, error: Exception) -> Response:
        if request.url.path.startswith(API) or "text/html" not in request.headers.get("accept", ""):
            answer = {"code": 404, "message": f"there is no {request.url.path[:200]}", "data": None}
            return JSONResponse(answer, 404)
        with Client(ui.page(""), request=request) as client:
            task_page.build_missing(client)
        return client.build_response(request, 404)


@contextmanager
def missing_task(client: Client) -> Iterator[None]:
    """Replaces a page whose task does not exist by one with a link to the list."""
    try:
        yield
    except NotFoundError:
        task_page.build_missing(client)


def add_reports(app: FastAPI, reports: Path) -> None:
    """The pages of reports: whole documents of ours, shown in a frame that may run their scripts and nothing else."""

    @app.get(compare_page.REPORT_PATH + "/{name}", include_in_schema=False)
    def show_report(name: str) -> Response:
        page = reports / name / "report.html"
        if not REPORT_NAME.fullmatch(name) or not page.is_file():
            return PlainTextResponse("there is no such report", 404)
        policy = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:"
        return FileResponse(page, media_type="text/html", headers={"content-security-policy": policy})
