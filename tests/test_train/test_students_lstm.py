"""Clips of different lengths: padding has no influence, frame pairs repeat, a frozen encoder stays fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.lora import LoraError, choose_targets
from train.students.base import StudentError
from train.students.build import build_student, load_local_weights, rebuild_student


def clip_student(**options: bool) -> Any:
    torch.manual_seed(0)
    return build_student("lstm/small", num_classes=3, image_size=32, **options)


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("attention_pooling", "training"), [(False, True), (True, False)])
def test_padding_has_no_influence(clips: Tensor, attention_pooling: bool, training: bool) -> None:
    student = clip_student(attention_pooling=attention_pooling).train(training)
    lengths = torch.tensor([5, 2])
    noisy = clips.clone()
    noisy[1, 2:] = 1e3
    first, second = student(clips, lengths), student(noisy, lengths)
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.features, second.features)
    assert first.features[1, 2:].abs().max() == 0
    alone = clip_student(attention_pooling=attention_pooling).eval()
    if not training:
        torch.testing.assert_close(first.logits[1:], alone(clips[1:, :2]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention_pooling", [True])
def test_full_clips_need_no_packing(clips: Tensor, attention_pooling: bool) -> None:
    student = clip_student(attention_pooling=attention_pooling).eval()
    packed, plain = student(clips, torch.tensor([5, 5])), student(clips)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_distilled_layer_depends_on_what_trains(clips: Tensor) -> None:
    trained, frozen = clip_student(), clip_student(freeze_encoder=True)
    assert trained(clips).features.shape == (2, 5, 2048)
    assert frozen(clips).features.shape == (2, 5, 512)
    assert trained.spec.feature_width == 2048
    assert frozen.spec.feature_width == 512
    assert "encoder" in trained.spec.distilled_layer
    assert "LSTM" in frozen.spec.distilled_layer


def test_another_frame_encoder_is_built_again_from_the_recorded_options(clips: Tensor) -> None:
    student = build_student("lstm/small", num_classes=3, image_size=32, frame_encoder="resnet10t").eval()
    assert student(clips).features.shape == (2, 5, 512) == (2, 5, student.spec.feature_width)
    again = rebuild_student(student.spec.to_dict()).eval()
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again(clips).logits, student(clips).logits)


@pytest.mark.parametrize("name", ["hf-hub:someone/thing", "local-dir:/tmp", "nothing"])
def test_a_frame_encoder_is_one_of_timm_also_in_a_checkpoint(name: str) -> None:
    spec = clip_student().spec.to_dict()
    with pytest.raises(StudentError, match="timm has no model"):
        rebuild_student({**spec, "options": {**spec["options"], "frame_encoder": name}})


@pytest.mark.parametrize(("name", "width"), [("mobilenetv3_small_050", 1024), ("vit_tiny_patch16_224", 192)])
def test_the_width_of_a_frame_encoder_is_that_of_its_output(clips: Tensor, name: str, width: int) -> None:
    student = build_student("lstm/small", num_classes=3, image_size=32, frame_encoder=name).eval()
    assert student(clips).features.shape == (2, 5, width) == (2, 5, student.spec.feature_width)
    with pytest.raises(StudentError, match="not a multiple of vit_tiny_patch16_224's patch 16"):
        build_student("lstm/small", num_classes=3, image_size=40, frame_encoder="vit_tiny_patch16_224")


def test_weights_of_a_plain_encoder_and_adapters(tmp_path: Path) -> None:
    import timm

    student = build_student("lstm/small", num_classes=3, image_size=32, frame_encoder="convnext_atto")
    plain = timm.create_model("convnext_atto", num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    load_local_weights(student, tmp_path / "plain.pt")
    assert torch.equal(student.encoder.stem[0].weight, plain.stem[0].weight)
    with pytest.raises(LoraError, match="has none of the layers conv1, conv2, conv3; name some with"):
        choose_targets(student, [])


def test_frozen_encoder_stays_as_it_is(clips: Tensor) -> None:
    student = clip_student(freeze_encoder=True).train()
    before = {k: v.clone() for k, v in student.encoder.state_dict().items()}
    output = student(clips, torch.tensor([5, 3]))
    (output.logits.sum() + output.features.sum()).backward()
    assert all(p.grad is None for p in student.encoder.parameters())
    assert all(torch.equal(before[k], v) for k, v in student.encoder.state_dict().items())
    assert student.lstm.weight_hh_l0.grad is not None


@pytest.mark.slow
def test_label_free_clips_train_what_is_distilled() -> None:
    trained = build_student("lstm/small", num_classes=None, image_size=32)
    frozen = build_student("lstm/small", num_classes=None, image_size=32, freeze_encoder=True)
    assert {n.split(".")[0] for n, p in trained.named_parameters() if p.requires_grad} == {"encoder"}
    assert {n.split(".")[0] for n, p in frozen.named_parameters() if p.requires_grad} == {"lstm"}


@pytest.mark.parametrize("lengths", [[0, 5], [6, 5]])
def test_impossible_lengths_are_refused(clips: Tensor, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.5"):
        clip_student()(clips, torch.tensor(lengths))
