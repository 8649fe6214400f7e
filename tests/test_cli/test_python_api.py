"""The pipeline as Python functions: `extract`, `train`, `load_student`, and a notebook of them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def run_python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script, encoding="utf-8")
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def make_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(24):
        place = folder / ("dark", "light")[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (40, 60, 3)) + 120 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")


def test_importing_the_packages_imports_nothing_else(tmp_path: Path) -> None:
    script = (
        "import extract, store, train, sys\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'zarr', 'pydantic', 'typer'}))"
    )
    done = run_python(script, tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_functions_take_the_options_of_the_commands() -> None:
    from extract import extract
    from extract.config import ExtractConfig
    from train import train
    from train.config import TrainConfig

    options = inspect.signature(train).parameters
    assert set(options) == set(TrainConfig.model_fields) - {"sources"}
    assert options["learning_rate"].default == 1e-4
    assert options["learning_rate"].annotation is float
    assert options["student"].default is inspect.Parameter.empty
    assert set(inspect.signature(extract).parameters) == set(ExtractConfig.model_fields) - {"base"}
    text = inspect.getdoc(extract) or ""
    assert "    image_size: Side of the square the teacher sees, in pixels. Default: 224." in text
    assert "    resize: How an image becomes square. One of squash, letterbox, center-crop." in text


def test_wrong_options_are_reported_together(tmp_path: Path) -> None:
    from extract import extract
    from extract.config import ConfigError
    from train import train
    from train.errors import ConfigError as TrainConfigError

    with pytest.raises(
        ConfigError, match=r"views: .* 0 .*; unknown option image_sise: did you mean image_size"
    ):
        extract(data="x", out=tmp_path, image_sise=3, views=-1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="dry_run: extract\\(\\) returns a store"):
        extract(data="x", out=tmp_path, dry_run=True)
    with pytest.raises(TrainConfigError, match="--student: missing"):
        train(store="x.zarr", out=tmp_path)  # type: ignore[call-arg]


def test_an_unknown_name_of_the_packages_is_an_attribute_error() -> None:
    import extract
    import train

    for package in (extract, train):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


SCRIPT = """
from pathlib import Path
from extract import extract
from extract.teachers.tiny import make_tiny_teacher
from train import load_student, train

print("this program runs")
make_tiny_teacher(Path("tiny"), depth=1)
store = extract(
    data="photos", out=Path("photos.zarr"), teacher_path="tiny", image_size=56, images="jpeg", workers=1, device=DEVICES
)
print(len(store["train"]) + len(store["val"]), store.manifest.complete)
summary = train(
    store=store, student="timm:test_resnet", out=Path("run"), epochs=1, image_size=32, batch_size=8, workers=0,
    device=DEVICES,
)
print(summary["epochs_done"], load_student("run").class_names)
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_script_without_a_main_guard(tmp_path: Path, devices: str) -> None:
    """The processes that are started do not run the caller's program again."""
    make_photos(tmp_path / "photos")
    done = run_python(SCRIPT.replace("DEVICES", repr(devices)), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("this program runs") == 1
    assert "24 True" in lines
    assert lines[-1] == "1 ('dark', 'light')"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On scanned digits; progress is one line that changes in its place."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert any(text.startswith("encoding: 300/300 images (100%)") for text in shown)
    results = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert "'top1'" in results[2]
    assert results[-1] == "['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"
