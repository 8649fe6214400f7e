"""Stage one: the teacher sees the data set once, its features go into a store.

from extract import extract

store = extract(data="photos", out="photos.zarr", teacher_path="Qwen2.5-VL-7B-Instruct")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extract.api import extract

__all__ = ["extract"]


def __getattr__(name: str) -> Any:
    """`from extract import extract`; nothing is imported before."""
    if name == "extract":
        from extract.api import extract

        return extract
    raise AttributeError(f"module 'extract' has no attribute {name!r}")
