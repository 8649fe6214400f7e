"""`cli teachers --check`: a real checkpoint loaded twice, by our loader and by its own library, on the user's images.

Both get the same resized pixels. The library normalizes them, cuts them into patches and encodes them by its own code;
only the order of its tokens is changed to ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from extract.sources.listing import list_files
from extract.teachers.base import Teacher, TeacherError, load_teacher
from extract.teachers.pixels import as_pixels
from extract.teachers.qwen_transformers import transformers_encoder
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.timm_encoder import TimmTeacher, timm_encoder
from imaging.decode import IMAGE_SUFFIXES, ImageError, decode_image, read_file

if TYPE_CHECKING:
    from PIL.Image import Image

# Both sides compute in float32, which differs in the seventh digit: any token below this cosine is a real difference.
SAME_COSINE = 0.9999


@dataclass(frozen=True)
class Parity:
    """What the comparison found, over all tokens of all images.

    max_difference, largest_value: of the features, in their own units. worst_image: the file with the lowest cosine.
    """

    teacher: str
    fingerprint: str
    reference: str
    images: int
    image_size: int
    tokens: int
    max_difference: float
    largest_value: float
    mean_cosine: float
    min_cosine: float
    worst_image: str

    @property
    def same(self) -> bool:
        return self.min_cosine >= SAME_COSINE


def check_teacher(
    name: str,
    path: str | None,
    folder: str | Path,
    *,
    image_size: int = 224,
    device: str = "auto",
    count: int = 8,
) -> Parity:
    """Compare our features in float32 with those of transformers (Qwen) or timm on `count` images of the folder.

    Raises:
        TeacherError: when the checkpoint does not load on either side, or no image of the folder can be decoded.
    """
    teacher = load_teacher(
        name, path, device=device, dtype="float32", image_size=image_size, compile_tower=False
    )
    files, images = readable_images(Path(folder), count)
    pixels, _ = as_pixels(images, None, teacher)
    library, encode = library_of(teacher, path)
    ours, theirs = (
        torch.cat([one(image[None]).cpu().double() for image in pixels])
        for one in (lambda image: teacher.encode(image).grid, encode)
    )
    cosine = F.cosine_similarity(ours, theirs, dim=-1).flatten(1)
    return Parity(
        teacher=name,
        fingerprint=teacher.spec.fingerprint,
        reference=library,
        images=len(files),
        image_size=image_size,
        tokens=cosine.numel(),
        max_difference=float((ours - theirs).abs().max()),
        largest_value=float(theirs.abs().max()),
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        worst_image=str(files[int(cosine.amin(dim=1).argmin())]),
    )


def readable_images(folder: Path, count: int) -> tuple[list[Path], list[Image]]:
    """The first `count` images of the folder that can be decoded, in the order of their names."""
    if not folder.is_dir():
        raise TeacherError(f"--images {folder}: no such folder; give a folder with a few images")
    files: list[Path] = []
    images: list[Image] = []
    for name in list_files(folder, IMAGE_SUFFIXES):
        if len(files) == count:
            break
        try:
            images.append(decode_image(read_file(folder / name)))
        except ImageError:
            continue
        files.append(folder / name)
    if not files:
        raise TeacherError(f"--images {folder}: none of its files is an image that can be decoded")
    return files, images


def library_of(teacher: Teacher, path: str | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name and version of the library that knows the checkpoint, and its features of uint8 [1, 3, H, W]."""
    if isinstance(teacher, QwenVLTeacher):
        return transformers_encoder(str(path), teacher)
    assert isinstance(teacher, TimmTeacher)  # the table of teachers has no third kind
    return timm_encoder(path, teacher)
