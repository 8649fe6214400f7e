"""`cli inspect --pictures`: samples of a store with their true labels, boxes and masks, next to the stored grids.

A grid is shown in colors: its first three principal components.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from files.writing import check_writable, whole_file, writing
from imaging.clips import read_clip_frames, sample_frame_indices
from imaging.decode import MOST_PIXELS, ImageError, decode_image
from imaging.geometry import View, resize_view
from store import format as names
from store.errors import StoreError
from store.reader import Split, Store, open_store
from train.data.images import DataError, path_of
from train.deliver.draw import Box, Label, draw_boxes, draw_label, draw_legend, draw_mask

SIDE = 224  # pixels of one picture
CLIP_SIDE = 2  # a clip is shown as 2 × 2 of its frames
TRIM = (1.0, 99.0)  # percentiles that become black and full color

Floats = npt.NDArray[np.float32]
Colors = npt.NDArray[np.uint8]


def write_pictures(path: Path | str, folder: Path, count: int = 16) -> list[Path]:
    """One PNG a sample, the image with its targets next to its grid, and `overview.png`; samples are spread over all splits.

    Raises:
        StoreError: for a store without valid rows, or with neither grids nor images to be found.
    """
    check_writable(folder, "--pictures")
    store = open_store(path)
    chosen = choose_rows(store, count)
    if not chosen:
        raise StoreError(f"{path}: has no valid row to show")
    colors = grid_colors(store, chosen)
    shown = [show_sample(store, split, row) for split, row in chosen]
    if colors is None and all(image is None for image in shown):
        where = store.manifest.data_root or "a place that is not recorded"
        raise StoreError(
            f"{path}: has no grids, and its images are neither in it nor at {where}: extract with --images jpeg or "
            "--grid 16"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files, panels = [], []
    for number, (split, row) in enumerate(chosen):
        grid = None if colors is None else Image.fromarray(colors[number])
        panels.append(panel(shown[number], grid))
        files.append(folder / f"{split}-{row:07d}.png")
        save(panels[-1], files[-1])
    save(overview(panels), folder / "overview.png")
    return [*files, folder / "overview.png"]


def choose_rows(store: Store, count: int) -> list[tuple[str, int]]:
    """(split, row) of `count` valid rows, evenly spread over all splits."""
    valid = [(name, row) for name, split in store.items() for row in np.flatnonzero(split.valid).tolist()]
    places = np.unique(np.linspace(0, len(valid) - 1, min(count, len(valid))).astype(np.int64))
    return [valid[place] for place in places.tolist()]


def save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as partial:
        image.save(partial)


# -- grids -----------------------------------------------------------------------------------------------


def grid_colors(store: Store, chosen: list[tuple[str, int]]) -> Colors | None:
    """uint8 [n, g, g, 3] of the chosen rows, by components that they share; None for a store without grids."""
    if any(names.GRID not in split.names for split in store.values()):
        return None
    grids = [store[split].true_values([row], names.GRID)[0] for split, row in chosen]
    return principal_colors(np.stack(grids))


def principal_colors(grids: Floats) -> Colors:
    """uint8 [n, g, g, 3]: the first three principal components of all tokens [n, g, g, D], standardized."""
    tokens = grids.reshape(-1, grids.shape[-1])
    std = tokens.std(axis=0)
    standardized = (tokens - tokens.mean(axis=0)) / np.where(std > 0, std, 1)
    # The right singular vectors of the tokens are the eigenvectors of their covariance, which is smaller.
    _, vectors = np.linalg.eigh(standardized.T @ standardized)
    components = standardized @ vectors[:, :-4:-1]
    low, high = np.percentile(components, TRIM, axis=0)
    scaled = (components - low) / np.where(high > low, high - low, 1)
    return (np.clip(scaled, 0, 1) * 255).astype(np.uint8).reshape(*grids.shape[:3], 3)


def panel(image: Image.Image | None, grid: Image.Image | None) -> Image.Image:
    """The image with its targets and the grid, side by side; one of them alone where the other is missing."""
    parts = [] if image is None else [image]
    if grid is not None:
        parts.append(grid.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    joined = Image.new(
        "RGB", (SIDE * max(1, len(parts)), max((part.height for part in parts), default=SIDE)), "white"
    )
    for number, part in enumerate(parts):
        joined.paste(part, (number * SIDE, 0))
    return joined


def overview(panels: list[Image.Image]) -> Image.Image:
    """All panels on one sheet, about as wide as high."""
    width, height = (max(item.size[axis] for item in panels) for axis in (0, 1))
    columns = max(1, round((len(panels) * height / width) ** 0.5))
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for number, item in enumerate(panels):
        sheet.paste(item, (number % columns * width, number // columns * height))
    return sheet


# -- images with their targets ---------------------------------------------------------------------------


def show_sample(store: Store, name: str, row: int) -> Image.Image | None:
    """The sample as the teacher saw it, SIDE pixels wide, its targets drawn; None where its image is not to be found."""
    split, policy = store[name], store.manifest.preprocessing.resize
    frames = read_frames(store, split, row)
    if not frames:
        return None
    if len(frames) > 1:
        return draw_class(store, split, row, mosaic(frames, policy))
    (image,) = frames
    size = tuple(int(side) for side in split.gather([row], [names.SIZES])[names.SIZES][0])
    original = size if all(size) else image.size
    view = resize_view(policy, (original[0], original[1]), SIDE)
    # `images/raw` has been through the resize policy already.
    raw = names.IMAGES_RAW in split.names
    shown = image.resize((SIDE, SIDE)) if raw else resize_view(policy, image.size, SIDE).render(image, SIDE)
    return draw_class(store, split, row, draw_places(store, split, row, shown, view, original))


def draw_places(
    store: Store, split: Split, row: int, shown: Image.Image, view: View, original: tuple[int, ...]
) -> Image.Image:
    """The rendered image with its true boxes and mask; `view` is of the `original` (width, height)."""
    classes = store.manifest.class_names
    if names.MASK in split.names and (data := bytes(split.ragged([row], names.MASK)[0])):
        mask = view.render(
            Image.open(io.BytesIO(data)).convert("L"), SIDE, names.IGNORE_INDEX, Image.Resampling.NEAREST
        )
        present = [int(index) for index in np.unique(np.asarray(mask)) if index != names.IGNORE_INDEX]
        shown = draw_legend(
            draw_mask(shown, mask), [Label(class_name(classes, index), index) for index in present]
        )
    if names.BOXES in split.names:
        corners = split.ragged([row], names.BOXES)[0].astype(np.float64) / np.tile(original, 2)
        numbers = split.ragged([row], names.BOX_CLASSES)[0].tolist()
        placed = np.clip(view.boxes_to_view(corners), 0, 1) * SIDE
        boxes = [
            Box((x1, y1, x2, y2), number, Label(class_name(classes, number), number))
            for (x1, y1, x2, y2), number in zip(placed.tolist(), numbers, strict=True)
            if x2 > x1 and y2 > y1
        ]
        shown = draw_boxes(shown, boxes)
    return shown


def draw_class(store: Store, split: Split, row: int, shown: Image.Image) -> Image.Image:
    """The picture with the name of its class, where it has one."""
    if names.LABEL not in split.names:
        return shown
    label = int(split.gather([row], [names.LABEL])[names.LABEL][0])
    if label == names.NO_LABEL:
        return shown
    return draw_label(shown, Label(class_name(store.manifest.class_names, label), label))


def class_name(class_names: tuple[str, ...], index: int) -> str:
    """The class's name, or its number where the store does not name it."""
    return class_names[index] if index < len(class_names) else str(index)


