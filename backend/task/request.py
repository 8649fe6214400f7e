"""One task, from options, JSON and YAML: explicit option > JSON > recipe of the student > default."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.task.errors import OptionError
from backend.task.options import OPTIONS, shown
from backend.task.parsing import Arguments, parse_arguments, read_training_config
from backend.task.platform_yaml import PlatformConfig, read_platform_config
from backend.task.safety import (
    check_api_url,
    check_database_url,
    check_id,
    check_inside,
    check_path,
    exists_at,
    inside,
)
from console.devices import device_index, parse_devices
from extract.known_teachers import teacher_of_checkpoint
from train.students.families import FAMILIES, SIZES, StudentName

DATASET_PARAMETER = re.compile(r"(?<![:\w]):dataset_id\b")
# Further spellings of a student's type and size.
TYPE_NAMES = {"yolo": "yolov8", "yolo8": "yolov8", "yolo-v8": "yolov8", "u-net": "unet"}
YOLO_SIZES = {
    "nano": "n",
    "tiny": "n",
    "small": "s",
    "medium": "m",
    "large": "l",
    "xlarge": "x",
    "extra-large": "x",
}
OTHER_SIZES = {"s": "small", "m": "medium", "l": "large"}
PRIVATE = frozenset({"dataset_url", "dataset_query", "training_config", "platform_config"})


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """What the platform asks for, resolved and checked; nothing heavy is imported for it.

    `chosen` holds only what an option or the JSON gave (the recipe of the student comes between them and
    the defaults); `warnings` go to the log, `notes` also into the summary.
    """

    task_id: str
    task_name: str
    api_base_url: str
    allow_local_urls: bool
    output_dir: Path
    teacher: str
    teacher_path: Path
    student: StudentName
    student_path: Path | None
    pretrained: bool
    task: str
    dataset_id: str
    dataset_dir: Path | None
    val_dataset_id: str
    val_dataset_dir: Path | None
    database: Mapping[str, str] = field(repr=False)
    cache_dir: Path
    devices: tuple[str, ...]
    chosen: Mapping[str, Any]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def get(self, name: str) -> Any:
        """The chosen value of an option, else its default."""
        return self.chosen.get(name, OPTIONS[name].default)

    @property
    def splits(self) -> dict[str, str]:
        """Splits from two data sets, each of which gives its own split of that name, or all it has; else empty."""
        train, val = self.dataset_dir, self.val_dataset_dir
        return {} if train is None or val is None or train == val else {"train": str(train), "val": str(val)}


@dataclass(frozen=True)
class Merged:
    """Options over JSON over YAML, before anything is resolved; `options` alone are what the caller typed."""

    options: Mapping[str, Any]
    document: Mapping[str, Any]
    config: PlatformConfig
    warnings: list[str]

    def get(self, name: str) -> Any:
        sources = (self.options, self.document, self.config.values)
        given = (source[name] for source in sources if source.get(name) is not None)
        return next(given, OPTIONS[name].default)

    def need(self, name: str, instead: str = "") -> Any:
        value = self.get(name)
        if value is None:
            raise OptionError(f"--{name}: expected a value, got none{instead}")
        return value

    @property
    def chosen(self) -> dict[str, Any]:
        """The values of options and JSON; the database's URL is left out, since it may hold a password."""
        both = {**self.document, **{k: v for k, v in self.options.items() if v is not None}}
        return {name: value for name, value in both.items() if value is not None and name not in PRIVATE}


def read_request(words: Sequence[str]) -> TaskRequest:
    """The task that a command line asks for.

    Raises:
        OptionError: with every problem on one line.
    """
    return resolve(merge(words))


def find_addressee(words: Sequence[str]) -> tuple[str, str, bool] | None:
    """(task id, base URL, local URLs allowed) of a command line whose other options are wrong, if those are good.

    Raises:
        OptionError: when they are wrong themselves.
    """
    arguments = parse_arguments(words)
    config = read_platform_config(arguments.values.get("platform_config"))
    task_id = arguments.values.get("task_id")
    url = arguments.values.get("api_base_url") or config.values.get("api_base_url")
    if not task_id or not url:
        return None
    allowed = config.allow_local_urls
    return check_id("task_id", task_id), check_api_url(url, allowed), allowed


