"""Views: which point of the original image each point of an image shown to a network comes from.

Every place a network sees an image through (a resize policy, a crop, a flip, any affine augmentation) is one
`View`: an affine map from *view* coordinates to *source* coordinates. Both are normalized: x first, y second,
(0, 0) the outer top left corner, (1, 1) the outer bottom right corner, and pixel or grid cell `i` of `n` has its
center at `(i + 0.5) / n`. Source coordinates belong to the original image with its EXIF orientation applied.

Because both sides are normalized, a view does not depend on the resolution of either image, and the position of
a student's cell in the teacher's grid is `teacher_view.inverse().compose(student_view).apply(cell_centers)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, cos, hypot, radians, sin, tan
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

ResizePolicy = Literal["squash", "letterbox", "center-crop"]
RESIZE_POLICIES: tuple[str, ...] = get_args(ResizePolicy)

# The mean color of Qwen's (CLIP's) normalization: padding becomes about zero for the network.
PADDING_COLOR = (122, 116, 104)

# How far, in output pixels, an edge may be from a whole pixel and still count as on it.
_EDGE_TOLERANCE = 1e-6

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class View:
    """An affine map, view coordinates → source coordinates: `source = matrix[:, :2] @ view + matrix[:, 2]`.

    `matrix` is float64 [2, 3]; it is copied and made read-only. Raises ValueError for another shape and for
    numbers that are not finite.
    """

    matrix: FloatArray

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (2, 3):
            raise ValueError(f"a view's matrix has shape [2, 3], got {list(matrix.shape)}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"a view's matrix must be finite, got {matrix.tolist()}")
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and np.array_equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash(self.matrix.tobytes())

    def __reduce__(self) -> tuple[type[View], tuple[FloatArray]]:
        return View, (np.array(self.matrix),)

    @classmethod
    def identity(cls) -> View:
        """The whole image, each axis stretched by itself: the view of the `squash` policy."""
        return cls(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))

    @classmethod
    def crop(cls, left: float, top: float, right: float, bottom: float) -> View:
        """The axis-parallel rectangle of the source, in normalized coordinates; it may reach outside [0, 1]."""
        return cls(np.array([[right - left, 0.0, left], [0.0, bottom - top, top]]))

    @classmethod
    def flip(cls, horizontal: bool = True, vertical: bool = False) -> View:
        """The image mirrored left to right (`horizontal`), top to bottom (`vertical`), or both."""
        left, right = (1.0, 0.0) if horizontal else (0.0, 1.0)
        top, bottom = (1.0, 0.0) if vertical else (0.0, 1.0)
        return cls.crop(left, top, right, bottom)

    @classmethod
    def affine(
        cls,
        *,
        angle_degrees: float = 0.0,
        scale: float = 1.0,
        shear_degrees: float = 0.0,
        shift: tuple[float, float] = (0.0, 0.0),
        aspect: float = 1.0,
    ) -> View:
        """Rotate, zoom, shear and shift about the image's center.

        The picture turns clockwise by `angle_degrees`, grows by `scale`, and moves by `shift` (fractions of the
        view, right and down). `aspect` is width / height of the view in pixels, so that rotations stay rigid
        when it is not square.
        """
        turn, shear = radians(angle_degrees), tan(radians(shear_degrees))
        rotation = np.array([[cos(turn), -sin(turn)], [sin(turn), cos(turn)]])
        forward = scale * rotation @ np.array([[1.0, shear], [0.0, 1.0]])  # source → view, square units
        stretch = np.diag([aspect, 1.0])
        linear = np.linalg.inv(np.linalg.inv(stretch) @ forward @ stretch)
        center = np.array([0.5, 0.5])
        offset = center - linear @ (center + np.asarray(shift, dtype=np.float64))
        return cls(np.column_stack([linear, offset]))

    def pixels(self, view_size: Sequence[int], source_size: Sequence[int]) -> FloatArray:
        """The map of view pixels to source pixels, float64 [2, 3]; sizes are (width, height).

        Pixel coordinates are those of edges: the center of the first pixel is at 0.5.
        """
        to_unit = np.diag([1.0 / view_size[0], 1.0 / view_size[1]])
        to_pixels = np.diag([float(source_size[0]), float(source_size[1])])
        return np.column_stack([to_pixels @ self.matrix[:, :2] @ to_unit, to_pixels @ self.matrix[:, 2]])

    def compose(self, inner: View) -> View:
        """`self ∘ inner`: first `inner`, then `self`; `a.compose(b).apply(p) == a.apply(b.apply(p))`."""
        linear = self.matrix[:, :2] @ inner.matrix[:, :2]
        offset = self.matrix[:, :2] @ inner.matrix[:, 2] + self.matrix[:, 2]
        return View(np.column_stack([linear, offset]))

    def inverse(self) -> View:
        """Source coordinates → view coordinates. Raises ValueError when the view has no area."""
        if abs(self.determinant) < 1e-12:
            raise ValueError(f"a view without area cannot be inverted: {self.matrix.tolist()}")
        linear = np.linalg.inv(self.matrix[:, :2])
        return View(np.column_stack([linear, -linear @ self.matrix[:, 2]]))

    @property
    def determinant(self) -> float:
        """The share of the source's area that the view covers; negative when the view mirrors."""
        return float(np.linalg.det(self.matrix[:, :2]))

    def apply(self, points: ArrayLike) -> FloatArray:
        """Source coordinates, float64 [..., 2], of the view coordinates `points` [..., 2]."""
        return np.asarray(points, dtype=np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def inside(self, height: int, width: int) -> NDArray[np.bool_]:
        """Bool [height, width]: which cells of the view have their center inside the source image."""
        source = self.apply(cell_centers(height, width))
        visible: NDArray[np.bool_] = np.all((source >= 0.0) & (source <= 1.0), axis=-1)
        return visible

    def boxes_to_view(self, boxes: ArrayLike) -> FloatArray:
        """Bounds [M, 4] (xyxy) in view coordinates of boxes [M, 4] (xyxy) in normalized source coordinates.

        Nothing is clipped. Under a rotation the bounds of the turned corners are returned.
        """
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        mapped = self.inverse().apply(corners.reshape(-1, 4, 2))
        return np.concatenate([mapped.min(axis=1), mapped.max(axis=1)], axis=1)

    def render(
        self,
        image: Image.Image,
        size: int | tuple[int, int],
        fill: int | tuple[int, ...] = PADDING_COLOR,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        reducing_gap: float | None = None,
    ) -> Image.Image:
        """The view of `image` as a new image of `size` (width, height; one number: square).

        Shrinking is anti-aliased, except with `Resampling.NEAREST` (masks), which never mixes pixels. Pixels
        whose center lies outside the source take `fill`. `reducing_gap` is Pillow's (faster, less exact).
        """
        width, height = (size, size) if isinstance(size, int) else size
        whole = _whole_pixel_boxes(self, (width, height), image.size)
        if whole is not None:
            return _render_by_resize(self, image, (width, height), whole, fill, resample, reducing_gap)
        return _render_by_transform(self, image, (width, height), fill, resample, reducing_gap)


def flips_horizontally(matrices: ArrayLike) -> NDArray[np.bool_]:
    """Bool [...]: which views [..., 2, 3] show the source mirrored left to right, turned by less than a quarter.

    A view that mirrors top to bottom is not among them: it is a horizontal flip that is upside down besides.
    """
    across, down = np.asarray(matrices, dtype=np.float64)[..., 0, :2], np.asarray(matrices)[..., 1, :2]
    mirrors = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0] < 0
    flips: NDArray[np.bool_] = mirrors & (across[..., 0] < 0)
    return flips


