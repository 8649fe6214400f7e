"""The REST contract, from the server's side: what the pages of a platform call, and what training processes report."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from backend.server.database import TaskState
from backend.server.errors import NotFoundError
from backend.server.logs import CHUNK, LOG_FILE, find_file, follow, list_files, read_tail
from backend.server.schemas import (
    TASK_ID,
    Answer,
    Count,
    ErrorLine,
    EvaluationView,
    HistoryPoint,
    Name,
    NewEvaluation,
    NewHistoryPoint,
    NewTask,
    Number,
    OutputFile,
    Percent,
    Progress,
    ReportedPath,
    ReportedUrl,
    TaskFields,
    TaskPage,
    TaskView,
)
from backend.server.tasks import ACTIVE, TaskFilter, Tasks
from files.reading import open_regular

KEEP_ALIVE_S = 15.0
EVENT_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "A stream."}
REASONS: dict[int | str, str] = {
    400: "A field is missing or wrong; `message` names it.",
    401: "The server needs a token.",
    403: "The Host header or the page of another site is refused.",
    404: "There is no such task or file.",
    409: "The state of the task does not allow it.",
    413: "The request is too large.",
    "default": "Any other error.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Answer[None], "description": text} for status, text in REASONS.items()
}

router = APIRouter(prefix="/model-distillation", responses=ERRORS)


def tasks_of(request: Request) -> Tasks:
    service: Tasks = request.app.state.tasks
    return service


Service = Annotated[Tasks, Depends(tasks_of)]
Id = Annotated[str, Path(alias="taskId", pattern=TASK_ID)]


# -- what users do -------------------------------------------------------------------------------------------


@router.post("/tasks", tags=["tasks"])
def create_task(tasks: Service, fields: NewTask) -> Answer[TaskView]:
    """Create a task. It is checked as the training process will check it; it starts with `start`."""
    return Answer(data=tasks.create(fields))


@router.get("/tasks", tags=["tasks"])
def list_tasks(
    tasks: Service,
    state: Annotated[list[TaskState] | None, Query()] = None,
    text: Annotated[Name | None, Query(description="In ids, names, students, data sets.")] = None,
    student: Annotated[Name | None, Query(alias="studentModel")] = None,
    dataset: Annotated[Name | None, Query(alias="datasetId")] = None,
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    size: Annotated[int, Query(ge=1, le=500)] = 20,
) -> Answer[TaskPage]:
    """One page of the tasks that the filter lets through, newest first."""
    wanted = TaskFilter(states=tuple(state or ()), text=text, student=student, dataset=dataset)
    return Answer(data=tasks.search(wanted, page, size))


@router.get("/tasks/{taskId}", tags=["tasks"])
def read_task(tasks: Service, task_id: Id) -> Answer[TaskView]:
    """One task as it stands."""
    return Answer(data=tasks.read(task_id))


@router.put("/tasks/{taskId}", tags=["tasks"])
def change_task(tasks: Service, task_id: Id, fields: TaskFields) -> Answer[TaskView]:
    """Replace what a task is, as long as it has not been started."""
    return Answer(data=tasks.change(task_id, fields))


@router.delete("/tasks/{taskId}", tags=["tasks"])
def delete_task(
    tasks: Service,
    task_id: Id,
    files: Annotated[bool, Query(description="Delete its output folder too.")] = False,
) -> Answer[None]:
    """Delete a task that is not active, with its history and evaluations."""
    tasks.delete(task_id, files)
    return Answer()


@router.post("/tasks/{taskId}/start", tags=["tasks"])
def start_task(tasks: Service, task_id: Id) -> Answer[TaskView]:
    """Put a task into the queue. One that was stopped or failed resumes."""
    return Answer(data=tasks.start(task_id))


@router.post("/tasks/{taskId}/stop", tags=["tasks"])
def stop_task(tasks: Service, task_id: Id) -> Answer[TaskView]:
    """Take a task out of the queue, or stop its process: SIGTERM, and SIGKILL after 5 seconds."""
    return Answer(data=tasks.stop(task_id))


@router.get("/tasks/{taskId}/command", tags=["tasks"])
def read_command(tasks: Service, task_id: Id) -> Answer[list[str]]:
    """The command that starting the task runs."""
    return Answer(data=tasks.command(task_id))


@router.post("/command", tags=["tasks"])
def preview_command(tasks: Service, fields: NewTask) -> Answer[list[str]]:
    """The command of a task that is not created yet; the same checks as creating it."""
    return Answer(data=tasks.preview(fields))


@router.get("/datasets", tags=["tasks"])
def list_datasets(tasks: Service) -> Answer[list[str]]:
    """The folders below the data sets' root."""
    return Answer(data=tasks.datasets())


