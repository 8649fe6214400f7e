"""What the platform's tests share: folders as the platform has them, and a command line over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_backend.platform_data import make_class_folders, make_clips, make_masks, make_yolo
from tests.test_backend.platform_server import PlatformServer
from tests.test_backend.platform_site import SMALL, Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Empty folders of a platform: a teacher, a data set, nothing inside."""
    site = Site(tmp_path / "data")
    (site.models / "qwen2.5-vl-8b").mkdir(parents=True)
    (site.datasets / "flowers" / "train").mkdir(parents=True)
    return site


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file into the test's folder and return its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A strict platform server for task 7; every test that uses it fails on a violation of the contract."""
    server = PlatformServer()
    yield server
    server.stop()
    assert server.violations == []


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A platform with a small teacher and a data set; its feature cache is shared by all tests."""
    from extract.teachers.tiny import make_tiny_teacher

    site = Site(tmp_path_factory.mktemp("platform"))
    make_tiny_teacher(site.models / "tiny", depth=1)
    make_class_folders(site.datasets / "花")
    make_class_folders(site.datasets / "one-split", train=24, val=0)
    make_class_folders(site.datasets / "big", train=160, val=8)
    make_yolo(site.datasets / "boxes")
    make_masks(site.datasets / "masks")
    make_clips(site.datasets / "clips")
    return site


@pytest.fixture
def words(shop: Site, tmp_path: Path) -> Callable[..., list[str]]:
    """A small training's command line into the test's own output folder."""

    def make(server: PlatformServer | None = None, **options: object) -> list[str]:
        url = server.url if server else "http://127.0.0.1:9/nobody"
        named: dict[str, Any] = {
            **SMALL,
            "api_base_url": url,
            "dataset_id": "花",
            "models_root": shop.models,
            "cache_dir": shop.root / "cache",
            "output_dir": tmp_path / "out",
        }
        return shop.words(**(named | options))

    return make
