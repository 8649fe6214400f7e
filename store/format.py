"""Format version 1, defined only here: every array's name, dtype and axis order, and the manifest.

Axis letters: `N` rows of a split, `D` feature width, `g` grid side, `C` classes, `K` recorded views,
`F` frames of all rows together, `M` boxes (or bytes) of all rows together, `S` image side in pixels.

A store is a Zarr v3 group with one sub-group a split. The manifest is the root group's attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1

# Arrays of fixed width, one entry a row.
POOLED = "features/pooled"  # [N, D] float16: mean over the tokens inside the image
GRID = "features/grid"  # [N, g, g, D] float16: raster order, y before x
# Further layers: features/grid@L [N, g_L, g_L, D_L] and views/grid@L, where L is the layer's number, counted from 0.
LAYER_MARK = "@"
LOGITS = "logits"  # logits/<name> [N, C] float16
MAPS = "maps"  # maps/<name> [N, s, s, C] uint8: -log p of each class in steps of 1 / MAP_STEPS, raster order
PROBE = "probe"  # the logits, and maps, that a probe of the features gives
VALID = "valid"  # [N] bool: false for a bad image, whose features are NaN
SIZES = "sizes"  # [N, 2] int32: width, height of the original in pixels, after EXIF; 0 when unreadable
CONTENT = "content"  # [N, 16] uint8: blake2b-128 of the file's bytes
TARGETS = "targets/"  # what the names of all targets begin with
LABEL = "targets/label"  # [N] int32: class index; -1 for a row without a label
IMAGES_FRAMES = (
    "images/frames"  # [N, T, 2] int64: start and length of each frame's JPEG in the clip's encoded bytes
)
IMAGES_RAW = "images/raw"  # [N, S, S, 3] uint8
VIEWS_GEOMETRY = "views/geometry"  # [N, K, 2, 3] float64: view → source, normalized coordinates
VIEWS_POOLED = "views/pooled"  # [N, K, D] float16
VIEWS_GRID = "views/grid"  # [N, K, g, g, D] float16

# Ragged arrays: <parent>/offsets [N+1] int64 gives the range of each row's entries in <parent>/*.
FRAMES = "features/frames/values"  # [F, D] float16: one row a frame (pair)
BOXES = "targets/boxes/values"  # [M, 4] float32: x0, y0, x1, y1 in pixels of the original
BOX_CLASSES = "targets/boxes/classes"  # [M] int32; a single -1, with a box of zeros: the row is not labeled
MASK = "targets/mask/values"  # [M] uint8: bytes of a PNG whose gray value is the class, 255 ignored
IMAGES_ENCODED = "images/encoded/values"  # [M] uint8: bytes of the image file
REASONS = "reasons/values"  # [M] uint8: UTF-8 text, why a row is invalid; empty for a valid row

# Beside an array that is not stored as plain float16 (see docs/store-format.md).
TOKEN_SCALE = ".token_scale"  # <array>.token_scale [N, ...] float32: int8 scale of every token
COMPONENTS = ".components"  # <array>.components [k, D] float32: PCA coefficients @ components = features

# A further teacher's arrays have the first teacher's names below teachers/<name>/: its features, recorded views (their
# geometry is shared), `valid` (where the row and this teacher's features are sound) and `reasons`.
TEACHERS = "teachers/"

# Keys, written with the plan. The index makes look-up possible without reading the keys.
KEY_VALUES = "keys/values"  # [M] uint8: UTF-8
KEY_OFFSETS = "keys/offsets"  # [N+1] int64
KEY_HASHES = "keys/hashes"  # [N] uint64, ascending: blake2b-64 of the key
KEY_ROWS = "keys/rows"  # [N] int64: the row of each hash

KEY_ARRAYS = (KEY_VALUES, KEY_OFFSETS, KEY_HASHES, KEY_ROWS)

# In the manifest's options where the stored grid's side does not divide the teacher's: how it was made smaller. Absent
# from stores of adaptive pooling, whose cells overlap, as `--grid 7` was before.
GRID_RULE = "grid_resampling"
# In the manifest's options where further layers are stored: {number: side of the grid}.
LAYERS = "layers"
AREA = "area"
# In the manifest's options where the one stored view of each image is its mirror image (`cli extract --views flip`).
EXACT_VIEW = "exact_view"
FLIP = "flip"

# Soft class maps: 255 stands for a probability of at most exp(-255 / 16) = 1.2e-7. The step is a relative error of 3 %.
MAP_STEPS = 16

OFFSETS = "offsets"
# What the manifest's digest covers besides the keys: a changed label is other data, as a changed image is.
DIGESTED = (
    SIZES,
    CONTENT,
    VALID,
    LABEL,
    BOXES,
    BOX_CLASSES,
    "targets/boxes/offsets",
    MASK,
    "targets/mask/offsets",
)
NO_LABEL = -1
IGNORE_INDEX = 255
# Printed with everything made with a teacher of random weights.
RANDOM_WEIGHTS_NOTICE = "random weights: to try the commands, not for real use"
# Written by the store itself; `StoreWriter.append` takes them as arguments, not as arrays.
OWN_ARRAYS = (VALID, REASONS)
# Large rows go straight into their shard files; the rest waits in the commit log until the end.
DIRECT_PREFIXES = ("features/", "views/", "images/", "maps/")
FEATURES_JOB = "features"
# What each teacher has of its own; everything else of a split belongs to the images.
TEACHERS_OWN = ("features/", VIEWS_POOLED, VIEWS_GRID, f"{LOGITS}/", f"{MAPS}/", VALID, "reasons/")
# Beside the Zarr arrays: what is being written, and the checksums of what was.
WORK_FOLDER = ".work"
COMMITS_FOLDER = ".commits"
# Beside them too, not part of the format: what the extractor alone needs; how long it took, what the probe measured.
NOTES_FOLDER = ".extract"
LEDGER = "bad_images.jsonl"  # one line for each bad image; absent where there is none
MEASURED_FILE = f"{NOTES_FOLDER}/measured.json"


def commits_file(split: str, *, keys: bool = False) -> str:
    """The file with the checksums of a split's arrays, or of its keys."""
    return f"{COMMITS_FOLDER}/{split}{'.keys' if keys else ''}.json"


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-][A-Za-z0-9_.@\-]*(/[A-Za-z0-9_\-][A-Za-z0-9_.@\-]*)*$")]


