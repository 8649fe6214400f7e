"""Masks, clips and HDF5: their forms, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from PIL import Image

from extract.sources.base import AnnotationError, SourceError
from extract.sources.detect import open_source
from extract.sources.folder import looks_like_frames
from imaging.clips import sample_frame_indices, time_order
from imaging.decode import ImageError, decode_image
from imaging.masks import decode_mask
from tests.test_extract.source_datasets import (
    mask_of,
    picture,
    png,
    save,
    write_clips,
    write_folder,
    write_masks,
)

SIZE = (24, 16)


def test_segmentation_folders_and_suffixes(tmp_path: Path) -> None:
    forms = {
        "plain": ("images/a.png", "masks/a.png"),
        "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
        "below": ("images/val/a.png", "labels/val/a.png"),
        "suffix": ("images/a.png", "masks/a_mask.png"),
        "beside": ("train/a.png", "train/a_mask.png"),
    }
    for name, (image, mask) in forms.items():
        save(tmp_path / name / image, picture(0))
        save(tmp_path / name / mask, mask_of(1))
        source = open_source(tmp_path / name, val_fraction=0)
        assert source.kind == "masks", name
        ((sample,),) = source.splits.values()
        assert sample.key == image
        np.testing.assert_array_equal(decode_mask(sample.read_mask(SIZE) or b""), mask_of(1))
    assert set(open_source(tmp_path / "below", val_fraction=0).splits) == {"val"}


def test_voc_segmentation_lists_choose_images_and_splits(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"JPEGImages/{number}.jpg", picture(number))
    for number in range(3):
        save(tmp_path / f"SegmentationClass/{number}.png", mask_of(number))
        save(tmp_path / f"SegmentationObject/{number}.png", mask_of(number))
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, stems in {"train": "0\n1\n", "val": "2\n", "trainval": "0\n1\n2\n"}.items():
        (lists / f"{name}.txt").write_text(stems)
    splits = open_source(tmp_path, "masks").splits
    assert {name: list(samples.keys) for name, samples in splits.items()} == {
        "train": ["JPEGImages/0.jpg", "JPEGImages/1.jpg"],
        "val": ["JPEGImages/2.jpg"],
    }
    (lists / "val.txt").write_text("2\n5\n")
    with pytest.raises(SourceError, match=r"1 of 4 images .* have no mask, first 'JPEGImages/5\.jpg'"):
        open_source(tmp_path, "masks")


def test_class_names_of_masks(tmp_path: Path) -> None:
    write_masks(tmp_path)
    assert open_source(tmp_path, class_names=["x", "y", "z", "w"]).class_names == ("x", "y", "z", "w")
    (tmp_path / "classes.txt").write_text("sky\ntree\nroad\n\n")
    assert open_source(tmp_path).class_names == ("sky", "tree", "road")


def test_masks_of_0_and_255_are_background_and_foreground(tmp_path: Path) -> None:
    binary = np.where(mask_of(1) == 1, 255, 0).astype(np.uint8)
    save(tmp_path / "images/a.png", picture(0))
    save(tmp_path / "masks/a.png", binary)
    source = open_source(tmp_path, val_fraction=0)
    assert source.class_names == ("0", "1")
    assert "255 taken as class 1" in source.notes[0]
    mask = decode_mask(source.splits["train"][0].read_mask() or b"")
    np.testing.assert_array_equal(mask, binary // 255)
    ignoring = open_source(tmp_path, binary=False, val_fraction=0)
    np.testing.assert_array_equal(decode_mask(ignoring.splits["train"][0].read_mask() or b""), binary)


def test_mask_errors_name_the_file(tmp_path: Path) -> None:
    write_masks(tmp_path)
    few = open_source(tmp_path, class_names=["x", "y"]).splits["train"]
    with pytest.raises(AnnotationError, match=r"masks/0\.png: class id 2, but there are 2 classes"):
        few[0].read_mask()
    samples = open_source(tmp_path).splits["train"]
    with pytest.raises(AnnotationError, match=r"masks/0\.png: mask of 24×16 pixels, its image has 30×16"):
        samples[0].read_mask((30, 16))
    (tmp_path / "train/masks/1.png").write_bytes(b"nonsense")
    with pytest.raises(AnnotationError, match=r"masks/1\.png: mask not an image"):
        samples[1].read_mask()
    with pytest.raises(AnnotationError, match=r"masks/1\.png: mask not an image"):
        open_source(tmp_path)


def write_camvid(root: Path, ending: str = "annot", classes: int = 3) -> None:
    """CamVid's own layout: a folder for each split, its masks in another one beside it."""
    for number in range(12):
        split = ("train", "train", "val", "test")[number % 4]
        save(root / f"{split}/seq/{number:04d}.png", picture(number))
        ids = np.random.default_rng(number).integers(0, classes, (16, 24), dtype=np.uint8)
        save(root / f"{split}{ending}/seq/{number:04d}.png", ids)


