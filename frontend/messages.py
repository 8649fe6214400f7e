"""Messages of the server and of training processes, in Chinese.

They reach the pages as finished English lines: from the database, from other processes, from a REST answer. So each is
recognized by its template, as gettext recognizes a text by its English form; what no template fits stays English.
"""

from __future__ import annotations

import re
from functools import cache

from frontend.texts import Texts

#: English → Chinese. `{…}` is what varies and is copied; `{state}` is translated itself.
MESSAGES: dict[str, str] = {
    # What the state of a task does not allow
    "there is no task {task}": "任务 {task} 不存在",
    "there is a task {task} already: choose another id": "任务 {task} 已存在：请换一个 id",
    "{folder} exists already: choose another id": "{folder} 已存在：请换一个 id",
    "task {task} is {state} and can no longer be changed: create another one": (
        "任务 {task} {state}，不能再修改：请新建一个任务"
    ),
    "task {task} is {state}: it cannot be started now": "任务 {task} {state}：现在不能开始",
    "task {task} is {state}: there is nothing to stop": "任务 {task} {state}：没有可停止的进程",
    "task {task} is {state}: stop it before deleting it": "任务 {task} {state}：请先停止再删除",
    "task {task} was not started by this server: stop its process yourself": (
        "任务 {task} 不是由本服务器启动的：请自行停止其进程"
    ),
    "task {task} writes to {folder}, which is not below {root}: start the server with its --output-root": (
        "任务 {task} 的输出文件夹 {folder} 不在 {root} 之下：请用相应的 --output-root 启动服务器"
    ),
    # How a task ended
    "the process ended while the server was not running, and left no result: start it again": (
        "进程在服务器停止期间结束，没有留下结果：请重新开始"
    ),
    "the process ended with exit code {code}: see the log": "进程已结束，退出码为 {code}：请查看日志",
    "the process cannot be started: {reason}": "无法启动进程：{reason}",
    "lost by the cluster: {reason}": "集群丢失了该任务：{reason}",
    # Its present step
    "extracting features: {what}, {done} of {total}": "正在提取特征：{what}，{done}/{total}",
    # What is wrong with a setting, after its name
    "expected a value, got none": "缺少值",
    "expected a number, got {value}": "应为数字，实际为 {value}",
    "expected a whole number, got {value}": "应为整数，实际为 {value}",
    "expected true or false, got {value}": "应为 true 或 false，实际为 {value}",
    "expected text, got {value}": "应为文本，实际为 {value}",
    "expected an object, got {value}": "应为对象，实际为 {value}",
    "expected at most {limit} characters, got {length}": "最多 {limit} 个字符，实际为 {length} 个",
    "expected at least {limit}, got {value}": "应不小于 {limit}，实际为 {value}",
    "expected more than {limit}, got {value}": "应大于 {limit}，实际为 {value}",
    "expected at most {limit}, got {value}": "应不大于 {limit}，实际为 {value}",
    "expected less than {limit}, got {value}": "应小于 {limit}，实际为 {value}",
    "expected one of {choices}, got {value}": "可选值为 {choices}，实际为 {value}",
    "expected random or pretrained, got {value}": "可选值为 random、pretrained，实际为 {value}",
    "control characters are not allowed, got {value}": "不允许控制字符，实际为 {value}",
    "control characters are not allowed": "不允许控制字符",
    "String should have at most {limit} characters": "最多 {limit} 个字符",
    "only all layers are supported, got {value}: leave it unset": "只支持全部层，实际为 {value}：请不要设置",
    "not supported here, got {value}: leave it unset": "不支持此设置，实际为 {value}：请不要设置",
    "unknown, expected e.g. {choices}, got {value}": "无法识别 {value}，可用的例如 {choices}",
    "expected a student like resnet50 or yolov8s, got none": "缺少学生模型，例如 resnet50 或 yolov8s",
    "{value} contradicts {option} {model}": "{value} 与 {option} {model} 矛盾",
    "expected {task} for {student}, got {value}": "{student} 的任务类型应为 {task}，实际为 {value}",
    "{task} has no class logits: expected feature, got {value}": (
        "{task} 任务没有类别 logits：应为 feature，实际为 {value}"
    ),
    "expected numbers like 0 or 0,1, or cpu, got {value}": "应为 0 或 0,1 这样的编号，或 cpu，实际为 {value}",
    "expected cpu, or each GPU once, got {value}": "应为 cpu，或每块 GPU 各一次，实际为 {value}",
    # Folders and files
    "no data set at {path}": "{path} 没有数据集",
    "{path} does not exist: put the teacher's weights there": "{path} 不存在：请把教师权重放到那里",
    "expected the folder of a Qwen checkpoint, got the file {path}": "应为 Qwen 检查点的文件夹，实际为文件 {path}",
    "expected a path, or {option} with a models root, got none": "缺少教师：请给出权重路径或 {option}",
    "expected the data set's id, got none": "缺少数据集 id",
    "expected a plain name without / \\ : .. and the like, got {value}": (
        "应为普通名称，不含 /、\\、:、.. 等字符，实际为 {value}"
    ),
    "expected 1 to {limit} bytes, got {value}": "长度应为 1 到 {limit} 字节，实际为 {value}",
    "expected a name below {root}, got {value}": "应为 {root} 之下的名称，实际为 {value}",
    "'..' is not allowed in a path, got {value}": "路径中不允许出现 '..'，实际为 {value}",
    "{path} leads outside {root}": "{path} 指向 {root} 之外",
    "{path} cannot be resolved": "无法解析路径 {path}",
    # Settings that do not fit together
    "hard_label_weight and soft_label_weight are both 0: nothing to learn": (
        "hard_label_weight 和 soft_label_weight 都为 0：没有可学习的内容"
    ),
    "{name} has no effect on {kind} students: {reason}": "{name} 对 {kind} 学生模型无效：{reason}",
    "{name} is an option of {kinds} students, the student is {student}": (
        "{name} 是 {kinds} 学生模型的选项，而当前学生模型是 {student}"
    ),
    # Good to know
    "unknown field {path} in training_config: ignored": "JSON 中的未知字段 {path} 已忽略",
    "training_config {path} {value} is a description only: not used": "{path} {value} 只是说明，不参与训练",
    "task_type classification does not fit {student}: training {task}": (
        "任务类型 classification 不适用于 {student}：改为训练 {task}"
    ),
    "distillation_type {kind}: {task} has no class logits, features alone are distilled": (
        "distillation_type {kind}：{task} 任务没有类别 logits，只蒸馏特征"
    ),
    "lora_rank {rank}: left off, the student starts from random weights": (
        "lora_rank {rank}：不使用，因为学生模型从随机权重开始"
    ),
    "the student starts from {path} (pretrainPath)": "学生模型的初始权重为 {path}（pretrainPath）",
    "no weights at {path}: the student starts from random weights": "{path} 没有权重：学生模型随机初始化",
    "no weights at {path}: timm's published weights are taken": "{path} 没有权重：使用 timm 发布的权重",
    # Tools
    "{tool}: no result after {seconds} s": "{tool}：{seconds} 秒后仍没有结果",
    "ended with exit code {code}": "已结束，退出码为 {code}",
}
PLACE = re.compile(r"\\{\w+\\}")
#: `--dataset_id: …`, `datasetId: …`, `training_config optimizer: …`; pydantic adds two words of its own.
SETTING = re.compile(r"(?:training_config )?((?:--)?[\w.]+): (?:Value error, )?(.+)")