@router.get("/models", tags=["tasks"])
def list_models(tasks: Service) -> Answer[list[str]]:
    """The folders and files below the models root."""
    return Answer(data=tasks.models())


# -- what training processes report ----------------------------------------------------------------------------


@router.put("/tasks/{taskId}/progress", tags=["reports"])
def report_progress(
    tasks: Service,
    task_id: Id,
    epoch: Annotated[Count, Query(alias="currentEpoch")],
    accuracy: Annotated[Percent | None, Query(description="Percent.")] = None,
    loss: Annotated[Number | None, Query()] = None,
    body: Annotated[Progress | None, Body()] = None,
) -> Answer[None]:
    """The epoch that was finished last; 0 with a message during the extraction."""
    tasks.report_progress(task_id, epoch, accuracy, loss, body)
    return Answer()


@router.post("/tasks/{taskId}/history", tags=["reports"])
def report_history(tasks: Service, task_id: Id, body: NewHistoryPoint) -> Answer[None]:
    """The numbers of one epoch; a repeated epoch replaces the earlier one."""
    tasks.report_history(task_id, body)
    return Answer()


@router.get("/tasks/{taskId}/history", tags=["tasks"])
def read_history(tasks: Service, task_id: Id) -> Answer[list[HistoryPoint]]:
    """All epochs, in order."""
    return Answer(data=tasks.history(task_id))


@router.put("/tasks/{taskId}/model-path", tags=["reports"])
def report_model(
    tasks: Service,
    task_id: Id,
    path: Annotated[ReportedPath, Query(alias="modelPath")],
    url: Annotated[ReportedUrl, Query(alias="modelUrl")],
) -> Answer[None]:
    """Where the best model is."""
    tasks.report_model(task_id, path, url)
    return Answer()


@router.post("/tasks/{taskId}/evaluations", tags=["reports"])
def report_evaluation(tasks: Service, task_id: Id, body: NewEvaluation) -> Answer[None]:
    """The final metrics."""
    tasks.report_evaluation(task_id, body)
    return Answer()


@router.get("/tasks/{taskId}/evaluations", tags=["tasks"])
def read_evaluations(tasks: Service, task_id: Id) -> Answer[list[EvaluationView]]:
    """All evaluations, the newest first."""
    return Answer(data=tasks.evaluations(task_id))


@router.post("/tasks/{taskId}/complete", tags=["reports"])
def report_complete(tasks: Service, task_id: Id) -> Answer[None]:
    """The task has succeeded."""
    tasks.report_end(task_id, "complete")
    return Answer()


@router.put("/tasks/{taskId}/error", tags=["reports"])
def report_error(
    tasks: Service, task_id: Id, message: Annotated[ErrorLine, Query(alias="errorMessage")]
) -> Answer[None]:
    """The task has failed or was stopped."""
    tasks.report_end(task_id, "error", message)
    return Answer()


# -- logs, files, events ---------------------------------------------------------------------------------------


@router.get("/tasks/{taskId}/log", tags=["files"], response_class=PlainTextResponse)
def read_log(
    tasks: Service,
    task_id: Id,
    tail: Annotated[int | None, Query(ge=1, le=10_000_000, description="At most this many bytes.")] = None,
    download: Annotated[bool, Query(description="As a file to save.")] = False,
) -> Response:
    """The log of all attempts: whole, or its end."""
    path = tasks.output_dir(task_id) / LOG_FILE
    if tail is not None and not download:
        return PlainTextResponse(read_tail(path, tail))
    return file_response(path, "text/plain; charset=utf-8", f"{task_id}.log" if download else None)