def merge(words: Sequence[str]) -> Merged:
    arguments = parse_arguments(words)
    text = arguments.values.get("training_config")
    document = Arguments()
    try:
        config = read_platform_config(arguments.values.get("platform_config"))
        document = read_training_config(text) if text else document
    except OptionError as error:
        arguments.problems.append(str(error))
        config = PlatformConfig()
    arguments.problems += document.problems
    arguments.check()
    return Merged(arguments.values, document.values, config, arguments.warnings + document.warnings)


def resolve(merged: Merged) -> TaskRequest:
    notes: list[str] = []
    student = reconcile(*(merged.get(f"student_model{part}") for part in ("", "_type", "_size")))
    task_id = check_id("task_id", merged.need("task_id"))
    url = merged.need("api_base_url", ": give it, or distillation.api.base-url in --platform_config")
    teacher, teacher_path = resolve_teacher(merged)
    output_dir = resolve_output(merged, task_id)
    return TaskRequest(
        task_id=task_id,
        task_name=merged.get("task_name") or "",
        api_base_url=check_api_url(url, merged.config.allow_local_urls),
        allow_local_urls=merged.config.allow_local_urls,
        output_dir=output_dir,
        teacher=teacher,
        teacher_path=teacher_path,
        student=student,
        **resolve_weights(merged, notes),
        task=resolve_task(merged, student, notes),
        cache_dir=resolve_cache(merged, output_dir),
        devices=resolve_devices(merged.get("gpu_devices")),
        **resolve_data(merged),
        chosen=merged.chosen,
        warnings=tuple(merged.warnings),
        notes=tuple(notes),
    )


def resolve_output(merged: Merged, task_id: str) -> Path:
    """`--output_dir`, below the output root when the operator set one; by default root / task id."""
    root, given = merged.config.output_root, merged.get("output_dir")
    if given is None:
        if root is None:
            raise OptionError("--output_dir: expected a folder, got none")
        return inside("task_id", root, task_id, merged.config.allow_symlinks)
    path = check_path("output_dir", given)
    if root is not None:
        path = root / path
        check_inside("output_dir", root, path)
    if exists_at("output_dir", path) and not path.is_dir():
        raise OptionError(f"--output_dir: expected a folder, got the file {path}")
    return path


def resolve_cache(merged: Merged, output_dir: Path) -> Path:
    """The shared cache is beside the tasks' folders unless it is configured."""
    given = merged.get("cache_dir")
    if given is not None:
        return check_path("cache_dir", given)
    return (merged.config.output_root or output_dir.absolute().parent) / "feature_cache"


def resolve_teacher(merged: Merged) -> tuple[str, Path]:
    """The teacher (`timm:NAME`, or the Qwen family of the checkpoint) and the place of its weights."""
    name = merged.get("teacher_model")
    path = resolve_teacher_path(merged, name)
    if not exists_at("teacher_path", path):
        raise OptionError(f"--teacher_path: {path} does not exist: put the teacher's weights there")
    if name and name.lower().startswith(("timm:", "timm/")):
        return f"timm:{name[len('timm:') :]}", path
    if path.is_file():
        raise OptionError(f"--teacher_path: expected the folder of a Qwen checkpoint, got the file {path}")
    # Of a folder that is no checkpoint the loader says what is wrong with it.
    return teacher_of_checkpoint(path) or "qwen2.5-vl", path


def resolve_teacher_path(merged: Merged, name: str | None) -> Path:
    given, root = merged.get("teacher_path"), merged.get("models_root")
    if given is not None:
        path = check_path("teacher_path", given)
        from_json = merged.options.get("teacher_path") is None
        return below_models_root("modelPath", root, path, merged) if from_json else path
    if not name:
        raise OptionError("--teacher_path: expected a path, or --teacher_model with a models root, got none")
    if root is None:
        raise OptionError("--teacher_path: expected a path, or a models root to look in, got none")
    return inside("teacher_model", check_path("models_root", root), name, merged.config.allow_symlinks)


def below_models_root(field_name: str, root: str | None, path: Path, merged: Merged) -> Path:
    """A path that someone typed into the web form: below the models root where there is one."""
    if root is None:
        return path
    path = Path(root) / path
    if not merged.config.allow_symlinks:
        check_inside(field_name, Path(root), path)
    return path


