"""YAML from files that others wrote: plain values, aliases only as far as they stay small.

An alias (`*name`) repeats an anchored part, and parts made of aliases repeat exponentially: 300 bytes can stand for
gigabytes. A loader shares the parts, but whatever walks, merges or prints the result does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MOST_CHARACTERS = 10_000_000
MOST_BY_ALIASES = 100_000  # characters and items that aliases may add to what is written
SHOWN_CHARACTERS = 300


class YamlError(ValueError):
    """The text is not YAML, or not of the kind that is read; one short line without the file's name."""


def load_yaml(text: str) -> Any:
    """The document's value; None for an empty text. Raises YamlError, also for several documents."""
    documents = list(load_yaml_documents(text))
    if len(documents) > 1:
        raise YamlError(f"{len(documents)} documents (separated by ---), expected one")
    return documents[0] if documents else None


def load_yaml_documents(text: str) -> Iterator[Any]:
    """The value of each document. Raises YamlError."""
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"{len(text):,} characters: at most {MOST_CHARACTERS:,} are read")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            check_expansion(node, len(text) + MOST_BY_ALIASES)
            yield loader.construct_document(node)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise YamlError(line[:SHOWN_CHARACTERS] + ("…" if len(line) > SHOWN_CHARACTERS else "")) from None
    finally:
        if loader is not None:
            loader.dispose()


def check_expansion(root: Any, most: int) -> None:
    """Raises YamlError when the node with its aliases written out has more than `most` characters and items."""
    sizes: dict[int, int | None] = {}  # None while a node's own parts are being measured

    def size_of(node: Any) -> int:
        if isinstance(node.value, str):
            return len(node.value) + 1
        if id(node) not in sizes:
            sizes[id(node)] = None
            pairs = ((part,) if not isinstance(part, tuple) else part for part in node.value)
            sizes[id(node)] = 1 + sum(size_of(part) for pair in pairs for part in pair)
        size = sizes[id(node)]
        if size is None:
            raise YamlError("an anchored part contains an alias of itself")
        return size

    if size_of(root) > most:
        raise YamlError("aliases (*name) repeat so much that they are not followed: write the values out")
