"""From a sample's key to its file."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from train.data.images import DataError, path_of


def test_files_with_decomposed_names_are_found_by_their_composed_keys(tmp_path: Path) -> None:
    decomposed = tmp_path / unicodedata.normalize("NFD", "ä/über.png")
    decomposed.parent.mkdir()
    decomposed.write_bytes(b"x")
    assert path_of("ä/über.png", tmp_path).read_bytes() == b"x"
    assert path_of("ä/gone.png", tmp_path) == tmp_path / "ä/gone.png"
    assert path_of("a/b.png", tmp_path) == tmp_path / "a/b.png"


@pytest.mark.parametrize("key", ["../x.png", "a/../../x.png", "/etc/passwd"])
def test_keys_stay_inside_the_root(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out of the data set's root"):
        path_of(key, tmp_path)