def resolve_weights(merged: Merged, notes: list[str]) -> dict[str, Any]:
    """The file that the student starts from, or whether timm's published weights are asked for.

    The back end always sends a path: where it does not exist, no weights are given.
    """
    missing = []
    for name, path in weight_files(merged):
        if exists_at(name, path):
            if name == "pretrainPath":
                notes.append(f"the student starts from {path} (pretrainPath)")
            return {"student_path": path, "pretrained": False}
        missing.append(f"{name} {path}")
    pretrained = asks_for_published_weights(merged)
    if missing:
        start = (
            "timm's published weights are taken" if pretrained else "the student starts from random weights"
        )
        notes.append(f"no weights at {' or '.join(missing)}: {start}")
    return {"student_path": None, "pretrained": pretrained}


def weight_files(merged: Merged) -> Iterator[tuple[str, Path]]:
    """Where weights may be: first the option's path, then the one typed into the web form."""
    given, typed = merged.options.get("student_path"), merged.document.get("student_path")
    if given is not None:
        yield "student_path", check_path("student_path", given)
    if typed is not None and merged.document.get("pretrained") is not False:
        path = check_path("pretrainPath", typed)
        yield "pretrainPath", below_models_root("pretrainPath", merged.get("models_root"), path, merged)


def asks_for_published_weights(merged: Merged) -> bool:
    """`--pretrained`; in the JSON initMethod `pretrained` without a path, which would mean the weights there."""
    option = merged.options.get("pretrained")
    if option is not None:
        return bool(option)
    return bool(merged.document.get("pretrained")) and merged.document.get("student_path") is None


def resolve_task(merged: Merged, student: StudentName, notes: list[str]) -> str:
    """The student's task; `classification` is hard-coded in the back end and yields to the student's own."""
    asked = str(merged.chosen.get("task_type", ""))
    own = FAMILIES[student.type].task
    if asked in ("", own) or (asked == "classification" and own == "sequence"):
        return own
    if asked == "features" and student.type != "yolov8":
        return asked
    if asked == "classification":
        notes.append(f"task_type classification does not fit {student}: training {own}")
        return own
    raise OptionError(f"--task_type: expected {own} for {student}, got {asked!r}")


def resolve_devices(value: str) -> tuple[str, ...]:
    """`0,1` → cuda:0, cuda:1; `cpu`; `cpu,cpu` starts two processes, which is for tests.

    Raises:
        OptionError: for anything else, a mixture, or a GPU named twice.
    """
    try:
        names = parse_devices(value, ("cpu", "cuda"))
    except ValueError:
        raise OptionError(
            f"--gpu_devices: expected numbers like 0 or 0,1, or cpu, got {shown(value)}"
        ) from None
    if set(names) == {"cpu"}:
        return tuple(names)
    numbers = [device_index(name) for name in names]
    if len(set(numbers)) < len(numbers) or "cpu" in names:
        raise OptionError(f"--gpu_devices: expected cpu, or each GPU once, got {shown(value)}")
    return tuple(f"cuda:{number}" for number in numbers)


def resolve_data(merged: Merged) -> dict[str, Any]:
    """Where the data is: folders below the data sets' root, or a database and a query."""
    dataset_id = merged.get("dataset_id")
    if dataset_id is not None:
        check_id("dataset_id", dataset_id)
    val_id = merged.get("val_dataset_id") or dataset_id
    root = check_path("datasets_root", merged.get("datasets_root"))
    database = resolve_database(merged, dataset_id, root)
    if dataset_id is None and not database:
        raise OptionError("--dataset_id: expected the data set's id, got none")
    names = {"dataset_id": dataset_id or "database", "val_dataset_id": val_id or "database"}
    if database:
        return {**names, "dataset_dir": None, "val_dataset_dir": None, "database": database}
    folders = [data_folder(merged, option, root, name) for option, name in names.items()]
    return {**names, "dataset_dir": folders[0], "val_dataset_dir": folders[1], "database": {}}


def data_folder(merged: Merged, option: str, root: Path, name: str) -> Path:
    check_id(option, name)
    path = inside(option, root, name, merged.config.allow_symlinks)
    if not exists_at(option, path):
        raise OptionError(f"--{option}: no data set at {path}")
    return path


