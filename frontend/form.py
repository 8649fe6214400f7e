"""The fields of the create form: each shows one setting of a document and writes it back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement

from backend.server.document import Setting
from backend.task.errors import OptionError
from frontend.layout import element, text
from frontend.messages import translate
from frontend.texts import Texts

#: Without a value the training or the server decides on them.
DECIDED_LATER = (
    "num_classes",
    "workers",
    "gpu_devices",
    "learning_rate",
    "teacher_image_size",
    "clip_frames",
)
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
Change = Callable[[str, Any], None]


def shown(value: Any) -> str:
    """A value as a field shows it: 0.0001, not 1e-04; lists with commas."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, float):
        plain = f"{value:.10f}".rstrip("0").rstrip(".")
        return plain if value == 0 or abs(value) >= 1e-6 else f"{value:g}"
    return "" if value is None else str(value)


def problem_of(texts: Texts, setting: Setting, value: Any) -> str:
    """What is wrong with a value, in the page's language; empty for a good one."""
    try:
        setting.read(value)
    except OptionError as error:
        if setting.kind in ("integer", "number") and not is_number(value):
            return texts(f"error.{setting.kind}")
        for name, limit in setting.limits.items():
            if breaks(name, float(limit), value):
                return texts(f"error.{name}", limit=f"{limit:.10g}")
        return texts(f"error.{setting.kind}") if setting.kind == "integer" else translate(texts, str(error))
    return ""


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def breaks(name: str, limit: float, value: Any) -> bool:
    number = float(value) if is_number(value) else limit
    return {"ge": number < limit, "gt": number <= limit, "le": number > limit, "lt": number >= limit}[name]


class Field:
    """One setting. Empty means the default, which the field shows. `show` never calls `change`."""

    def __init__(self, texts: Texts, setting: Setting, change: Change) -> None:
        self.texts, self.setting, self.change = texts, setting, change
        self.quiet = False
        self.problem = ""
        self.element = self.make()

    @property
    def label(self) -> str:
        return self.texts.or_word(f"set.{self.setting.name}", self.setting.key)

    @property
    def help(self) -> str:
        """What the setting does: in Chinese only where there is a translation."""
        own = f"help.{self.setting.name}"
        if self.texts.known(own):
            return self.texts(own)
        return self.setting.help if self.texts.language == "en" else ""

    @property
    def hint(self) -> str:
        """The default, and where it is from; for a setting without one what it does."""
        if self.setting.default is None:
            return self.help
        name = "hint.recipe" if self.setting.from_recipe else "hint.default"
        return self.texts(name, value=shown(self.setting.default))

    def make(self) -> ui.element:
        raise NotImplementedError

    def set_value(self, value: Any) -> None:
        raise NotImplementedError

    def set_problem(self, problem: str) -> None:
        self.problem = problem
        if isinstance(self.element, ValidationElement):
            self.element.error = problem or None

    def set_visible(self, visible: bool) -> None:
        self.element.set_visibility(visible)

    def show(self, setting: Setting, value: Any) -> None:
        """The setting with its present default, and its value in the document (None: not given)."""
        self.setting = setting
        self.quiet = True
        try:
            self.set_value(value)
        finally:
            self.quiet = False
        self.check(value)

    def check(self, value: Any) -> None:
        self.set_problem("" if value is None else problem_of(self.texts, self.setting, value))

    def report(self, value: Any) -> None:
        if not self.quiet:
            self.change(self.setting.name, value)


