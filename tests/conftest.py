"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two threads a process oversubscribe a small machine when several tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def asset_or_skip(name: str) -> Path:
    """The folder of a registry asset (see tests/assets.py); skips the test when it can't be fetched."""
    from commands.assets import AssetError
    from tests.assets import asset

    try:
        return asset(name)
    except AssetError as error:
        pytest.skip(f"registry data is missing: {error}")


@pytest.fixture(scope="session")
def asset_path():  # type: ignore[no-untyped-def]
    """`asset_path("foolbox")`: the unpacked folder of a registry asset, or a skip."""
    return asset_or_skip


@pytest.fixture(scope="session")
def pretrained_teacher_weights() -> Path:
    """ImageNet weights of EfficientNet-Lite2 (1280 wide), or a skip."""
    from commands.assets import PRETRAINED_TEACHER_WEIGHTS

    return asset_or_skip("efficientnet-lite2") / PRETRAINED_TEACHER_WEIGHTS


@pytest.fixture(autouse=True, scope="session")
def cache_of_remote_stores(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Never the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache") / "stores"))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):  # type: ignore[no-untyped-def]
    """What a test logs about file names that are not UTF-8 must not end the worker that sends its report."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:  # type: ignore[no-untyped-def]
    """With CI=true a skipped test that allowed_skips.txt does not list fails the run."""
    for nodeid in unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"skipped in CI, but not listed in tests/{ALLOWED_SKIPS.name}: {nodeid}")


def pytest_sessionfinish(session, exitstatus) -> None:  # type: ignore[no-untyped-def]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter is not None and unexpected_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unexpected_skips(reporter) -> list[str]:  # type: ignore[no-untyped-def]
    """Node ids of skipped tests that are not allowed, empty outside CI."""
    if os.environ.get("CI") != "true":
        return []
    allowed = {line.split("#")[0].strip() for line in ALLOWED_SKIPS.read_text().splitlines()}
    skipped = {report.nodeid.split("[")[0] for report in reporter.stats.get("skipped", [])}
    return sorted(skipped - allowed)
