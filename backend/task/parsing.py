"""What the platform sends, read into typed values: its command line, and its training_config JSON.

The command line: `--name value`, `--name=value`, bare booleans; underscores or dashes; the last of repeated options
wins; an unknown option is named in a warning and ignored together with its values. An option never takes a following
`--word` for its value, so text from a web form cannot become an option (`--name=--word` passes it all the same).

The JSON: camelCase, flat or nested, as a file or as the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.task.errors import OptionError
from backend.task.options import OPTIONS, as_text, camel_case, canonical_name, read_text_file, shown

BARE = object()  # an option without a value
UNSET: tuple[Any, ...] = (None, "", [], {}, False)
# Objects whose fields are settings; `trainingConfig` is how the platform's task record carries them.
NESTED = (
    "trainingConfig",
    "teacherModelConfig",
    "studentModelConfig",
    "loraAdvancedConfig",
    "distillationAdvancedConfig",
)
JSON_NAMES: dict[str, str] = {
    spelling: option.name
    for option in OPTIONS.values()
    if option.from_json
    for spelling in (camel_case(option.name), option.name, *option.json)
}
KL_NAMES = ("kl", "kl_div", "kldiv", "kl_divergence")
FEATURE_LOSSES = OPTIONS["feature_loss_type"].choices


@dataclass
class Arguments:
    """What was read: typed values (None: given as empty, so unset), warnings, and all problems."""

    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read(self, name: str, value: Any) -> None:
        """Take the value of an option. Raises OptionError when it is not one."""
        self.values[name] = OPTIONS[name].read(value)

    def check(self) -> None:
        """Raises OptionError with every problem on one line."""
        if self.problems:
            raise OptionError("; ".join(self.problems))

    def spell_out_alpha(self) -> None:
        """`alpha` is the soft weight, 1 - alpha the hard one, unless the weights themselves are given as well."""
        alpha = self.values.pop("alpha", None)
        if alpha is not None:
            for name, weight in (("soft_label_weight", alpha), ("hard_label_weight", round(1 - alpha, 12))):
                if self.values.get(name) is None:
                    self.values[name] = weight


# -- the command line -----------------------------------------------------------------------------------


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read a command line; problems are collected, not raised: `check` does that."""
    arguments = Arguments()
    given: dict[str, Any] = {}
    for word, values in split_words(words):
        name = canonical_name(word or "")
        if word is None:
            arguments.warnings.append(f"ignored: {', '.join(shown(value) for value in values)}")
        elif name not in OPTIONS:
            arguments.warnings.append(f"unknown option --{printable(word)}: ignored")
        else:
            given.pop(name, None)  # the last one counts, also in the order of problems
            given[name] = values[0] if values else BARE
            if surplus := ", ".join(shown(value) for value in values[1:]):
                arguments.warnings.append(f"--{name} takes one value, ignored: {surplus}")
    for name, value in given.items():
        try:
            if value is BARE and OPTIONS[name].kind != "boolean":
                raise OptionError("expected a value, got none")
            arguments.read(name, "true" if value is BARE else value)
        except OptionError as error:
            arguments.problems.append(f"--{name}: {error}")
    arguments.spell_out_alpha()
    return arguments


