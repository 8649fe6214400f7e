"""The host's half of preprocessing: equal to Hugging Face's when exact, close enough for the teacher when fast."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from extract.decode.sample import (
    DRAFT_MARGIN,
    LARGEST_ZOOM,
    Encoding,
    decode_sample,
    resize_pixels,
    sample_views,
)
from extract.sources.base import Sample
from imaging.decode import Decoded, ImageError, decode
from imaging.geometry import RESIZE_POLICIES, resize_view
from tests.test_extract.extractions import preprocess

SIZE = 224


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on three scales: what resampling kernels differ on."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(
                generator.integers(0, 256, (height // s + 1, width // s + 1, 3), dtype=np.uint8)
            ).resize((width, height), Image.Resampling.BICUBIC),
            np.float32,
        )
        for s in (2, 9, 40)
    ]
    return Image.fromarray(np.clip(np.mean(layers, axis=0), 0, 255).astype(np.uint8))


def hugging_face_pixels(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """What the Qwen2-VL image processor makes of an image at a target size: float32 [3, height, width]."""
    from transformers import Qwen2VLImageProcessor

    # Its size is a number of pixels, from which it computes sides with rounding: a little slack on both sides.
    slack = {"shortest_edge": width * height - 200, "longest_edge": width * height + 200}
    output = Qwen2VLImageProcessor(size=slack)(images=image, return_tensors="pt")
    _, rows, columns = output["image_grid_thw"][0].tolist()
    assert (columns * 14, rows * 14) == (width, height), "the test needs a size that the processor keeps"
    patches = output["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height, width)


def normalize(pixels: np.ndarray) -> torch.Tensor:
    from extract.teachers.pixels import normalize as on_device

    # transformers folds 1/255 into mean and std, in this order of operations.
    scale = 1 / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * (1.0 / scale)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * (1.0 / scale)
    return on_device(torch.from_numpy(pixels), mean[:, None, None], std[:, None, None])


@pytest.mark.parametrize(
    ("source", "target"),
    [((224, 224), 224), ((500, 500), 224), ((1200, 1200), 112), ((150, 150), 224), ((226, 222), 224)],
)
def test_exact_equals_the_hugging_face_processor_bit_for_bit(source: tuple[int, int], target: int) -> None:
    data = jpeg(textured(*source))
    expected = hugging_face_pixels(decode(data).image, target, target)
    found = preprocess(data, target, exact=True)
    assert found.size == source
    assert torch.equal(normalize(found.pixels), expected)
    flipped = preprocess(
        jpeg(decode(data).image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), target, exact=True
    )
    assert not torch.equal(normalize(flipped.pixels), expected)


def test_exact_handles_grey_and_transparent_files() -> None:
    grey = textured(300, 300).convert("L")
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    expected = hugging_face_pixels(grey, SIZE, SIZE)
    assert torch.equal(normalize(preprocess(buffer.getvalue(), SIZE, exact=True).pixels), expected)


def test_files_that_are_no_jpeg_are_exact_anyway() -> None:
    buffer = io.BytesIO()
    textured(1000, 900).save(buffer, "PNG", compress_level=1)
    fast, exact = preprocess(buffer.getvalue(), SIZE), preprocess(buffer.getvalue(), SIZE, exact=True)
    np.testing.assert_array_equal(fast.pixels, exact.pixels)


def test_draft_never_goes_below_the_margin() -> None:
    for side in range(200, 2200, 77):
        data = jpeg(Image.new("RGB", (side, side)))
        used = decode(data, target_size=DRAFT_MARGIN * 100).image.width
        assert used >= min(side, DRAFT_MARGIN * 100)
        assert used < 2 * DRAFT_MARGIN * 100 + 1 or used == side


def test_views_are_cut_from_an_image_that_is_decoded_large_enough() -> None:
    """A crop of half a side needs twice the pixels that the whole image needs."""
    crops = sample_views("a.jpg", 2000, 0, 2000, 1500)
    sides = np.abs(crops[:, [0, 1], [0, 1]]) * [2000, 1500]
    assert 1 / LARGEST_ZOOM <= sides.min() / 1500 < 1.2 / LARGEST_ZOOM
    sample, planes = Sample("a.jpg", jpeg(textured(2000, 1500))), {}
    for views in (0, 3):
        for exact in (False, True):
            encoding = Encoding(image_size=SIZE, resize="squash", views=views, exact=exact)
            planes[views, exact] = np.zeros((1 + views, 3, SIZE, SIZE), np.uint8)
            assert decode_sample(encoding, sample, planes[views, exact]).reason is None
    np.testing.assert_array_equal(
        planes[3, False], planes[3, True]
    )  # 1500 pixels are less than 2 · 2 · 2 · 224
    assert (planes[0, False] != planes[0, True]).any()  # 2 · 2 · 224 are less


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1000, 120), (90, 61)])
@pytest.mark.parametrize("policy", RESIZE_POLICIES)
def test_every_policy_shows_what_its_view_says(policy: str, size: tuple[int, int]) -> None:
    image = textured(*size)
    found = resize_pixels(Decoded(image, size), SIZE, policy).transpose(1, 2, 0).astype(int)
    view = resize_view(policy, size, SIZE)
    reference = np.asarray(view.render(image, SIZE)).astype(int)
    # Two independent kernels (torch, Pillow) that may round differently.
    assert np.abs(found - reference).mean() < 0.3
    assert np.abs(found - reference).max() <= 6
    assert np.abs(found - reference[:, ::-1]).mean() > 3


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_other_interpolations(interpolation: str) -> None:
    image = textured(500, 400)
    found = resize_pixels(Decoded(image, image.size), 64, "squash", interpolation)
    resample = Image.Resampling[interpolation.upper()]
    reference = np.asarray(image.resize((64, 64), resample)).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - reference).max() <= 1


def test_large_images_in_several_memory_blocks() -> None:
    image = Image.new("RGB", (3000, 2500), (10, 200, 30))
    found = resize_pixels(Decoded(image, image.size), 28)
    assert (found == np.array([10, 200, 30], np.uint8)[:, None, None]).all()


def test_bad_images_keep_their_reason() -> None:
    with pytest.raises(ImageError, match="empty file"):
        preprocess(b"", SIZE)
    with pytest.raises(ImageError, match="too many pixels"):
        preprocess(jpeg(textured(50, 50)), SIZE, max_pixels=100)


@pytest.fixture(scope="module")
def photos(asset_path) -> list[Image.Image]:  # type: ignore[no-untyped-def]
    return [Image.open(file).convert("RGB") for file in sorted(Path(asset_path("foolbox")).rglob("*.jpg"))][
        :8
    ]


@pytest.fixture(scope="module")
def pretrained(pretrained_teacher_weights: Path):  # type: ignore[no-untyped-def]
    """EfficientNet-Lite2 with ImageNet weights: float32 [B, 3, S, S] → tokens [B · h · w, 1280]."""
    import timm

    model = timm.create_model("tf_efficientnet_lite2")
    weights = torch.load(pretrained_teacher_weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.eval()

    @torch.no_grad()
    def tokens(pixels: list[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
        return model.forward_features(batch).permute(0, 2, 3, 1).reshape(-1, 1280).numpy()

    return tokens


def first_percentile_cosine(reference: np.ndarray, other: np.ndarray, statistics: np.ndarray) -> float:
    """Of the cosines per grid token, standardised per channel by the mean and deviation of `statistics`."""
    mean, std = statistics.mean(axis=0), statistics.std(axis=0) + 1e-6
    a, b = (reference - mean) / std, (other - mean) / std
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.percentile(cosines, 1))


def make_collages(photos: list[Image.Image], count: int) -> list[bytes]:
    """JPEG files of 2000×1500 with real detail: twelve photos each."""
    collages = []
    generator = np.random.default_rng(0)
    for _ in range(count):
        collage = Image.new("RGB", (2000, 1500))
        for place, number in enumerate(generator.permutation(len(photos))[:12]):
            photo = photos[number].resize((500, 500), Image.Resampling.LANCZOS)
            collage.paste(photo, (place % 4 * 500, place // 4 * 500))
        collages.append(jpeg(collage))
    return collages


@pytest.mark.slow
def test_the_fast_path_keeps_the_teachers_features(photos, pretrained) -> None:  # type: ignore[no-untyped-def]
    sets = [[jpeg(photo.resize((640, 480))) for photo in photos], make_collages(photos, 12)]
    exact = [[preprocess(data, SIZE, exact=True).pixels for data in files] for files in sets]
    references = [pretrained(pixels) for pixels in exact]
    everything = np.concatenate(references)
    for files, reference, pixels in zip(sets, references, exact, strict=True):
        fast = pretrained([preprocess(data, SIZE).pixels for data in files])
        assert first_percentile_cosine(reference, fast, everything) >= 0.99
        flipped = pretrained([np.ascontiguousarray(image[:, :, ::-1]) for image in pixels])
        assert first_percentile_cosine(reference, flipped, everything) < 0.5
    # What the margin is for: decoding down to just above the target is not good enough.
    eager = pretrained([resize_pixels(decode(data, target_size=SIZE), SIZE) for data in sets[1]])
    assert first_percentile_cosine(references[1], eager, everything) < 0.99
