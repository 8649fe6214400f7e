"""Why a file of weights could not be read, in our own words; imports no torch."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

PICKLE_MARK = b"\x80"  # files of torch.save before PyTorch 1.6 begin with it; newer ones are zip files


def why_unreadable(path: Path, error: Exception) -> str:
    """The reason that `torch.load(path, weights_only=True)` raised `error`.

    Its own text advises to load the file all the same, which would run whatever code is in it.
    """
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    if not isinstance(error, pickle.UnpicklingError):
        return " ".join(str(error).split())[:160] or type(error).__name__
    with path.open("rb") as file:
        begins_as_pickle = file.read(1) == PICKLE_MARK
    if begins_as_pickle or zipfile.is_zipfile(path):
        return (
            "it holds more than weights, which would run code when loaded: save its state dict alone, "
            "torch.save(model.state_dict(), FILE)"
        )
    return "not a file of torch.save"
