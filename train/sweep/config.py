"""The configuration of a sweep, and its trials."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from console.options import describe_problems, given, load_options, names_where, nearest_names, option
from train.config import TrainConfig, config_to_json
from train.errors import ConfigError

# Options of the losses: trials that differ in nothing else, and are shown the same images, share one control.
DISTILLATION_OPTIONS = names_where(TrainConfig, "distills")
# Options that the sweep itself sets for each trial.
OWN_OPTIONS = names_where(TrainConfig, "set_by_sweep") | {"sources"}


class SweepConfig(BaseModel):
    """Options of `cli sweep`. `set` maps a training option to the values to try; `options` holds fixed ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = option(..., "The store of teacher features: a folder or a URL.", flag="STORE")
    out: Path = option(..., "The sweep's folder; the same command again continues in it.", metavar="SWEEP")
    students: list[str] = option(..., "Comma-separated students (cli students).", min_length=1)
    seeds: list[int] = option([0], "Comma-separated seeds.", min_length=1)
    set: dict[str, list[Any]] = option(
        {}, "A training option and its values: name=v1,v2. Repeatable.", metavar="NAME=VALUES"
    )
    options: dict[str, Any] = {}  # training options with one value for all trials
    jobs: int | None = option(None, "Trials at a time.", ge=1, shown_default="one a GPU, else by the cores")
    scheduler: str | None = option(None, "Address of a dask scheduler instead of a local cluster.")
    control: bool = option(True, "Also train each student without the teacher.")
    trial_timeout_s: float | None = option(
        None, "End a trial that takes more than this many seconds.", gt=0, flag="--trial-timeout"
    )

    @field_validator("students", "seeds", mode="before")
    @classmethod
    def split_text(cls, value: Any) -> Any:
        """`resnet18,vit-tiny`, as on the command line."""
        return split_list(value) if isinstance(value, str) else value

    @field_validator("set")
    @classmethod
    def check_values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if empty := [name for name, values in value.items() if not values]:
            raise ValueError(f"no values for {', '.join(empty)}")
        return value

    @model_validator(mode="after")
    def check_names(self) -> Self:
        problems = []
        for name in (*self.set, *self.options):
            if name in OWN_OPTIONS:
                problems.append(f"{name} is the sweep's own: use its option of that name")
            elif name not in TrainConfig.model_fields:
                problems.append(
                    f"unknown training option {name}: {nearest_names(name, TrainConfig.model_fields)}"
                )
        if both := set(self.set) & set(self.options):
            problems.append(f"both fixed and varied: {', '.join(sorted(both))}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_sweep_config(values: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> SweepConfig:
    """The sweep of command-line `values` (`None` is absent) over those of a file.

    In the file, names that are no option of `cli sweep` are training options; `set` and `options` of both are merged.

    Raises:
        ConfigError: with every problem.
    """
    chosen = given(values)
    own, training = split_names(file or {})
    merged = {**own, **chosen}
    merged["set"] = {**plain_names(own.get("set")), **plain_names(chosen.get("set"))}
    merged["options"] = {**training, **plain_names(own.get("options")), **plain_names(chosen.get("options"))}
    merged["options"] = {
        name: value for name, value in merged["options"].items() if name not in merged["set"]
    }
    return load_options(SweepConfig, merged, {}, ConfigError)


def split_names(file: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's options of `cli sweep`, under the names that they have here, and its training options."""
    named = {"trial_timeout_s" if name == "trial_timeout" else name: value for name, value in file.items()}
    own = {name: value for name, value in named.items() if name in SweepConfig.model_fields}
    return own, {name: value for name, value in named.items() if name not in own}


def split_list(text: str) -> list[str]:
    """`a, b` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def plain_names(values: Any) -> dict[str, Any]:
    """Names with underscores, as the configuration has them."""
    return {str(name).replace("-", "_"): value for name, value in (values or {}).items()}


class Trial(NamedTuple):
    """One training: its name (also its folder's), its options, and whether it is a control."""

    name: str
    options: dict[str, Any]  # of `cli train`, without store and out
    is_control: bool
    control_name: str | None  # of the control that it is compared with


def plan_trials(config: SweepConfig, store_fingerprint: str) -> list[Trial]:
    """All trials of a sweep, the controls first: several distilled trials are compared with one control.

    A trial's name ends in a digest of its options and the store: a changed option is another trial, another way to
    write the same value (`1e-4` and `0.0001`) is not.
    Raises `ConfigError` when an option's value is not valid for a student.
    """
    controls: dict[str, Trial] = {}
    distilled: dict[str, Trial] = {}
    for options in checked(config, combinations(config)):
        control = control_of(options, config, store_fingerprint) if config.control else None
        if control is not None:
            controls[control.name] = control
        name = trial_name(options, config, store_fingerprint, suffix="")
        distilled[name] = Trial(name, options, False, control.name if control else None)
    return [*controls.values(), *distilled.values()]


def combinations(config: SweepConfig) -> Iterator[dict[str, Any]]:
    names = list(config.set)
    for student, seed in itertools.product(dict.fromkeys(config.students), dict.fromkeys(config.seeds)):
        for values in itertools.product(*config.set.values()):
            yield {
                **config.options,
                **dict(zip(names, values, strict=True)),
                "student": student,
                "seed": seed,
            }


def control_of(options: Mapping[str, Any], config: SweepConfig, store_fingerprint: str) -> Trial | None:
    """The control of `cli train --control` as a trial; none where there is no task loss (task `features`).

    Of the distillation options only one decides on the images (`train.distill.resolve.resolve_augmentation`): whether features
    are learned at all, which `logit` and `none` do not.
    """
    if options.get("task") == "features":
        return None
    kept = {name: value for name, value in options.items() if name not in DISTILLATION_OPTIONS}
    if options.get("distillation_type") in ("logit", "none"):
        kept["distillation_type"] = options["distillation_type"]
    kept["control_only"] = True
    return Trial(trial_name(kept, config, store_fingerprint, "-control"), kept, True, None)


def trial_name(options: Mapping[str, Any], config: SweepConfig, store_fingerprint: str, suffix: str) -> str:
    varied = [
        f"{name}={options[name]}"
        for name, values in config.set.items()
        if len(values) > 1 and name in options
    ]
    if suffix:
        varied = [part for part in varied if part.split("=")[0] not in DISTILLATION_OPTIONS]
    kind, _, size = options["student"].partition("/")  # `resnet/resnet18` is resnet18, `yolov8/n` stays whole
    student = size if size.startswith(kind) else options["student"]
    words = [student, f"seed{options['seed']}", *varied]
    slug = re.sub(r"[^A-Za-z0-9=._-]+", "_", "-".join(words))[:100]
    text = json.dumps([store_fingerprint, dict(options)], sort_keys=True, default=str)
    return f"{slug}{suffix}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def checked(config: SweepConfig, combinations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The combinations with their values as `cli train` understands them: plain numbers and words, whole paths.

    Raises `ConfigError` now instead of letting trials fail after hours.
    """
    settled: list[dict[str, Any]] = []
    problems: dict[str, None] = {}
    for options in combinations:
        try:
            parsed = TrainConfig(store=config.store, out=config.out, **options)
            plain = config_to_json(parsed)
            # Paths from the root: workers may have another working directory.
            values = {name: (getattr(parsed, name), plain[name]) for name in options}
            settled.append(
                {
                    n: str(value.resolve()) if isinstance(value, Path) else p
                    for n, (value, p) in values.items()
                }
            )
        except ValidationError as error:
            problems |= dict.fromkeys(describe_problems(error, TrainConfig))
        except ConfigError as error:
            problems[str(error)] = None
    if problems:
        raise ConfigError("; ".join(problems))
    return settled