@cache
def patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """(pattern, Chinese) of each message; those with most fixed text, which are the most specific, first."""
    ordered = sorted(MESSAGES, key=lambda english: -len(re.sub(r"{\w+}", "", english)))
    return tuple((pattern_of(english), MESSAGES[english]) for english in ordered)


def pattern_of(english: str) -> re.Pattern[str]:
    return re.compile(PLACE.sub(lambda place: f"(?P<{place[0][2:-2]}>.+?)", re.escape(english)))


def translate(texts: Texts, message: str) -> str:
    """A message in the page's language; of several problems on one line (`…; …`) each by itself."""
    if texts.language != "zh":
        return message
    parts = message.split("; ")
    translated = [translate_one(texts, part) for part in parts]
    if not any(translated):
        return message
    return "；".join(new or old for new, old in zip(translated, parts, strict=True))


def translate_one(texts: Texts, message: str) -> str | None:
    """None where no template fits the whole message."""
    named = SETTING.fullmatch(message)
    if named and (problem := translate_one(texts, named[2])):
        return f"{named[1]}：{problem}"
    for pattern, chinese in patterns():
        if found := pattern.fullmatch(message):
            parts = found.groupdict()
            if "state" in parts:
                parts["state"] = texts.or_word(f"state.{parts['state']}", parts["state"])
            return chinese.format(**parts)
    return None
