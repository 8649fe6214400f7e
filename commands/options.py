"""A configuration's options on the command line: typer signatures and their help, made from the model's fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from console.options import Option, options_of

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else there.")]

#: Student type → option → the default that replaces the general one.
Recipes = Mapping[str, Mapping[str, Any]]


def offer_options(
    function: Callable[..., None], model: type[BaseModel], recipes: Recipes | None = None
) -> None:
    """Give `function` one keyword per option of the model, in place of its `**options`.

    Values are texts, or None when not given: the model reads them, so that all wrong ones are reported together. None is
    required here, since a file may have it as well.
    """
    own = inspect.signature(function, eval_str=True)
    fixed = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    options = options_of(model).values()
    parameters = [
        *(keyword(option, recipes or {}) for option in options if not option.panel),
        *(item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fixed),
        *(keyword(option, recipes or {}) for option in options if option.panel),
    ]
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": None}


def keyword(option: Option, recipes: Recipes) -> inspect.Parameter:
    """The option as a keyword of a command, described for typer."""
    choices = f" {', '.join(option.choices)}." if option.choices else ""
    text = f"{option.help}{choices}{shown_default(option, recipes)}"
    kind: Any = str
    if not option.flag.startswith("--"):
        info = typer.Argument(help=text, metavar=option.flag, show_default=False)
    else:
        is_flag = option.kinds == {bool}
        kind = bool if is_flag else list[str] if option.kinds == {dict} else str
        info = typer.Option(
            f"{option.flag}/--no-{option.flag[2:]}" if is_flag else option.flag,
            help=text,
            rich_help_panel=option.panel or None,
            show_default=False,
            metavar=None if is_flag else option.metavar or type_name(option),
        )
    annotation = Annotated[kind | None, info]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def type_name(option: Option) -> str:
    """What a value is, as the other commands' help writes it: `<int>`, `<float>`, `<path>`, `<choice>` or `<str>`."""
    if option.choices:
        return "<choice>"
    names: dict[type, str] = {int: "<int>", float: "<float>", Path: "<path>"}
    return next((names[kind] for kind in option.kinds if kind in names and len(option.kinds) == 1), "<str>")


def shown_default(option: Option, recipes: Recipes) -> str:
    """` [default: 0.5]`, or ` [default: the student's recipe, 0.0001 for resnet]`; nothing for an absent default."""
    values = {kind: recipe.get(option.name, option.default) for kind, recipe in recipes.items()}
    kind, first = next(iter(values.items()), ("", option.default))
    if option.shown_default:
        return f" [default: {option.shown_default}]"
    if any(value != first for value in values.values()):
        return f" [default: the student's recipe, {default_text(first)} for {kind}]"
    return (
        "" if first is None or first is False or first in ("", {}) else f" [default: {default_text(first)}]"
    )


def default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(default_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
