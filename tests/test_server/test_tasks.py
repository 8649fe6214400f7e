"""The service: what may be done with a task in which state, and what the calls of a training process change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from backend.server.database import Task, TaskState, open_database
from backend.server.errors import ConflictError, NotFoundError, TaskError
from backend.server.schemas import EvaluationResult, HistoryPoint, NewTask, Progress, TaskFields
from backend.server.settings import Settings
from backend.server.tasks import TaskFilter, Tasks, settle
from backend.server.undelivered import apply_undelivered
from backend.task.calls import TaskCalls
from backend.task.main import UNDELIVERED

S = TaskState
FIELDS: dict[str, Any] = {"teacher_model": "tiny", "student_model": "resnet18", "dataset_id": "flowers"}


@pytest.fixture
def tasks(settings: Settings) -> Iterator[Tasks]:
    engine = open_database(settings.database)
    yield Tasks(engine, settings)
    engine.dispose()


def new(**changes: Any) -> NewTask:
    return NewTask(**(FIELDS | changes))


def put_in_state(tasks: Tasks, task_id: str, state: TaskState, **values: Any) -> None:
    with Session(tasks.engine) as session, session.begin():
        task = session.query(Task).filter_by(task_id=task_id).one()
        task.state = state
        for name, value in values.items():
            setattr(task, name, value)


# -- creating and changing -----------------------------------------------------------------------------------


def test_create_read_change(tasks: Tasks) -> None:
    made = tasks.create(new(task_id="a", task_name="花", training_config={"optimizer": "sgd"}))
    assert (made.state, made.planned_epochs, made.num_classes) == (S.CREATED, 100, None)
    assert tasks.read("a") == made
    changed = tasks.change("a", TaskFields(**(FIELDS | {"total_epochs": 3, "student_model": "vit-tiny"})))
    assert (changed.planned_epochs, changed.student_model, changed.training_config) == (3, "vit-tiny", {})
    assert tasks.read("a") == changed
    assert changed.created_at == made.created_at
    assert len(tasks.create(new()).task_id) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_model": "resnet19"}, "student_model_size: unknown|studentModelSize: unknown"),
        ({"dataset_id": "roses"}, "datasetId: no data set at"),
        ({"dataset_id": "../models"}, "datasetId: expected a plain name"),
        ({"val_dataset_id": "a/../../b"}, "valDatasetId: expected a plain name"),
        ({"teacher_path": "../../etc"}, r"teacherPath: '\.\.' is not allowed"),
        ({"teacher_model": "none"}, "teacherPath: .* does not exist"),
        ({"learning_rate": 0.0}, "learningRate: expected more than 0"),
        ({"total_epochs": 10**9 + 1}, "totalEpochs: expected at most"),
        ({"gpu_devices": "0,zero"}, "gpuDevices: expected numbers like 0 or 0,1, or cpu"),
        ({"training_config": {"optimizer": "magic"}}, "training_config optimizer: expected one of"),
        ({"training_config": {"attentionDistill": True}}, "attentionDistill: not supported here"),
        ({"training_config": {"pretrainPath": "/etc/passwd"}}, "leads outside"),
        ({"student_model": "yolov8n", "task_type": "segmentation"}, "taskType: expected detection"),
        (
            {"student_model": "unet-small", "training_config": {"distillationType": "logit"}},
            "has no class logits",
        ),
    ],
)
def test_what_the_training_process_would_refuse_is_refused(
    tasks: Tasks, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        tasks.create(new(**changes))
    assert tasks.search().total == 0


def test_an_id_is_used_once(tasks: Tasks, settings: Settings) -> None:
    tasks.create(new(task_id="a"))
    with pytest.raises(ConflictError, match="there is a task 'a' already"):
        tasks.create(new(task_id="a"))
    tasks.create(new(task_id="A"))  # another id, in every database
    (settings.output_root / "left").mkdir()
    for name in ("left", "feature_cache"):
        with pytest.raises(ConflictError, match="exists already"):
            tasks.create(new(task_id=name))


def test_only_a_task_that_was_not_started_can_be_changed(tasks: Tasks) -> None:
    tasks.create(new(task_id="a"))
    for state in S:
        put_in_state(tasks, "a", state)
        if state == S.CREATED:
            tasks.change("a", TaskFields(**FIELDS))
        else:
            with pytest.raises(ConflictError, match=f"task a is {state}"):
                tasks.change("a", TaskFields(**FIELDS))


def test_start_and_stop_by_state(tasks: Tasks) -> None:
    tasks.create(new(task_id="a"))
    for state in S:
        put_in_state(tasks, "a", state, runner="local")
        if state in (S.CREATED, S.STOPPED, S.FAILED, S.LOST):
            assert tasks.start("a").state == S.QUEUED
        else:
            with pytest.raises(ConflictError):
                tasks.start("a")
    put_in_state(tasks, "a", S.QUEUED, attempt=0)
    assert tasks.stop("a").state == S.CREATED
    put_in_state(tasks, "a", S.QUEUED, attempt=1)
    assert tasks.stop("a").state == S.STOPPED
    put_in_state(tasks, "a", S.RUNNING)
    assert tasks.stop("a").state == S.STOPPING
    assert tasks.stop("a").state == S.STOPPING
    put_in_state(tasks, "a", S.RUNNING, runner=None)
    with pytest.raises(ConflictError, match="was not started by this server"):
        tasks.stop("a")


def test_a_data_set_that_has_gone_is_an_error_at_the_start(tasks: Tasks, settings: Settings) -> None:
    tasks.create(new(task_id="a"))
    (settings.datasets_root / "flowers").rename(settings.datasets_root / "gone")
    with pytest.raises(TaskError, match="no data set at"):
        tasks.start("a")
    assert tasks.read("a").state == S.CREATED


def test_delete(tasks: Tasks, settings: Settings) -> None:
    tasks.create(new(task_id="a"))
    folder = settings.output_root / "a"
    folder.mkdir()
    tasks.report_history("a", HistoryPoint(epoch=1))
    tasks.report_evaluation("a", EvaluationResult(precision=0.5))
    for state in (S.QUEUED, S.RUNNING, S.STOPPING):
        put_in_state(tasks, "a", state, runner="local")
        with pytest.raises(ConflictError, match="stop it before deleting it"):
            tasks.delete("a")
    put_in_state(tasks, "a", S.STOPPED)
    tasks.delete("a", files=True)
    assert not folder.exists()
    with pytest.raises(NotFoundError):
        tasks.read("a")


def test_list_filters_and_pages(tasks: Tasks) -> None:
    for number in range(25):
        student = "vit-tiny" if number % 5 == 0 else "resnet18"
        tasks.create(new(task_id=f"t{number}", task_name=f"花 100%_{number}", student_model=student))
    page = tasks.search(page=2, size=10)
    assert (page.total, page.page, page.size) == (25, 2, 10)
    assert [task.task_id for task in page.items] == [f"t{number}" for number in range(14, 4, -1)]
    assert tasks.search(TaskFilter(student="vit-tiny")).total == 5
    assert tasks.search(TaskFilter(text="VIT-")).total == 5
    assert tasks.search(TaskFilter(text="100%_2")).total == 6
    assert tasks.search(TaskFilter(text="100_")).total == 0  # % and _ are no wildcards
    put_in_state(tasks, "t3", S.FAILED)
    assert tasks.search(TaskFilter(states=(S.FAILED, S.LOST))).items[0].task_id == "t3"
    assert tasks.search(page=99).items == []


def test_queue_positions(tasks: Tasks) -> None:
    for name in "abc":
        tasks.create(new(task_id=name))
    for name in "cab":
        tasks.start(name)
    assert [task.task_id for task in tasks.waiting()] == ["c", "a", "b"]
    assert {task.task_id: task.queue_position for task in tasks.search().items} == {"c": 1, "a": 2, "b": 3}


# -- reports -------------------------------------------------------------------------------------------------


def test_reports_of_a_training(tasks: Tasks) -> None:
    tasks.create(new(task_id="a", total_epochs=4))
    tasks.report_progress("a", 0, None, None, Progress(message="extracting features: 3 of 9"))
    assert (tasks.read("a").state, tasks.read("a").message) == (S.RUNNING, "extracting features: 3 of 9")
    for epoch, accuracy in ((1, 40.0), (2, 60.0), (3, 50.0)):
        body = Progress(current_epoch=epoch, total_epochs=4, train_loss=1 / epoch, val_accuracy=accuracy)
        tasks.report_progress("a", epoch, accuracy, 1 / epoch, body)
        tasks.report_history("a", HistoryPoint(epoch=epoch, val_accuracy=accuracy, epoch_time=10.0))
    tasks.report_progress("a", 2, 60.0, 0.5, None)  # late, and again
    tasks.report_history("a", HistoryPoint(epoch=2, val_accuracy=61.0, epoch_time=10.0))
    view = tasks.read("a")
    assert (view.current_epoch, view.accuracy, view.best_accuracy, view.message) == (3, 50.0, 60.0, None)
    assert (view.progress, view.time_left) == (75.0, 10.0)
    assert [point.val_accuracy for point in tasks.history("a")] == [40.0, 61.0, 50.0]
    result = EvaluationResult(precision=0.5, detailed_results='{"a": "花"}', eval_sample_count=9)
    tasks.report_evaluation("a", result)
    tasks.report_evaluation("a", result)
    assert [found.detailed_results for found in tasks.evaluations("a")] == ['{"a": "花"}']
    tasks.report_model("a", "/x/best_model.pt", "file:///x/best_model.pt")
    tasks.report_end("a", "complete")
    view = tasks.read("a")
    assert (view.state, view.progress, view.model_path) == (S.COMPLETED, 100.0, "/x/best_model.pt")


def test_a_process_of_this_server_ends_with_its_exit_code_not_with_its_call(tasks: Tasks) -> None:
    tasks.create(new(task_id="a"))
    tasks.start("a")
    begun = tasks.begin("a", "local", "cpu")
    assert begun is not None
    assert (begun.task_id, begun.attempt, begun.output_dir.name) == ("a", 1, "a")
    tasks.report_end("a", "complete")
    assert tasks.read("a").state == S.RUNNING
    tasks.finish("a", 0)
    assert tasks.read("a").state == S.COMPLETED
    tasks.report_progress("a", 5, None, None, None)  # on its way when the process ended
    assert tasks.read("a").state == S.COMPLETED
    assert tasks.begin("a", "local", "cpu") is None


@pytest.mark.parametrize(
    ("state", "exit_code", "reported", "message", "expected", "error"),
    [
        (S.RUNNING, 0, "complete", None, S.COMPLETED, None),
        (S.RUNNING, 1, "error", "bad images", S.FAILED, "bad images"),
        (S.RUNNING, 2, None, None, S.FAILED, "exit code 2"),
        (S.RUNNING, -9, None, None, S.FAILED, "exit code -9"),
        (S.STOPPING, 143, "error", "stopped: saved", S.STOPPED, None),
        (S.STOPPING, -9, None, None, S.STOPPED, None),
        (S.STOPPING, 1, "error", "disk full", S.FAILED, "disk full"),
        (S.STOPPING, 0, "complete", None, S.COMPLETED, None),
        (S.RUNNING, 143, "error", "stopped: saved", S.STOPPED, None),
        (S.RUNNING, None, "complete", None, S.COMPLETED, None),
        (S.RUNNING, None, "error", "bad images", S.FAILED, "bad images"),
        (S.RUNNING, None, "error", "stopped: saved", S.STOPPED, None),
        (S.RUNNING, None, None, None, S.LOST, "left no result"),
        (S.STOPPING, None, None, None, S.STOPPED, None),
    ],
)
def test_final_state(
    state: TaskState,
    exit_code: int | None,
    reported: str | None,
    message: str | None,
    expected: TaskState,
    error: str | None,
) -> None:
    task = Task(state=state, reported_end=reported, error_message=message, process_id=5)
    settle(task, exit_code)
    assert task.state == expected
    assert (task.error_message is None) == (error is None)
    assert (error or "") in (task.error_message or "")
    assert task.process_id is None


def test_what_a_process_could_not_deliver_is_applied(tasks: Tasks, settings: Settings) -> None:
    tasks.create(new(task_id="a", total_epochs=2))
    tasks.start("a")
    tasks.begin("a", "local", "cpu")
    started = tasks.read("a").started_at
    assert started is not None
    calls, now = TaskCalls("a"), started.timestamp()
    values = {"precision": 0.5, "map50": None}
    records = [
        {"time": now - 100, **calls.error("of an earlier attempt").record()},
        {"time": now + 1, **calls.progress(epoch=2, total_epochs=2, val_accuracy=0.75).record()},
        {"time": now + 1, **calls.history(epoch=2, values={"valAccuracy": 75.0}).record()},
        {
            "time": now + 1,
            **calls.evaluations(
                values=values, dataset_id="flowers", dataset_name="花", samples=8, details={}
            ).record(),
        },
        {"time": now + 1, "kind": "history", "query": {}, "body": {"epoch": "odd"}},
        {"time": now + 1, **calls.model_path(settings.output_root / "a" / "best_model.pt").record()},
        {"time": now + 1, **calls.complete().record()},
    ]
    folder = settings.output_root / "a"
    folder.mkdir()
    lines = [json.dumps(record) for record in records] + ['{"cut off']
    (folder / UNDELIVERED).write_text("\n".join(lines))
    apply_undelivered(tasks, "a")
    tasks.finish("a", None)
    view = tasks.read("a")
    assert (view.state, view.accuracy, view.error_message) == (S.COMPLETED, 75.0, None)
    assert (view.model_path or "").endswith("best_model.pt")
    assert [point.epoch for point in tasks.history("a")] == [2]
    assert [found.eval_sample_count for found in tasks.evaluations("a")] == [8]


def test_outputs_outside_of_the_output_root_are_not_touched(tasks: Tasks) -> None:
    tasks.create(new(task_id="a"))
    put_in_state(tasks, "a", S.STOPPED, output_dir="/etc")
    for action in (tasks.start, tasks.output_dir, lambda name: tasks.delete(name, files=True)):
        with pytest.raises(ConflictError, match="not below"):
            action("a")