class Model(BaseModel):
    """Frozen, keyword-only, unknown fields rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherSpec(Model):
    """Who made the features. Two stores with equal specs hold comparable features."""

    name: str
    fingerprint: str
    layer: str
    width: int = Field(gt=0)
    dtype: str = "float32"
    random_weights: bool = False
    options: dict[str, Any] = {}


class Preprocessing(Model):
    """What happened to the image before the teacher saw it. Part of the teacher."""

    image_size: int = Field(gt=0)
    resize: Literal["squash", "letterbox", "center-crop"] = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    options: dict[str, Any] = {}

    @property
    def bit_depth(self) -> int:
        """Bits of a 16-bit gray image that are used: 2^bit_depth − 1 is white. All 16 by default."""
        return int(self.options.get("bit_depth", 16))


class ArraySpec(Model):
    """One array of a split. `row_shape` is the shape without its first axis.

    `scaled` arrays hold true value / scale, with a power-of-two scale per channel (last axis).
    `encoding` is how true values are computed; see `Split.true_values`.
    A ragged array's first axis counts entries, not rows; its `offsets` are beside it.
    """

    name: Name
    row_shape: tuple[int, ...] = ()
    dtype: Literal["bool", "uint8", "int8", "int32", "int64", "uint64", "float16", "float32", "float64"]
    ragged: bool = False
    scaled: bool = False
    codec: Literal["none", "zstd"] = "none"
    encoding: Literal["plain", "int8", "pca"] = "plain"

    @property
    def direct(self) -> bool:
        """Whether rows go straight into the final shard files."""
        return not self.ragged and teacher_of(self.name)[1].startswith(DIRECT_PREFIXES)

    @property
    def offsets_name(self) -> str:
        return self.name.rpartition("/")[0] + "/" + OFFSETS

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row_shape, dtype=np.int64))


class TeacherSection(Model):
    """What the manifest records of a further teacher: the fields of `Manifest` that differ from teacher to teacher."""

    teacher: TeacherSpec
    preprocessing: Preprocessing
    grid: int | None = None
    software: dict[str, str] = {}
    license: str | None = None
    options: dict[str, Any] = {}


class Manifest(Model):
    """The root group's attributes: all that a reader must know before it trusts the arrays."""

    format_version: int = FORMAT_VERSION
    complete: bool = False
    teacher: TeacherSpec
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    task: str | None = None
    source: str | None = None
    data_root: str | None = None
    grid: int | None = None
    views: int = 0
    images: Literal["none", "jpeg", "raw"] = "none"
    software: dict[str, str] = {}
    license: str | None = None  # of the teacher's published weights; None: not known
    options: dict[str, Any] = {}
    teachers: dict[str, TeacherSection] = {}  # further teachers, whose arrays are below teachers/<name>/
    # Filled in by the store.
    splits: dict[str, int] = {}
    arrays: tuple[ArraySpec, ...] = ()
    shard_rows: int = 0
    batch_rows: int = 0
    added: tuple[str, ...] = ()  # arrays of later jobs: they go when rows are appended
    digest: str | None = None

    @property
    def exact_flip(self) -> bool:
        """Whether the one stored view of each image is what the teacher saw of it, mirrored left to right."""
        return self.options.get(EXACT_VIEW) == FLIP

    @property
    def teacher_names(self) -> list[str]:
        """The first teacher's name, then those under which further ones were added."""
        return [self.teacher.name, *self.teachers]

    def of_teacher(self, name: str) -> Manifest:
        """The manifest as if this further teacher were the store's only one; arrays under their names without prefix."""
        prefix = f"{TEACHERS}{name}/"
        own = [
            spec.model_copy(update={"name": spec.name.removeprefix(prefix)})
            for spec in self.arrays
            if spec.name.startswith(prefix)
        ]
        shared = [
            spec for spec in self.arrays if not of_one_teacher(spec.name) and not teacher_of(spec.name)[0]
        ]
        section = dict(self.teachers[name])
        return self.model_copy(
            update={**section, "arrays": (*own, *shared), "teachers": {}, "added": ()},
        )

    def with_arrays(self, arrays: Iterable[ArraySpec]) -> Manifest:
        """The manifest of a store that has only these arrays: without teachers that have none of them."""
        kept = tuple(arrays)
        names = {spec.name for spec in kept}
        teachers = {
            name: section
            for name, section in self.teachers.items()
            if any(array.startswith(f"{TEACHERS}{name}/") for array in names)
        }
        added = tuple(name for name in self.added if name in names)
        return self.model_copy(update={"arrays": kept, "added": added, "teachers": teachers})