@router.get("/tasks/{taskId}/log/events", tags=["files"], responses={200: EVENT_STREAM})
async def follow_log(tasks: Service, task_id: Id) -> StreamingResponse:
    """The log as server-sent events, a line each, from the last lines on; `end` follows the last one."""
    path = await asyncio.to_thread(tasks.output_dir, task_id)

    def is_over() -> bool:
        try:
            return tasks.broadcast.closed or tasks.read(task_id).state not in ACTIVE
        except NotFoundError:
            return True

    async def stream() -> AsyncIterator[str]:
        async for lines in follow(path / LOG_FILE, is_over):
            yield "".join(event("log", line) for line in lines) or ": waiting\n\n"
        yield event("end", "")

    return event_stream(stream())


@router.get("/tasks/{taskId}/files", tags=["files"])
def list_output_files(tasks: Service, task_id: Id) -> Answer[list[OutputFile]]:
    """The files of the task's output folder: weights, exports, metrics."""
    return Answer(data=list_files(tasks.output_dir(task_id)))


@router.get("/tasks/{taskId}/files/{name:path}", tags=["files"], response_class=StreamingResponse)
def download_file(tasks: Service, task_id: Id, name: str) -> Response:
    """Download one of them."""
    path = find_file(tasks.output_dir(task_id), name)
    return file_response(path, "application/octet-stream", path.name)


def file_response(path: FilePath, media_type: str, save_as: str | None) -> Response:
    """The file as it is now: of one that grows meanwhile, what it had at the beginning. Raises NotFoundError."""
    try:
        file = open_regular(path)
    except OSError:
        raise NotFoundError(f"there is no file {path.name!r} yet") from None
    size = os.fstat(file.fileno()).st_size

    def chunks() -> Iterator[bytes]:
        left = size
        with file:
            while data := file.read(min(left, CHUNK)):
                left -= len(data)
                yield data

    headers = {"Content-Length": str(size)}
    if save_as is not None:
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(save_as, safe='')}"
    return StreamingResponse(chunks(), media_type=media_type, headers=headers)


@router.get("/events", tags=["events"], responses={200: EVENT_STREAM})
async def follow_tasks(tasks: Service) -> StreamingResponse:
    """Changes of all tasks as server-sent events. It begins with every task as it stands, so none is missed.

    `task` carries the task as `GET /tasks/{taskId}` gives it, `deleted` its id.
    """
    return follow_changes(tasks, None)


@router.get("/tasks/{taskId}/events", tags=["events"], responses={200: EVENT_STREAM})
async def follow_task(tasks: Service, task_id: Id) -> StreamingResponse:
    """Changes of one task, the same way."""
    await asyncio.to_thread(tasks.read, task_id)
    return follow_changes(tasks, task_id)


def follow_changes(tasks: Tasks, task_id: str | None) -> StreamingResponse:
    async def stream() -> AsyncIterator[str]:
        # Subscribed before reading, so that no change falls between the tasks as they stand and the first event.
        with tasks.changes(task_id) as subscription:
            for view in await asyncio.to_thread(standing, tasks, task_id):
                yield event("task", view.model_dump_json(by_alias=True))
            while True:
                try:
                    change = await subscription.next(KEEP_ALIVE_S)
                except StopAsyncIteration:  # the server is closing
                    return
                if change is None:
                    yield ": waiting\n\n"  # a comment now and then shows a client that is gone
                elif change.task is not None:
                    yield event("task", change.json)
                else:
                    yield event("deleted", json.dumps({"taskId": change.task_id}))
                    if change.task_id == task_id:
                        return

    return event_stream(stream())


def standing(tasks: Tasks, task_id: str | None) -> list[TaskView]:
    return list(tasks.read_all()) if task_id is None else [tasks.read(task_id)]


def event(kind: Literal["task", "deleted", "log", "end"], data: str) -> str:
    return f"event: {kind}\ndata: {data.rstrip(chr(13)).replace(chr(13), ' ')}\n\n"


def event_stream(content: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(content, media_type="text/event-stream", headers=headers)
