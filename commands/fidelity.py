"""What augmentation costs: a stored grid carried through a view, against what the teacher says of the view itself.

Training moves the stored grid with the image (`train.distill.transport`). The teacher, shown the moved image, would not
answer exactly so: it sees other context, other scales, and mirrored shapes. Both are compared here on the store's own
images, by the code that training uses.

Shapes: `B` images, `g` cells a side, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from extract.encode import resample_grid
from extract.plan import encoding_of
from extract.verify import choose_rows, find_samples
from imaging.decode import MOST_PIXELS, decode
from imaging.geometry import View, flips_horizontally, resize_view
from store.format import GRID, VIEWS_GRID
from train.data.views import AUGMENTATIONS, draw_crop, render_image
from train.distill.projector import TargetStandardizer
from train.distill.transport import apply_transport, relate_views, transport_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from extract.teachers import Teacher
    from store.reader import Split, Store

ROTATION_DEGREES = 15.0
# The mosaic shows four whole images, each in a quarter: what of it an image's view must look at.
QUARTERS = tuple(View.crop(-x, -y, 2 - x, 2 - y) for y in (0, 1) for x in (0, 1))
# A cell counts where the image covers all of it.
WHOLE = 0.999


@dataclass(frozen=True)
class Fidelity:
    """One kind of view: cosine of standardized features, carried against encoded, over `cells` grid cells.

    exact: the store has the teacher's answer to this view, and nothing is carried.
    """

    view: str
    cells: int
    mean: float
    first_percentile: float
    exact: bool = False


@dataclass(frozen=True)
class Subject:
    """An image of the store with its grid float32 [1, g, g, D] in true units, and the view that the teacher had of it.

    mirrored: the grid of its mirror image, where that is stored.
    """

    image: Image
    grid: Tensor
    base: View
    mirrored: Tensor | None = None

    def shown_by(self, view: View) -> tuple[Tensor, View]:
        """The stored grid that training uses for a view of the image, and the view that the grid shows."""
        if self.mirrored is None or not flips_horizontally(view.matrix):
            return self.grid, self.base
        return self.mirrored, self.base.compose(View.flip())


def view_fidelity(
    store: Store, teacher: Teacher, *, samples: int = 16, data: str | None = None, seed: int = 0
) -> list[Fidelity]:
    """Compare carried and encoded grids for no change, flips, crops, rotations and mosaics of up to `samples` images.

    Empty for a store without grids or of clips. `none` draws the same view as training draws it, which shows what the
    resampling alone changes.
    """
    reference = max(store.values(), key=len)
    statistics = reference.statistics.get(GRID)
    if GRID not in reference.names or statistics is None or encoding_of(store.manifest).frames:
        return []
    subjects = load_subjects(store, samples, data)
    standardize = TargetStandardizer(statistics.mean, statistics.std)
    generator = np.random.default_rng(seed)
    crops = [draw_crop(AUGMENTATIONS["full"], generator) for _ in subjects]
    angles = generator.choice([-ROTATION_DEGREES, ROTATION_DEGREES], len(subjects))
    kinds: dict[str, list[tuple[list[Subject], list[View]]]] = {
        "none": [([subject], [View.identity()]) for subject in subjects],
        "flip": [([subject], [View.flip()]) for subject in subjects],
        "crop": [([subject], [view]) for subject, view in zip(subjects, crops, strict=True)],
        "rotation": [
            ([subject], [View.affine(angle_degrees=float(angle))])
            for subject, angle in zip(subjects, angles, strict=True)
        ],
        "mosaic": [(subjects[first : first + 4], list(QUARTERS)) for first in range(0, len(subjects) - 3, 4)],
    }
    found = []
    for kind, pictures in kinds.items():
        cosines = [compare(teacher, standardize, parts, views) for parts, views in pictures]
        values = np.concatenate(cosines) if cosines else np.empty(0)
        if len(values):
            exact = kind == "flip" and subjects[0].mirrored is not None
            found.append(
                Fidelity(
                    kind, len(values), float(values.mean()), float(np.quantile(values, 0.01)), exact=exact
                )
            )
    return found


def load_subjects(store: Store, count: int, data: str | None) -> list[Subject]:
    """Up to `count` images spread over the store, as `cli verify` chooses them."""
    manifest = store.manifest
    size, policy = manifest.preprocessing.image_size, manifest.preprocessing.resize
    chosen = choose_rows(store, count)
    found = find_samples(store, chosen, data)
    subjects = []
    for split, rows in chosen.items():
        grids = read_grids(store[split], rows, GRID)
        exact = manifest.exact_flip and VIEWS_GRID in store[split].names
        mirrored = (
            [grid[:, 0] for grid in read_grids(store[split], rows, VIEWS_GRID)]
            if exact
            else [None] * len(rows)
        )
        for row, grid, mirror in zip(rows, grids, mirrored, strict=True):
            decoded = decode(
                found[split][row].read(), max_pixels=MOST_PIXELS, bit_depth=manifest.preprocessing.bit_depth
            )
            base = resize_view(policy, decoded.image.size, size)
            subjects.append(Subject(decoded.image, grid, base, mirror))
    return subjects


def read_grids(split: Split, rows: list[int], name: str) -> list[Tensor]:
    """The rows' grids in true units, each float32 [1, ...]."""
    values = np.asarray(split.true_values(np.asarray(rows), name), np.float32)
    return list(torch.from_numpy(values)[:, None])


def compare(
    teacher: Teacher, standardize: TargetStandardizer, parts: list[Subject], views: list[View]
) -> NDArray[np.float64]:
    """Cosines of the cells that the parts cover in the picture that shows each part through its view."""
    size = teacher.preprocessing.image_size
    side = parts[0].grid.shape[1]
    picture = np.empty((size, size, 3), np.uint8)
    carried, covered = torch.zeros(side, side, parts[0].grid.shape[-1]), torch.zeros(side, side)
    for part, view in zip(parts, views, strict=True):
        seen = part.base.compose(view)
        # Of several parts, each fills its own area of the picture.
        shown = view.inside(size, size) if len(parts) > 1 else np.ones((size, size), np.bool_)
        picture[shown] = render_image(part.image, seen, size)[shown]
        grid, base = part.shown_by(seen)
        geometry = relate_views(seen.matrix[None], base.matrix[None])
        moved = apply_transport(grid, transport_weights(geometry, side, side, (side, side)))
        whole = moved.weight[0] >= WHOLE
        carried[whole] = moved.cells[0][whole]
        covered[whole] = 1
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous()
    encoded = resample_grid(teacher.encode(pixels).grid.float().cpu(), side)[0]
    kept = covered > 0
    cosine = torch.nn.functional.cosine_similarity(
        standardize(carried[kept]), standardize(encoded[kept]), dim=-1
    )
    return np.asarray(cosine.double().numpy())