@pytest.mark.parametrize("ending", ["annot", "_labels", "_masks", "Annotations", "-gt"])
def test_splits_with_masks_beside_them(tmp_path: Path, ending: str) -> None:
    write_camvid(tmp_path, ending)
    source = open_source(tmp_path)
    assert source.kind == "masks"
    assert {name: len(samples) for name, samples in source.splits.items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert source.class_names == ("0", "1", "2")
    sample = source.splits["val"][1]
    assert sample.key == "val/seq/0006.png"
    expected = np.random.default_rng(6).integers(0, 3, (16, 24), dtype=np.uint8)
    np.testing.assert_array_equal(decode_mask(sample.read_mask((24, 16)) or b""), expected)


def test_classes_that_are_called_like_masks_of_another_stay_classes(tmp_path: Path) -> None:
    """`face` and `face_mask`: photos of other stems, and photos are no masks."""
    for number in range(6):
        save(tmp_path / f"face/{number}.png", picture(number))
        save(tmp_path / f"face_mask/m{number}.png", picture(10 + number))
    assert open_source(tmp_path).class_names == ("face", "face_mask")


def test_masks_of_a_large_data_set_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first files of the walk are all images: each folder is looked into all the same."""
    monkeypatch.setattr("extract.sources.detect.PEEK_IN_FOLDER", 3)
    write_camvid(tmp_path)
    assert open_source(tmp_path).kind == "masks"


def test_ignored_ids(tmp_path: Path) -> None:
    write_camvid(tmp_path, classes=12)
    assert len(open_source(tmp_path).class_names) == 12
    source = open_source(tmp_path, ignore="3,11")
    assert source.class_names == tuple(str(number) for number in range(11))
    ids = np.random.default_rng(0).integers(0, 12, (16, 24), dtype=np.uint8)
    mask = decode_mask(source.splits["train"][0].read_mask() or b"")
    np.testing.assert_array_equal(mask, np.where(np.isin(ids, [3, 11]), 255, ids))
    (tmp_path / "classes.txt").write_text("\n".join(f"class {number}" for number in range(11)))
    with pytest.raises(AnnotationError, match=r"class id 11, but there are 11 classes .*or pass ignore=11"):
        open_source(tmp_path).splits["train"][0].read_mask()
    with pytest.raises(SourceError, match="ignore: got 'sky', expected class ids"):
        open_source(tmp_path, ignore="sky")


def test_masks_in_a_folder_of_any_name(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"data/photos/{number}.png", picture(number))
        save(tmp_path / f"data/drawn by hand/{number}_L.png", mask_of(number))
        save(tmp_path / f"elsewhere/{number}.png", mask_of(number))
    inside = open_source(tmp_path / "data", masks="drawn by hand", val_fraction=0)
    outside = open_source(tmp_path / "data/photos", masks="../../elsewhere", val_fraction=0)
    for source, key in ((inside, "photos/1.png"), (outside, "1.png")):
        sample = source.splits["train"][1]
        assert sample.key == key
        np.testing.assert_array_equal(decode_mask(sample.read_mask() or b""), mask_of(1))
    with pytest.raises(SourceError, match=r"masks=nothing: .*nothing is not a folder"):
        open_source(tmp_path / "data", masks="nothing")


COLORS = ((128, 128, 128), (192, 0, 128), (0, 0, 0))
TABLES = {
    "label_colors.txt": "128 128 128\tSky\n192 0 128\t\tArchway\n0 0 0 Void\n",
    "class_dict.csv": "name,r,g,b\nSky,128,128,128\nArchway,192,0,128\nVoid,0,0,0\n",
    "colors.json": '{"Sky": [128, 128, 128], "Archway": [192, 0, 128], "Void": [0, 0, 0]}',
}


@pytest.mark.parametrize("table", TABLES)
def test_masks_in_colors(tmp_path: Path, table: str) -> None:
    for number in range(4):
        save(tmp_path / f"images/{number}.png", picture(number))
        save(tmp_path / f"masks/{number}_L.png", np.array(COLORS, np.uint8)[np.minimum(mask_of(number), 2)])
    (tmp_path / table).write_text(TABLES[table])
    source = open_source(tmp_path, colors=table, ignore="void", val_fraction=0)
    assert source.class_names == ("Sky", "Archway")
    mask = decode_mask(source.splits["train"][2].read_mask() or b"")
    np.testing.assert_array_equal(mask, np.where(mask_of(2) >= 2, 255, mask_of(2)))
    with pytest.raises(AnnotationError, match=r"in colors: expected class ids.*colors=FILE"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("128 128 Sky\n", r"colors.txt:1: '128 128 Sky': expected `R G B name`"),
        ("128 128 300 Sky\n", r"colors.txt:1: color .* expected three whole numbers of 0 to 255"),
        ("1 2 3 Sky\n1 2 3 Tree\n", r"color \(1, 2, 3\) stands for several classes: Sky, Tree"),
        ("", r"0 colors, expected 1 to 255"),
    ],
)
def test_color_tables_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    save(tmp_path / "images/0.png", picture(0))
    save(tmp_path / "masks/0.png", mask_of(0))
    (tmp_path / "colors.txt").write_text(content)
    with pytest.raises(AnnotationError, match=message):
        open_source(tmp_path, colors="colors.txt")


def test_image_without_a_mask(tmp_path: Path) -> None:
    write_masks(tmp_path)
    (tmp_path / "val/masks/8.png").unlink()
    with pytest.raises(SourceError, match=r"1 of 11 images .* have no mask, first 'val/images/8.png'"):
        open_source(tmp_path)


def write_video(path: Path, count: int) -> list[int]:
    """A clip whose frame `i` is grey of a level of its own; returns the levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = [20 + 10 * (number % 20) for number in range(count)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 2_000_000
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return levels


def levels_of(images: list[Image.Image]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def test_video_frames_are_spread_evenly(tmp_path: Path) -> None:
    levels = write_video(tmp_path / "train/walk/a.mp4", 20)
    write_video(tmp_path / "train/run/b.avi", 5)
    source = open_source(tmp_path, val_fraction=0)
    assert (source.kind, source.task, source.class_names) == ("clips", "sequence", ("run", "walk"))
    run, walk = source.splits["train"]
    assert (run.key, run.label, walk.key, walk.label) == ("train/run/b.avi", 0, "train/walk/a.mp4", 1)
    assert walk.read() == (tmp_path / "train/walk/a.mp4").read_bytes()
    np.testing.assert_allclose(
        levels_of([frame.image for frame in walk.read_clip(4)]), [levels[i] for i in (2, 7, 12, 17)], atol=3
    )
    pairs = [frame.image for frame in walk.read_clip(2, pairs=True)]
    np.testing.assert_allclose(levels_of(pairs), [levels[i] for i in (4, 5, 14, 15)], atol=3)
    assert len(run.read_clip(8)) == 8
    with pytest.raises(ImageError, match="too many pixels: frames of 64×48"):
        run.read_clip(2, max_pixels=100)


def test_damaged_videos_are_bad_clips(tmp_path: Path) -> None:
    write_video(tmp_path / "a/good.avi", 30)
    data = (tmp_path / "a/good.avi").read_bytes()
    (tmp_path / "a/cut.mp4").write_bytes(data[:60])
    (tmp_path / "a/empty.mp4").write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/text.mkv").write_text("no video at all")
    samples = {sample.key: sample for sample in open_source(tmp_path, val_fraction=0).splits["train"]}
    assert len(samples["a/good.avi"].read_clip(4)) == 4
    for key in ("a/cut.mp4", "a/empty.mp4", "b/text.mkv"):
        with pytest.raises(ImageError):
            samples[key].read_clip(4)


def test_frame_folders_are_in_the_order_of_time(tmp_path: Path) -> None:
    dataset = write_clips(tmp_path / "clips")
    for number in range(4, 13):  # 4 … 12 written without leading zeros
        save(
            Path(dataset.path) / "train/bird/clip0" / f"{number}.png", np.full((16, 24, 3), number, np.uint8)
        )
    clip = next(s for s in open_source(dataset.path, "clips").splits["train"] if s.key == "train/bird/clip0")
    assert levels_of([frame.image for frame in clip.read_clip(12)])[3:] == list(range(4, 13))
    (Path(dataset.path) / "train/bird/clip0/12.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"frame 12\.png: empty file"):
        clip.read_clip(12)
    assert sorted(["f10.png", "f9.png", "f1a.png"], key=time_order) == ["f1a.png", "f9.png", "f10.png"]


def test_a_clip_with_another_frame_has_other_content(tmp_path: Path) -> None:
    dataset = write_clips(tmp_path / "clips")
    before = {s.key: s.read() for s in open_source(dataset.path).splits["train"]}
    save(Path(dataset.path) / "train/bird/clip0/0002.png", picture(99))
    after = {s.key: s.read() for s in open_source(dataset.path).splits["train"]}
    assert [key for key in before if before[key] != after[key]] == ["train/bird/clip0"]


def test_what_is_no_clip(tmp_path: Path) -> None:
    dataset = write_folder(tmp_path / "folder")
    assert not looks_like_frames(["1.png", "2.png"])
    assert not looks_like_frames(["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"])
    assert not looks_like_frames(["cat/a/1.png", "cat/a/3.png"])
    assert looks_like_frames(["cat/a/1.png", "cat/a/2.png"])
    with pytest.raises(ValueError, match="is not a clip"):
        open_source(dataset.path).splits["train"][0].read_clip(2)
    save(tmp_path / "mixed/a/b/1.png", picture(0))
    write_video(tmp_path / "mixed/a/c.mp4", 3)
    with pytest.raises(SourceError, match="both video files"):
        open_source(tmp_path / "mixed", "clips")


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(20, 4, [2, 7, 12, 17]), (4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (3, 1, [1])],
)
def test_frame_indices(total: int, count: int, expected: list[int]) -> None:
    assert sample_frame_indices(total, count).tolist() == expected


def test_frame_pairs() -> None:
    assert sample_frame_indices(20, 2, pairs=True).tolist() == [[4, 5], [14, 15]]
    assert sample_frame_indices(1, 2, pairs=True).tolist() == [[0, 0], [0, 0]]
    for total in range(2, 40):
        for count in range(1, 20):
            pairs = sample_frame_indices(total, count, pairs=True)
            assert (pairs[:, 1] == pairs[:, 0] + 1).all()
            assert pairs.max() < total
            assert (np.diff(pairs[:, 0]) >= 0).all()
    with pytest.raises(ValueError, match="cannot take 4 frames of 0"):
        sample_frame_indices(0, 4)


def hdf5(path: Path, **datasets: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def stack(count: int) -> np.ndarray:
    return np.stack([picture(number) for number in range(count)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_hdf5_pixel_layouts(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = hdf5(tmp_path / "x.h5", images=stack(5).transpose(order), labels=[1, 0, 1, -1, 0])
    samples = open_source(path, val_fraction=0).splits["train"]
    assert [sample.label for sample in samples] == [1, 0, 1, None, 0]
    for number, sample in enumerate(samples):
        assert sample.key == f"{number:09d}"
        np.testing.assert_array_equal(np.asarray(decode_image(sample.read())), picture(number))


def test_hdf5_grey_images_keys_and_names(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", images=stack(2)[..., 0], labels=[b"dog", b"cat"], keys=[b"p/1", b"p/2"])
    source = open_source(path, val_fraction=0)
    assert source.class_names == ("cat", "dog")
    assert [(s.key, s.label) for s in source.splits["train"]] == [("p/1", 1), ("p/2", 0)]
    seen = np.asarray(decode_image(source.splits["train"][1].read()))
    np.testing.assert_array_equal(seen[..., 1], picture(1)[..., 0])


def test_hdf5_encoded_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        cells = file.create_dataset("images", (2,), dtype=h5py.vlen_dtype(np.uint8))
        cells[0], cells[1] = (np.frombuffer(png(picture(n)), np.uint8) for n in range(2))
    source = open_source(tmp_path / "x.h5", val_fraction=0)
    assert source.task == "features"
    assert [s.read() for s in source.splits["train"]] == [png(picture(0)), png(picture(1))]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"pictures": stack(2)}, "no data set 'images'"),
        ({"images": stack(2).astype(np.float32)}, r"images is float32 \[2, 16, 24, 3\]: expected uint8"),
        ({"images": stack(2)[..., :2]}, r"images is uint8 \[2, 16, 24, 2\]"),
        ({"images": stack(2), "labels": [1]}, r"labels have shape \[1\], expected \[2\]"),
        ({"images": stack(2), "labels": [1, -2]}, "label 1: label -2 is negative"),
        ({"images": stack(2), "keys": [b"a"]}, "1 keys, but 2 images"),
        ({"images": stack(2), "keys": [b"a", b"a"]}, "keys occur more than once"),
    ],
)
def test_hdf5_errors(tmp_path: Path, datasets: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(hdf5(tmp_path / "x.h5", **datasets))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external storage", "/images has its values in another file, .*secret.bin'"),
        ("external link", "images is an external link to .*secret.h5': other files are not read"),
        ("soft link to an external link", "images is an external link to .*secret.h5'"),
        ("external labels", "labels is an external link to .*secret.h5'"),
        ("external keys", "keys is an external link to .*secret.h5'"),
        ("external group", "train is an external link to .*secret.h5'"),
        ("link to a pipe", "images is an external link to .*pipe'"),
        ("virtual", "/images is a virtual data set, made of parts of other files"),
        ("unlimited virtual of a pipe", "/images is a virtual data set, made of parts of other files"),
        ("huge rows", r"rows of 10,800,000,000 bytes \(shape \[1, 60000, 60000, 3\]\): the limit is"),
        ("huge images", "images of 324,000,000 pixels .*: the limit is 178,956,970"),
        ("huge chunks", "chunks of 2,160,000,000 bytes: the limit is"),
        ("never written", r"shape \[1000000000, 16, 24, 3\].* at most 0 were ever written"),
        ("contiguous, never written", "at most 0 were ever written"),
        ("labels never written", "/labels has shape .* at most 0 were ever written"),
        ("unknown filter", r"compressed by filter 32015 \(without a name\), which is not available here"),
        ("cycle", "more than 16 soft links"),
    ],
)
def test_hdf5_of_other_files_and_impossible_sizes_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "secret.bin").write_bytes(stack(2).tobytes())
    hdf5(tmp_path / "secret.h5", images=stack(2), labels=[0, 1], keys=[b"a", b"b"])
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        write_hostile_hdf5(file, kind, tmp_path)
    with pytest.raises(SourceError, match=message) as raised:
        open_source(tmp_path / "x.h5")
    assert "\n" not in str(raised.value)


def write_hostile_hdf5(file: h5py.File, kind: str, folder: Path) -> None:
    secret, large = str(folder / "secret.h5"), {"dtype": "uint8", "chunks": (1, 64, 64, 3)}
    if kind == "external storage":
        values = str(folder / "secret.bin")
        file.create_dataset("images", (2, 16, 24, 3), "uint8", external=[(values, 0, h5py.h5f.UNLIMITED)])
    elif kind == "external link":
        file["images"] = h5py.ExternalLink(secret, "/images")
    elif kind == "link to a pipe":
        file["images"] = h5py.ExternalLink(str(folder / "pipe"), "/images")
    elif kind == "soft link to an external link":
        file["elsewhere"] = h5py.ExternalLink(secret, "/")
        file["images"] = h5py.SoftLink("/elsewhere/images")
    elif kind == "external group":
        file["train"] = h5py.ExternalLink(secret, "/")
    elif kind in ("external labels", "external keys"):
        name = kind.removeprefix("external ")
        file["images"], file[name] = stack(2), h5py.ExternalLink(secret, f"/{name}")
    elif kind == "virtual":
        layout = h5py.VirtualLayout((2, 16, 24, 3), "uint8")
        layout[:] = h5py.VirtualSource(secret, "images", shape=(2, 16, 24, 3))
        file.create_virtual_dataset("images", layout)
    elif kind == "unlimited virtual of a pipe":
        endless = h5py.h5s.UNLIMITED
        layout = h5py.VirtualLayout((2, 16, 24, 3), "uint8", maxshape=(None, 16, 24, 3))
        source = h5py.VirtualSource(
            str(folder / "pipe"), "images", shape=(2, 16, 24, 3), maxshape=(None, 16, 24, 3)
        )
        layout[0:endless] = source[0:endless]
        file.create_virtual_dataset("images", layout)
    elif kind == "huge rows":
        file.create_dataset("images", (1, 60_000, 60_000, 3), **large)
    elif kind == "huge images":
        file.create_dataset("images", (1, 18_000, 18_000, 3), "uint8", chunks=(1, 18_000, 18_000, 3))
        file["images"].id.write_direct_chunk((0, 0, 0, 0), b"\0")
    elif kind == "huge chunks":
        file.create_dataset("images", (1000, 600, 1200, 3), "uint8", chunks=(1000, 600, 1200, 3))
    elif kind == "never written":
        file.create_dataset("images", (1_000_000_000, 16, 24, 3), "uint8", chunks=(1, 16, 24, 3))
    elif kind == "contiguous, never written":
        file.create_dataset("images", (1_000_000_000, 16, 24, 3), "uint8")
    elif kind == "labels never written":
        file["images"] = stack(2)
        file.create_dataset("labels", (1 << 40,), "int64", chunks=(1024,))
    elif kind == "unknown filter":
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 16, 24, 3))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # Zstandard
        space = h5py.h5s.create_simple((2, 16, 24, 3))
        images = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties)
        for row in range(2):
            images.write_direct_chunk((row, 0, 0, 0), b"compressed elsewhere")
    elif kind == "cycle":
        file["images"], file["again"] = h5py.SoftLink("/again"), h5py.SoftLink("/images")


def test_hdf5_with_soft_links_inside_the_file(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", **{"raw/pixels": stack(2), "raw/classes": [1, 0]})
    with h5py.File(path, "r+") as file:
        file["train/images"] = h5py.SoftLink("/raw/pixels")
        file["train/labels"] = h5py.SoftLink("/raw/classes")
    samples = open_source(path, val_fraction=0).splits["train"]
    assert [sample.label for sample in samples] == [1, 0]
    np.testing.assert_array_equal(np.asarray(decode_image(samples[1].read())), picture(1))


def test_an_hdf5_file_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.h5")
    with pytest.raises(SourceError):
        open_source(tmp_path / "x.h5")
    with pytest.raises(SourceError, match="not a regular file"):
        open_source(tmp_path / "x.h5", kind="hdf5")


def test_hdf5_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"nonsense")
    with pytest.raises(SourceError, match="not a readable HDF5 file"):
        open_source(tmp_path / "x.h5")
    with pytest.raises(SourceError, match="holds HDF5 files: give the path of one"):
        open_source(tmp_path)
