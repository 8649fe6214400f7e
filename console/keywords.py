"""A configuration's options as the keywords of a Python function, as `commands/options.py` offers them on the command line."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from console.options import Option, options_of

Keywords = ParamSpec("Keywords")
Result = TypeVar("Result")


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
