"""Compare: the report of several completed tasks, embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nicegui import Client, ui

from backend.server.database import TaskState
from backend.server.results import build_report
from backend.server.schemas import TaskView
from backend.server.tasks import TaskFilter, Tasks
from frontend.layout import button, element, empty_panel, frame, heading, link, page_texts, panel, text
from frontend.live import with_spinner
from frontend.texts import Texts

MOST_TASKS = 200
REPORTS = ".pages/reports"
#: Where the pages of reports are served; `frontend/app.py` adds the route.
REPORT_PATH = "/reports"


def build(client: Client, tasks: Tasks) -> None:
    texts = page_texts(client)
    completed = tasks.search(TaskFilter(states=(TaskState.COMPLETED,)), 1, MOST_TASKS).items
    with frame(texts, client, texts("compare.title"), "compare"):
        with heading(texts("compare.title"), texts("compare.lead")):
            pass
        if not completed:
            with empty_panel("insights", texts("compare.empty"), texts("compare.empty.next")):
                button(texts("nav.new"), lambda: ui.navigate.to("/new"), "primary", "add")
            return
        Comparison(texts, tasks, completed)


class Comparison:
    """The choice of tasks, and the report on them."""

    def __init__(self, texts: Texts, tasks: Tasks, completed: list[TaskView]) -> None:
        self.texts = texts
        self.reports = tasks.settings.output_root / REPORTS
        self.folders = {task.task_id: Path(task.output_dir) for task in completed}
        names = {
            task.task_id: f"{task.task_name or task.task_id} · {task.student_model}" for task in completed
        }
        self.names = names
        with panel(), element("div", "line compare-choice"):
            self.chosen = ui.select(
                names, label=texts("compare.choose"), multiple=True, value=list(names)[:4]
            )
            self.chosen.props("outlined dense use-chips stack-label options-dense").classes("grow")
            button(texts("compare.make"), self.make, "primary", "insights")
        self.result = element("div", "stack")

    async def make(self) -> None:
        if not self.chosen.value:
            ui.notify(self.texts("compare.none"), type="warning")
            return
        folders = [self.folders[task_id] for task_id in self.chosen.value]
        page = await with_spinner(
            self.texts, self.result, "compare.making", build_report(folders, self.reports)
        )
        if page is not None:
            self.show(f"{REPORT_PATH}/{page.parent.name}")

    def show(self, url: str) -> Any:
        with self.result:
            with element("div", "line"):
                # The report names a run by its folder, which is the task's id.
                with element("div", "chips grow"):
                    for task_id in self.chosen.value:
                        text(f"{task_id} = {self.names[task_id]}", "span", "chip name")
                with link(url, "small").props('target="_blank" rel="noopener"'):
                    text(self.texts("compare.open"), "span")
            frame_element = element("iframe", "report-frame").props(f'src="{url}" sandbox="allow-scripts"')
            frame_element._props["title"] = self.texts("compare.title")
