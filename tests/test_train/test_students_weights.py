"""`--student-path`: every form that weights come in, and what does not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from train.students.base import StudentError
from train.students.build import build_student

SIZE = 32


def resnet(num_classes: int = 4) -> Any:
    torch.manual_seed(1)
    return timm.create_model("resnet18", num_classes=num_classes)


def same_body(student: Any, reference: Any, head: str = "fc") -> bool:
    state = student.state_dict()
    return all(torch.equal(state[k], v) for k, v in reference.state_dict().items() if not k.startswith(head))


def save(content: Any, path: Path) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("weights.pt", lambda s: s),
        ("weights.pth", lambda s: {"state_dict": s, "epoch": 3}),
        ("best.pt", lambda s: {"rng": torch.zeros(5), "model_state_dict": s, "config": {"a": 1}}),
        ("ddp.pt", lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}),
        ("compiled.pt", lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}),
        ("weights.safetensors", lambda s: dict(s)),
    ],
)
def test_files(tmp_path: Path, name: str, wrap: Any) -> None:
    reference = resnet()
    path = save(wrap(reference.state_dict()), tmp_path / name)
    student = build_student("resnet18", num_classes=4, image_size=SIZE, student_path=path)
    assert same_body(student, reference, head="nothing")
    assert student.initial_weights.reinitialized == ()
    assert not student.initial_weights.is_random


@pytest.mark.parametrize("classes", [4, 0])
def test_a_head_of_another_size_is_fresh_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: int
) -> None:
    reference = resnet(classes)
    path = save(reference.state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        student = build_student("resnet18", num_classes=7, image_size=SIZE, student_path=path)
    assert same_body(student, reference)
    assert student.initial_weights.reinitialized == ("fc.bias", "fc.weight")
    assert "fc.weight" in caplog.text


def test_hugging_face_folder_of_timm_with_shards(tmp_path: Path) -> None:
    reference = resnet()
    state = reference.state_dict()
    names = sorted(state)
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save({k: state[k] for k in part}, tmp_path / shard)
    index = {k: ("a" if i % 2 == 0 else "b") + ".safetensors" for i, k in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    student = build_student("resnet18", num_classes=4, image_size=SIZE, student_path=tmp_path)
    assert same_body(student, reference, head="nothing")


def test_torchvision_resnet_gives_the_same_outputs(tmp_path: Path) -> None:
    reference = torchvision.models.resnet18(num_classes=4).eval()
    path = save(reference.state_dict(), tmp_path / "w.pth")
    student = build_student("resnet18", num_classes=4, image_size=SIZE, student_path=path).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(student(images).logits, reference(images), rtol=1e-4, atol=1e-5)


def test_torchvision_vit_gives_the_same_outputs(tmp_path: Path) -> None:
    reference = torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=4
    ).eval()
    torch.nn.init.normal_(reference.heads.head.weight)
    path = save(reference.state_dict(), tmp_path / "w.pth")
    options = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    student = build_student("vit-tiny", num_classes=4, image_size=SIZE, student_path=path, **options).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(student(images).logits, reference(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transformers_vit_folder_gives_the_same_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=SIZE,
        num_labels=4,
    )
    config.layer_norm_eps = 1e-6
    reference = transformers.ViTForImageClassification(config).eval()
    torch.nn.init.normal_(reference.classifier.weight)
    reference.save_pretrained(tmp_path)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    student = build_student(
        "vit-tiny", num_classes=4, image_size=SIZE, student_path=tmp_path, **options
    ).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(student(images).logits, reference(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transformers_resnet_folder_gives_the_same_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=4
    )
    reference = transformers.ResNetForImageClassification(config).eval()
    reference.save_pretrained(tmp_path)
    student = build_student("resnet18", num_classes=4, image_size=SIZE, student_path=tmp_path).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(student(images).logits, reference(images).logits, rtol=1e-4, atol=1e-4)


def test_vit_of_another_image_size_has_its_positions_resampled(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    large = build_student("vit-tiny", num_classes=2, image_size=64, **options)
    path = save(large.state_dict(), tmp_path / "w.pt")
    small = build_student("vit-tiny", num_classes=2, image_size=32, student_path=path, **options)
    assert small.state_dict()["pos_embed"].shape == (1, 5, 24)
    assert torch.equal(small.state_dict()["pos_embed"][:, 0], large.state_dict()["pos_embed"][:, 0])


@pytest.mark.slow
def test_resnet50_fills_the_frame_encoder_of_an_lstm(tmp_path: Path) -> None:
    encoder = timm.create_model("resnet50", num_classes=1000)
    path = save(encoder.state_dict(), tmp_path / "w.pt")
    student = build_student("lstm/small", num_classes=3, image_size=SIZE, student_path=path)
    assert torch.equal(student.state_dict()["encoder.conv1.weight"], encoder.state_dict()["conv1.weight"])
    assert "lstm.weight_ih_l0" in student.initial_weights.reinitialized


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv1.weight"},
            "missing: layer1.0.conv1.weight",
        ),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "not in the student: extra.weight"),
        (
            lambda s: {**s, "conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"conv1.weight \(64, 1, 7, 7\) instead of",
        ),
        (lambda s: {"epoch": 3}, "holds no weights"),
        (lambda s: [1, 2], "holds no weights"),
    ],
)
def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path, change: Any, text: str) -> None:
    path = save(change(dict(resnet().state_dict())), tmp_path / "w.pt")
    with pytest.raises(StudentError, match=text) as caught:
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_another_architecture_lists_some_keys_and_counts_the_rest(tmp_path: Path) -> None:
    path = save(timm.create_model("resnet50").state_dict(), tmp_path / "w.pt")
    with pytest.raises(StudentError, match=r"does not fit resnet/resnet18: .*and \d+ more"):
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=path)


class Payload:
    """Pickling this would run a function when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_pickles_never_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save({"model": Payload()}, tmp_path / "w.pt")
    with pytest.raises(StudentError, match="holds more than weights"):
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudentError, match="does not exist"):
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=tmp_path / name)
    (tmp_path / name).write_bytes(b"hello\n")  # the unpickler raises KeyError
    with pytest.raises(StudentError, match="student_path"):
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=tmp_path / name)
    with pytest.raises(StudentError, match=r"folder without model\.safetensors"):
        build_student("resnet18", num_classes=4, image_size=SIZE, student_path=tmp_path)
