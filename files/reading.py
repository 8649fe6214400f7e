"""Files that others made, read so that no content can block, overwhelm or run code.

A data set may hold anything under the name of an image or annotation: a pipe without a writer, a socket, a link to a
device. So only regular files are opened, and every file of a data set is opened here.

In YAML an alias (`*name`) repeats an anchored part, and parts made of aliases repeat exponentially: 300 bytes can stand
for gigabytes. A loader shares the parts, but code that walks, merges or prints the result does not. So aliases are
followed only as far as the result stays small.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOT_REGULAR = "not a regular file"


def open_regular(path: Path | str) -> io.BufferedReader:
    """The open file, for reading. Raises OSError, whose `strerror` is the reason, for anything but a regular file."""
    try:
        check_regular(
            os.stat(path).st_mode, path
        )  # before opening: that alone can start something at a device
        # Non-blocking and checked again, in case the name has come to mean a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    try:
        check_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(mode: int, path: Path | str) -> None:
    """Raises OSError unless `mode` (`st_mode`) is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_REGULAR, os.fspath(path))


def read_regular(path: Path | str) -> bytes:
    """All bytes of a regular file. Raises OSError like `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_regular_text(path: Path | str, encoding: str = "utf-8") -> str:
    """The text of a regular file, line ends as `\\n`. Raises OSError like `open_regular`, UnicodeDecodeError."""
    return read_regular(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


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