def teacher_of(array: str) -> tuple[str, str]:
    """The prefix of a further teacher's array, `teachers/<name>/` or empty, and the array's name without it."""
    if not array.startswith(TEACHERS):
        return "", array
    name, _, rest = array.removeprefix(TEACHERS).partition("/")
    return f"{TEACHERS}{name}/", rest


def valid_array(array: str) -> str:
    """The name of the `valid` array that says which rows of an array hold features."""
    return teacher_of(array)[0] + VALID


def of_one_teacher(array: str) -> bool:
    """Whether an array (its name without prefix) is one teacher's; the others belong to the images."""
    return array.startswith(TEACHERS_OWN)


def view_array(name: str) -> str:
    """The array of recorded views [N, K, ...] that belongs to an array of features [N, ...]."""
    return name.replace("features/", "views/", 1)


def layer_grid(number: int | None, grid: str = GRID) -> str:
    """The name of a layer's grid; None: the last layer's."""
    return grid if number is None else f"{grid}{LAYER_MARK}{number}"


def stored_layers(arrays: Iterable[str]) -> set[int]:
    """Numbers of the further layers whose grids are among these arrays."""
    start = GRID + LAYER_MARK
    return {int(name.removeprefix(start)) for name in arrays if name.startswith(start)}


def feature_arrays(
    width: int,
    *,
    grid: int | None = None,
    views: int = 0,
    frames: bool = False,
    layers: Mapping[int, tuple[int, int]] | None = None,
) -> list[ArraySpec]:
    """The feature arrays of a store whose teacher is `width` wide. layers: side and width of further layers' grids."""
    half: dict[str, Any] = {"dtype": "float16", "scaled": True}
    specs = [ArraySpec(name=POOLED, row_shape=(width,), **half)]
    if grid:
        specs.append(ArraySpec(name=GRID, row_shape=(grid, grid, width), **half))
    for number, (side, wide) in (layers or {}).items():
        specs.append(ArraySpec(name=layer_grid(number), row_shape=(side, side, wide), **half))
    if frames:
        specs.append(ArraySpec(name=FRAMES, row_shape=(width,), ragged=True, **half))
    if views:
        specs.append(ArraySpec(name=VIEWS_GEOMETRY, row_shape=(views, 2, 3), dtype="float64"))
        specs.append(ArraySpec(name=VIEWS_POOLED, row_shape=(views, width), **half))
    if views and grid:
        specs.append(ArraySpec(name=VIEWS_GRID, row_shape=(views, grid, grid, width), **half))
    for number, (side, wide) in (layers or {}).items() if views else ():
        specs.append(
            ArraySpec(name=layer_grid(number, VIEWS_GRID), row_shape=(views, side, side, wide), **half)
        )
    return specs


