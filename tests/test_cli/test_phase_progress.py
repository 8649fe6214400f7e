"""What `cli extract` shows while it works: one display for each phase."""

from __future__ import annotations

import pytest

from console.progress import PhaseProgress


def test_each_phase_counts_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with PhaseProgress() as progress:
        for done, message in [(0, "encoding"), (4, "encoding"), (10, "encoding"), (10, "encoding")]:
            progress.progress(done, 10, message)
        for done in (6, 10):  # a resumed scoring of the same number of images
            progress.progress(done, 10, "scoring")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "encoding: 10/10 images (100%)",
        "scoring: 10/10 images (100%)",
    ]


def test_a_phase_that_ended_shows_its_own_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """The probe after an extraction must not slow down the rate that is shown."""
    with PhaseProgress() as progress:
        progress.progress(0, 5, "encoding")
        progress.progress(5, 5, "encoding")
        assert "5/5" in capsys.readouterr().err  # said before whatever comes next
    assert capsys.readouterr().err == ""


def test_an_interrupted_phase_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with PhaseProgress() as progress:
        progress.progress(0, 5, "encoding")
        progress.progress(3, 5, "encoding")
    assert capsys.readouterr().err.startswith("encoding: 3/5 images (60%)")
