"""Options: how a configuration declares them, where their values come from, and what is wrong with them.

A configuration is a pydantic model whose fields are made by `option`. `options_of` returns what is known of them: to
the command line for its help, to the training for what a resumed run may change, to the platform for what both share.
`load_options` is the one way from values (options, a file, a run to resume) to a configuration.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from files.reading import load_yaml

Model = TypeVar("Model", bound=BaseModel)
Keywords = ParamSpec("Keywords")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of one option; all but the first four are keywords of `option`.

    Attributes:
        name: the field's.
        kinds: the types of its values, without None; a Literal counts as str.
        choices: the words it takes, where it takes nothing else.
        default: None where there is none.
        help: what it does, a sentence.
        panel: the heading in `--help`; empty for what is listed before all headings.
        flag: how it is written on the command line: `--learning-rate`, or `STORE` for an argument.
        metavar: what `--help` shows in the place of the value, where its type is not enough.
        shown_default: the default in words, where the value is not enough.
        free_on_resume: may differ between the command that started a run and the one that resumes it.
        distills: has an effect on the distillation alone: a control without the teacher does not depend on it.
        set_by_sweep: a sweep sets it itself for each of its trials.
        needs: what must be in use for it to have an effect: `lora`, or class `logits` of the teacher.
        students: the types of student that have it; empty for all.
        not_for: type of student → why it has no effect there, or what to use instead.
    """

    name: str
    kinds: frozenset[type]
    choices: tuple[str, ...]
    default: Any
    help: str
    flag: str
    panel: str = ""
    metavar: str = ""
    shown_default: str = ""
    free_on_resume: bool = False
    distills: bool = False
    set_by_sweep: bool = False
    needs: Literal["", "lora", "logits"] = ""
    students: tuple[str, ...] = ()
    not_for: Mapping[str, str] = field(default_factory=dict)


def option(default: Any, help: str, **rest: Any) -> Any:
    """A field of a configuration: its default (`...`: required), its help, facts for `Option`, and pydantic's limits."""
    known = {item.name for item in fields(Option)}
    facts = {name: value for name, value in rest.items() if name in known}
    limits = {name: value for name, value in rest.items() if name not in known}
    return Field(default, description=help, json_schema_extra=facts, **limits)


@functools.cache
def options_of(model: type[BaseModel]) -> dict[str, Option]:
    """The options of a configuration by name, in the order of its fields. A field without a help text is no option."""
    return {name: describe_field(name, item) for name, item in model.model_fields.items() if item.description}


def names_where(model: type[BaseModel], fact: str) -> frozenset[str]:
    """The options of a configuration of which a fact holds: `names_where(TrainConfig, "free_on_resume")`."""
    return frozenset(name for name, item in options_of(model).items() if getattr(item, fact))


def describe_field(name: str, item: FieldInfo) -> Option:
    is_union = get_origin(item.annotation) in (Union, UnionType)
    kinds = [
        kind
        for kind in (get_args(item.annotation) if is_union else [item.annotation])
        if kind is not NoneType
    ]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    types: frozenset[Any] = frozenset(
        str if get_origin(kind) is Literal else get_origin(kind) or kind for kind in kinds
    )
    facts: Any = {"flag": f"--{name.replace('_', '-')}", **(item.json_schema_extra or {})}  # type: ignore[dict-item]
    return Option(
        name=name,
        kinds=types,
        choices=tuple(words) if types == {str} else (),
        default=None if item.is_required() else item.default,
        help=item.description or "",
        **facts,
    )


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have a value: None is absent."""
    return {name: value for name, value in options.items() if value is not None}


def load_options(
    model: type[Model], options: Mapping[str, Any], below: Mapping[str, Any], error: type[Exception]
) -> Model:
    """The configuration of `options` (None is absent) over the values of a file, of a run to resume, …

    Raises:
        error: the caller's own kind, with every problem: unknown names (and the nearest valid one) and bad values.
    """
    try:
        return model(**{**below, **given(options)})
    except ValidationError as problem:
        raise error("; ".join(describe_problems(problem, model))) from None


def describe_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """pydantic's problems, one text for each option: `name: what is wrong (got …)`."""
    # pydantic reports each alternative of `int | "auto"` on its own; they belong together.
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for item in error.errors():
        grouped.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
    return [describe_problem(name, items, model) for name, items in grouped.items()]


def describe_problem(name: str, items: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> str:
    kind, value = items[0]["type"], items[0].get("input")
    if kind == "extra_forbidden":
        return f"unknown option {name}: {nearest_names(name, model.model_fields)}"
    if kind in ("missing", "too_short"):
        known = options_of(model).get(name)
        problem = "missing" if kind == "missing" else "expected at least one value, got none"
        return f"{known.flag if known else '--' + name}: {problem}"
    texts = [str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ") for item in items]
    # pydantic explains some problems twice
    text = " or ".join(dict.fromkeys(text.partition(", unable to parse")[0] for text in texts))
    shown = f" (got {value})" if isinstance(value, (str, int, float)) else ""
    return f"{name}: {text}{shown}" if name else text


def nearest_names(name: str, valid: Iterable[str]) -> str:
    """`did you mean a or b?`, or the whole list when nothing is near."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(names)}"


def read_option_file(file: Path, error: type[Exception]) -> dict[str, Any]:
    """The options in a `.yaml`, `.yml`, `.toml` or `.json` file; dashes in names count as underscores.

    Raises `error`, the caller's own kind, when the file cannot be read or holds no table of options.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = tomllib.loads(text) if file.suffix == ".toml" else load_yaml(text)
    except OSError as problem:
        raise error(f"configuration {file}: cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"configuration {file}: {' '.join(str(problem).split())[:500]}") from None
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise error(f"configuration {file}: expected `name: value` lines, got {got}")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def takes_options(
    model: Callable[Keywords, BaseModel],
) -> Callable[[Callable[..., Result]], Callable[Keywords, Result]]:
    """A decorator: the function takes the options of `model` as keywords.

    Type checkers see them with their types, and `help()` lists them with their defaults and texts.
    """
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    options = options_of(model).values()
    fields = model.model_fields

    def decorate(function: Callable[..., Result]) -> Callable[Keywords, Result]:
        parameters = [
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if fields[option.name].is_required() else option.default,
                annotation=fields[option.name].annotation,
            )
            for option in options
        ]
        own = inspect.signature(function, eval_str=True)
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        about, raised = inspect.cleandoc(function.__doc__ or "").split("\n\nRaises:")
        listed = "\n".join(describe(option) for option in options)
        function.__doc__ = f"{about}\n\nArgs:\n{listed}\n\nRaises:{raised}"
        return function

    return decorate


def describe(option: Option) -> str:
    """`    learning_rate: Peak learning rate. Default: 0.0001.`"""
    choices = f" One of {', '.join(option.choices)}." if option.choices else ""
    default: Any = option.shown_default or option.default
    known = "" if default is None or default in ("", {}) else f" Default: {default}."
    text = f"{option.name}: {option.help}{choices}{known}"
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        ")
