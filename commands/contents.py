"""What `cli inspect` says of a store's samples: how many of each kind and class in each split, and what to be careful of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from console.output import print_table
from store.reader import Split, Store
from store.summary import count_classes, count_kinds, store_warnings, target_kind
from train.validation import MASKS_READ, count_mask_classes

SHOWN_CLASSES = 40


def describe_contents(store: Store) -> dict[str, Any]:
    """`splits`: name → `kinds` and `classes`; `warnings`. For a complete store.

    kinds: samples that are `labeled`, `unlabeled`, `background` and `bad`. classes: name → `samples` with the class, and
    `boxes` of it, or `pixels` of it in `masks_read` masks that are evenly spread over the split.
    """
    splits = {
        name: {"kinds": count_kinds(split), **split_classes(store, split)} for name, split in store.items()
    }
    return {"splits": splits, "warnings": store_warnings(store)}


def split_classes(store: Store, split: Split) -> dict[str, Any]:
    names = store.manifest.class_names
    kind = target_kind(split)
    if kind == "mask":
        counts, read = count_mask_classes(split, len(names))
        return {"classes": by_name(names, counts), "masks_read": read}
    return {"classes": by_name(names, count_classes(split, len(names), kind))}


def by_name(names: tuple[str, ...], counts: dict[str, npt.NDArray[np.int64]]) -> dict[str, dict[str, int]]:
    """Counts by what is counted → by class; empty where nothing was."""
    if not counts:
        return {}
    return {
        name: {what: int(values[index]) for what, values in counts.items()}
        for index, name in enumerate(names)
    }


def print_contents(described: dict[str, Any]) -> None:
    """The same as tables; nothing for a store whose contents were not described (an incomplete one)."""
    splits = {name: split for name, split in described["splits"].items() if "kinds" in split}
    if not splits:
        return
    print()
    kinds = [{"split": name, **split["kinds"]} for name, split in splits.items()]
    print_table(kinds, ["split", "labeled", "unlabeled", "background", "bad"], "samples")
    print_classes(splits)
    for text in described["warnings"]:
        print(f"warning: {text}")


def print_classes(splits: dict[str, Any]) -> None:
    """Samples of each class in each split, and boxes or the share of pixels in brackets."""
    names = list(next(iter(splits.values()))["classes"])
    if not names:
        return
    totals = {
        name: sum(entry.get("pixels", 0) for entry in split["classes"].values())
        for name, split in splits.items()
    }

    def text(split: str, name: str) -> str:
        entry = splits[split]["classes"][name]
        if "pixels" in entry:
            return f"{entry['samples']:,} ({entry['pixels'] / max(1, totals[split]):.1%})"
        return f"{entry['samples']:,}" + (f" ({entry['boxes']:,})" if "boxes" in entry else "")

    rows = [
        {"class": name, **{split: text(split, name) for split in splits}} for name in names[:SHOWN_CLASSES]
    ]
    first = next(iter(splits.values()))
    what = "boxes" if "boxes" in first["classes"][names[0]] else "share of the pixels"
    has_more = any(len(entry) > 1 for entry in first["classes"].values())
    title = "samples of each class" + (f" ({what})" if has_more else "")
    if any(
        split.get("masks_read", 0) < split["kinds"]["labeled"]
        for split in splits.values()
        if "masks_read" in split
    ):
        title += f", in {MASKS_READ:,} masks of each split"
    print()
    print_table(rows, ["class", *splits], title)
    if len(names) > SHOWN_CLASSES:
        print(f"and {len(names) - SHOWN_CLASSES} more classes: --json has them all")
