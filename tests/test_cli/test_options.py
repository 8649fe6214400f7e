"""Options: declared on the configurations' fields, offered by the commands, read and refused in one way."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from commands.extract import extract
from commands.options import keyword, offer_options
from commands.train import train
from console.devices import find_device, parse_devices
from console.options import load_options, names_where, option, options_of
from extract.config import ExtractConfig
from train.config import TrainConfig, load_config
from train.errors import ConfigError


class Example(BaseModel):
    model_config = ConfigDict(extra="forbid")

    place: str = option(..., "Where.", flag="PLACE")
    count: int = option(3, "How many.", panel="Numbers", ge=1)
    side: int | Literal["auto"] = option("auto", "Cells a side.", panel="Numbers")
    mode: Literal["fast", "exact"] | None = option(None, "How.", panel="Numbers", shown_default="by size")
    quiet: bool = option(False, "No lines.", panel="Numbers", distills=True)
    pairs: dict[str, Any] = option({}, "NAME=VALUE.", flag="--pair", metavar="NAME=VALUE")
    note: str = ""


def test_a_field_says_all_that_is_known_of_its_option() -> None:
    options = options_of(Example)
    assert list(options) == ["place", "count", "side", "mode", "quiet", "pairs"]
    assert (options["count"].kinds, options["count"].default, options["count"].panel) == ({int}, 3, "Numbers")
    assert (options["side"].kinds, options["side"].choices) == ({int, str}, ())
    assert options["mode"].choices == ("fast", "exact")
    assert [options[name].flag for name in ("place", "count", "pairs")] == ["PLACE", "--count", "--pair"]
    assert names_where(Example, "distills") == {"quiet"}


def test_a_command_gets_a_keyword_for_each_option() -> None:
    def command(config: Path | None = None, **options: Any) -> None: ...

    offer_options(command, Example)
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["place", "pairs", "config", "count", "side", "mode", "quiet"]
    assert all(item.default is None for item in parameters.values())


def help_of(name: str, recipes: dict[str, dict[str, Any]] | None = None) -> str:
    return str(keyword(options_of(Example)[name], recipes or {}).annotation.__metadata__[0].help)


def test_the_help_lists_choices_and_default() -> None:
    assert help_of("count") == "How many. [default: 3]"
    assert help_of("mode") == "How. fast, exact. [default: by size]"
    assert help_of("quiet") == "No lines."
    recipes = {"resnet": {"count": 5}, "vit": {}}
    assert help_of("count", recipes) == "How many. [default: the student's recipe, 5 for resnet]"


def test_options_win_over_what_is_below_and_none_is_absent() -> None:
    made = load_options(Example, {"place": "a", "count": None}, {"place": "b", "count": "7"}, ConfigError)
    assert (made.place, made.count) == ("a", 7)


def test_all_problems_are_one_report() -> None:
    with pytest.raises(ConfigError) as caught:
        load_options(Example, {"conut": 1, "count": 0, "side": "x", "mode": "slow"}, {}, ConfigError)
    assert str(caught.value).split("; ") == [
        "PLACE: missing",
        "count: should be greater than or equal to 1 (got 0)",
        "side: should be a valid integer or should be 'auto' (got x)",
        "mode: should be 'fast' or 'exact' (got slow)",
        "unknown option conut: did you mean count?",
    ]


@pytest.mark.parametrize(("command", "model"), [(train, TrainConfig), (extract, ExtractConfig)])
def test_both_stages_offer_every_option_under_a_heading(command: Any, model: type[BaseModel]) -> None:
    options = options_of(model)
    assert set(options) <= set(inspect.signature(command).parameters)
    assert {name for name, item in options.items() if not item.panel} <= {"data", "store", "student", "out"}
    assert set(model.model_fields) - set(options) <= {"sources"}


@pytest.mark.parametrize(
    ("student", "chosen", "text"),
    [
        ("resnet18", {"freeze_encoder": True}, "freeze_encoder is an option of lstm students"),
        ("lstm/small", {"dropout": 0.1}, "dropout is an option of resnet, vit, timm students"),
        ("yolov8n", {"ema_decay": 0.9}, "ema_decay has no effect on yolov8 students: ultralytics' trainer"),
        ("yolov8n", {"attention_pooling": True}, "attention_pooling is an option of lstm students"),
    ],
)
def test_options_that_a_student_does_not_have(student: str, chosen: dict[str, Any], text: str) -> None:
    config = load_config({"store": "s.zarr", "out": "run", "student": student, **chosen})
    (problem,) = config.unsupported_options()
    assert problem.startswith(text)
    assert load_config({"store": "s.zarr", "out": "run", "student": student}).unsupported_options() == []


def test_devices_are_parsed_in_one_way() -> None:
    assert parse_devices(" cuda:0, CUDA:1") == ["cuda:0", "cuda:1"]
    assert parse_devices("0,1") == ["cuda:0", "cuda:1"]
    for text in ("gpu", "", "cuda:x", "cuda:-1", "cpu,", "²", "mps"):
        with pytest.raises(ValueError, match="must be auto, cpu, cuda"):
            parse_devices(text)


def test_a_device_that_is_not_there_is_an_error() -> None:
    assert [find_device("auto", gpus, ConfigError) for gpus in (0, 2)] == ["cpu", "cuda"]
    assert find_device("cuda:1", 2, ConfigError) == "cuda:1"
    with pytest.raises(ConfigError, match="device cuda:2 is not there: this machine shows 2 CUDA devices"):
        find_device("cuda:2", 2, ConfigError)
    with pytest.raises(ConfigError, match="unknown device 'tpu': expected auto, cpu"):
        find_device("tpu", 2, ConfigError)
