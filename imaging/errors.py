"""The one error of this package."""

from __future__ import annotations


class ImageError(Exception):
    """One image cannot be used. `reason` is a short text for the ledger; it does not name the file."""

    exit_code: int = 1

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str]]:
        return type(self), (self.reason,)