def split_words(words: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Each option with the words up to the next one; words before the first option come under None."""
    groups: list[tuple[str | None, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((None, [word]))
    return groups


def printable(text: str) -> str:
    """A name from outside as a log line shows it: on one line, short."""
    return shown(text)[1:-1]


# -- the training_config JSON ---------------------------------------------------------------------------


def read_training_config(text: str) -> Arguments:
    """Settings from JSON text (it starts with a brace) or from the file that `text` names.

    Raises:
        OptionError: when it cannot be read or is no JSON object; bad values are collected in `problems`.
    """
    arguments = Arguments()
    try:
        content = parse_object(text if text.lstrip().startswith("{") else read_text_file(Path(text)))
    except OptionError as error:
        raise OptionError(f"--training_config: {error}") from None
    # Outer fields first: nested ones, which are more specific, win.
    for path, name, value in sorted(walk(content, arguments), key=lambda item: item[0].count(".")):
        try:
            if name in SPECIAL:
                SPECIAL[name](arguments, path, value)
            elif name in JSON_NAMES:
                arguments.read(JSON_NAMES[name], value)
            elif name not in NESTED:
                arguments.warnings.append(f"unknown field {path} in training_config: ignored")
        except OptionError as error:
            arguments.problems.append(f"training_config {path}: {error}")
    arguments.spell_out_alpha()
    return arguments


def parse_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise OptionError("nested too deeply") from None
    except ValueError as error:
        raise OptionError(f"not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise OptionError(f"expected a JSON object, got {shown(content)}")
    return content


def refuse_constant(word: str) -> None:
    """NaN and Infinity, which Python's parser would take."""
    raise ValueError(f"{word} is no number")


def walk(content: dict[str, Any], arguments: Arguments, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every field as (path, name, value), going into the nested objects (also when they come as JSON text)."""
    for name, value in content.items():
        path = f"{prefix}{printable(name)}"
        if name not in NESTED or value in UNSET:
            yield path, name, value
            continue
        try:
            inner = parse_object(value) if isinstance(value, str) else value
        except OptionError:
            inner = None
        if isinstance(inner, dict) and prefix.count(".") < len(NESTED):
            yield from walk(inner, arguments, f"{path}.")
        else:
            arguments.problems.append(f"training_config {path}: expected an object, got {shown(value)}")


def refuse(arguments: Arguments, path: str, value: Any) -> None:
    """A field that has no meaning here: ignoring it would train something else than was asked."""
    if value not in UNSET and str(value).strip().lower() not in ("none", "false"):
        raise OptionError(f"not supported here, got {shown(value)}: leave it unset")


def take_layers(arguments: Arguments, path: str, value: Any) -> None:
    if value not in UNSET and value != ["all"] and str(value).strip().lower() != "all":
        raise OptionError(f"only all layers are supported, got {shown(value)}: leave it unset")


def take_bias(arguments: Arguments, path: str, value: Any) -> None:
    """`biasTrain` is none, all or lora_only; a checkbox sends true for all."""
    arguments.read("lora_bias", ("all" if value else "none") if isinstance(value, bool) else value)


def take_loss_type(arguments: Arguments, path: str, value: Any) -> None:
    """`lossType` names the logit loss, or one of the feature losses."""
    word = as_text(value or "").lower().replace("-", "_")
    if word in KL_NAMES:
        arguments.values["distill_loss_type"] = "kl_div"
    elif word in FEATURE_LOSSES:
        arguments.values["feature_loss_type"] = word
    elif word:
        expected = ", ".join(("kl_div", *FEATURE_LOSSES))
        raise OptionError(f"expected one of {expected}, got {shown(value)}")


def take_init_method(arguments: Arguments, path: str, value: Any) -> None:
    word = as_text(value or "").lower()
    if word not in ("", "random", "pretrained"):
        raise OptionError(f"expected random or pretrained, got {shown(value)}")
    if word:
        arguments.values["pretrained"] = word == "pretrained"


def take_parameter_size(arguments: Arguments, path: str, value: Any) -> None:
    """`paramSize` describes a model to people; other fields decide which model it is."""
    if value not in UNSET:
        arguments.warnings.append(f"training_config {path} {shown(value)} is a description only: not used")


SPECIAL: dict[str, Callable[[Arguments, str, Any], None]] = {
    "intermediateLayers": refuse,
    "attentionDistill": refuse,
    "quantization": refuse,
    "layers": take_layers,
    "biasTrain": take_bias,
    "lossType": take_loss_type,
    "initMethod": take_init_method,
    "paramSize": take_parameter_size,
}
