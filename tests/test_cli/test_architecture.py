"""Who may import whom: the rule that lets either stage live without the other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import OURS

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "files": set(),
    "console": {"files"},
    "imaging": {"files"},
    "store": {"files"},
    "processes": {"console", "files"},
    "extract": {"console", "files", "imaging", "processes", "store"},
    "train": {"console", "files", "imaging", "processes", "store"},
    "backend": OURS - {"cli", "frontend"},
    "frontend": {"backend"},
    "commands": OURS - {"cli"},
}


def imports_of(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def lazy_targets(path: Path) -> Iterator[str]:
    """Top-level names of our modules in registry strings such as `"train.students.unet:build"`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, attribute = node.value.partition(":")
            if colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split(".")):
                yield module.split(".")[0]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_they_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in (*imports_of(path), *lazy_targets(path)) if name in OURS and name != package}
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {sorted(ours - ALLOWED[package])}"


#: From the bottom up: packages and modules of `train/`.
TRAIN_LAYERS = (
    (
        *("students", "data", "distill", "tasks"),
        *(
            "checkpoint",
            "config",
            "errors",
            "events",
            "fit",
            "fonts",
            "lora",
            "metrics",
            "ranks",
            "run_folder",
        ),
    ),
    ("loop",),
    ("memory", "phase_one"),
    ("yolo",),
    ("deliver",),
    ("run", "self_training", "sweep", "report"),
)


@pytest.mark.parametrize("name", [name for layer in TRAIN_LAYERS[:-1] for name in layer])
def test_no_import_in_train_points_upward(name: str) -> None:
    level = next(level for level, names in enumerate(TRAIN_LAYERS) if name in names)
    above = {name for names in TRAIN_LAYERS[level + 1 :] for name in names}
    place = ROOT / "train" / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("train."):
                    assert module.split(".")[1] not in above, f"{path}: imports {module}"


def test_only_one_file_imports_transformers() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for package in OURS - {"cli"}
        for path in (ROOT / package).rglob("*.py")
        if "transformers" in set(imports_of(path))
    }
    assert importers == {"extract/teachers/qwen_transformers.py"}


@pytest.mark.parametrize("package", ["store", "imaging", "console", "processes"])
def test_light_packages_never_import_torch(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert "torch" not in set(imports_of(path)), path


def test_importing_all_of_stage_two_leaves_transformers_out() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "train").rglob("*.py"))
    ]
    script = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
heavy = [name for name in ("transformers", "peft", "extract") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
