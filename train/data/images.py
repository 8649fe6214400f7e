"""The images of a split, by row: from the store itself, or from the data set's root by key."""

from __future__ import annotations

import io
import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from files.names import path_on_disk
from files.reading import read_regular
from imaging.decode import MOST_PIXELS, ImageError, decode
from imaging.geometry import View, resize_view
from imaging.masks import IGNORE
from store.errors import DistillError
from store.format import CONTENT, IMAGES_ENCODED, IMAGES_RAW, MASK, SIZES, VIEWS_GEOMETRY, Preprocessing
from store.reader import Split
from train.data.batches import Item
from train.data.views import Augmentation, draw_color, draw_view, render_image, render_mask, sample_generator
from train.errors import TrainError


class DataError(TrainError):
    """An image or target of a sample is missing or not what the store was made from."""


class Shown(NamedTuple):
    """A decoded image and which part of the original it is.

    `size` is (width, height) of the original; `to_source` maps the image's coordinates to the original's (None: the
    image is the whole original).
    """

    image: Image.Image
    size: tuple[int, int]
    to_source: View | None = None

    def into_image(self, view: View) -> View:
        """`view` of the original as a view of `image`: to render it, or to draw what was predicted in it."""
        return view if self.to_source is None else self.to_source.inverse().compose(view)


def path_of(key: str, data_root: Path | str | None) -> Path:
    """The path of a sample's file. Raises DataError for a key that leads out of the data set's root."""
    if Path(key).is_absolute() or ".." in Path(key).parts:
        raise DataError(
            f"key {key!r} leads out of the data set's root: the store is damaged or was made by others"
        )
    path = path_on_disk(Path(data_root or ".") / key)
    if not key.isascii() and not path.exists():
        # Keys are in Unicode NFC; files that came from macOS may have kept their decomposed names.
        decomposed = Path(data_root or ".") / unicodedata.normalize("NFD", key)
        return decomposed if decomposed.exists() else path
    return path


