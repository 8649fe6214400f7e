"""1,000 bad and odd files: none crashes, none blocks, none gives another picture than its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from extract.decode.sample import resize_pixels
from extract.sources.detect import open_source
from imaging.decode import Decoded, ImageError, decode
from tests.test_extract.bad_images import KINDS, Case, bad_images
from tests.test_extract.extractions import Preprocessed, preprocess

COUNT = 1_000
MAX_PIXELS = 8_000  # the largest healthy pictures here have more


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    root = tmp_path_factory.mktemp("bad") / "images"
    root.mkdir()
    found = dict(bad_images(COUNT))
    for name, case in found.items():
        case.write(root / name)
    return root, found


def test_every_file_is_refused_with_a_reason_or_gives_its_own_picture(
    cases: tuple[Path, dict[str, Case]],
) -> None:
    root, expected = cases
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    samples = open_source(root, val_fraction=0).splits["train"]
    assert [sample.key for sample in samples] == sorted(expected)
    for sample in samples:
        case = expected[sample.key]
        try:
            image = decode(sample.read()).image
        except ImageError as error:
            outcomes["refused"] += 1
            if not error.reason or "\n" in error.reason:
                wrong.append(f"{sample.key} {case.name}: reason {error.reason!r}")
            if case.pixels is not None and case.must:
                wrong.append(f"{sample.key} {case.name}: refused: {error.reason}")
            continue
        outcomes["decoded"] += 1
        if problem := compare(np.asarray(image), case):
            wrong.append(f"{sample.key} {case.name}: {problem}")
    assert not wrong, f"{len(wrong)} of {COUNT}: " + "; ".join(wrong[:20])
    assert min(outcomes["refused"], outcomes["decoded"]) > COUNT // 4, outcomes


def compare(found: np.ndarray, case: Case) -> str | None:
    """What is wrong with a decoded picture, or None."""
    if case.pixels is None:
        return "decoded, should be refused"
    if found.shape != case.pixels.shape:
        return f"shape {found.shape}, expected {case.pixels.shape}"
    difference = float(np.abs(found.astype(int) - case.pixels).mean())
    return None if difference <= case.tolerance else f"mean difference {difference:.2f}"


def test_preprocessing_agrees_with_decoding(cases: tuple[Path, dict[str, Case]]) -> None:
    root, expected = cases
    for number, sample in enumerate(open_source(root, val_fraction=0).splits["train"]):
        policy = ("squash", "letterbox", "center-crop")[number % 3]
        try:
            found = preprocess(sample.read(), 28, policy, exact=number % 2 == 0)
        except ImageError:
            with pytest.raises(ImageError):
                decode(sample.read())
            continue
        case = expected[sample.key]
        assert case.pixels is not None
        height, width = case.pixels.shape[:2]
        assert found.size == (width, height)
        reference = resize_pixels(Decoded(decode(sample.read()).image, found.size), 28, policy)
        assert np.abs(found.pixels.astype(int) - reference).mean() < 3


def test_the_comparison_can_fail(cases: tuple[Path, dict[str, Case]]) -> None:
    case = next(case for case in cases[1].values() if case.pixels is not None and case.pixels.shape[1] > 9)
    assert case.pixels is not None
    assert compare(case.pixels, case) is None
    assert compare(case.pixels[:, ::-1], case) is not None
    assert compare(case.pixels[:, :-1], case) is not None
    assert 30 * len(KINDS) <= COUNT


@pytest.mark.slow
def test_extraction_puts_every_bad_file_into_the_ledger(
    cases: tuple[Path, dict[str, Case]], extract_options: dict[str, object]
) -> None:
    from extract.config import load_config
    from extract.result import LEDGER
    from extract.run import run_extraction
    from store.reader import open_store

    root, _ = cases
    options = {
        **extract_options,
        "data": str(root),
        "workers": 2,
        "max_bad": "100%",
        "images": "raw",
        "image_size": 28,
        "max_pixels": MAX_PIXELS,
    }
    run_extraction(load_config(options))
    path = Path(str(options["out"]))
    store = open_store(path)
    ledger = {
        record["key"]: record["reason"]
        for record in map(json.loads, (path / LEDGER).read_text().splitlines())
    }
    rows = 0
    for name in store.splits:
        split = store[name]
        stored = split.gather(np.arange(len(split)), ["images/raw", "features/pooled", "sizes"])
        for row, key in enumerate(split.keys):
            rows += 1
            expected = outcome_of(root / key)
            if isinstance(expected, str):
                assert not split.valid[row]
                assert ledger[key] == expected
                assert np.isnan(stored["features/pooled"][row]).all()
                continue
            assert split.valid[row], ledger.get(key)
            assert key not in ledger
            np.testing.assert_array_equal(stored["images/raw"][row], expected.pixels.transpose(1, 2, 0))
            assert tuple(stored["sizes"][row]) == expected.size
            assert np.isfinite(stored["features/pooled"][row].astype(np.float32)).all()
    assert rows == COUNT
    assert any("too many pixels" in reason for reason in ledger.values())


def outcome_of(path: Path) -> Preprocessed | str:
    """The preprocessed image, or the reason why there is none."""
    try:
        return preprocess(path, 28, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return error.reason