def cell_centers(height: int, width: int) -> FloatArray:
    """Normalized centers (x, y) of a grid's cells, float64 [height, width, 2], raster order."""
    grid = np.empty((height, width, 2), dtype=np.float64)
    grid[..., 0] = (np.arange(width) + 0.5) / width
    grid[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    return grid


def resize_view(policy: str, source_size: tuple[int, int], view_size: int | tuple[int, int]) -> View:
    """The view of a resize policy for an image of `source_size` (width, height); see `content_rectangle`."""
    out_width, out_height = (view_size, view_size) if isinstance(view_size, int) else view_size
    left, top, width, height = content_rectangle(policy, source_size, view_size)
    return View.crop(-left / width, -top / height, (out_width - left) / width, (out_height - top) / height)


def content_rectangle(
    policy: str, source_size: tuple[int, int], view_size: int | tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a resize policy puts the whole source in the view: (left, top, width, height), whole output pixels.

    `squash` stretches the image over the view; `letterbox` fits it inside, the rest is padding; `center-crop`
    covers the view, what is left over sticks out on two sides (negative left or top). Rounding to whole pixels
    makes the scales of the two axes differ slightly; views built from it contain the exact scales.
    Raises ValueError for another policy.
    """
    out_width, out_height = (view_size, view_size) if isinstance(view_size, int) else view_size
    if policy == "squash":
        return 0, 0, out_width, out_height
    if policy not in RESIZE_POLICIES:
        raise ValueError(f"resize policy {policy!r}: expected one of {', '.join(RESIZE_POLICIES)}")
    scales = out_width / source_size[0], out_height / source_size[1]
    if policy == "letterbox":
        width, height = (max(1, round(side * min(scales))) for side in source_size)
    else:
        width, height = (round(side * max(scales)) for side in source_size)
        width, height = max(out_width, width), max(out_height, height)
    return (out_width - width) // 2, (out_height - height) // 2, width, height


def _axis_span(scale: float, offset: float, count: int, extent: int) -> tuple[int, int, float, float] | None:
    """Output pixels [first, last) inside the source along one axis, and their source pixels [low, high).

    None when the source's edge falls between two output pixels, or nothing is visible.
    """
    edges = sorted((-offset / scale * count, (1.0 - offset) / scale * count))
    first, last = max(0.0, edges[0]), min(float(count), edges[1])
    if (
        last - first < 1.0 - _EDGE_TOLERANCE
        or max(abs(v - round(v)) for v in (first, last)) > _EDGE_TOLERANCE
    ):
        return None
    sides = sorted((scale * v / count + offset) * extent for v in (round(first), round(last)))
    return round(first), round(last), max(0.0, sides[0]), min(float(extent), sides[1])


def _whole_pixel_boxes(
    view: View, size: tuple[int, int], source_size: tuple[int, int]
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]] | None:
    """For a view without rotation: the output rectangle (whole pixels) and source box it shows; else None."""
    (a, b, c), (d, e, f) = view.matrix.tolist()
    if b != 0.0 or d != 0.0 or a == 0.0 or e == 0.0:
        return None
    x = _axis_span(a, c, size[0], source_size[0])
    y = _axis_span(e, f, size[1], source_size[1])
    if x is None or y is None or x[3] - x[2] < 1e-3 or y[3] - y[2] < 1e-3:
        return None
    return (x[0], y[0], x[1], y[1]), (x[2], y[2], x[3], y[3])


def _render_by_resize(
    view: View,
    image: Image.Image,
    size: tuple[int, int],
    boxes: tuple[tuple[int, int, int, int], tuple[float, float, float, float]],
    fill: int | tuple[int, ...],
    resample: Image.Resampling,
    reducing_gap: float | None,
) -> Image.Image:
    (left, top, right, bottom), source = boxes
    inner = image.resize((right - left, bottom - top), resample, box=source, reducing_gap=reducing_gap)
    if view.matrix[0, 0] < 0:
        inner = inner.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.matrix[1, 1] < 0:
        inner = inner.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if inner.size == size:
        return inner
    canvas = Image.new(image.mode, size, _fill_for(image.mode, fill))
    canvas.paste(inner, (left, top))
    return canvas


def _render_by_transform(
    view: View,
    image: Image.Image,
    size: tuple[int, int],
    fill: int | tuple[int, ...],
    resample: Image.Resampling,
    reducing_gap: float | None,
) -> Image.Image:
    # Pillow's transform does not anti-alias, so the source is shrunk first to about the output's resolution;
    # normalized coordinates stay what they are.
    to_source = view.pixels(size, image.size)
    if resample != Image.Resampling.NEAREST:
        shrink = [max(1.0, hypot(*row[:2])) for row in to_source]
        smaller = (max(1, ceil(image.width / shrink[0])), max(1, ceil(image.height / shrink[1])))
        if smaller != image.size:
            image = image.resize(smaller, resample, reducing_gap=reducing_gap)
            to_source = view.pixels(size, image.size)
    if resample not in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        resample = Image.Resampling.BICUBIC
    data = tuple(float(v) for v in to_source.reshape(-1))
    color = _fill_for(image.mode, fill)
    return image.transform(size, Image.Transform.AFFINE, data, resample=resample, fillcolor=color)


def _fill_for(mode: str, fill: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """`fill` in the form the mode wants: one number for single-band images, a tuple otherwise."""
    bands = Image.getmodebands(mode)
    if bands == 1:
        return fill if isinstance(fill, int) else fill[0]
    return (fill,) * bands if isinstance(fill, int) else fill
