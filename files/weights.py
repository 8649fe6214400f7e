"""Files of weights: read without running code in them, and why one cannot be read. torch is imported when one is."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Files of torch.save before PyTorch 1.6 begin as pickles do, newer ones as zip files.
MARKS = (b"\x80", b"PK\x03\x04")


class WeightsError(Exception):
    """A file of weights cannot be read; the text is the reason alone, without the file's name."""


def read_weights(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: plain types and tensors; no code in the file runs.

    Raises FileNotFoundError, and WeightsError for everything else that prevents it.
    """
    import torch

    try:
        with only_plain_classes():
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes torch raise anything
        raise WeightsError(why_unreadable(path, error)) from error


@contextmanager
def only_plain_classes() -> Iterator[None]:
    """Inside, `torch.load(weights_only=True)` accepts no classes but torch's own plain ones.

    Classes that other libraries have allowed in this process do not count: ultralytics leaves the classes of every
    checkpoint that it reads allowed, and the constructors of some of them run code from their arguments.
    """
    from torch import serialization

    known = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(known)


def begins_as_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(MARKS)


def why_unreadable(path: Path, error: Exception) -> str:
    """The reason that `torch.load(path, weights_only=True)` raised `error`.

    Its own text advises to load the file all the same, which would run whatever code is in it; bytes that are no
    pickle make it raise anything.
    """
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    # EINVAL: the loader looked for the end of a zip file in a file that is too short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return " ".join(str(error).split())[:160] or type(error).__name__
    if not begins_as_torch_file(path):
        return "not a file of torch.save"
    holds_code = isinstance(error, pickle.UnpicklingError) and "truncated" not in str(error)
    if not holds_code and "TorchScript" not in str(error):
        return "it is damaged, cut short or not a file of torch.save"
    return (
        "it holds more than weights, which would run code when loaded: save its state dict alone, "
        "torch.save(model.state_dict(), FILE)"
    )
