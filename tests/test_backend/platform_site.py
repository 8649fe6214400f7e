"""The platform's folders and its command line over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Site:
    """One platform's folders."""

    root: Path

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def words(self, **options: object) -> list[str]:
        """The back end's command line; an option given as None is left out."""
        values: dict[str, object] = {
            "task_id": "7",
            "api_base_url": "http://localhost:8080/api",
            "teacher_model": "qwen2.5-vl-8b",
            "student_model": "resnet50",
            "teacher_path": self.models / "qwen2.5-vl-8b",
            "student_model_type": "resnet",
            "student_model_size": "resnet50",
            "dataset_id": "flowers",
            "datasets_root": self.datasets,
            "output_dir": self.output / "7",
        } | options
        pairs = [(f"--{name}", str(value)) for name, value in values.items() if value is not None]
        return [word for pair in pairs for word in pair]


# A training of seconds on a CPU; the back end's own command line with small numbers.
SMALL: dict[str, object] = {
    "image_size": 32,
    "batch_size": 8,
    "epochs": 2,
    "workers": 0,
    "gpu_devices": "cpu",
    "num_classes": 2,
    "teacher_path": None,
    "teacher_model": "tiny",
    "student_model": "resnet18",
    "student_model_type": None,
    "student_model_size": None,
    "distillation_type": "feature",
}