def resolve_database(merged: Merged, dataset_id: str | None, root: Path) -> dict[str, str]:
    """URL and query: from the options, else the YAML's entry for this data set; empty for folders.

    Only what comes as an option is checked for local files and hosts: the YAML is the operator's.
    """
    entry = merged.config.database_of(dataset_id)
    query = merged.options.get("dataset_query") or entry.get("query")
    url = merged.options.get("dataset_url")
    if url is not None:
        check_database_url(url, root, merged.config.allow_local_urls)
    url = url or entry.get("url") or (merged.config.values.get("dataset_url") if query else None)
    query = query or (merged.config.values.get("dataset_query") if url else None)
    if bool(url) != bool(query):
        missing = "dataset_query" if url else "dataset_url"
        raise OptionError(f"--{missing}: a data set in a database needs both a URL and a query, got none")
    if not url or not query:
        return {}
    return {"url": url, "query": with_dataset_id(query, dataset_id), "image_root": str(root)}


def with_dataset_id(query: str, dataset_id: str | None) -> str:
    """The query with the id as a literal in place of `:dataset_id`.

    A literal, not a bound parameter: databases convert it to the column's type. `check_id` lets neither quotes
    nor backslashes through, so it cannot end early.
    """
    if not DATASET_PARAMETER.search(query):
        return query
    if dataset_id is None:
        raise OptionError("--dataset_id: the query asks for :dataset_id, got none")
    return DATASET_PARAMETER.sub(f"'{dataset_id}'", query)


def reconcile(model: str | None, kind: str | None, size: str | None) -> StudentName:
    """The student that the three options name together; what is missing is derived from `model`.

    Raises:
        OptionError: when they name none, an unknown one, or contradict each other.
    """
    named = parse_model(model) if model else None
    type_name = clean_type(kind) if kind else (named.type if named else None)
    if type_name is None:
        raise OptionError("--student_model: expected a student like resnet50 or yolov8s, got none")
    if named and named.type != type_name:
        raise OptionError(f"--student_model_type: {shown(kind)} contradicts --student_model {shown(model)}")
    if named is not None and (not size or type_name == "timm"):
        return named
    if not size:
        raise OptionError(
            f"--student_model_size: expected one of {', '.join(SIZES.get(type_name, ()))}, got none"
        )
    given = StudentName(type_name, clean_size(type_name, size))
    if named is not None and named != given:
        raise OptionError(f"--student_model_size: {shown(size)} contradicts --student_model {shown(model)}")
    return given


def parse_model(model: str) -> StudentName:
    """`resnet50`, `resnet/resnet50`, `yolov8s`, `yolov8/s`, `unet-small`, `lstm_medium`, `timm:NAME`."""
    text = model.strip()
    if text.lower().startswith("timm:") and len(text) > len("timm:"):
        return StudentName("timm", text[len("timm:") :])
    head, slash, size = text.lower().partition("/")
    kind = clean_type(head) if slash else next((kind for kind in SIZES if head.startswith(kind)), None)
    if kind is None:
        raise unknown("student_model", model)
    return StudentName(kind, clean_size(kind, size if slash else head))


def clean_type(kind: str) -> str:
    word = kind.strip().lower().replace("_", "-")
    word = TYPE_NAMES.get(word, word)
    if word not in SIZES and word != "timm":
        raise OptionError(f"--student_model_type: expected one of {', '.join(SIZES)}, got {shown(kind)}")
    return word


def clean_size(kind: str, size: str) -> str:
    """The size as the table spells it, from `50`, `resnet-50`, `tiny`, `yolov8s`, `nano`, `S` and the like."""
    if kind == "timm":
        return size
    word = size.strip().lower().replace("_", "-")
    if word in SIZES[kind]:
        return word
    bare = word.removeprefix(kind).strip("-")
    aliases = YOLO_SIZES if kind == "yolov8" else OTHER_SIZES
    for candidate in (bare, f"{kind}{bare}", f"{kind}-{bare}", aliases.get(bare)):
        if candidate in SIZES[kind]:
            return candidate
    raise unknown("student_model_size", size, kind)


def unknown(option: str, value: str, kind: str | None = None) -> OptionError:
    names = SIZES[kind] if kind else tuple(f"{kind}/{size}" for kind in SIZES for size in SIZES[kind])
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4) if not kind else names
    return OptionError(
        f"--{option}: unknown, expected e.g. {', '.join(near or names[:4])}, got {shown(value)}"
    )
