"""Labels, boxes, masks and legends on pictures: any script, any length, never outside the picture."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from train import fonts
from train.deliver.draw import (
    PALETTE,
    Box,
    Label,
    class_color,
    draw_boxes,
    draw_label,
    draw_legend,
    draw_mask,
    draw_true_boxes,
    drawable,
    mask_color,
    shorten,
    wrap,
)

CHINESE, JAPANESE, KOREAN = "绿色的大自行车", "ねこの写真", "고양이 사진"


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has Pillow's own font alone."""
    fonts.file_with.cache_clear()
    fonts.missing.clear()
    monkeypatch.setattr(fonts, "font_files", lambda: ())
    yield
    fonts.file_with.cache_clear()
    fonts.missing.clear()


@pytest.mark.parametrize(
    ("name", "face"), [(CHINESE, "SC"), (JAPANESE, "JP"), (KOREAN, "KR"), ("Grüße, Déjà vu", None)]
)
def test_every_character_of_a_name_has_a_glyph_of_its_own(name: str, face: str | None) -> None:
    label, font = drawable(Label(name, 3, "93%"), 20)
    assert label.name == name
    empty_box = bytes(font.getmask("\U0010fffd"))  # a character that no font has
    glyphs = {character: bytes(font.getmask(character)) for character in name if not character.isspace()}
    assert empty_box not in glyphs.values()
    assert len(set(glyphs.values())) == len(glyphs)
    if face:
        assert str(font.getname()[0]).endswith(face)
        assert font.getname()[1] == "Regular" or b"Regular" in font.get_variation_names()


def test_without_a_font_the_class_s_number_is_drawn_and_one_warning_says_so(
    no_fonts: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        names = [
            drawable(Label(name, index, "93%"), 20)[0].text for index, name in enumerate((CHINESE, KOREAN))
        ]
    assert names == ["class 0 93%", "class 1 93%"]
    assert len(caplog.records) == 1
    assert "pip install manimgx-fonts-cjk" in caplog.text
    assert drawable(Label("cat", 2), 20)[0].text == "cat"


@pytest.mark.parametrize(
    "name", ["a very long class name that goes on and on and on", "x" * 200, CHINESE * 9]
)
def test_long_labels_are_broken_or_cut_and_keep_their_share(name: str) -> None:
    label, font = drawable(Label(name, 0, "93%"), 12)
    lines = wrap(label, font, 150)
    assert len(lines) == 2
    assert lines[1].endswith("… 93%")
    assert all(font.getlength(line) <= 150 for line in lines)
    assert shorten(label, font, 150).endswith("… 93%")
    assert font.getlength(shorten(label, font, 20)) <= 20


def test_words_are_kept_whole_where_a_label_is_broken() -> None:
    label, font = drawable(Label("traffic light with bus", 0, "93%"), 12)
    assert wrap(label, font, font.getlength("traffic light wi")) == ["traffic light", "with bus 93%"]


@pytest.mark.parametrize("size", [(300, 200), (64, 48), (20, 400)])
def test_tags_of_boxes_stay_inside_the_picture(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = ImageDraw.ImageDraw.text

    def text(pen: ImageDraw.ImageDraw, place: tuple[float, float], words: str, **options: object) -> None:
        written.append(pen.textbbox(place, words, font=options["font"]))  # type: ignore[arg-type]
        original(pen, place, words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    width, height = size
    corners = [(0, 0, 9, 9), (width - 10, height - 4, width, height), (width / 2, 0, width, height)]
    label = Label("bicycle with a basket", 1, "93%")
    draw_boxes(Image.new("RGB", size), [Box(xyxy, 1, label) for xyxy in corners])
    draw_label(Image.new("RGB", size), label)
    assert len(written) >= 4
    for left, top, right, bottom in written:
        assert left >= 0
        assert top >= 0
        assert right <= width + 1
        assert bottom <= height + 1


def test_true_boxes_have_no_class_s_color() -> None:
    box = Box((20, 20, 80, 80), 2)
    pixels = np.asarray(draw_true_boxes(Image.new("RGB", (100, 100), (128, 128, 128)), [box])).reshape(-1, 3)
    colors = {tuple(map(int, pixel)) for pixel in pixels}
    assert colors == {(128, 128, 128), (0, 0, 0), (255, 255, 255)}
    assert not colors & {class_color(index) for index in range(200)}


def test_classes_have_colors_of_their_own() -> None:
    assert len({class_color(index) for index in range(100)}) == 100
    assert class_color(0) == PALETTE[0]


def test_a_legend_names_the_colors_of_the_mask() -> None:
    classes = np.zeros((60, 200), np.uint8)
    classes[:, 100:] = 2
    picture = draw_mask(Image.new("RGB", (200, 60), (0, 0, 0)), Image.fromarray(classes))
    labels = [Label("ground", 0), Label("road", 1), Label(CHINESE * 5, 2)]
    shown = np.asarray(draw_legend(picture, labels))
    assert shown.shape[1] == 200
    strip = {tuple(map(int, pixel)) for pixel in shown[60:].reshape(-1, 3)}
    assert {mask_color(1), mask_color(2)} <= strip
    assert np.asarray(draw_legend(picture, labels[:1])).shape == (60, 200, 3)


@pytest.mark.filterwarnings("error:Glyph")
def test_matplotlib_s_plots_have_the_characters_too(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    fonts.register_with_matplotlib(["bicycle", CHINESE])
    families = list(matplotlib.rcParams["font.family"])
    fonts.register_with_matplotlib([CHINESE])
    assert matplotlib.rcParams["font.family"] == families
    figure = Figure()
    figure.suptitle(f"bicycle {CHINESE}")
    figure.savefig(tmp_path / "plot.png")


def test_ultralytics_draws_other_scripts_with_a_font_of_this_machine() -> None:
    from train.students.offline import prepare_ultralytics

    prepare_ultralytics()
    from ultralytics.utils.plotting import Annotator

    annotator = Annotator(Image.new("RGB", (200, 100)), example=f"names {CHINESE}", pil=True)
    glyphs = {bytes(annotator.font.getmask(character)) for character in CHINESE}
    assert bytes(annotator.font.getmask("\U0010fffd")) not in glyphs


@pytest.mark.parametrize(("height", "lines"), [(300, 2), (40, 1)])
def test_a_label_leaves_most_of_a_small_picture_free(height: int, lines: int) -> None:
    white = Image.new("RGB", (120, height), (255, 255, 255))
    shown = np.asarray(draw_label(white, Label("a class name of many words", 0, "93%")).convert("L"))
    band = int((shown[:, 0] < 255).sum())
    _, font = drawable(Label("a", 0), max(10, 120 // 20 if height > 120 else height // 20))
    assert lines * sum(font.getmetrics()) <= band <= lines * (sum(font.getmetrics()) + 1) + 4
