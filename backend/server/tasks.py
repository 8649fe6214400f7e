"""Tasks: what users and training processes may do with them. The REST routes, the pages and the queue all come here.

Each method is one transaction. Writes are serialized by a lock that also covers the publishing of the change, so that
subscribers receive the states of a task in the order of the database. Methods block for milliseconds and may be called
from any thread; `changes` is for coroutines.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from pydantic.alias_generators import to_camel
from sqlalchemy.orm import Session

from backend.server.command import FIELD_OF_OPTION, Order, Place, command_line, training_words
from backend.server.database import Evaluation, History, Task, TaskState
from backend.server.errors import ConflictError, NotFoundError, TaskError
from backend.server.events import Broadcast, Change, Subscription
from backend.server.schemas import (
    EvaluationResult,
    EvaluationView,
    HistoryPoint,
    NewTask,
    Progress,
    TaskFields,
    TaskPage,
    TaskView,
)
from backend.server.settings import Settings
from backend.task.configs import StageConfigs
from backend.task.errors import OptionError
from backend.task.options import is_plain
from backend.task.parsing import read_training_config
from backend.task.request import TaskRequest, read_request, resolve_devices

ACTIVE = (TaskState.QUEUED, TaskState.RUNNING, TaskState.STOPPING)
# From these a task can be started (again); the training process resumes what is in its folder.
STARTABLE = (TaskState.CREATED, TaskState.STOPPED, TaskState.FAILED, TaskState.LOST)
FIELDS = tuple(TaskFields.model_fields)
# Beside the tasks' folders; the training process names it (backend/task/request.py).
CACHE_FOLDER = "feature_cache"


@dataclass(frozen=True, kw_only=True)
class TaskFilter:
    """Which tasks a list shows; None lets all through. `text` is looked for in ids, names, students and data sets."""

    states: tuple[TaskState, ...] = ()
    text: str | None = None
    student: str | None = None
    dataset: str | None = None


class Tasks:
    """All tasks of one server.

    `wake` is called after every change that the queue has to act on.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.broadcast = Broadcast()
        self.lock = threading.RLock()
        self.wake: Callable[[], None] = lambda: None

    # -- what users do -------------------------------------------------------------------------------------

    def create(self, fields: NewTask) -> TaskView:
        """Check and keep a new task.

        Raises:
            TaskError: with all that is wrong with it, on one line.
            ConflictError: when the id is taken, or its output folder exists.
        """
        task_id = fields.task_id or uuid.uuid4().hex[:12]
        place = self.place(task_id, requested_devices(fields) or "cpu")
        request = self.check(fields, place)
        if task_id == CACHE_FOLDER or place.output_dir.exists():
            raise ConflictError(f"taskId: {place.output_dir} exists already: choose another id")
        with self.writing() as session:
            if session.scalar(sa.select(Task.id).where(Task.task_id == task_id)) is not None:
                raise ConflictError(f"taskId: there is a task {task_id!r} already: choose another id")
            now = utc_now()
            task = Task(
                task_id=task_id,
                state=TaskState.CREATED,
                attempt=0,
                datasets_root=str(self.settings.datasets_root),
                models_root=str(self.settings.models_root),
                output_dir=str(place.output_dir),
                created_at=now,
                updated_at=now,
            )
            fill(task, fields, request)
            session.add(task)
            session.flush()
            self.publish(session, task)
            return self.view(session, task)

    def change(self, task_id: str, fields: TaskFields) -> TaskView:
        """Replace what a task is, as long as it has not been started.

        Raises:
            TaskError, NotFoundError, ConflictError: like `create`, and when it has been started.
        """
        with self.changing(task_id) as (session, task):
            if task.state != TaskState.CREATED:
                raise ConflictError(
                    f"task {task_id} is {task.state} and can no longer be changed: create another one"
                )
            place = self.place(task_id, requested_devices(fields) or "cpu")
            fill(task, fields, self.check(fields, place))
            return self.view(session, task)

    def search(self, filter: TaskFilter | None = None, page: int = 1, size: int = 20) -> TaskPage:
        """One page of the tasks that the filter lets through, newest first; pages count from 1."""
        conditions = conditions_of(filter or TaskFilter())
        with Session(self.engine) as session:
            total = session.scalar(sa.select(sa.func.count(Task.id)).where(*conditions)) or 0
            statement = sa.select(Task).where(*conditions).order_by(Task.id.desc())
            rows = session.scalars(statement.limit(size).offset((page - 1) * size)).all()
            positions = queue_positions(session)
            items = [view_of(task, positions.get(task.task_id)) for task in rows]
        return TaskPage(total=total, page=page, size=size, items=items)

    def read_all(self) -> list[TaskView]:
        """Every task, oldest first."""
        with Session(self.engine) as session:
            positions = queue_positions(session)
            rows = session.scalars(sa.select(Task).order_by(Task.id))
            return [view_of(task, positions.get(task.task_id)) for task in rows]

    def datasets(self) -> list[str]:
        """The folders below the data sets' root, by name."""
        return [path.name for path in visible(self.settings.datasets_root) if path.is_dir()]

    def models(self) -> list[str]:
        """The folders and files below the models root, by name."""
        return [path.name for path in visible(self.settings.models_root)]

    def read(self, task_id: str) -> TaskView:
        """One task. Raises NotFoundError."""
        with Session(self.engine) as session:
            return self.view(session, find_task(session, task_id))

    def start(self, task_id: str) -> TaskView:
        """Put a task into the queue; one that ran before resumes.

        Raises:
            TaskError: when it cannot run as it is: a data set or teacher that is no longer there.
            ConflictError: when it is waiting, running or complete.
        """
        with self.changing(task_id) as (session, task):
            if task.state not in STARTABLE:
                raise ConflictError(f"task {task_id} is {task.state}: it cannot be started now")
            self.check_output(task)
            self.check(fields_of(task), self.place_of(task))
            task.state, task.queued_at, task.ended_at = TaskState.QUEUED, utc_now(), None
            task.error_message = task.message = task.exit_code = task.reported_end = None
            view = self.view(session, task)
        self.wake()
        return view

    def stop(self, task_id: str) -> TaskView:
        """Take a task out of the queue, or stop its process: SIGTERM, and SIGKILL after 5 seconds.

        Raises:
            ConflictError: when it is neither waiting nor running, or was not started by this server.
        """
        with self.changing(task_id) as (session, task):
            if task.state == TaskState.QUEUED:
                task.state = TaskState.STOPPED if task.attempt else TaskState.CREATED
                task.queued_at = None
            elif task.state == TaskState.RUNNING and task.runner is None:
                raise ConflictError(
                    f"task {task_id} was not started by this server: stop its process yourself"
                )
            elif task.state == TaskState.RUNNING:
                task.state = TaskState.STOPPING
            elif task.state != TaskState.STOPPING:
                raise ConflictError(f"task {task_id} is {task.state}: there is nothing to stop")
            view = self.view(session, task)
        self.wake()
        return view

    def delete(self, task_id: str, files: bool = False) -> None:
        """Delete a task with its history and evaluations; with `files` also its output folder.

        Raises:
            ConflictError: while it is waiting or running.
        """
        with self.writing() as session:
            task = find_task(session, task_id)
            if task.state in ACTIVE and not (task.state == TaskState.RUNNING and task.runner is None):
                raise ConflictError(f"task {task_id} is {task.state}: stop it before deleting it")
            if files:
                self.check_output(task)
            folder = task.output_dir
            for table in (History, Evaluation):
                session.execute(sa.delete(table).where(table.task_key == task.id))
            session.delete(task)
            session.flush()
            self.on_commit(session, lambda: self.broadcast.publish(Change(task_id, None)))
        if files:  # outside of the lock: it can take long
            shutil.rmtree(folder, ignore_errors=True)

    def command(self, task_id: str) -> list[str]:
        """The command that starting the task runs. Raises NotFoundError, TaskError."""
        with Session(self.engine) as session:
            task = find_task(session, task_id)
            return self.command_of(fields_of(task), self.place_of(task))

    def preview(self, fields: NewTask) -> list[str]:
        """The command of a task that is not created yet. Raises TaskError with all that is wrong with it."""
        place = self.place(fields.task_id or "TASK", requested_devices(fields) or "cpu")
        self.check(fields, place)
        return self.command_of(fields, place)

    def history(self, task_id: str) -> list[HistoryPoint]:
        """The epochs of a task, in order. Raises NotFoundError."""
        with Session(self.engine) as session:
            task = find_task(session, task_id)
            rows = session.scalars(
                sa.select(History).where(History.task_key == task.id).order_by(History.epoch)
            )
            return [HistoryPoint.model_validate(row) for row in rows]

    def evaluations(self, task_id: str) -> list[EvaluationView]:
        """The evaluations of a task, the newest first. Raises NotFoundError."""
        with Session(self.engine) as session:
            task = find_task(session, task_id)
            statement = sa.select(Evaluation).where(Evaluation.task_key == task.id)
            rows = session.scalars(statement.order_by(Evaluation.id.desc()))
            return [EvaluationView.model_validate(row) for row in rows]

    def changes(self, task_id: str | None = None) -> AbstractContextManager[Subscription]:
        """Subscribe to the changes of one task or all: `with tasks.changes() as changes: async for change in changes`.

        Enter it before reading the tasks, so that no change falls between the two.
        """
        return self.broadcast.subscribe(task_id)

    def output_dir(self, task_id: str) -> Path:
        """A task's output folder, which may not exist yet. Raises NotFoundError, ConflictError."""
        with Session(self.engine) as session:
            task = find_task(session, task_id)
            self.check_output(task)
            return Path(task.output_dir)

    # -- what training processes report --------------------------------------------------------------------

    def report_progress(
        self, task_id: str, epoch: int, accuracy: float | None, loss: float | None, body: Progress | None
    ) -> None:
        """`PUT …/progress`. Epoch 0 with a message is the extraction. Repeated calls change nothing."""
        with self.reporting(task_id) as (_, task):
            body = body or Progress()
            if task.runner is None and task.state in STARTABLE:  # started again elsewhere
                task.state, task.ended_at, task.error_message = TaskState.RUNNING, None, None
            task.current_epoch = max(epoch, task.current_epoch or 0)
            if body.total_epochs:
                task.planned_epochs = body.total_epochs
            if body.message or epoch:
                task.message = (body.message or "")[:1000] or None
            if epoch and epoch >= (task.current_epoch or 0):
                task.train_loss = first_known(body.train_loss, loss, task.train_loss)
                task.val_loss = first_known(body.val_loss, task.val_loss)
                task.accuracy = first_known(body.val_accuracy, accuracy, task.accuracy)
                known = [value for value in (task.best_accuracy, task.accuracy) if value is not None]
                task.best_accuracy = max(known, default=None)

    def report_history(self, task_id: str, point: HistoryPoint) -> None:
        """`POST …/history`. A repeated epoch replaces the earlier one."""
        with self.reporting(task_id) as (session, task):
            row = session.scalar(
                sa.select(History).where(History.task_key == task.id, History.epoch == point.epoch)
            )
            if row is None:
                row = History(task_key=task.id, created_at=utc_now())
                session.add(row)
            for name in HistoryPoint.model_fields:
                setattr(row, name, getattr(point, name))
            task.epoch_seconds = first_known(point.epoch_time, task.epoch_seconds)

    def report_model(self, task_id: str, path: str, url: str) -> None:
        """`PUT …/model-path`: where the best model is."""
        with self.reporting(task_id) as (_, task):
            task.model_path, task.model_url = path, url

    def report_evaluation(self, task_id: str, result: EvaluationResult) -> None:
        """`POST …/evaluations`. The same result twice is one evaluation: its answer was lost."""
        with self.reporting(task_id) as (session, task):
            latest = session.scalar(
                sa.select(Evaluation)
                .where(Evaluation.task_key == task.id)
                .order_by(Evaluation.id.desc())
                .limit(1)
            )
            values = {name: getattr(result, name) for name in EvaluationResult.model_fields}
            if latest is None or any(getattr(latest, name) != value for name, value in values.items()):
                session.add(Evaluation(task_key=task.id, created_at=utc_now(), **values))

    def report_end(self, task_id: str, end: Literal["complete", "error"], message: str | None = None) -> None:
        """`POST …/complete` and `PUT …/error`.

        For a process of this server the exit code decides, as soon as it has ended; a process that someone else
        started ends with this call.
        """
        with self.reporting(task_id) as (_, task):
            task.reported_end = end
            if end == "error":
                task.error_message = message
            if task.runner is None:
                settle(task, None)

    # -- what the queue does -------------------------------------------------------------------------------

    def waiting(self) -> list[TaskView]:
        """Tasks in the queue, first come first."""
        with Session(self.engine) as session:
            statement = sa.select(Task).where(Task.state == TaskState.QUEUED)
            return [view_of(task) for task in session.scalars(statement.order_by(Task.queued_at, Task.id))]

    def in_states(self, *states: TaskState) -> list[Task]:
        """Tasks of this server's processes in one of the states, detached from the database."""
        with Session(self.engine, expire_on_commit=False) as session:
            statement = sa.select(Task).where(Task.state.in_(states), Task.runner.is_not(None))
            return list(session.scalars(statement.order_by(Task.id)))

    def begin(self, task_id: str, runner: str, devices: str) -> Order | None:
        """Mark a waiting task as running, before its process exists; None when it is no longer waiting.

        Raises:
            OptionError: when a path is not below the models root any more; the task still waits.
        """
        with self.changing(task_id) as (_, task):
            if task.state != TaskState.QUEUED:
                return None
            # It resumes with the roots that the server has now: data and models may have moved.
            task.datasets_root, task.models_root = (
                str(self.settings.datasets_root),
                str(self.settings.models_root),
            )
            task.state, task.runner, task.devices = TaskState.RUNNING, runner, devices
            task.process_id = task.process_started = None
            task.attempt += 1
            task.started_at = utc_now()
            place = Place(task.task_id, Path(task.output_dir), devices)
            words = training_words(fields_of(task), place, self.settings)
            return Order(task.task_id, task.attempt, words, place.output_dir)

    def words_of(self, task: Task) -> list[str]:
        """The options that a running task was started with; none when a root has changed since."""
        place = Place(task.task_id, Path(task.output_dir), task.devices or "cpu")
        try:
            return training_words(fields_of(task), place, self.settings)
        except OptionError:
            return []

    def set_process(self, task_id: str, process_id: int, started: float) -> None:
        """The process of a running task, by which a restarted server finds it again."""
        with self.changing(task_id) as (_, task):
            task.process_id, task.process_started = process_id, started

    def finish(self, task_id: str, exit_code: int | None, reason: str | None = None) -> None:
        """A task's process has ended; `exit_code` is None where it is not known, `reason` what else is known."""
        with self.changing(task_id) as (_, task):
            if reason is not None and task.reported_end is None:
                task.error_message = reason[:1000]
            if task.state in (TaskState.RUNNING, TaskState.STOPPING):
                settle(task, exit_code)

    def refuse(self, task_id: str, reason: str) -> None:
        """A task's process could not be started."""
        with self.changing(task_id) as (_, task):
            task.state, task.error_message, task.ended_at = TaskState.FAILED, reason[:1000], utc_now()

    # -- steps ---------------------------------------------------------------------------------------------

    def place(self, task_id: str, devices: str) -> Place:
        return Place(task_id, self.settings.output_root / task_id, devices)

    def place_of(self, task: Task) -> Place:
        devices = requested_devices(fields_of(task)) or task.devices or "cpu"
        return Place(task.task_id, Path(task.output_dir), devices)

    def command_of(self, fields: TaskFields, place: Place) -> list[str]:
        try:
            return command_line(training_words(fields, place, self.settings))
        except OptionError as error:
            raise TaskError(named_by_form(str(error))) from None

    def check(self, fields: TaskFields, place: Place) -> TaskRequest:
        """The request as the training process will read it. Raises TaskError with every problem on one line."""
        try:
            request = read_request(training_words(fields, place, self.settings))
            StageConfigs(request)
            return request
        except OptionError as error:
            raise TaskError(named_by_form(str(error))) from None

    def check_output(self, task: Task) -> None:
        """Raise ConflictError when the task's folder is not below this server's output root."""
        root = self.settings.output_root
        if root not in Path(task.output_dir).resolve().parents:
            raise ConflictError(
                f"task {task.task_id} writes to {task.output_dir}, which is not below {root}: start the server with "
                "its --output-root"
            )

    def view(self, session: Session, task: Task) -> TaskView:
        position = queue_positions(session).get(task.task_id) if task.state == TaskState.QUEUED else None
        return view_of(task, position)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction; what it registers with `on_commit` happens after it, still in order."""
        with self.lock:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                yield session
            for action in session.info.pop("after", ()):
                action()

    @contextmanager
    def changing(self, task_id: str) -> Iterator[tuple[Session, Task]]:
        """A transaction on one task, published when it succeeds. Raises NotFoundError."""
        with self.writing() as session:
            task = find_task(session, task_id)
            task.updated_at = utc_now()
            yield session, task
            session.flush()
            self.publish(session, task)

    @contextmanager
    def reporting(self, task_id: str) -> Iterator[tuple[Session, Task]]:
        """The same for a call of a training process.

        A task that reports although this server has not started it runs elsewhere (`cli distill` by hand).
        """
        with self.changing(task_id) as (session, task):
            if task.state == TaskState.CREATED:
                task.state, task.started_at, task.runner = TaskState.RUNNING, utc_now(), None
            yield session, task

    def publish(self, session: Session, task: Task) -> None:
        view = self.view(session, task)
        self.on_commit(session, lambda: self.broadcast.publish(Change(task.task_id, view)))

    def on_commit(self, session: Session, action: Callable[[], None]) -> None:
        session.info.setdefault("after", []).append(action)


# -- one task ------------------------------------------------------------------------------------------------


def visible(folder: Path) -> list[Path]:
    """What is in a folder, without hidden files and names that are not UTF-8."""
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and all(map(is_plain, path.name)))


def utc_now() -> datetime:
    return datetime.now(UTC)


def first_known(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def find_task(session: Session, task_id: str) -> Task:
    task = session.scalar(sa.select(Task).where(Task.task_id == task_id))
    if task is None:
        raise NotFoundError(f"there is no task {task_id[:64]!r}")
    return task


def fill(task: Task, fields: TaskFields, request: TaskRequest) -> None:
    """Write what a task is into its row."""
    for name in FIELDS:
        value = getattr(fields, name)
        setattr(task, name, json.dumps(value) if name == "training_config" else value)
    task.planned_epochs = int(StageConfigs(request).settings["epochs"])


def fields_of(task: Task) -> TaskFields:
    """What a task is, from its row."""
    values = {name: getattr(task, name) for name in FIELDS}
    return TaskFields.model_validate(values | {"training_config": json.loads(task.training_config or "{}")})


def view_of(task: Task, position: int | None = None) -> TaskView:
    """A row as everyone sees it; `position` is its place in the queue."""
    values = {name: getattr(task, name) for name in TaskView.model_fields if hasattr(task, name)}
    done, planned = task.current_epoch or 0, task.planned_epochs or 0
    left = None
    if task.state == TaskState.RUNNING and task.epoch_seconds is not None and planned >= done:
        left = task.epoch_seconds * (planned - done)
    share = 100.0 * min(done, planned) / planned if planned else 0.0
    values |= {
        "training_config": json.loads(task.training_config or "{}"),
        "state": TaskState(task.state),
        "progress": 100.0 if task.state == TaskState.COMPLETED else share,
        "time_left": left,
        "queue_position": position,
    }
    return TaskView.model_construct(**values)  # rows were checked when they were written


def settle(task: Task, exit_code: int | None) -> None:
    """The final state of a task whose process has ended.

    The exit code decides: 0 is success, 143 and 130 are stops. Where it is not known (the server was restarted
    meanwhile), the process's own last call does; without one, the end is unknown.
    """
    stopped = exit_code in (143, 130, -15, -9) and task.state == TaskState.STOPPING
    if exit_code == 0 or (exit_code is None and task.reported_end == "complete"):
        task.state, task.error_message = TaskState.COMPLETED, None
    elif stopped or exit_code in (143, 130):
        task.state = TaskState.STOPPED
    elif exit_code is None and task.reported_end is None:
        task.state = TaskState.STOPPED if task.state == TaskState.STOPPING else TaskState.LOST
    elif exit_code is None and (task.error_message or "").startswith("stopped"):
        task.state = TaskState.STOPPED
    else:
        task.state = TaskState.FAILED
    if task.state == TaskState.LOST:
        task.error_message = (
            "the process ended while the server was not running, and left no result: start it again"
        )
    elif task.state == TaskState.FAILED and not task.error_message:
        task.error_message = f"the process ended with exit code {exit_code}: see the log"
    elif task.state == TaskState.STOPPED:
        task.error_message = None
    task.exit_code, task.ended_at, task.message = exit_code, utc_now(), None
    task.process_id = task.process_started = None


def requested_devices(fields: TaskFields) -> str | None:
    """The devices that a task asks for, in its field or in its JSON; None: any.

    Raises:
        TaskError: when they are not `0`, `0,1` or `cpu`, or the JSON is wrong.
    """
    try:
        devices = fields.gpu_devices or read_training_config(json.dumps(fields.training_config)).values.get(
            "gpu_devices"
        )
        if devices is not None:
            resolve_devices(devices)
    except OptionError as error:
        raise TaskError(named_by_form(str(error))) from None
    return devices


def conditions_of(filter: TaskFilter) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if filter.states:
        conditions.append(Task.state.in_(filter.states))
    if filter.student:
        conditions.append(Task.student_model == filter.student)
    if filter.dataset:
        conditions.append(Task.dataset_id == filter.dataset)
    if filter.text:
        columns = (Task.task_id, Task.task_name, Task.student_model, Task.dataset_id)
        conditions.append(sa.or_(*(column.icontains(filter.text, autoescape=True) for column in columns)))
    return conditions


def queue_positions(session: Session) -> dict[str, int]:
    """Task id → place in the queue, from 1."""
    statement = sa.select(Task.task_id).where(Task.state == TaskState.QUEUED)
    ids = session.scalars(statement.order_by(Task.queued_at, Task.id)).all()
    return {task_id: number for number, task_id in enumerate(ids, start=1)}


def named_by_form(text: str) -> str:
    """The training process's message with the form's names: `--epochs: …` becomes `totalEpochs: …`."""
    return re.sub(r"--([a-z_]+)", lambda match: to_camel(FIELD_OF_OPTION.get(match[1], match[1])), text)
