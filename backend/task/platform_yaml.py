"""The platform's own YAML (Spring's application-distillation.yml): URLs, roots, databases, what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.task.errors import OptionError
from backend.task.options import as_boolean, as_multiline_text, as_text, read_text_file, shown
from files.reading import YamlError, load_yaml_documents

PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.\-]*)(?::([^{}]*))?\}")
ALLOW_VARIABLE = "QWEN_DISTILL_ALLOW_LOCAL_URLS"

# `distillation.<key>` → our option. Keys are matched without case, dashes and underscores, as Spring does.
KEYS: dict[str, str] = {
    "api.baseurl": "api_base_url",
    "models.root": "models_root",
    "datasets.root": "datasets_root",
    "output.root": "output_root",
    "cache.root": "cache_dir",
    "datasets.url": "dataset_url",
    "datasets.query": "dataset_query",
}
FLAGS: dict[str, str] = {
    "security.allowlocalurls": "allow_local_urls",
    "security.allowsymlinks": "allow_symlinks",
}
SQL_PREFIX = "datasets.sql."


@dataclass(frozen=True, kw_only=True)
class PlatformConfig:
    """Settings of the platform's operator; unlike options and JSON they never come from a web form."""

    values: dict[str, str] = field(default_factory=dict)
    output_root: Path | None = None
    queries: dict[str, dict[str, str]] = field(default_factory=dict)
    allow_local_urls: bool = False
    allow_symlinks: bool = False

    def database_of(self, dataset_id: str | None) -> dict[str, str]:
        """`{url, query}` of a data set that lives in a database: its own entry, else the one named `*`."""
        return self.queries.get(dataset_id or "") or self.queries.get("*") or {}


def read_platform_config(name: str | None, environment: Mapping[str, str] = os.environ) -> PlatformConfig:
    """Read the YAML; without a file only the environment counts.

    Raises:
        OptionError: when it cannot be read, is no YAML mapping, or a value is of the wrong kind.
    """
    allow = environment.get(ALLOW_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")
    if not name:
        return PlatformConfig(allow_local_urls=allow)
    try:
        flat = dict(flatten_file(Path(name), environment))
        flags = {FLAGS[key]: as_boolean(value) for key, value in flat.items() if key in FLAGS}
        values = {KEYS[key]: as_text(value) for key, value in flat.items() if key in KEYS}
        queries = read_queries(flat)
    except OptionError as error:
        raise OptionError(f"--platform_config {name}: {error}") from None
    root = values.pop("output_root", None)
    flags["allow_local_urls"] = allow or flags.get("allow_local_urls", False)
    return PlatformConfig(
        values={key: value for key, value in values.items() if value},
        output_root=Path(root) if root else None,
        queries=queries,
        **flags,
    )


def read_queries(flat: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`datasets.sql.<dataset_id>.{url,query}`; the id may be `*` and may hold dots."""
    queries: dict[str, dict[str, str]] = {}
    for key, value in flat.items():
        if key.startswith(SQL_PREFIX):
            dataset_id, _, part = key.removeprefix(SQL_PREFIX).rpartition(".")
            if part not in ("url", "query") or not dataset_id:
                raise OptionError(f"distillation.{key}: expected datasets.sql.<dataset_id>.url or .query")
            queries.setdefault(dataset_id, {})[part] = " ".join(as_multiline_text(value).split())
    return queries


def flatten_file(path: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """(key below `distillation`, value) of every leaf in every document of the file, placeholders resolved."""
    text = read_text_file(path)
    try:
        documents = list(load_yaml_documents(text))
    except YamlError as error:
        raise OptionError(f"not valid YAML: {error}") from None
    for document in documents:
        if document is not None and not isinstance(document, dict):
            raise OptionError(f"expected `key: value` lines, got {shown(document)}")
        for key, value in flatten(document or {}):
            if key.startswith("distillation."):
                yield key.removeprefix("distillation."), resolve_placeholders(value, environment)


def flatten(tree: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > 32:
        raise OptionError("nested too deeply")
    for name, value in tree.items():
        # The id of a data set keeps its spelling; every other key is matched the way Spring relaxes it.
        exact = f"{prefix}.".startswith(f"distillation.{SQL_PREFIX}") and isinstance(value, Mapping)
        key = f"{prefix}.{name if exact else relaxed(str(name))}" if prefix else relaxed(str(name))
        if isinstance(value, Mapping):
            yield from flatten(value, key, depth + 1)
        else:
            yield key, value


def relaxed(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")


def resolve_placeholders(value: Any, environment: Mapping[str, str]) -> Any:
    """`${NAME}` and `${NAME:default}` from the environment, as Spring writes them.

    Raises:
        OptionError: when a name is neither in the environment nor has a default.
    """

    def replacement(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        variable = name.upper().replace(".", "_").replace("-", "")
        found = environment.get(name, environment.get(variable, default))
        if found is None:
            raise OptionError(f"${{{name}}} is neither in the environment nor has a default")
        return found

    return PLACEHOLDER.sub(replacement, value) if isinstance(value, str) else value
