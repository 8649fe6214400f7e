"""The application: services, routes, error answers, security, in one object that uvicorn runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from backend.server.database import open_database
from backend.server.errors import TaskError
from backend.server.processes import LocalRunner
from backend.server.queue import Runner, TaskQueue
from backend.server.routes import router
from backend.server.security import Guard
from backend.server.settings import Settings
from backend.server.tasks import Tasks
from console.output import get_logger

log = get_logger("server")

MOST_PROBLEMS = 20


def create_app(settings: Settings) -> FastAPI:
    """The server's application; `app.state.tasks` is the service that everything goes through.

    The database is opened and migrated here; the queue starts and ends with the application.

    Raises:
        ServerError: when the database cannot be used, or another server uses the output root.
    """
    tasks = Tasks(open_database(settings.database), settings)
    queue = TaskQueue(tasks, make_runner(settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue.open()
        try:
            yield
        finally:
            queue.close()
            tasks.broadcast.close()
            tasks.engine.dispose()

    # Swagger UI's files are served from here: the page works without a network.
    app: FastAPI = FastAPIOffline(
        title="qwen-distill",
        description="Training tasks: create, start, watch. The training process reports to the same API.",
        redoc_url=None,
        lifespan=lifespan,
        static_url="/docs-files",
    )
    app.state.tasks, app.state.settings = tasks, settings
    app.include_router(router)
    app.add_middleware(Guard, settings=settings)
    add_error_answers(app)
    return app


def make_runner(settings: Settings) -> Runner:
    """Where tasks run. Raises ServerError when the cluster cannot be used."""
    if settings.scheduler is None:
        return LocalRunner(settings)
    from backend.server.cluster import DaskRunner

    return DaskRunner(settings)


def add_error_answers(app: FastAPI) -> None:
    """Every error as `{code, message, data}`, none with a traceback."""

    @app.exception_handler(TaskError)
    async def refused(request: Request, error: TaskError) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, "; ".join(describe(item) for item in error.errors()[:MOST_PROBLEMS]))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "an error of the server: its log has the details")


def describe(problem: dict[str, Any]) -> str:
    """One problem of a request: `learningRate: Input should be a valid number`."""
    kind, *path = problem["loc"] or ("request",)
    where = ".".join(str(part) for part in path) or str(kind)
    return f"{where}: {str(problem['msg']).removeprefix('Value error, ')}"


def answer(status: int, message: str, headers: Any = None) -> JSONResponse:
    printable = message.encode("utf-8", "backslashreplace").decode("utf-8")[:2000]
    return JSONResponse({"code": status, "message": printable, "data": None}, status, headers)