class ImageReader:
    """Reads images and masks of one split; picklable, and safe to use in forked workers.

    `split` is a reader of the store; `data_root` is used when the store holds no images; `preprocessing` is the
    store's: `images/raw` went through it. Files are compared with the stored content hash, so that features never
    meet another image.
    """

    def __init__(
        self,
        split: Split,
        data_root: Path | str | None,
        preprocessing: Preprocessing,
        bit_depth: int | None = None,
    ) -> None:
        """`preprocessing`: the store's. `bit_depth`: of 16-bit gray images, where it is not the store's."""
        self.split, self.data_root, self.preprocessing = split, data_root, preprocessing
        self.bit_depth = bit_depth or preprocessing.bit_depth
        names = set(split.names)
        self.kind = "jpeg" if IMAGES_ENCODED in names else "raw" if IMAGES_RAW in names else "files"

    def read(self, row: int, target_size: int) -> Shown:
        """The image of a row, decoded at no less than `target_size` pixels a side where the format allows it.

        Raises DataError naming the key.
        """
        if self.kind == "raw":
            return self.read_raw(row)
        data = self.stored_bytes(row) if self.kind == "jpeg" else self.file_bytes(row)
        try:
            # The extraction has chosen the cap (--max-pixels); what it took is taken here, too.
            decoded = decode(
                data,
                target_size=target_size,
                max_pixels=MOST_PIXELS,
                bit_depth=self.bit_depth,
            )
        except ImageError as error:
            raise DataError(f"image {self.key(row)}: {error.reason}") from None
        return Shown(decoded.image, decoded.size)

    def read_raw(self, row: int) -> Shown:
        """`images/raw` shows what the teacher saw: its resize policy has been applied already."""
        pixels = self.split.gather(np.array([row]), [IMAGES_RAW])[IMAGES_RAW][0]
        width, height = (int(side) for side in self.split.gather(np.array([row]), [SIZES])[SIZES][0])
        size = (max(width, 1), max(height, 1))
        view = resize_view(self.preprocessing.resize, size, self.preprocessing.image_size)
        return Shown(Image.fromarray(pixels), size, view)

    def stored_bytes(self, row: int) -> bytes:
        data = bytes(self.split.ragged(np.array([row]), IMAGES_ENCODED)[0])
        if not data:
            raise DataError(f"image {self.key(row)}: the store holds no bytes for it")
        return data

    def file_bytes(self, row: int) -> bytes:
        """The file's bytes, checked against the stored hash."""
        key = self.key(row)
        path = path_of(key, self.data_root)
        try:
            data = read_regular(path)
        except OSError as error:
            raise DataError(
                f"image {key}: cannot be read at {path} ({error.strerror or error}): pass --data-root, or extract "
                "with --images jpeg so that the store is enough"
            ) from None
        expected = self.split.gather(np.array([row]), [CONTENT])[CONTENT][0].tobytes()
        if any(expected) and blake2b(data, digest_size=16).digest() != expected:
            raise DataError(
                f"image {key}: {path} changed since the store was made (content hash differs): re-extract"
            )
        return data

    def read_mask(self, row: int) -> Image.Image | None:
        """The class mask of a row, one gray value per class (255: ignored); None for a row without a mask."""
        data = bytes(self.split.ragged(np.array([row]), MASK)[0])
        if not data:
            return None
        image = Image.open(io.BytesIO(data))
        # A palette's indices are the classes; converting to gray would replace them by luminances.
        return Image.fromarray(np.asarray(image)) if image.mode == "P" else image.convert("L")

    def key(self, row: int) -> str:
        return str(self.split.keys[row])


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How a data set shows its images: side in pixels, resize policy, augmentation, seed."""

    image_size: int
    policy: str
    augmentation: Augmentation
    seed: int
    masks: bool = False
    recorded_views: int = 0


class Views(Dataset[Any], ABC):
    """Items of a plan → decoded, augmented samples. A function of (seed, epoch, key) only.

    An error for the user comes back as a sample: a worker process would bury its text in a traceback.
    """

    def __getitem__(self, item: Item) -> dict[str, Any] | DistillError:
        try:
            return self.show(item)
        except DistillError as error:
            return error

    @abstractmethod
    def show(self, item: Item) -> dict[str, Any]:
        """The sample of an item. Raises DataError naming its key."""


class ImageViews(Views):
    """Images of one split."""

    def __init__(self, reader: ImageReader, settings: ViewSettings) -> None:
        self.reader, self.settings = reader, settings

    def show(self, item: Item) -> dict[str, Any]:
        settings, reader = self.settings, self.reader
        shown = reader.read(item.row, decode_size(settings))
        generator = sample_generator(settings.seed, item.showing, reader.key(item.row))
        base = resize_view(settings.policy, shown.size, settings.image_size)
        recorded = -1
        if settings.recorded_views:
            recorded = int(generator.integers(settings.recorded_views))
            view = self.recorded_view(item.row, recorded)
        else:
            view = draw_view(settings.augmentation, generator, base)
        color = draw_color(settings.augmentation, generator)
        pixels = render_image(shown.image, shown.into_image(view), settings.image_size, color)
        sample = {
            "row": item.row,
            "weight": item.weight,
            "image": pixels,
            "view": view.matrix,
            "recorded": recorded,
        }
        if settings.masks:
            mask = reader.read_mask(item.row)
            # A row without a mask is no background: nothing of it is labeled.
            sample["mask"] = (
                np.full((settings.image_size,) * 2, IGNORE, np.uint8)
                if mask is None
                else render_mask(mask, view, settings.image_size)
            )
        return sample

    def recorded_view(self, row: int, index: int) -> View:
        return View(self.reader.split.gather(np.array([row]), [VIEWS_GEOMETRY])[VIEWS_GEOMETRY][0][index])


def decode_size(settings: ViewSettings) -> int:
    """Pixels a side that a decoded JPEG keeps at least, so that the smallest crop is not magnified."""
    scale = settings.augmentation.crop_scale[0] if not settings.recorded_views else 0.35
    return int(np.ceil(settings.image_size / np.sqrt(scale)))
