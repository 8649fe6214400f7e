"""Pascal VOC: one XML file of boxes per image.

Either `JPEGImages/`, `Annotations/`, `ImageSets/Main/{train,val,test}.txt`, or `images/` + `annotations/`, or XML
files beside their images, each of them also inside `train/`, `val/`, `test/`. An XML file and its image have the
same stem. VOC counts pixels from 1 and includes the last one, so a box becomes (xmin − 1, ymin − 1, xmax, ymax);
`one_based=false` takes numbers as they are. Class names are sorted. Objects marked `difficult` are left out unless
`difficult=true`. Images without an XML file have no objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from extract.sources.annotations import BoxedFiles, BoxTable, check_box, read_lines
from extract.sources.base import AnnotationError, Samples, Source, SourceError
from extract.sources.listing import Progress, list_files, make_key, suffix_of
from extract.sources.splitting import SPLIT_NAMES
from files.reading import read_regular
from imaging.decode import IMAGE_SUFFIXES

IMAGE_FOLDERS = ("JPEGImages", "images")
XML_FOLDERS = ("Annotations", "annotations", "labels")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class VocImage:
    """An image's path and its XML file, both relative to the root; None: no objects."""

    path: str
    xml: str | None


def open_voc(
    path: Path,
    *,
    difficult: bool = False,
    one_based: bool = True,
    unlabeled: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Open a VOC data set. `unlabeled`: images without an XML file are not labeled, instead of without objects.

    Raises SourceError, and AnnotationError that names the XML file and line."""
    root = find_root(path)
    images = pair_files(root, progress)
    if not any(image.xml for image in images.values()):
        raise SourceError(f"no XML file beside an image in {root}: expected Annotations/*.xml or image.xml")
    splits = read_splits(root, images)
    objects = {
        image.path: read_xml(root / image.xml, difficult, one_based) if image.xml else []
        for members in splits.values()
        for image in members
    }
    names = tuple(sorted({name for boxes in objects.values() for name, _ in boxes}))
    if not names:
        raise SourceError(f"no objects in any XML file of {root}")
    index = {name: number for number, name in enumerate(names)}
    parts = {
        split: make_samples(root, members, objects, index, unlabeled) for split, members in splits.items()
    }
    return Source(
        kind="voc",
        root=str(root),
        task="detection",
        class_names=names,
        splits=parts,
        notes=() if unlabeled else count_unannotated(splits),
    )


def count_unannotated(splits: Mapping[str, list[VocImage]]) -> tuple[str, ...]:
    """A note on the images without an XML file, which may be background or may have been forgotten."""
    members = {image.path: image for images in splits.values() for image in images}
    missing = sorted(path for path, image in members.items() if image.xml is None)
    if not missing:
        return ()
    return (
        f"{len(missing):,} of {len(members):,} images have no XML file (first: {missing[0]}): taken as images without "
        "objects (source option unlabeled=true: as not labeled)",
    )


def make_samples(
    root: Path,
    members: list[VocImage],
    objects: Mapping[str, list[tuple[str, Box]]],
    index: Mapping[str, int],
    unlabeled: bool,
) -> Samples:
    table = BoxTable()
    for image in members:
        if unlabeled and image.xml is None:
            table.add_unlabeled()
            continue
        found = objects[image.path]
        table.add([box for _, box in found], [index[name] for name, _ in found])
    paths = [image.path for image in members]
    return BoxedFiles(root, paths, [make_key(path) for path in paths], table)


def find_root(path: Path) -> Path:
    """The folder with `JPEGImages`, also when it is the only year inside a `VOCdevkit`."""
    if (path / "JPEGImages").is_dir():
        return path
    nested = sorted(
        folder.parent for folder in [*path.glob("*/JPEGImages"), *path.glob("VOCdevkit/*/JPEGImages")]
    )
    if len(nested) > 1:
        raise SourceError(
            f"{path} holds several VOC data sets ({', '.join(p.name for p in nested)}): give one"
        )
    return nested[0] if nested else path


def pair_files(root: Path, progress: Progress | None) -> dict[str, VocImage]:
    """Image key without suffix → the image and its XML file."""
    xml = {file[: -len(".xml")]: file for file in list_files(root, [".xml"])}
    used_folders = [name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    images = {}
    for path in list_files(root, IMAGE_SUFFIXES, progress):
        if root.joinpath("JPEGImages").is_dir() and not path.startswith("JPEGImages/"):
            continue  # SegmentationClass and the like
        stem = path[: len(path) - len(suffix_of(path))]
        candidates = [stem, *(_mirror(stem, name, other) for name in used_folders for other in XML_FOLDERS)]
        candidates += [_mirror(stem, name, other) for name in IMAGE_FOLDERS for other in XML_FOLDERS]
        images[stem] = VocImage(path, next((xml[name] for name in candidates if name in xml), None))
    return images


def _mirror(stem: str, folder: str, other: str) -> str:
    """`train/images/a` → `train/annotations/a`; the last such folder counts."""
    head, found, tail = ("/" + stem).rpartition(f"/{folder}/")
    return f"{head}/{other}/{tail}".lstrip("/") if found else ""


def read_splits(root: Path, images: Mapping[str, VocImage]) -> dict[str, list[VocImage]]:
    """Members of each split, sorted, from ImageSets/Main, else from the top folders, else all in one."""
    lists = {}
    for name in ("train", "val", "test", "trainval"):
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        if file.exists():
            lists[name] = read_list(file, images)
    if "train" in lists or "val" in lists:
        lists.pop("trainval", None)
    if lists:
        return {SPLIT_NAMES.get(name, "train"): members for name, members in lists.items() if members}
    tops = {stem.partition("/")[0].lower() if "/" in stem else "" for stem in images}
    members = sorted(images.values(), key=lambda image: image.path)
    if not tops <= set(SPLIT_NAMES):
        return {"train": members}
    parts: dict[str, list[VocImage]] = {}
    for image in members:
        parts.setdefault(SPLIT_NAMES[image.path.partition("/")[0].lower()], []).append(image)
    return parts


def read_list(file: Path, images: Mapping[str, VocImage]) -> list[VocImage]:
    """The images that a list file names, one a line. Raises AnnotationError for one that is not there."""
    members = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        stem = f"JPEGImages/{line.split()[0]}"
        if stem not in images:
            raise AnnotationError(f"{file}:{number}: no image {stem} with an image suffix")
        members.append(images[stem])
    return sorted(dict.fromkeys(members), key=lambda image: image.path)


def read_xml(file: Path, difficult: bool, one_based: bool) -> list[tuple[str, Box]]:
    """(class name, box in pixels xyxy) of each object. Raises AnnotationError."""
    try:
        tree = ElementTree.fromstring(read_regular(file))
    except OSError as error:
        raise AnnotationError(f"{file}: cannot be read: {error.strerror}") from None
    except ElementTree.ParseError as error:  # names line and column
        raise AnnotationError(f"{file}: not XML: {error}") from None
    found = []
    for number, item in enumerate(tree.iter("object"), start=1):
        where = f"{file}: object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise AnnotationError(f"{where}: has no name")
        if not difficult and (item.findtext("difficult") or "0").strip() == "1":
            continue
        box = item.find("bndbox")
        if box is None:
            raise AnnotationError(f"{where}: has no bndbox")
        corners = [(box.findtext(corner) or "").strip() for corner in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = check_box(corners, where)
        found.append((name, (max(0.0, x1 - 1), max(0.0, y1 - 1), x2, y2) if one_based else (x1, y1, x2, y2)))
    return found
