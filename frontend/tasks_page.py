"""Tasks: the table of all tasks, live, with what can be done to each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nicegui import Client, ui

from backend.server.database import TaskState
from backend.server.errors import TaskError
from backend.server.events import Change
from backend.server.schemas import TaskView
from backend.server.tasks import STARTABLE, TaskFilter, Tasks
from frontend.layout import (
    button,
    duration,
    element,
    empty,
    frame,
    heading,
    icon_button,
    link,
    page_texts,
    text,
)
from frontend.live import follow
from frontend.messages import translate
from frontend.texts import Texts

PAGE_SIZE = 20
STOPPABLE = (TaskState.QUEUED, TaskState.RUNNING)


def build(client: Client, tasks: Tasks) -> None:
    texts = page_texts(client)
    with frame(texts, client, texts("tasks.title"), "tasks"):
        with heading(texts("tasks.title"), texts("tasks.lead")):
            button(texts("nav.new"), lambda: ui.navigate.to("/new"), "primary", "add")
        TaskTable(texts, client, tasks)


class TaskTable:
    """One page of the tasks that the filter lets through. Rows change in place; the table is made again only when
    other tasks are shown.
    """

    def __init__(self, texts: Texts, client: Client, tasks: Tasks) -> None:
        self.texts, self.tasks = texts, tasks
        self.search, self.state, self.page = "", "", 1
        self.rows: dict[str, Row] = {}
        with element("section", "panel") as self.panel:
            self.filter = element("div", "line filter")
            self.body = element("div")
        follow(client, tasks, None, self.apply)
        self.fill_filter()
        self.load()

    def fill_filter(self) -> None:
        states = {"": self.texts("tasks.all")} | {
            state.value: self.texts.or_word(f"state.{state}", state.value) for state in TaskState
        }
        with self.filter:
            search = ui.input(placeholder=self.texts("tasks.search"), on_change=self.change_search)
            search.props("outlined dense clearable debounce=250").classes("search")
            search._props["aria-label"] = self.texts("tasks.search")
            with search.add_slot("prepend"):
                ui.icon("search").props('aria-hidden="true"')
            state = ui.select(states, value="", on_change=self.change_state)
            state.props("outlined dense").classes("state-filter")
            state._props["aria-label"] = self.texts("tasks.filter")
            self.count = text("", "span", "muted small count").props('role="status"')

    def change_search(self, event: Any) -> None:
        self.search, self.page = event.value or "", 1
        self.load()

    def change_state(self, event: Any) -> None:
        self.state, self.page = event.value, 1
        self.load()

    def clear_filter(self) -> None:
        self.filter.clear()
        self.search, self.state, self.page = "", "", 1
        self.fill_filter()
        self.load()

    def turn_page(self, step: int) -> None:
        self.page += step
        self.load()

    def load(self) -> None:
        """Read the page from the database and show it."""
        states = (TaskState(self.state),) if self.state else ()
        found = self.tasks.search(TaskFilter(states=states, text=self.search or None), self.page, PAGE_SIZE)
        pages = max(1, math.ceil(found.total / PAGE_SIZE))
        if self.page > pages:  # the last task of the last page was deleted
            self.page = pages
            return self.load()
        filtered = bool(self.search or self.state)
        self.filter.set_visibility(bool(found.total) or filtered)
        name = "tasks.count.one" if found.total == 1 else "tasks.count"
        self.count.set_text(self.texts(name, count=found.total))
        if [task.task_id for task in found.items] == list(self.rows) and self.rows:
            for task in found.items:
                self.rows[task.task_id].show(task)
            return None
        self.body.clear()
        self.rows = {}
        with self.body:
            if found.items:
                self.fill_table(found.items)
                self.fill_pages(pages)
            elif filtered:
                with empty("search_off", self.texts("tasks.nothing"), self.texts("tasks.nothing.next")):
                    button(self.texts("tasks.clear"), self.clear_filter)
            else:
                with empty("model_training", self.texts("tasks.empty"), self.texts("tasks.empty.next")):
                    button(self.texts("nav.new"), lambda: ui.navigate.to("/new"), "primary", "add")
        return None

    def fill_table(self, items: list[TaskView]) -> None:
        columns = ("name", "state", "student", "data", "progress", "best", "left", "actions")
        with element("table", "table cards tasks"):
            with element("thead"), element("tr"):
                for name in columns:
                    text(
                        self.texts(f"column.{name}"),
                        "th",
                        "right" if name in ("best", "left", "actions") else "",
                    )
            with element("tbody"):
                for task in items:
                    self.rows[task.task_id] = Row(self.texts, self.tasks, task, self.load)

    def fill_pages(self, pages: int) -> None:
        if pages == 1:
            return
        with element("div", "pages"):
            text(self.texts("tasks.page", page=self.page, pages=pages), "span", "muted small")
            before = icon_button("chevron_left", self.texts("tasks.previous"), lambda: self.turn_page(-1))
            after = icon_button("chevron_right", self.texts("tasks.next"), lambda: self.turn_page(1))
            before.set_enabled(self.page > 1)
            after.set_enabled(self.page < pages)

    def apply(self, change: Change) -> None:
        """A task has changed: its row, or the whole page when it came, went or no longer fits the filter."""
        row = self.rows.get(change.task_id)
        if row is not None and change.task is not None and self.state in ("", change.task.state):
            row.show(change.task)
        else:
            self.load()


class Row:
    """One task in the table."""

    def __init__(self, texts: Texts, tasks: Tasks, task: TaskView, reload: Callable[[], Any]) -> None:
        self.texts, self.tasks, self.reload = texts, tasks, reload
        self.shown_state = ""
        with element("tr").props(f'data-task="{task.task_id}"'):
            with self.cell("name", "title"), element("div"):
                with link(f"/tasks/{task.task_id}"):
                    self.name = text("", "span")
                self.message = text("", "div", "muted small")
            with self.cell("state"):
                self.state = text("", "span", "state")
            with self.cell("student"):
                self.student = text("", "span")
            with self.cell("data"):
                self.data = text("", "span")
            with self.cell("progress"):
                self.progress = ProgressBar(texts)
            with self.cell("best", "right number"):
                self.best = text("", "span")
            with self.cell("left", "right number"):
                self.left = text("", "span")
            self.actions = self.cell("actions", "actions")
        self.show(task)

    def cell(self, name: str, classes: str = "") -> ui.element:
        made = element("td", classes)
        made._props["data-label"] = self.texts(f"column.{name}")
        return made

    def show(self, task: TaskView) -> None:
        self.task = task
        self.name.set_text(task.task_name or task.task_id)
        self.message.set_text(short_message(self.texts, task))
        self.student.set_text(task.student_model)
        self.data.set_text(task.dataset_id)
        self.progress.show(task)
        self.best.set_text(self.texts("none") if task.best_accuracy is None else f"{task.best_accuracy:.2f}%")
        self.left.set_text(duration(self.texts, task.time_left))
        if task.state != self.shown_state:
            self.shown_state = task.state
            self.state.set_text(self.texts.or_word(f"state.{task.state}", task.state))
            self.state.classes(replace=f"state {task.state}")
            self.actions.clear()
            with self.actions:
                self.fill_actions()

    def fill_actions(self) -> None:
        task = self.task
        actions = TaskActions(self.texts, self.tasks, task, self.reload)
        if task.state in STARTABLE:
            name = "action.resume" if task.attempt else "action.start"
            icon_button("play_arrow", self.texts(name), actions.start)
        if task.state in STOPPABLE:
            icon_button("stop", self.texts("action.stop"), actions.stop)
        if task.state == TaskState.CREATED:
            icon_button("edit", self.texts("action.edit"), actions.edit)
        icon_button("content_copy", self.texts("action.clone"), actions.clone)
        if task.state not in (TaskState.QUEUED, TaskState.RUNNING, TaskState.STOPPING):
            icon_button("delete_outline", self.texts("action.delete"), actions.ask_to_delete)


class ProgressBar:
    """A bar and `epoch 3 of 20`."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        with element("div", "progress") as self.whole:
            with element("div", "track").props(
                'role="progressbar" aria-valuemin="0" aria-valuemax="100"'
            ) as self.track:
                self.fill = element("div", "fill")
            self.words = text("", "div", "words")

    def show(self, task: TaskView) -> None:
        self.whole.classes(replace=f"progress {task.state}")
        self.fill.style(f"width: {task.progress:.1f}%")
        self.track.props(f'aria-valuenow="{task.progress:.0f}" aria-label="{self.texts("column.progress")}"')
        done, total = task.current_epoch or 0, task.planned_epochs
        waiting = task.state == TaskState.RUNNING and not done
        words = self.texts("extracting") if waiting else self.texts("epoch", done=done, total=total or "?")
        if task.state == TaskState.QUEUED and task.queue_position:
            words = self.texts("queued", place=task.queue_position)
        if task.state == TaskState.RUNNING and total and done >= total:
            words = f"{words} · {self.texts('finishing')}"
        self.words.set_text(words)


