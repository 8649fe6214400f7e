"""A font for each text: Pillow's built-in one for ASCII, else one that has every character of the text.

Pillow draws an empty box for a character that the font lacks, so a font is only taken when it has them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from console.output import get_logger

log = get_logger("draw")

ELLIPSIS = "…"  # in Pillow's built-in font, too
# The optional package manimgx-fonts-cjk (extra `fonts`): Noto Sans CJK, under the SIL Open Font License, for Chinese, Japanese and Korean.
FONT_PACKAGE = "manimgx_fonts_cjk"
# System fonts, by file name, in this order of preference; then any other.
PREFERRED = (
    "notosanscjk",
    "sourcehansans",
    "notosans",
    "droidsansfallback",
    "wqy",
    "msyh",
    "pingfang",
    "dejavusans",
)
STYLED = re.compile(r"bold|italic|oblique|black|light|thin|mono|serif|condensed", re.IGNORECASE)
KANA = re.compile("[\u3040-\u30ff]")
HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7af]")
MOST_FACES = 64

Font = ImageFont.FreeTypeFont


def font_for(text: str, size: int) -> Font | None:
    """A font of `size` pixels that has every character of `text`; None when this machine has none."""
    if text.replace(ELLIPSIS, "").isascii():
        return built_in(size)
    characters = frozenset(character for character in text if not character.isspace())
    path = file_with(characters)
    return None if path is None else open_font(path, size, language_of(text))


@cache
def built_in(size: int) -> Font:
    """Pillow's own font, for ASCII."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # every Pillow wheel comes with FreeType
    return font


@cache
def file_with(characters: frozenset[str]) -> Path | None:
    """The first font file that has all `characters`."""
    wanted = frozenset(map(ord, characters))
    return next((path for path in font_files() if wanted <= code_points(path)), None)


@cache
def font_files() -> tuple[Path, ...]:
    """Font files of the optional package, then of the system."""
    from matplotlib.font_manager import findSystemFonts

    system = sorted(map(Path, findSystemFonts()), key=preference)
    return (*packaged_fonts(), *system)


def packaged_fonts() -> Iterator[Path]:
    found = find_spec(FONT_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        yield from sorted(path for path in Path(folder).iterdir() if path.suffix in (".ttc", ".otf", ".ttf"))


def preference(path: Path) -> tuple[int, bool, str]:
    name = re.sub("[-_ ]", "", path.name.lower())
    rank = next((index for index, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
    return rank, bool(STYLED.search(path.stem)), path.name


@cache
def code_points(path: Path) -> frozenset[int]:
    """The Unicode characters of a font; none where the file cannot be read as a scalable font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


def language_of(text: str) -> str:
    """Which face of a collection for Chinese, Japanese and Korean draws the characters as the reader knows them."""
    return "JP" if KANA.search(text) else "KR" if HANGUL.search(text) else "SC"


@cache
def open_font(path: Path, size: int, language: str) -> Font:
    """The face for `language`, in its regular weight where the file holds several."""
    faces = [ImageFont.truetype(str(path), size)]
    while path.suffix.lower() == ".ttc" and len(faces) < MOST_FACES:
        try:
            faces.append(ImageFont.truetype(str(path), size, index=len(faces)))
        except OSError:  # past the last one
            break
    font = next((face for face in faces if str(face.getname()[0]).endswith(f" {language}")), faces[0])
    try:
        if b"Regular" in font.get_variation_names():
            font.set_variation_by_name("Regular")
    except OSError:  # has one weight
        pass
    return font


def register_with_matplotlib(texts: Iterable[str]) -> None:
    """Let matplotlib, in this process, fall back on a font that has the characters that its own font lacks.

    Logs a warning where this machine has none.
    """
    odd = [text for text in texts if not text.isascii()]
    if not odd:
        return
    path = file_with(frozenset(character for text in odd for character in text if not character.isspace()))
    if path is None:
        warn_missing(odd[0])
        return
    from matplotlib import font_manager, rcParams

    font_manager.fontManager.addfont(path)
    name = font_manager.FontProperties(fname=path).get_name()
    rcParams["font.family"] = [*(family for family in rcParams["font.family"] if family != name), name]


missing: set[str] = set()  # names that no font has the characters of


def warn_missing(name: str) -> None:
    """Log, once for each process, that class names cannot be drawn."""
    if not missing:
        log.warning(
            "no font on this machine has the characters of %r: pictures show class numbers instead of such names; "
            "install one: pip install manimgx-fonts-cjk, or apt install fonts-noto-cjk",
            name,
        )
    missing.add(name)
