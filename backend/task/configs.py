"""The platform's settings → our two configurations. This is the only place that knows both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.task.errors import OptionError
from backend.task.options import OPTIONS
from backend.task.request import TaskRequest
from train.recipes import recipe_of

if TYPE_CHECKING:
    from console.options import Option
    from extract.config import ExtractConfig
    from train.config import TrainConfig

PATCH = 28
LARGEST_TEACHER_SIZE = 448
GRID_TASKS = frozenset({"detection", "segmentation"})
LABEL_TASKS = frozenset({"classification", "sequence"})

# Any of these in the output folder: this task was started before.
RUN_FILES = ("last.pt", "best.pt", "config.json", "metrics.jsonl")


class Mapping:
    """What a request means for both stages; `notes` say where the platform's wish could not be followed."""

    def __init__(self, request: TaskRequest) -> None:
        self.request = request
        self.notes: list[str] = list(request.notes)
        self.recipe = recipe_of(str(request.student))
        self.distillation = self.resolve_distillation()
        self.lora_rank = self.resolve_lora()

    def setting(self, name: str) -> Any:
        """Option or JSON, else the recipe of the student, else the default."""
        return {**self.recipe, **self.request.chosen}.get(name, OPTIONS[name].default)

    def resolve_distillation(self) -> str:
        """feature, logit or hybrid, as far as the task has class logits.

        Raises:
            OptionError: when logits alone are asked for where there are none.
        """
        asked, task = self.setting("distillation_type"), self.request.task
        if task in LABEL_TASKS or asked == "feature":
            return str(asked)
        if "distillation_type" in self.request.chosen:
            if asked == "logit":
                raise OptionError(
                    f"--distillation_type: {task} has no class logits: expected feature, got 'logit'"
                )
            self.notes.append(
                f"distillation_type {asked}: {task} has no class logits, features alone are distilled"
            )
        return "feature"

    def resolve_lora(self) -> int:
        """The back end sends rank 16 as its default: on random weights adapters make no sense."""
        rank = int(self.setting("lora_rank"))
        if rank and self.request.student_path is None and not self.request.pretrained:
            self.notes.append(f"lora_rank {rank}: left off, the student starts from random weights")
            return 0
        return rank

    @property
    def teacher_size(self) -> int:
        """The student's image size to the nearest multiple of 28, at most 448, unless asked otherwise."""
        asked = self.request.get("teacher_image_size")
        if asked is not None:
            return int(asked)
        size = (int(self.setting("image_size")) + PATCH // 2) // PATCH * PATCH
        return min(max(size, PATCH), LARGEST_TEACHER_SIZE)

    def features(self) -> dict[str, Any]:
        """What is extracted, derived from the student: the options that decide a store's content."""
        request = self.request
        wanted: dict[str, Any] = {
            "teacher": request.teacher,
            "image_size": self.teacher_size,
            "grid": "auto" if request.task in GRID_TASKS else 0,
            "logits": "probe" if self.distillation in ("logit", "hybrid") else "none",
            "val_fraction": request.get("val_fraction"),
            # A missing split is cut by content: renamed files stay on their side, copies are never on both.
            "group_duplicates": True,
            # Images of one folder are read there; a database or a second folder have no common root to read from.
            "images": "jpeg" if request.database or data_splits(request) else "none",
        }
        if request.student.type == "lstm":
            wanted["source"] = "clips"
            wanted |= {"frames": request.get("clip_frames")} if request.get("clip_frames") else {}
        if request.database:
            wanted["source"] = "sql"
        return wanted

    def store_features(self) -> dict[str, Any]:
        """The options that name a store in the cache: logits come from its features and are added when missing."""
        return {name: value for name, value in self.features().items() if name != "logits"}

    def extract_config(self, out: Path) -> ExtractConfig:
        """Stage one's configuration.

        Raises:
            ConfigError: when the options do not make sense together.
        """
        from extract.config import load_config

        request = self.request
        options = {
            **self.features(),
            "out": out,
            "teacher_path": str(request.teacher_path),
            "device": ",".join(dict.fromkeys(request.devices)),
            "workers": request.get("workers"),
            "max_bad": request.get("max_bad"),
            **self.data_options(),
        }
        return load_config(None, options)

    def data_options(self) -> dict[str, Any]:
        request = self.request
        if request.database:
            options = {name: request.database[name] for name in ("query", "image_root")}
            return {"data": request.database["url"], "source_options": options}
        splits = data_splits(request)
        return {"data": str(request.dataset_dir), **({"split": splits} if splits else {})}

    def train_config(self, store: Path) -> TrainConfig:
        """Stage two's configuration; it resumes when the output folder holds a run.

        Raises:
            ConfigError: when the options do not make sense together.
        """
        from console.options import options_of
        from train.config import TrainConfig, load_config

        request = self.request
        options = {
            **self.same_options(options_of(TrainConfig)),
            "store": store,
            "student": str(request.student),
            "out": request.output_dir,
            "task": request.task,
            "distillation_type": self.distillation,
            "lora_rank": self.lora_rank,
            "student_path": request.student_path,
            "pretrained": request.pretrained or None,
            "device": ",".join(request.devices),
            "checkpoint_interval": self.checkpoint_interval,
            "resume": any((request.output_dir / name).exists() for name in RUN_FILES),
        }
        if self.features()["images"] == "none":
            options["data_root"] = request.dataset_dir
        return load_config(options)

    def same_options(self, options: dict[str, Option]) -> dict[str, Any]:
        """What was chosen of the options that have the same name and meaning in stage two, where they have an effect."""
        unused = {"lora": not self.lora_rank, "logits": self.distillation == "feature"}
        return {
            name: self.request.chosen[name]
            for name, option in options.items()
            if name in self.request.chosen and not unused.get(option.needs)
        }

    @property
    def checkpoint_interval(self) -> int | None:
        """Epochs between `checkpoint_epoch_n.pt` files, None for none of them."""
        if not self.request.get("auto_save_checkpoint"):
            return None
        return int(self.request.get("checkpoint_interval"))


def data_splits(request: TaskRequest) -> dict[str, str] | None:
    """Splits from two data sets, each of which gives its own split of that name, or all it has.

    None when one data set holds both in its layout.
    """
    train, val = request.dataset_dir, request.val_dataset_dir
    if train is None or val is None or train == val:
        return None
    return {"train": str(train), "val": str(val)}
