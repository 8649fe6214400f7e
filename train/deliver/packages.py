"""Packages that a command needs and an installation may lack: looked for before anything heavy is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from train.errors import DeliveryError


def require_torchao() -> None:
    """Raises DeliveryError when torchao, which quantizes, is not installed."""
    if find_spec("torchao") is None:
        raise DeliveryError("quantizing needs torchao: pip install torchao")
