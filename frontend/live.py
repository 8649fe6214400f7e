"""Live updates of an open page: one subscription a page, ended with the page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from nicegui import Client, background_tasks, ui

from backend.server.events import Change
from backend.server.tasks import Tasks
from backend.server.tools import ToolError
from frontend.layout import notice, text
from frontend.messages import translate
from frontend.texts import Texts


def follow(client: Client, tasks: Tasks, task_id: str | None, apply: Callable[[Change], Any]) -> None:
    """Call `apply` with every change of a task (None: of all), from now until the page is closed.

    To be called before the page reads the tasks: then no change falls between the two.
    """
    subscription = ExitStack()
    changes = subscription.enter_context(tasks.changes(task_id))

    async def listen() -> None:
        with subscription:
            async for change in changes:
                with client:
                    apply(change)

    running = background_tasks.create(listen(), name=f"follow {task_id or 'all tasks'}")
    client.on_delete(running.cancel)


async def with_spinner(texts: Texts, container: ui.element, name: str, work: Awaitable[Any]) -> Any:
    """The result of slow work, with a spinner and the text of that name meanwhile; None when it failed, which is shown."""
    container.clear()
    with container, ui.element("div").classes("empty").props('role="status"'):
        ui.spinner(size="28px")
        ui.label(texts(name)).classes("muted small")
    try:
        result = await work
    except ToolError as error:
        container.clear()
        with container, notice("bad"):
            text(translate(texts, str(error)), "p")
        return None
    container.clear()
    return result