def mosaic(frames: list[Image.Image], policy: str) -> Image.Image:
    """Frames of a clip in the order of time, row by row, SIDE × SIDE."""
    side = SIDE // CLIP_SIDE
    sheet = Image.new("RGB", (SIDE, SIDE))
    for number, frame in enumerate(frames):
        small = resize_view(policy, frame.size, side).render(frame, side)
        sheet.paste(small, (number % CLIP_SIDE * side, number // CLIP_SIDE * side))
    return sheet


def read_frames(store: Store, split: Split, row: int) -> list[Image.Image]:
    """The sample's image, or some frames of a clip, from the store or the data set's folder; none where neither has it."""
    if names.IMAGES_RAW in split.names:
        return [Image.fromarray(split.gather([row], [names.IMAGES_RAW])[names.IMAGES_RAW][0])]
    depth = store.manifest.preprocessing.bit_depth
    try:
        if names.IMAGES_ENCODED in split.names:
            return [
                decode_image(data, target_size=SIDE, max_pixels=MOST_PIXELS)
                for data in stored_images(split, row)
            ]
        if store.manifest.data_root is None:
            return []
        path = path_of(split.keys[row], store.manifest.data_root)
        if "frames" in store.manifest.options:
            return read_clip_frames(path, CLIP_SIDE**2, bit_depth=depth)
        return [decode_image(path, target_size=SIDE, max_pixels=MOST_PIXELS, bit_depth=depth)]
    except (ImageError, DataError):
        return []


def stored_images(split: Split, row: int) -> list[bytes]:
    """The encoded image in the store, or some of a clip's frames."""
    data = split.ragged([row], names.IMAGES_ENCODED)[0].tobytes()
    if names.IMAGES_FRAMES not in split.names:
        return [data]
    spans = split.gather([row], [names.IMAGES_FRAMES])[names.IMAGES_FRAMES][0].tolist()
    chosen = [spans[place] for place in sample_frame_indices(len(spans), CLIP_SIDE**2).tolist()]
    return [data[start : start + length] for start, length in chosen]