class TextField(Field):
    """Text or a number, typed."""

    def make(self) -> ui.element:
        self.input = ui.input(self.label, on_change=lambda event: self.report(self.typed(event.value)))
        self.input.without_auto_validation()  # `check` sets the error
        self.input.props("outlined dense stack-label debounce=300 hide-bottom-space")
        if self.setting.kind in ("integer", "number"):
            self.input.props(f'inputmode="{"numeric" if self.setting.kind == "integer" else "decimal"}"')
        self.input.props('autocomplete="off" spellcheck="false"')
        if self.help and self.setting.default is not None:
            with self.input:
                ui.tooltip(self.help).props("delay=500")
        return self.input

    def typed(self, value: str | None) -> Any:
        """A number where the text is one, so that the JSON has a number; None for nothing."""
        stripped = (value or "").strip()
        if not stripped:
            return None
        if self.setting.kind not in ("integer", "number"):
            return stripped
        try:
            return self.setting.read(stripped)
        except OptionError:
            # A number out of range is still a number in the JSON.
            return json.loads(stripped) if NUMBER.fullmatch(stripped) else stripped

    def set_value(self, value: Any) -> None:
        if self.typed(self.input.value) != value or value is None:
            self.input.set_value(shown(value))
        default = self.setting.default
        decided = self.texts("hint.auto") if self.setting.name in DECIDED_LATER else ""
        self.input.props["placeholder"] = decided if default is None else shown(default)
        self.input.props["hint"] = self.hint


class ChoiceField(Field):
    """One word of several; the first entry is the default."""

    def make(self) -> ui.element:
        self.select = ui.select(self.options(None), label=self.label, value="")
        self.select.without_auto_validation()  # `check` sets the error
        self.select.on_value_change(lambda event: self.report(event.value or None))
        self.select.props("outlined dense stack-label hide-bottom-space options-dense")
        if self.help:
            with self.select:
                ui.tooltip(self.help).props("delay=500")
        return self.select

    def options(self, value: Any) -> dict[str, str]:
        default = self.setting.default
        name = "choice.recipe" if self.setting.from_recipe else "choice.default"
        first = self.texts("hint.auto") if default is None else self.texts(name, value=shown(default))
        words = {choice: choice for choice in self.setting.choices}
        # A word that is not among the choices came from the JSON: it is shown, with what is wrong about it.
        return {"": first} | words | ({} if value is None or value in words else {value: str(value)})

    def set_value(self, value: Any) -> None:
        self.select.set_options(self.options(value), value="" if value is None else value)


class SwitchField(Field):
    """Yes or no; the document has it only where it differs from the default."""

    def make(self) -> ui.element:
        with element("div", "switch-field") as whole:
            self.switch = ui.switch(self.label, on_change=self.toggled)
            if self.help:
                text(self.help, "div", "muted small")
        return whole

    def toggled(self, event: Any) -> None:
        self.report(None if event.value == bool(self.setting.default) else event.value)

    def set_value(self, value: Any) -> None:
        try:
            meant = self.setting.read(value)
        except OptionError:
            meant = None
        self.switch.set_value(bool(self.setting.default) if meant is None else meant)


class PickerField(Field):
    """One of the things that were found; another name can be typed where `free` is true."""

    def __init__(
        self,
        texts: Texts,
        setting: Setting,
        change: Change,
        found: dict[str, str],
        *,
        free: bool,
        required: bool,
    ) -> None:
        self.found, self.free, self.required = found, free, required
        super().__init__(texts, setting, change)

    def make(self) -> ui.element:
        self.select = ui.select(
            dict(self.found), label=self.label, with_input=True, clearable=not self.required
        )
        if self.free:
            self.select.props("new-value-mode=add-unique")
        self.select.without_auto_validation()  # `check` sets the error
        self.select.on_value_change(lambda event: self.report(event.value or None))
        self.select.props("outlined dense stack-label hide-bottom-space options-dense")
        self.select.props["hint"] = self.help
        return self.select

    def set_value(self, value: Any) -> None:
        options = dict(self.found)
        if value is not None and value not in options:
            options[value] = str(value)
        self.select.set_options(options, value=value)


def make_field(texts: Texts, setting: Setting, change: Change) -> Field:
    if setting.kind == "boolean":
        return SwitchField(texts, setting, change)
    return (ChoiceField if setting.choices else TextField)(texts, setting, change)
