"""`cli inspect --pictures`: what the stored grids see, as colours: their first three principal components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from console.files import whole_file, writing
from imaging.decode import decode_image
from imaging.errors import ImageError
from imaging.geometry import resize_view
from store import format as names
from store.errors import StoreError
from store.reader import Split, open_store

SIDE = 224  # pixels of one picture
TRIM = (1.0, 99.0)  # percentiles that become black and full colour

Floats = npt.NDArray[np.float32]


def write_pictures(path: Path | str, folder: Path, count: int = 16) -> list[Path]:
    """One PNG a sample, image beside grid, and `overview.png`; samples are spread over the first split.

    Raises:
        StoreError: for a store without grids or without valid rows.
    """
    store = open_store(path)
    split = store[store.splits[0]]
    if names.GRID not in split.names:
        raise StoreError(f"{path}: has no grids to show: extract with --grid 16")
    valid = np.flatnonzero(split.valid)
    if not len(valid):
        raise StoreError(f"{path}: split {split.name!r} has no valid row to show")
    rows = valid[np.unique(np.linspace(0, len(valid) - 1, min(count, len(valid))).astype(np.int64))]
    grids = split.gather(rows, [names.GRID])[names.GRID].astype(np.float32) * split.scale[names.GRID]
    root = Path(store.manifest.data_root) if store.manifest.data_root else None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files, panels = [], []
    for row, colours in zip(rows.tolist(), principal_colours(grids), strict=True):
        panels.append(panel(read_image(split, row, root), store.manifest.preprocessing.resize, colours))
        files.append(folder / f"{split.name}-{row:07d}.png")
        save(panels[-1], files[-1])
    save(overview(panels), folder / "overview.png")
    return [*files, folder / "overview.png"]


def save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as partial:
        image.save(partial)


def principal_colours(grids: Floats) -> npt.NDArray[np.uint8]:
    """uint8 [n, g, g, 3]: the first three principal components of all tokens [n, g, g, D], standardised."""
    tokens = grids.reshape(-1, grids.shape[-1])
    std = tokens.std(axis=0)
    standardised = (tokens - tokens.mean(axis=0)) / np.where(std > 0, std, 1)
    # The right singular vectors of the tokens are the eigenvectors of their covariance, which is smaller.
    _, vectors = np.linalg.eigh(standardised.T @ standardised)
    components = standardised @ vectors[:, :-4:-1]
    low, high = np.percentile(components, TRIM, axis=0)
    scaled = (components - low) / np.where(high > low, high - low, 1)
    return (np.clip(scaled, 0, 1) * 255).astype(np.uint8).reshape(*grids.shape[:3], 3)


def panel(image: Image.Image | None, resize: str, colours: npt.NDArray[np.uint8]) -> Image.Image:
    """The image as the teacher saw it, and its grid, side by side; the grid alone where there is no image."""
    grid = Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    if image is None:
        return grid
    both = Image.new("RGB", (2 * SIDE, SIDE))
    both.paste(resize_view(resize, image.size, SIDE).render(image, SIDE), (0, 0))
    both.paste(grid, (SIDE, 0))
    return both


def overview(panels: list[Image.Image]) -> Image.Image:
    """All panels on one sheet, about as wide as high."""
    width, height = (max(item.size[axis] for item in panels) for axis in (0, 1))
    columns = max(1, round((len(panels) * height / width) ** 0.5))
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for number, item in enumerate(panels):
        sheet.paste(item, (number % columns * width, number // columns * height))
    return sheet


def read_image(split: Split, row: int, root: Path | None) -> Image.Image | None:
    """The sample's image from the store or the data set's folder; None where neither has it."""
    if names.IMAGES_RAW in split.names:
        return Image.fromarray(split.gather([row], [names.IMAGES_RAW])[names.IMAGES_RAW][0])
    try:
        if names.IMAGES_ENCODED in split.names:
            data = split.ragged([row], names.IMAGES_ENCODED)[0].tobytes()
            if names.IMAGES_FRAMES in split.names:  # a clip: its middle frame
                spans = split.gather([row], [names.IMAGES_FRAMES])[names.IMAGES_FRAMES][0].tolist()
                start, length = spans[len(spans) // 2]
                data = data[start : start + length]
            return decode_image(data, target_size=SIDE)
        return decode_image(root / split.keys[row], target_size=SIDE) if root is not None else None
    except ImageError:
        return None
