"""The wheel: built from the project's own files, installed into a fresh environment, used there."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import OURS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=280)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_our_names_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    top = {name.split("/")[0] for name in names}
    modules = {"cli.py", "train_qwen_vl_distillation.py"}
    assert {name for name in top if not name.endswith(".dist-info")} == (OURS - {"cli"}) | modules
    assert not [name for name in names if "test" in name.split("/")[-1].split(".")[0].split("_")]
    assert "train/report/page.html.j2" in names
    assert "frontend/style.css" in names
    assert {"backend/server/migrations/env.py", "backend/server/migrations/versions/0001_tasks.py"} <= set(
        names
    )


@pytest.mark.slow
def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment with the wheel alone; its dependencies are lent from this one, which holds no wheel."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, timeout=280
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # Plain paths: an editable installation's own .pth files are not followed from here.
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=280, check=False
        )

    where = run(
        str(python),
        "-c",
        "import store, train, extract; print(store.__file__, train.__file__, extract.__file__)",
    )
    assert all(str(packages) in path for path in where.stdout.split()), where.stderr
    for name in ("cli", "qwen-distill"):
        shown = run(str(environment / "bin" / name), "--help")
        assert shown.returncode == 0, shown.stderr
        assert "extract" in shown.stdout
    made = run(str(environment / "bin" / "cli"), "make-tiny-teacher", "tiny", "--depth", "1")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "tiny" / "config.json").exists()
