"""Collect the wheels that a GPU machine without a network lacks, in the versions of constraints.txt.

    python scripts/collect_wheels.py wheels [--python 3.12]
    # copy the repository and the folder to that machine, then run there:
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 benchmarks/gpu.py

For a machine that has PyTorch with CUDA, torchvision, timm, transformers, accelerate, peft, onnx, onnxruntime and the usual
scientific packages. Not included: polars (52 MB), which ultralytics only needs for the plots of a training, and av (36 MB),
which only video files need (`--video` includes it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the store, the pipeline and the YOLO students need in addition. pydantic's metadata names its pydantic-core.
PACKAGES = (
    "zarr",
    "numcodecs",
    "google-crc32c",
    "donfig",
    "dask",
    "distributed",
    "partd",
    "locket",
    "tblib",
    "tornado",
    "zict",
    "pydantic",
    "annotated-types",
    "typing-inspection",
    "ultralytics",
    "ultralytics-thop",
    "plotly",
    "sqlalchemy",
    "greenlet",
)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


def pinned_versions() -> dict[str, str]:
    """`{package: version}` of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip().lower(): version.strip() for name, _, version in pairs}


def required_by(wheels: Path, package: str, needed: str) -> str:
    """The requirement `needed==VERSION` of a downloaded wheel of `package`."""
    (wheel,) = wheels.glob(f"{package}-[0-9]*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    prefix = f"Requires-Dist: {needed}=="
    return next(line.removeprefix("Requires-Dist: ").strip() for line in lines if line.startswith(prefix))


def download(folder: Path, python: str, requirements: Sequence[str]) -> None:
    """Download one wheel for each requirement into `folder`.

    Raises:
        subprocess.CalledProcessError: when pip finds no wheel; its message is on stderr.
    """
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*command, "--dest", str(folder), *requirements], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="Python version of that machine (%(default)s)")
    parser.add_argument("--video", action="store_true", help="include av, for video files")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(
            f"error: {folder}: expected an empty or new folder, because two versions of a wheel cannot be installed"
        )
        return 2
    versions = pinned_versions()
    names = (*PACKAGES, "av") if arguments.video else PACKAGES
    wanted = [f"{name}=={versions[name]}" if name in versions else name for name in names]
    try:
        download(folder, arguments.python, wanted)
        download(folder, arguments.python, [required_by(folder, "pydantic", "pydantic-core")])
    except subprocess.CalledProcessError as error:
        return error.returncode
    wheels = list(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.0f} MB, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