def short_message(texts: Texts, task: TaskView) -> str:
    """Why a task failed, or what it is doing before its first epoch."""
    content = translate(texts, task.error_message or task.message or "")
    return content if len(content) <= 90 else f"{content[:90]}…"


class TaskActions:
    """What can be done to one task; refusals are shown, not raised."""

    def __init__(self, texts: Texts, tasks: Tasks, task: TaskView, done: Callable[[], Any]) -> None:
        self.texts, self.tasks, self.task, self.done = texts, tasks, task, done

    @property
    def name(self) -> str:
        return self.task.task_name or self.task.task_id

    def attempt(self, action: Callable[[], Any], said: str) -> None:
        try:
            action()
        except TaskError as error:
            ui.notify(translate(self.texts, str(error)), type="negative", multi_line=True, timeout=8000)
        else:
            ui.notify(self.texts(said, name=self.name), type="positive", timeout=3000)
            self.done()

    def start(self) -> None:
        self.attempt(lambda: self.tasks.start(self.task.task_id), "done.started")

    def stop(self) -> None:
        self.attempt(lambda: self.tasks.stop(self.task.task_id), "done.stopping")

    def edit(self) -> None:
        ui.navigate.to(f"/tasks/{self.task.task_id}/edit")

    def clone(self) -> None:
        ui.navigate.to(f"/new?from={self.task.task_id}")

    def ask_to_delete(self) -> None:
        with ui.dialog() as dialog, element("div", "panel padded dialog"):
            text(self.texts("delete.title", name=self.name), "h2")
            text(self.texts("delete.text"), "p", "muted")
            with element("div", "save-bar"):
                button(self.texts("cancel"), dialog.close)
                button(self.texts("action.delete"), lambda: self.delete(dialog), "plain danger")
        dialog.on("hide", dialog.delete)
        dialog.open()

    def delete(self, dialog: ui.dialog) -> None:
        dialog.close()
        self.attempt(lambda: self.tasks.delete(self.task.task_id), "done.deleted")