def target_arrays(*, label: bool = False, boxes: bool = False, mask: bool = False) -> list[ArraySpec]:
    """Sizes and content of every row, and the targets that the data set has."""
    specs = [
        ArraySpec(name=SIZES, row_shape=(2,), dtype="int32"),
        ArraySpec(name=CONTENT, row_shape=(16,), dtype="uint8"),
    ]
    if label:
        specs.append(ArraySpec(name=LABEL, dtype="int32"))
    if boxes:
        specs.append(ArraySpec(name=BOXES, row_shape=(4,), dtype="float32", ragged=True))
        specs.append(ArraySpec(name=BOX_CLASSES, dtype="int32", ragged=True))
    if mask:
        specs.append(ArraySpec(name=MASK, dtype="uint8", ragged=True))
    return specs


def image_arrays(images: Literal["none", "jpeg", "raw"], side: int, frames: int = 0) -> list[ArraySpec]:
    """The images themselves, when the store is to be enough to train from; `frames` of each sample of clips."""
    if images == "jpeg":
        encoded = ArraySpec(name=IMAGES_ENCODED, dtype="uint8", ragged=True)
        return [encoded, ArraySpec(name=IMAGES_FRAMES, row_shape=(frames, 2), dtype="int64")][
            : 2 if frames else 1
        ]
    if images == "raw":
        return [ArraySpec(name=IMAGES_RAW, row_shape=(side, side, 3), dtype="uint8")]
    return []


def logits_array(name: str, classes: int) -> ArraySpec:
    """Teacher logits `logits/<name>` [N, C]."""
    return ArraySpec(name=f"{LOGITS}/{name}", row_shape=(classes,), dtype="float16")


def map_array(name: str, side: int, classes: int) -> ArraySpec:
    """Soft class maps `maps/<name>` [N, s, s, C] in the geometry of the teacher's view."""
    return ArraySpec(name=f"{MAPS}/{name}", row_shape=(side, side, classes), dtype="uint8")


def own_specs() -> list[ArraySpec]:
    """The arrays that every features job has: `valid` and the reasons of invalid rows."""
    return [ArraySpec(name=VALID, dtype="bool"), ArraySpec(name=REASONS, dtype="uint8", ragged=True)]


def offsets_spec(name: str) -> ArraySpec:
    """The spec of a ragged array's offsets."""
    return ArraySpec(name=name, dtype="int64")


def ragged_groups(specs: Iterable[ArraySpec]) -> dict[str, list[ArraySpec]]:
    """Offsets' name → the ragged arrays that share it."""
    groups: dict[str, list[ArraySpec]] = {}
    for spec in specs:
        if spec.ragged:
            groups.setdefault(spec.offsets_name, []).append(spec)
    return groups
