"""What a training is asked to do: one frozen object, checked as a whole before anything heavy starts.

Precedence: option > configuration file > recipe of the student > general default; `sources` says for every
field which of them it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from console.option_file import read_option_file
from console.output import plain_json
from console.redaction import redact_values
from train.errors import ConfigError
from train.recipes import recipe_of
from train.students.names import UnknownStudentError, parse_student_name

Task = Literal["auto", "classification", "segmentation", "sequence", "features", "detection"]
Source = Literal["option", "file", "recipe"]
LORA = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias")


class TrainConfig(BaseModel):
    """Options of `cli train`, with the same names (dashes for underscores) and meaning.

    Fields that are not given come from the student's recipe, else from the defaults below. `None` is absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What, from what, to where
    store: str = Field(description="The store of teacher features (cli extract), a folder or a URL.")
    student: str = Field(description="TYPE/SIZE, a short form like resnet18, or timm:NAME (cli students).")
    out: Path = Field(description="The run folder to write.")
    task: Task = Field("auto", description="auto: the student's own task.")
    num_classes: int | None = Field(
        None, ge=1, le=1_000_000, description="Classes of the head; default: the store's."
    )
    student_path: Path | None = Field(None, description="Local weights to start from.")
    pretrained: bool = Field(False, description="Start from timm's published weights (needs its hub).")
    data_root: Path | None = Field(None, description="Where the images lie, when the store holds none.")
    train_split: str = Field("train", description="The split to train on.")
    val_split: str = Field("val", description="The split to validate on.")

    # Optimisation
    epochs: int = Field(100, ge=1, description="Passes over the training split.")
    batch_size: int = Field(32, ge=1, description="Samples a forward pass, over all processes together.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    optimizer: Literal["adamw", "adam", "sgd", "auto"] = Field(
        "adamw",
        description="sgd uses momentum 0.9; auto: ultralytics' choice, also of the learning rate unless given (yolov8).",
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="After the warm-up.")
    warmup_epochs: float = Field(
        1.0, ge=0, description="Length of the linear warm-up, at most a fifth of the run."
    )
    weight_decay: float = Field(0.01, ge=0, description="Not applied to norms and biases.")
    grad_accum_steps: int = Field(1, ge=1, description="Batches summed into one optimizer step.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip student and alignment head together; 0: off.")
    image_size: int = Field(224, ge=8, le=4096, description="Side of the student's input, pixels.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Mixed precision; auto on GPUs. fp32 on a GPU uses TF32."
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Evaluate and keep averaged weights.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of the task's cross-entropy.")
    early_stopping_patience: int | None = Field(None, ge=1, description="Epochs without improvement.")
    mixup_alpha: float = Field(0.0, ge=0, description="MixUp's Beta parameter; 0: off.")
    cutmix_alpha: float = Field(0.0, ge=0, description="CutMix's Beta parameter; 0: off.")
    augment: Literal["auto", "none", "photometric", "mild", "full"] = Field(
        "auto", description="auto: full where targets can move with the image, else mild crops and colours."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for more computing.")
    compile: bool = Field(False, description="torch.compile the student.")

    # Distillation
    distillation_type: Literal["feature", "logit", "hybrid", "none"] | None = Field(
        None, description="Default: hybrid for classification, feature for the other tasks."
    )
    hard_label_weight: float = Field(0.5, ge=0, description="Weight of the task loss.")
    soft_label_weight: float = Field(0.5, ge=0, description="Weight of the distillation loss.")
    feature_weight: float = Field(1.0, ge=0, description="Of the feature term in the distillation loss.")
    logit_weight: float = Field(1.0, ge=0, description="Of the logit term in the distillation loss.")
    feature_loss_type: Literal["mse", "cosine", "smooth_l1", "relation"] = Field(
        "mse", description="Feature term."
    )
    feature_target: Literal["auto", "pooled", "grid", "both"] = Field(
        "auto", description="Which stored features are learnt; auto: all that the student can match."
    )
    distill_loss_type: Literal["kl_div"] = Field("kl_div", description="Logit term.")
    temperature: float = Field(4.0, gt=0, description="Of the logit term.")
    teacher_logits: str = Field("auto", description="Name of the stored logits, e.g. probe.")
    align_feature: bool = Field(True, description="Map the student's features into the teacher's space.")
    align_head: Literal["linear", "mlp"] = Field("linear", description="Form of the alignment head.")
    views: Literal["auto", "random", "recorded"] = Field(
        "auto", description="auto: recorded views where stored."
    )

    # LoRA
    lora_rank: int = Field(0, ge=0, description="0: off.")
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapters.")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="Inside the adapters.")
    lora_target_modules: str = Field(
        "", description="Comma-separated; empty: defaults of the student's type."
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases train.")

    # Students' own options
    dropout: float = Field(0.0, ge=0, lt=1, description="timm students: dropout before the classifier.")
    freeze_encoder: bool = Field(False, description="lstm: keep the frame encoder fixed.")
    attention_pooling: bool = Field(False, description="lstm: attention over time instead of the mean.")
    distill_layers: str | None = Field(None, description="yolov8: P5, or a list like P3,P4,P5.")
    foreground_weight: float = Field(1.0, ge=1, description="yolov8: weight of cells inside boxes.")
    yolo_settings: str = Field(
        "", description="yolov8: ultralytics' own settings, e.g. mosaic=0.5,degrees=10."
    )

    # The machine and the run
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 or a list like cuda:0,cuda:1.")
    workers: int | None = Field(
        None, ge=0, description="Processes that decode images; default: by this process's share of the cores."
    )
    seed: int = Field(0, ge=0, description="Of initial weights, data order, augmentation and dropout.")
    deterministic: bool = Field(False, description="Only deterministic kernels (slower on GPUs).")
    auto_batch: bool = Field(False, description="Out of memory: halve the batch, double the accumulation.")
    control: bool = Field(False, description="Also train the same student without the teacher.")
    control_only: bool = Field(
        False, description="Train the control alone: the images and schedule of these options, no teacher."
    )
    resume: bool = Field(False, description="Continue the run in the run folder.")
    overwrite: bool = Field(False, description="Delete what is in the run folder first.")
    tracker: Literal["tensorboard", "wandb", "mlflow"] = Field(
        "tensorboard", description="TensorBoard is always on."
    )
    checkpoint_interval: int | None = Field(
        None, ge=1, description="Also keep checkpoint_epoch_N.pt every N epochs."
    )
    checkpoint_minutes: float = Field(
        1.0, ge=0, description="Save last.pt, and a new best.pt, every so many minutes; always at the end."
    )

    sources: dict[str, Source] = Field(default_factory=dict, description="Where each value came from.")

    @model_validator(mode="before")
    @classmethod
    def fill_from_recipe(cls, values: Any) -> Any:
        """Fields that were not given come from the student's recipe; say so in `sources`."""
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
        return str(value) if isinstance(value, Path) else value

    @field_validator("device")
    @classmethod
    def check_device(cls, value: str) -> str:
        for name in value.split(","):
            kind, _, index = name.strip().partition(":")
            if kind not in ("auto", "cpu", "cuda", "mps") or (index and not index.isdigit()):
                raise ValueError("must be auto, cpu, cuda, or a list like cuda:0,cuda:1")
        return value

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
        if self.mixup_alpha and self.cutmix_alpha:
            problems.append("mixup_alpha and cutmix_alpha exclude each other")
        if self.control and self.distillation_type == "none":
            problems.append(
                "control and distillation_type none: nothing to compare, both train without the teacher"
            )
        if self.optimizer == "auto" and self.student_type != "yolov8":
            problems.append(f"optimizer auto: only yolov8 students have it, not {self.student}")
        if self.control and self.control_only:
            problems.append("control and control_only exclude each other: a control has no control")
        if not self.lora_rank and not self.is_explicit("lora_rank"):
            problems += [f"{name} has no effect without --lora-rank" for name in LORA if self.differs(name)]
        if self.train_split == self.val_split:
            problems.append(f"train_split and val_split are both {self.val_split}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def student_type(self) -> str:
        """`resnet`, `vit`, `unet`, `lstm`, `yolov8` or `timm`."""
        return parse_student_name(self.student).type

    @property
    def devices(self) -> list[str]:
        """The devices to use, one process each when there are several."""
        return [name.strip() for name in self.device.split(",")]

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
    chosen = {name: value for name, value in options.items() if value is not None}
    from_file = read_option_file(file, ConfigError) if file is not None else {}
    given = {**from_file, **chosen}
    before = options_to_resume(given)
    sources = {
        **before.pop("sources", {}),
        **dict.fromkeys(from_file, "file"),
        **dict.fromkeys(chosen, "option"),
    }
    try:
        return TrainConfig(**{**before, **given, "sources": sources})
    except ValidationError as error:
        raise ConfigError("; ".join(describe_problems(error.errors()))) from None


def options_to_resume(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that `given` resumes, and their `sources`; empty without `resume` or without a run."""
    from train.rundir import has_results, read_options

    if given.get("resume") not in (True, "true", "True") or "out" not in given:
        return {}
    folder = Path(str(given["out"]))
    if {"store", "student"} <= given.keys() and not has_results(folder):
        return {}  # a start that failed: one of its options may be the reason
    before = read_options(folder)
    if before is None:
        if {"store", "student"} <= given.keys():
            return {}
        raise ConfigError(
            f"--resume: nothing to resume in {folder}: check --out, or leave --resume out and name STORE and --student"
        )
    # An option that has been removed since has no effect any more.
    known = {name: value for name, value in before.items() if name in TrainConfig.model_fields}
    dropped = {"out", "resume", "overwrite"}
    sources = {name: source for name, source in known.pop("sources", {}).items() if name not in dropped}
    return {**{name: value for name, value in known.items() if name not in dropped}, "sources": sources}


def describe_problems(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """pydantic's problems, one text per option: `name: what is wrong (got …)`."""
    return [describe_problem(item) for item in items]


def describe_problem(item: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"][:1])
    if item["type"] == "extra_forbidden":
        return f"unknown option {name}: {nearest_names(name, TrainConfig.model_fields)}"
    if item["type"] == "missing":
        return f"{'STORE' if name == 'store' else '--' + name}: missing"
    if item["type"] == "too_short":
        return f"--{name}: expected at least one value, got none"
    text = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    text = text.partition(", unable to parse")[0]  # pydantic says the same thing twice
    value = item.get("input")
    got = f" (got {value})" if isinstance(value, (str, int, float)) else ""
    return f"{name}: {text}{got}" if name else text


def nearest_names(name: str, valid: Any) -> str:
    """`did you mean a or b?`, or the whole list when nothing is near."""
    near = difflib.get_close_matches(name, list(valid), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(valid)}"


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, for records: passwords in addresses are hidden."""
    values: dict[str, Any] = redact_values(plain_json(config.model_dump()))
    return values
