"""The platform's settings → the configurations of both stages. This is the only place that knows all three."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.task.errors import OptionError
from backend.task.options import OPTIONS
from backend.task.request import TaskRequest
from extract.known_teachers import QWEN_CHECKPOINTS
from train.students.families import recipe_of

if TYPE_CHECKING:
    from extract.config import ExtractConfig
    from train.config import TrainConfig

# Sides of timm encoders' images are multiples of it too, unless asked otherwise.
DEFAULT_SIDE = 28
LARGEST_TEACHER_SIZE = 448
GRID_TASKS = frozenset({"detection", "segmentation"})
LABEL_TASKS = frozenset({"classification", "sequence"})


class StageConfigs:
    """What a request means for both stages; `notes` list where the platform's request could not be followed.

    Attributes:
        settings: option or JSON > recipe of the student > default.
        distillation: feature, logit or hybrid.
        lora_rank: 0 for none.
    """

    def __init__(self, request: TaskRequest) -> None:
        self.request = request
        self.notes: list[str] = list(request.notes)
        defaults = {name: option.default for name, option in OPTIONS.items()}
        self.settings = ChainMap(dict(request.chosen), dict(recipe_of(str(request.student))), defaults)
        self.distillation = self.resolve_distillation()
        self.lora_rank = self.resolve_lora()

    def resolve_distillation(self) -> str:
        """feature, logit or hybrid, as far as the task has class logits.

        Raises:
            OptionError: when logits alone are asked for where there are none.
        """
        asked, task = str(self.settings["distillation_type"]), self.request.task
        if task in LABEL_TASKS or asked == "feature":
            return asked
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
        rank = int(self.settings["lora_rank"])
        if rank and self.request.student_path is None and not self.request.pretrained:
            self.notes.append(f"lora_rank {rank}: left off, the student starts from random weights")
            return 0
        return rank

    @property
    def teacher_size(self) -> int:
        """The student's image size to the nearest that the teacher takes, at most 448, unless asked otherwise.

        Multiples of 28 for Qwen2.5-VL, of 32 for Qwen3-VL and Qwen3.5.
        """
        asked = self.settings["teacher_image_size"]
        if asked is not None:
            return int(asked)
        known = QWEN_CHECKPOINTS.get(self.request.teacher)
        side = DEFAULT_SIDE if known is None else known.side
        size = (int(self.settings["image_size"]) + side // 2) // side * side
        return min(max(size, side), LARGEST_TEACHER_SIZE)

    def features(self) -> dict[str, Any]:
        """What is extracted, derived from the student: the options that decide a store's content."""
        request = self.request
        wanted: dict[str, Any] = {
            "teacher": request.teacher,
            "image_size": self.teacher_size,
            "grid": "auto" if request.task in GRID_TASKS else 0,
            "logits": "probe" if self.distillation in ("logit", "hybrid") else "none",
            "val_fraction": self.settings["val_fraction"],
            # A missing split is cut by content: renamed files stay on their side, copies are never on both.
            "group_duplicates": True,
            # Images of one folder are read there; a database or a second folder have no common root to read from.
            "images": "jpeg" if request.database or request.splits else "none",
        }
        if request.student.type == "lstm":
            wanted["source"] = "clips"
            if self.settings["clip_frames"]:
                wanted["frames"] = self.settings["clip_frames"]
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
        if request.database:
            source_options = {name: request.database[name] for name in ("query", "image_root")}
            data: dict[str, Any] = {"data": request.database["url"], "source_options": source_options}
        else:
            data = {"data": str(request.dataset_dir), "split": request.splits or None}
        options = {
            **self.features(),
            **data,
            "out": out,
            "teacher_path": str(request.teacher_path),
            "device": ",".join(dict.fromkeys(request.devices)),
            "workers": self.settings["workers"],
            "max_bad": self.settings["max_bad"],
        }
        return load_config(options)

    def train_config(self, store: Path) -> TrainConfig:
        """Stage two's configuration; it resumes when the output folder holds a run.

        Raises:
            ConfigError: when the options do not make sense together.
        """
        from train.config import load_config
        from train.run_folder import RunFolder

        request, run = self.request, RunFolder(self.request.output_dir)
        in_use = {"", "lora" if self.lora_rank else "", "logits" if self.distillation != "feature" else ""}
        options = {
            # What was not chosen is left to the recipe, which TrainConfig itself applies.
            **{name: value for name, value in request.chosen.items() if OPTIONS[name].shared}
            | {name: None for name, option in OPTIONS.items() if option.needs not in in_use},
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
            "resume": run.has_results() or run.has_config(),
        }
        if self.features()["images"] == "none":
            options["data_root"] = request.dataset_dir
        return load_config(options)

    @property
    def checkpoint_interval(self) -> int | None:
        """Epochs between `checkpoint_epoch_n.pt` files, None for none of them."""
        return int(self.settings["checkpoint_interval"]) if self.settings["auto_save_checkpoint"] else None
