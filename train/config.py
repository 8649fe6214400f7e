"""The configuration of a training: one frozen object, checked as a whole before anything expensive starts.

Precedence: option > configuration file > recipe of the student > general default; `sources` records which of
them each value came from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from console.devices import KINDS, parse_devices
from console.options import given, load_options, option, options_of, read_option_file
from console.output import plain_json, redact_values
from train.errors import ConfigError
from train.students.families import UnknownStudentError, parse_student_name, recipe_of

Task = Literal["auto", "classification", "segmentation", "sequence", "features", "detection"]
Source = Literal["option", "file", "recipe"]

# Headings of `cli train --help`.
_data = partial(option, panel="Data and student")
_optimization = partial(option, panel="Optimization")
_distillation = partial(option, panel="Distillation", distills=True)
_lora = partial(option, panel="LoRA")
_run = partial(option, panel="The run")

_NO_LOGITS = {
    "yolov8": "detectors have no class logits of the teacher to learn from; use --distillation-type feature"
}


class TrainConfig(BaseModel):
    """Options of `cli train`, with the same names (dashes for underscores) and meaning.

    Fields that are not given come from the student's recipe, else from the defaults below. `None` is absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What, from what, to where
    store: str = option(
        ...,
        "The store of teacher features (cli extract), a folder or a URL; --resume knows it.",
        flag="STORE",
        free_on_resume=True,
        set_by_sweep=True,
    )
    student: str = option(
        ...,
        "TYPE/SIZE, a short form like resnet18, or timm:NAME (cli students).",
        metavar="TYPE/SIZE",
        set_by_sweep=True,
    )
    out: Path = option(..., "The run folder to write.", metavar="RUN", free_on_resume=True, set_by_sweep=True)

    task: Task = _data("auto", "auto: the student's own task.")
    num_classes: int | None = _data(None, "Classes of the head; default: the store's.", ge=1, le=1_000_000)
    student_path: Path | None = _data(None, "Local weights to start from.", free_on_resume=True)
    pretrained: bool = _data(
        False,
        "Start from timm's published weights (needs its hub).",
        free_on_resume=True,
        not_for={"yolov8": "that needs a download; give a local file with --student-path"},
    )
    data_root: Path | None = _data(
        None, "Where the images are, when the store holds none.", free_on_resume=True
    )
    train_split: str = _data("train", "The split to train on.")
    val_split: str = _data("val", "The split to validate on.")
    labeled_share: float | None = _data(
        None,
        "Share of labeled samples in each batch, where others have no label or mask.",
        gt=0,
        le=1,
        shown_default="theirs, and at least a quarter; lstm, and unet without maps: 1",
        distills=True,
        not_for={"yolov8": "detectors train on images with boxes; --pretrain-epochs learns from all"},
    )
    dropout: float = _data(
        0.0,
        "timm students: dropout before the classifier.",
        ge=0,
        lt=1,
        students=["resnet", "vit", "timm"],
        not_for={"yolov8": "YOLOv8 has none"},
    )
    freeze_encoder: bool = _data(
        False,
        "lstm: keep the frame encoder fixed.",
        students=["lstm"],
        not_for={"yolov8": "use --yolo-settings freeze=LAYERS"},
    )
    attention_pooling: bool = _data(
        False, "lstm: attention over time instead of the mean.", students=["lstm"]
    )
    frame_encoder: str = _data(
        "resnet50",
        "lstm: timm's model that encodes each frame.",
        students=["lstm"],
        metavar="NAME",
    )
    distill_layers: str | None = _data(
        None,
        "The student's maps that learn, and the teacher's layers: p3:8,p4:16,p5:last; of ViTs blocks: 5:8,last.",
        students=["resnet", "vit", "timm", "unet", "yolov8"],
        metavar="LEVEL:LAYER,...",
        distills=True,
    )
    foreground_weight: float = _data(
        1.0, "yolov8: weight of cells inside boxes.", ge=1, students=["yolov8"], distills=True
    )
    boxes_from: Path | None = _data(
        None,
        "yolov8: a trained detector (run folder or best.pt) that labels the images without boxes first (self-training).",
        students=["yolov8"],
    )
    yolo_settings: str = _data(
        "", "yolov8: ultralytics' own settings, e.g. mosaic=0.5,degrees=10.", students=["yolov8"]
    )

    epochs: int = _optimization(100, "Passes over the training split.", ge=1, free_on_resume=True)
    pretrain_epochs: int = _optimization(
        0,
        "Phase one: first learn the features of all samples, labeled or not, for so many epochs (unet: also stored class "
        "maps); 0: off.",
        ge=0,
        distills=True,
    )
    pretrain_learning_rate: float = _optimization(
        1e-3, "Peak learning rate of phase one.", gt=0, distills=True
    )
    pretrain_image_size: int | None = _optimization(
        None,
        "Side of the input in phase one, pixels; default: that of phase two.",
        ge=8,
        le=4096,
        distills=True,
    )
    batch_size: int = _optimization(32, "Samples a forward pass, over all processes together.", ge=1)
    learning_rate: float = _optimization(1e-4, "Peak learning rate.", gt=0)
    optimizer: Literal["adamw", "adam", "sgd", "auto"] = _optimization(
        "adamw",
        "adam adds the weight decay to the gradient, adamw does not; sgd uses momentum 0.9; auto: ultralytics' choice, "
        "also of the learning rate unless given (yolov8).",
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = _optimization("cosine", "After the warm-up.")
    warmup_epochs: float = _optimization(
        1.0, "Length of the linear warm-up, at most a fifth of the run.", ge=0
    )
    weight_decay: float = _optimization(0.01, "Not applied to norms and biases.", ge=0)
    grad_accum_steps: int = _optimization(1, "Batches summed into one optimizer step.", ge=1)
    max_grad_norm: float = _optimization(1.0, "Clip student and alignment head together; 0: off.", ge=0)
    image_size: int = _optimization(224, "Side of the student's input, pixels.", ge=8, le=4096)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _optimization(
        "auto", "Mixed precision; auto on GPUs. fp32 on a GPU uses TF32."
    )
    ema_decay: float | None = _optimization(
        None,
        "Evaluate and keep averaged weights.",
        gt=0,
        lt=1,
        not_for={"yolov8": "ultralytics' trainer always averages weights, with its own ramp to 0.9999"},
    )
    label_smoothing: float = _optimization(
        0.0,
        "Of the task's cross-entropy.",
        ge=0,
        lt=1,
        not_for={"yolov8": "YOLOv8's loss has soft targets of its own"},
    )
    early_stopping_patience: int | None = _optimization(
        None, "Epochs without improvement.", ge=1, free_on_resume=True
    )
    validate_every: int | None = _optimization(
        None,
        "Optimizer steps between validations, at least; they are at ends of epochs.",
        ge=1,
        shown_default="as many as train as many samples as a validation has",
    )
    mixup_alpha: float = _optimization(
        0.0,
        "MixUp's Beta parameter; 0: off.",
        ge=0,
        not_for={"yolov8": "use --yolo-settings mixup=PROBABILITY"},
    )
    cutmix_alpha: float = _optimization(
        0.0,
        "CutMix's Beta parameter; 0: off.",
        ge=0,
        not_for={"yolov8": "use --yolo-settings cutmix=PROBABILITY"},
    )
    augment: Literal["auto", "none", "photometric", "mild", "full"] = _optimization(
        "auto", "auto: full where targets can move with the image, else mild crops and colors."
    )
    gradient_checkpointing: bool = _optimization(
        False,
        "Less memory for more computing.",
        not_for={"yolov8": "ultralytics' trainer has none; use a smaller --batch-size"},
    )
    compile: bool = _optimization(
        False,
        "torch.compile the student.",
        free_on_resume=True,
        not_for={"yolov8": "ultralytics' trainer does not compile models that are distilled"},
    )

    teachers: str = _distillation(
        "",
        "Which of the store's teachers are learned from, several with commas or +; each has a head of its own.",
        shown_default="the first",
        distills=False,  # the first one's resize policy, and the rows that all have, are those of the control as well
    )
    distillation_type: Literal["feature", "logit", "hybrid", "none"] | None = _distillation(
        None, "Default: hybrid for classes, feature for masks and boxes."
    )
    hard_label_weight: float = _distillation(0.5, "Weight of the task loss.", ge=0)
    soft_label_weight: float = _distillation(
        0.5, "Weight of the distillation loss; 0: batches hold labeled samples only.", ge=0
    )
    feature_weight: float | None = _distillation(
        None,
        "Of the feature term in the distillation loss.",
        ge=0,
        shown_default="found from gradients in the first steps",
    )
    logit_weight: float = _distillation(
        1.0, "Of the logit term in the distillation loss.", ge=0, needs="logits", not_for=_NO_LOGITS
    )
    distill_until: Literal["auto", "end"] = _distillation(
        "auto",
        "auto: the distillation terms end when the student is better than a probe of the teacher's features.",
        not_for={"yolov8": "there is no probe of boxes to compare with"},
    )
    feature_loss_type: Literal["mse", "cosine", "smooth_l1", "relation"] = _distillation(
        "mse", "Feature term."
    )
    standardize: Literal["channel", "phi-s"] = _distillation(
        "channel",
        "How targets get variance 1: each channel on its own, or PHI-S, a rotation and one scale for all.",
    )
    feature_target: Literal["auto", "pooled", "grid", "both"] = _distillation(
        "auto", "Which stored features are learned; auto: all that the student can match."
    )
    distill_loss_type: Literal["kl_div"] = _distillation("kl_div", "Logit term.", needs="logits")
    temperature: float | None = _distillation(
        None,
        "Of the logit term for classes.",
        gt=0,
        needs="logits",
        not_for=_NO_LOGITS,
        shown_default="1 for the logits of a probe, else 4",
    )
    teacher_logits: str = _distillation(
        "auto",
        "Name of the stored logits or soft class maps, e.g. probe.",
        needs="logits",
        not_for=_NO_LOGITS,
    )
    align_feature: bool = _distillation(True, "Map the student's features into the teacher's space.")
    align_head: Literal["linear", "mlp"] = _distillation("linear", "Form of the alignment head.")
    views: Literal["auto", "random", "recorded"] = _distillation(
        "auto",
        "auto: recorded views, or the features of mirror images, where stored; random: neither.",
        distills=False,  # decides on the images that the control sees as well
        not_for={"yolov8": "ultralytics' own augmentations are used, recorded views cannot be replayed"},
    )

    lora_rank: int = _lora(0, "0: off.", ge=0)
    lora_alpha: float = _lora(16, "Scale of the adapters.", gt=0, needs="lora")
    lora_dropout: float = _lora(0.1, "Inside the adapters.", ge=0, lt=1, needs="lora")
    lora_target_modules: str = _lora(
        "", "Comma-separated; empty: defaults of the student's type.", needs="lora"
    )
    lora_bias: Literal["none", "all", "lora_only"] = _lora("none", "Which biases train.", needs="lora")

    device: str = _run("auto", "auto, cpu, cuda, cuda:0 or a list like cuda:0,cuda:1.", free_on_resume=True)
    workers: int | None = _run(
        None,
        "Processes that decode images; default: by this process's share of the cores.",
        ge=0,
        free_on_resume=True,
    )
    cache_dir: Path | None = _run(
        None,
        "Where the shards of a remote STORE are kept.",
        shown_default="~/.cache/qwen-distill/stores",
        free_on_resume=True,
    )
    cache_gb: float | None = _run(
        None,
        "Size of that cache; what was not used for longest goes first.",
        gt=0,
        shown_default="four fifths of the free disk",
        free_on_resume=True,
    )
    seed: int = _run(0, "Of initial weights, data order, augmentation and dropout.", ge=0, set_by_sweep=True)
    deterministic: bool = _run(False, "Only deterministic kernels (slower on GPUs).")
    auto_batch: bool = _run(
        False, "Out of memory: halve the batch, double the accumulation.", free_on_resume=True
    )
    control: bool = _run(False, "Also train the same student without the teacher.", set_by_sweep=True)
    control_only: bool = _run(
        False,
        "Train the control alone: the images and schedule of these options, no teacher.",
        set_by_sweep=True,
    )
    pretrain_cache: Path | None = _run(
        None,
        "Share phase one with other runs: a folder of phase ones, each named after all that determines it.",
        free_on_resume=True,
        set_by_sweep=True,
    )
    resume: bool = _run(False, "Continue the run in the run folder.", free_on_resume=True, set_by_sweep=True)
    overwrite: bool = _run(
        False, "Delete what is in the run folder first.", free_on_resume=True, set_by_sweep=True
    )
    tracker: Literal["tensorboard", "wandb", "mlflow"] = _run(
        "tensorboard", "TensorBoard is always on.", free_on_resume=True
    )
    checkpoint_interval: int | None = _run(
        None, "Also keep checkpoint_epoch_N.pt every N epochs.", ge=1, free_on_resume=True
    )
    checkpoint_minutes: float = _run(
        1.0,
        "Save last.pt, and a new best.pt, every so many minutes; always at the end.",
        ge=0,
        free_on_resume=True,
    )

    sources: dict[str, Source] = {}  # where each value came from

    @model_validator(mode="before")
    @classmethod
    def fill_from_recipe(cls, values: Any) -> Any:
        """Fields that were not given come from the student's recipe, which `sources` records."""
        if not isinstance(values, dict):
            return values
        given = {name for name in values if name != "sources"}
        sources = values["sources"] if "sources" in values else dict.fromkeys(sorted(given), "option")
        recipe = {k: v for k, v in recipe_of(str(values.get("student", ""))).items() if k not in given}
        return {**recipe, **values, "sources": {**dict.fromkeys(recipe, "recipe"), **sources}}

    @field_validator("student")
    @classmethod
    def check_student(cls, value: str) -> str:
        try:
            return str(parse_student_name(value))
        except UnknownStudentError as error:
            raise ValueError(str(error)) from None

    @field_validator("store", mode="before")
    @classmethod
    def plain_store(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value  # a path, or an opened store

    @field_validator("device")
    @classmethod
    def check_device(cls, value: str) -> str:
        return ",".join(parse_devices(value, (*KINDS, "mps")))

    @model_validator(mode="after")
    def check_together(self) -> Self:
        problems = []
        if self.resume and self.overwrite:
            problems.append("resume and overwrite exclude each other")
        if self.hard_label_weight == 0 and self.soft_label_weight == 0:
            problems.append("hard_label_weight and soft_label_weight are both 0: nothing to learn")
        if self.feature_weight == 0 and self.logit_weight == 0 and self.distillation_type != "none":
            problems.append("feature_weight and logit_weight are both 0: use distillation_type none")
        if self.pretrained and self.student_path is not None:
            problems.append("pretrained and student_path exclude each other: both choose the initial weights")
        if len(set(self.teacher_names)) < len(self.teacher_names):
            problems.append(f"teachers {self.teachers}: a teacher is named twice")
        if self.mixup_alpha and self.cutmix_alpha:
            problems.append("mixup_alpha and cutmix_alpha exclude each other")
        if self.control and self.distillation_type == "none" and not self.pretrain_epochs:
            problems.append(
                "control and distillation_type none: nothing to compare, both train without the teacher"
            )
        if not self.pretrain_epochs and not self.is_explicit("pretrain_epochs"):
            problems += [
                f"{name} has no effect without --pretrain-epochs"
                for name in ("pretrain_learning_rate", "pretrain_image_size")
                if self.is_explicit(name) and self.task != "features"
            ]
        if not self.soft_label_weight and self.is_explicit("labeled_share"):
            problems.append("labeled_share has no effect with soft_label_weight 0: every sample is labeled")
        if self.optimizer == "auto" and self.student_type != "yolov8":
            problems.append(f"optimizer auto: only yolov8 students have it, not {self.student}")
        if self.boxes_from is not None and self.task == "features":
            problems.append(
                "boxes_from has no effect with task features, which learns no boxes: leave it out"
            )
        if self.control and self.control_only:
            problems.append("control and control_only exclude each other: a control has no control")
        if not self.lora_rank and not self.is_explicit("lora_rank"):
            problems += [
                f"{name} has no effect without --lora-rank"
                for name, item in options_of(TrainConfig).items()
                if item.needs == "lora" and self.differs(name)
            ]
        if self.train_split == self.val_split:
            problems.append(f"train_split and val_split are both {self.val_split}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def teacher_names(self) -> list[str]:
        """The names in `teachers`; empty: the store's first teacher."""
        return [name for word in self.teachers.replace("+", ",").split(",") if (name := word.strip())]

    @property
    def student_type(self) -> str:
        """`resnet`, `vit`, `unet`, `lstm`, `yolov8` or `timm`."""
        return parse_student_name(self.student).type

    @property
    def devices(self) -> list[str]:
        """The devices to use, one process each when there are several."""
        return self.device.split(",")

    @property
    def needs_ranks(self) -> bool:
        """Whether the training takes several processes of torch.distributed that are not running yet."""
        # ultralytics starts the processes of YOLO students.
        return len(self.devices) > 1 and "RANK" not in os.environ and self.student_type != "yolov8"

    def unsupported_options(self) -> list[str]:
        """One text for each option that was chosen and that this type of student does not have."""
        problems = []
        for name, item in options_of(TrainConfig).items():
            if not self.differs(name):
                continue
            if reason := item.not_for.get(self.student_type):
                problems.append(f"{name} has no effect on {self.student_type} students: {reason}")
            elif item.students and self.student_type not in item.students:
                kinds = ", ".join(item.students)
                problems.append(f"{name} is an option of {kinds} students, the student is {self.student}")
        return problems

    def is_explicit(self, name: str) -> bool:
        """True when the value of `name` was chosen by an option or a file, not by recipe or default."""
        return self.sources.get(name) in ("option", "file")

    def differs(self, name: str) -> bool:
        """True when the value of `name` is not the general default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def replace(self, **changes: Any) -> TrainConfig:
        """The same configuration with some values changed; where values came from stays as it is."""
        return TrainConfig(**{**self.model_dump(), **changes})


def load_config(options: Mapping[str, Any], file: Path | None = None) -> TrainConfig:
    """The configuration of `options` (`None` is absent) over those of a YAML, TOML or JSON file.

    With `resume`, options that are not given are those of the run in the folder `out`.

    Raises:
        ConfigError: with every problem: unknown names (and the nearest valid one) and bad values.
    """
    chosen = given(options)
    from_file = read_option_file(file, ConfigError) if file is not None else {}
    before = options_to_resume({**from_file, **chosen})
    sources = {
        **before.pop("sources", {}),
        **dict.fromkeys(from_file, "file"),
        **dict.fromkeys(chosen, "option"),
    }
    return load_options(TrainConfig, {**chosen, "sources": sources}, {**before, **from_file}, ConfigError)


def options_to_resume(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that `options` resume, and their `sources`; empty without `resume` or without a run."""
    from train.run_folder import RunFolder

    if options.get("resume") not in (True, "true", "True") or "out" not in options:
        return {}
    folder = RunFolder(Path(str(options["out"])))
    if {"store", "student"} <= options.keys() and not folder.has_results():
        return {}  # a start that failed: one of its options may be the reason
    before = folder.read_options()
    if before is None:
        if {"store", "student"} <= options.keys():
            return {}
        raise ConfigError(
            f"--resume: nothing to resume in {folder.path}: check --out, or leave --resume out and name STORE and --student"
        )
    # An option that has been removed since has no effect any more.
    known = {name: value for name, value in before.items() if name in TrainConfig.model_fields}
    dropped = {"out", "resume", "overwrite"}
    sources = {name: source for name, source in known.pop("sources", {}).items() if name not in dropped}
    return {**{name: value for name, value in known.items() if name not in dropped}, "sources": sources}


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, for records: passwords in addresses are hidden."""
    values: dict[str, Any] = redact_values(plain_json(config.model_dump()))
    return values
