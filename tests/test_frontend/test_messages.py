"""Messages of the server in Chinese: real refusals, and templates that the program's own texts still have."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from backend.server.database import Task, TaskState, open_database
from backend.server.document import preview_task
from backend.server.errors import TaskError
from backend.server.schemas import NewTask, TaskFields
from backend.server.settings import Settings
from backend.server.tasks import Tasks
from frontend.messages import MESSAGES, translate
from frontend.texts import Texts

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, Any] = {"teacher_model": "tiny", "student_model": "resnet18", "dataset_id": "flowers"}
DOCUMENT: dict[str, Any] = {"teacherModel": "tiny", "studentModel": "resnet18", "datasetId": "flowers"}
#: Fixed text that the program composes of parts, or that is pydantic's; real refusals below cover it.
COMPOSED = (
    "expected at least",
    "expected more than",
    "expected at most",
    "expected less than",
    "contradicts",
)
PYDANTIC = ("String should have at most", "characters")
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[Tasks]:
    for name in ("datasets/flowers/train", "models/tiny", "output"):
        (tmp_path / name).mkdir(parents=True)
    roots = {f"{name}_root": (tmp_path / name).resolve() for name in ("datasets", "models", "output")}
    settings = Settings(**roots)
    engine = open_database(settings.database)
    yield Tasks(engine, settings)
    engine.dispose()


def in_chinese(message: str) -> str:
    assert translate(Texts("en"), message) == message
    return translate(Texts("zh"), message)


def put_in_state(tasks: Tasks, state: TaskState, **values: Any) -> None:
    with Session(tasks.engine) as session, session.begin():
        task = session.query(Task).one()
        task.state = state
        for name, value in values.items():
            setattr(task, name, value)


@pytest.mark.parametrize(
    ("state", "action", "chinese"),
    [
        (TaskState.RUNNING, lambda tasks: tasks.start("a"), "任务 a 运行中：现在不能开始"),
        (TaskState.COMPLETED, lambda tasks: tasks.stop("a"), "任务 a 已完成：没有可停止的进程"),
        (TaskState.QUEUED, lambda tasks: tasks.delete("a"), "任务 a 排队中：请先停止再删除"),
        (
            TaskState.FAILED,
            lambda tasks: tasks.change("a", TaskFields(**FIELDS)),
            "任务 a 失败，不能再修改：请新建一个任务",
        ),
        (TaskState.RUNNING, lambda tasks: tasks.stop("a"), "任务 a 不是由本服务器启动的：请自行停止其进程"),
        (
            TaskState.CREATED,
            lambda tasks: tasks.create(NewTask(task_id="a", **FIELDS)),
            "taskId：任务 'a' 已存在：请换一个 id",
        ),
        (TaskState.CREATED, lambda tasks: tasks.read("b"), "任务 'b' 不存在"),
    ],
)
def test_what_the_state_of_a_task_does_not_allow(
    tasks: Tasks, state: TaskState, action: Callable[[Tasks], Any], chinese: str
) -> None:
    tasks.create(NewTask(task_id="a", **FIELDS))
    put_in_state(tasks, state, runner=None)
    with pytest.raises(TaskError) as refused:
        action(tasks)
    assert in_chinese(str(refused.value)) == chinese


@pytest.mark.parametrize(
    ("changes", "chinese"),
    [
        ({"datasetId": "roses"}, r"datasetId：.*/roses 没有数据集"),
        ({"datasetId": "../models"}, r"datasetId：应为普通名称，.*，实际为 '../models'"),
        ({"modelPath": "../../etc"}, r"teacherPath：路径中不允许出现 '\.\.'，实际为 '../../etc'"),
        (
            {"modelPath": "/etc"},
            r"teacherPath：应为 .* 之下的名称，实际为 '/etc'|modelPath：'/etc' 指向 .* 之外",
        ),
        ({"teacherModel": "none"}, r"teacherPath：.*/none 不存在：请把教师权重放到那里"),
        ({"teacherModel": ""}, r"teacherPath：缺少教师：请给出权重路径或 teacherModel"),
        ({"gpuDevices": "0,zero"}, r"gpuDevices：应为 0 或 0,1 这样的编号，或 cpu，实际为 '0,zero'"),
        ({"gpuDevices": "0,0"}, r"gpuDevices：应为 cpu，或每块 GPU 各一次，实际为 '0,0'"),
        ({"studentModel": "resnet19"}, r"--student_model_size：无法识别 'resnet19'，可用的例如 .*resnet18.*"),
        (
            {"studentModel": "vit-tiny", "studentModelType": "resnet"},
            r"--student_model_type：'resnet' 与 --student_model 'vit-tiny' 矛盾",
        ),
        (
            {"studentModel": "yolov8n", "taskType": "segmentation"},
            r"taskType：yolov8/n 的任务类型应为 detection，实际为 'segmentation'",
        ),
        (
            {"studentModel": "unet-small", "distillationType": "logit"},
            r"distillationType：segmentation 任务没有类别 logits：应为 feature，实际为 'logit'",
        ),
        ({"totalEpochs": 0}, r"totalEpochs：应不小于 1，实际为 0"),
        ({"learningRate": 0}, r"learningRate：应大于 0，实际为 0\.0"),
        ({"imageSize": 10**10}, r"imageSize：应不大于 \d+，实际为 \d+"),
        ({"loraDropout": 1}, r"loraDropout：应小于 1，实际为 1\.0"),
        (
            {"optimizer": "magic", "batchSize": "many"},
            r"optimizer：可选值为 .*，实际为 'magic'；batchSize：应为整数，实际为 'many'",
        ),
        ({"attentionDistill": True}, r"attentionDistill：不支持此设置，实际为 True：请不要设置"),
        (
            {"hardLabelWeight": 0, "softLabelWeight": 0},
            r"hard_label_weight 和 soft_label_weight 都为 0：没有可学习的内容",
        ),
        ({"taskName": "x" * 300}, r"task_name：最多 200 个字符"),
    ],
)
def test_what_is_wrong_with_settings(tasks: Tasks, changes: dict[str, Any], chinese: str) -> None:
    preview = preview_task(tasks, DOCUMENT | changes, "a")
    assert preview.problems
    assert re.fullmatch(chinese, in_chinese("; ".join(preview.problems)))


def test_notes_of_a_task_that_can_start(tasks: Tasks) -> None:
    preview = preview_task(tasks, DOCUMENT | {"loraRank": 8, "paramSize": "8B", "colour": 1}, "a")
    assert preview.command
    for note in preview.notes:
        assert CHINESE.search(in_chinese(note)), note


def test_how_a_task_ended(tasks: Tasks) -> None:
    tasks.create(NewTask(task_id="a", **FIELDS))
    put_in_state(tasks, TaskState.RUNNING)
    tasks.finish("a", None)
    lost = tasks.read("a").error_message
    assert lost is not None
    assert in_chinese(lost) == "进程在服务器停止期间结束，没有留下结果：请重新开始"
    put_in_state(tasks, TaskState.RUNNING, error_message=None)
    tasks.finish("a", 1)
    failed = tasks.read("a").error_message
    assert failed is not None
    assert in_chinese(failed) == "进程已结束，退出码为 1：请查看日志"


def test_a_message_without_a_template_stays_as_it_is() -> None:
    for message in ("", "CUDA error: no kernel image", "photos: 3 files; see the log", "image: broken; x: y"):
        assert in_chinese(message) == message
    # One problem that is known beside one that is not.
    assert in_chinese("datasetId: no data set at /d/x; odd: this") == "datasetId：/d/x 没有数据集；odd: this"


def test_every_template_is_a_text_of_the_program() -> None:
    """A message that was changed in the program needs its template changed too."""
    literals = "\0".join(program_texts())
    for english, chinese in MESSAGES.items():
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), english
        pieces = [piece.strip() for piece in re.split(r"{\w+}:?|, got", english)]
        known = (*COMPOSED, *PYDANTIC)
        missing = [p for p in pieces if len(p) > 3 and p not in literals and not p.startswith(known)]
        assert not missing, english


def program_texts() -> Iterator[str]:
    for folder in ("backend", "train", "console"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
