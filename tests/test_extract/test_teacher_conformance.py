"""What every teacher must do. A new teacher joins with one line in TEACHERS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from extract.known_teachers import TIMM_ROWS
from extract.teachers import Teacher, TeacherError, list_teachers, load_teacher
from extract.teachers.base import TEACHERS as REGISTRY
from imaging.geometry import resize_view


class Case(NamedTuple):
    """A teacher to test: its name, the fixture with its weights ('' for none), options, image side in pixels."""

    name: str
    weights: str
    options: dict[str, Any]
    size: int

    def load(self, path: str | None, **options: Any) -> Teacher:
        torch.manual_seed(0)
        options = {"device": "cpu", "dtype": "float32", "image_size": self.size, **self.options, **options}
        return load_teacher(self.name, path, **options)


RANDOM = {"random_weights": True}
TEACHERS = {
    "qwen2.5-vl": Case("qwen2.5-vl", "tiny_teacher_folder", {}, 140),  # whole and cut windows
    "qwen3-vl": Case("qwen3-vl", "sharp_qwen3", {}, 160),
    "timm map": Case("timm:test_efficientnet", "", RANDOM, 224),
    "timm tokens": Case("timm:test_vit", "", RANDOM, 160),
    "timm pretrained": Case("timm:tf_efficientnet_lite2", "pretrained_teacher_weights", {}, 224),
}


@pytest.fixture(scope="module", params=TEACHERS)
def case(request: pytest.FixtureRequest) -> Case:
    return TEACHERS[request.param]


@pytest.fixture(scope="module")
def path(case: Case, request: pytest.FixtureRequest) -> str | None:
    return str(request.getfixturevalue(case.weights)) if case.weights else None


@pytest.fixture(scope="module")
def teacher(case: Case, path: str | None) -> Teacher:
    return case.load(path)


def pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Smooth random pictures: coarse noise, enlarged."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize(size, Image.Resampling.BICUBIC) for array in noise]


def size_of(teacher: Teacher) -> int:
    return teacher.preprocessing.image_size


def square_pictures(teacher: Teacher, count: int) -> list[Image.Image]:
    return pictures(count, (size_of(teacher), size_of(teacher)))


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def test_says_what_it_is(case: Case, teacher: Teacher) -> None:
    assert isinstance(teacher, Teacher)
    assert teacher.spec.width > 0
    assert teacher.spec.layer
    assert len(teacher.spec.fingerprint) == 32
    assert teacher.spec.dtype == "float32"
    assert teacher.preprocessing.image_size == case.size
    assert teacher.device == torch.device("cpu")


def test_random_weights_are_told_from_pretrained_ones(teacher: Teacher) -> None:
    assert teacher.spec.random_weights == (teacher.spec.name != "timm:tf_efficientnet_lite2")


def test_shapes_dtypes_and_the_mean(teacher: Teacher) -> None:
    out = teacher.encode(as_tensor(square_pictures(teacher, 3)))
    h, w = teacher.grid_size(size_of(teacher), size_of(teacher))
    assert out.grid.shape == (3, h, w, teacher.spec.width)
    assert out.pooled.shape == (3, teacher.spec.width)
    assert out.grid.dtype == out.pooled.dtype == torch.float32
    assert torch.allclose(out.pooled, out.grid.mean(dim=(1, 2)), atol=1e-5)
    assert not out.grid.requires_grad


def test_pil_images_and_their_pixels_are_one(teacher: Teacher) -> None:
    images = square_pictures(teacher, 2)
    assert torch.equal(teacher.encode(images).grid, teacher.encode(as_tensor(images)).grid)


def test_the_same_twice(teacher: Teacher) -> None:
    images = as_tensor(square_pictures(teacher, 2))
    assert torch.equal(teacher.encode(images).grid, teacher.encode(images).grid)


def test_an_image_does_not_depend_on_its_neighbours(teacher: Teacher) -> None:
    images = as_tensor(square_pictures(teacher, 4))
    together, alone = teacher.encode(images).grid, teacher.encode(images[2:3]).grid
    assert torch.allclose(together[2], alone[0], atol=1e-3 * together.abs().max().item())
    assert not torch.allclose(together[1], alone[0], atol=1e-3 * together.abs().max().item())


def test_moving_an_object_moves_the_change(teacher: Teacher) -> None:
    """Trap 1, through the real preprocessing: the cell that changes most is the one under the object."""
    h, w = teacher.grid_size(size_of(teacher), size_of(teacher))
    background = pictures(1, (640, 480))[0]
    places = [(0, w - 1), (h - 1, 0), (h // 2, w // 2 - 1), (h - 2, w // 3)]
    images = [background]
    for row, column in places:
        image = background.copy()
        left, top, side = round(column / w * 640), round(row / h * 480), max(640 // w, 480 // h)
        image.paste((255, 0, 255), (left, top, left + side, top + side))
        images.append(image)
    grid = teacher.encode(images).grid
    change = (grid[1:] - grid[:1]).norm(dim=-1)  # [places, h, w]
    reach = max(1, h // 7)  # a receptive field is wider than a cell
    for place, cells in zip(places, change, strict=True):
        row, column = divmod(int(cells.argmax()), w)
        assert abs(row - place[0]) <= reach, (place, (row, column))
        assert abs(column - place[1]) <= reach, (place, (row, column))


@pytest.mark.parametrize("size", [(400, 200), (200, 400), (301, 224), (300, 300)])
def test_letterbox_padding_stays_out_of_pooled(case: Case, path: str | None, size: tuple[int, int]) -> None:
    teacher = case.load(path, resize="letterbox")
    out = teacher.encode(pictures(1, size))
    h, w = teacher.grid_size(size_of(teacher), size_of(teacher))
    # The share of each cell that is image, counted pixel by pixel.
    side = size_of(teacher)
    canvas = resize_view("letterbox", size, side).render(Image.new("L", size, 255), side, fill=0)
    pixels = np.asarray(canvas, np.float64) / 255
    rows, columns = (np.arange(side) * n // side for n in (h, w))
    share = np.zeros((h, w))
    np.add.at(share, (rows[:, None], columns[None, :]), pixels)
    weights = torch.from_numpy(share / share.sum()).float()
    expected = torch.einsum("hwd,hw->d", out.grid[0], weights)
    assert torch.allclose(out.pooled[0], expected, atol=2e-2 * out.grid.abs().max().item() / h)
    plain = out.grid.mean(dim=(1, 2))[0]
    assert torch.allclose(out.pooled[0], plain, atol=1e-5) == (size == (300, 300))


def test_a_thin_image_still_has_a_mean(case: Case, path: str | None) -> None:
    teacher = case.load(path, resize="letterbox")
    out = teacher.encode([Image.new("RGB", (2000, 2), (200, 30, 30))])
    assert torch.isfinite(out.pooled).all()
    h = teacher.grid_size(size_of(teacher), size_of(teacher))[0]
    middle_row = (size_of(teacher) - 1) // 2  # one row of pixels is left of the image
    middle = out.grid[0, middle_row * h // size_of(teacher)].mean(dim=0)
    assert torch.allclose(out.pooled[0], middle, atol=1e-3 * out.grid.abs().max().item())


def test_given_weights_make_the_mean(teacher: Teacher) -> None:
    h, w = teacher.grid_size(size_of(teacher), size_of(teacher))
    inside = torch.zeros(2, h, w)
    inside[0, 0, 1] = 1.0
    inside[1, h - 1, :2] = torch.tensor([0.75, 0.25])
    out = teacher.encode(as_tensor(square_pictures(teacher, 2)), inside=inside)
    assert torch.allclose(out.pooled[0], out.grid[0, 0, 1], atol=1e-5)
    mixed = 0.75 * out.grid[1, h - 1, 0] + 0.25 * out.grid[1, h - 1, 1]
    assert torch.allclose(out.pooled[1], mixed, atol=1e-4)
    with pytest.raises(TeacherError, match="inside has shape"):
        teacher.encode(as_tensor(square_pictures(teacher, 2)), inside=torch.ones(2, h + 1, w))


def test_centre_crop_sees_the_middle(case: Case, path: str | None) -> None:
    teacher = case.load(path, resize="center-crop")
    image = pictures(1, (2 * case.size, case.size))[0]
    middle = image.crop((case.size // 2, 0, case.size * 3 // 2, case.size))
    assert torch.allclose(teacher.encode([image]).grid, teacher.encode([middle]).grid, atol=1e-5)
    assert not torch.allclose(
        teacher.encode([image]).grid, teacher.encode([image.rotate(180)]).grid, atol=1e-3
    )


def test_the_fingerprint_is_the_weights(case: Case, path: str | None, teacher: Teacher) -> None:
    again = case.load(path, dtype="bfloat16")
    assert again.spec.fingerprint == teacher.spec.fingerprint
    assert again.spec.dtype == "bfloat16"
    assert again.encode(as_tensor(square_pictures(teacher, 1))).grid.dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.zeros(1, 3, 64, 64), "torch.float32"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(0, 3, 64, 64, dtype=torch.uint8), "empty batch"),
        ([], "empty batch"),
        ([np.zeros((64, 64, 3), np.uint8)], "list of ndarray: expected PIL images"),
    ],
)
def test_wrong_input_is_named(teacher: Teacher, images: Any, problem: str) -> None:
    with pytest.raises(TeacherError, match=problem):
        teacher.encode(images)


def test_the_table_lists_every_teacher_with_what_a_user_needs() -> None:
    rows = list_teachers()
    assert [row["name"] for row in rows][: len(REGISTRY)] == list(REGISTRY)
    assert {row.name for row in TIMM_ROWS} == {
        row["name"].removeprefix("timm:") for row in rows[len(REGISTRY) :]
    }
    for row in rows:
        assert all(row[key] for key in ("description", "width", "weights", "license", "how_to_get"))


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("qwen3", {}, "unknown teacher 'qwen3': valid are qwen2.5-vl, qwen3-vl, qwen3.5, timm:NAME"),
        ("timm", {}, "needs a model name"),
        ("timm:vit_tinny_patch16_224", {}, "did you mean .*vit_tiny_patch16_224"),
        ("timm:test_efficientnet", {"device": "cuda:99"}, "device cuda:99 is not there"),
        ("timm:test_efficientnet", {"device": "gpu"}, "unknown device"),
        ("timm:test_efficientnet", {"dtype": "int8"}, "use float32 or bfloat16"),
        ("timm:test_efficientnet", {"resize": "stretch"}, "unknown resize policy 'stretch'"),
        ("qwen2.5-vl", {}, "needs --teacher-path.*make-tiny-teacher"),
        ("qwen3.5", {}, "a name like Qwen/Qwen3.5-9B .*make-tiny-teacher DIR --family qwen3.5"),
    ],
)
def test_wrong_names_and_options_are_one_clear_line(name: str, options: dict[str, Any], problem: str) -> None:
    options = {"device": "cpu", **options}
    if name.startswith("timm:"):
        options["random_weights"] = True
    with pytest.raises(TeacherError, match=problem) as caught:
        load_teacher(name, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_importing_the_package_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    script = "import sys, extract.teachers; print([m for m in ('torch', 'transformers', 'timm') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
