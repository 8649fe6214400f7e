"""`--distill-layers`: which maps of the student learn which layers of the teacher.

A *level* is a map of the student: `P3` the one of stride 8 (2^3), `P4` of stride 16; of token models a block's number, counted
from 0, or `LAST`, the tokens after the last norm. A *layer* is one of the teacher (`cli extract --layers`), None its last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from store.format import GRID, layer_grid, stored_layers
from train.errors import ConfigError

Levels = Mapping[str, int | None]

#: Of YOLOv8: the inputs of its Detect head.
DETECTOR_LEVELS = ("P3", "P4", "P5")


def parse_levels(text: str) -> dict[str, int | None]:
    """`p3:8,p4:16,p5` as {"P3": 8, "P4": 16, "P5": None}. Raises ConfigError for anything else."""
    chosen: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        level, _, layer = (word.strip() for word in part.upper().partition(":"))
        if not level or not (layer in ("", "LAST") or (layer.isascii() and layer.isdecimal())):
            raise ConfigError(
                f"distill_layers {text}: expected a list of the student's levels, each with the teacher's layer where it "
                f"is not the last, like P3:8,P4:16,P5:last; got {part}"
            )
        if level in chosen:
            raise ConfigError(f"distill_layers {text}: level {level} is named twice")
        chosen[level] = int(layer) if layer.isdecimal() else None
    if not chosen:
        raise ConfigError(f"distill_layers {text!r}: expected a list like P3:8,P4:16,P5:last, got none")
    return chosen


def check_levels(text: str, chosen: Iterable[str], available: Collection[str], student: str) -> None:
    """Raises ConfigError for a level that the student does not have."""
    unknown = [level for level in chosen if level not in available]
    if unknown:
        raise ConfigError(
            f"distill_layers {text}: {student} has no level {unknown[0]}, it has {', '.join(available)}"
        )


def check_layers(
    where: object, layers: Iterable[int | None], arrays: Collection[str], grid: str = GRID
) -> None:
    """Raises ConfigError for a layer whose grids are not among a split's arrays. grid: name of the last layer's."""
    for layer in layers:
        if layer_grid(layer, grid) not in arrays:
            stored = ", ".join(map(str, [*sorted(stored_layers(arrays)), "last"]))
            raise ConfigError(
                f"distill_layers: {where} has no layer {layer}, it has {stored}: extract with --layers {layer}"
            )


def detector_levels(text: str | None, student: str, layers: Iterable[int] = ()) -> dict[str, int | None]:
    """The levels of a YOLOv8 student that are distilled, and the layer that each learns.

    Without `text` P5 learns the last layer; from a store with further `layers`, P3 learns the first and P4 a middle one
    besides. Raises ConfigError for other levels.
    """
    if text is not None:
        chosen = parse_levels(text)
        check_levels(text, chosen, DETECTOR_LEVELS, student)
        return chosen
    stored: Sequence[int | None] = [*sorted(layers), None]
    if len(stored) == 1:
        return {"P5": None}
    return {"P3": stored[0], "P4": stored[(len(stored) - 1) // 2], "P5": None}
