"""LoRA on every student: what trains, what is saved, and that merging changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train.lora import (
    LoraError,
    LoraOptions,
    adaptable_layers,
    adapter_state,
    apply_lora,
    load_adapter_state,
    merge_lora,
)
from train.students.base import InitialWeights, StudentError
from train.students.build import build_student

STUDENTS: list[Any] = [
    ("resnet/resnet18", 32, {}),
    ("vit/vit-tiny", 32, {"depth": 2}),
    pytest.param(("unet/small", 32, {}), marks=pytest.mark.slow),
    pytest.param(("lstm/small", 32, {}), marks=pytest.mark.slow),
    pytest.param(("timm:mobilenetv4_conv_small", 64, {}), marks=pytest.mark.slow),
]
OPTIONS = LoraOptions(rank=4, dropout=0.0)


def base_student(name: str, size: int, options: dict[str, Any]) -> Any:
    """A student that counts as pretrained, with random batch-norm gains and statistics.

    timm starts the last gain of every residual block at 0, which would hide whatever the adapters before it do.
    """
    torch.manual_seed(0)
    student = build_student(name, num_classes=3, image_size=size, **options)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    student.initial_weights = InitialWeights("weights.pt")
    return student


def images_for(student: Any) -> torch.Tensor:
    size = student.spec.image_size
    shape = (2, 2, 3, size, size) if student.spec.type == "lstm" else (2, 3, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def train_a_little(student: Any, images: torch.Tensor) -> None:
    student.train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        student(images).logits.square().mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    # B starts at zero: make sure that the adapters matter in what follows.
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


@pytest.fixture(scope="module", params=STUDENTS, ids=["resnet", "vit", "unet", "lstm", "timm"])
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    base = base_student(*request.param)
    student = copy.deepcopy(base)
    report = apply_lora(student, OPTIONS)
    images = images_for(student)
    train_a_little(student, images)
    return {"base": base, "student": student, "report": report, "images": images}


def test_only_adapters_and_head_train(trained: dict[str, Any]) -> None:
    student, report = trained["student"], trained["report"]
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    heads = tuple(f"model.{p}" for p in student.head_prefixes) + student.head_prefixes
    assert all("lora_" in name or name.startswith(heads) for name in names)
    assert any("lora_" in name for name in names)
    assert any(name.startswith(heads) for name in names)
    assert report.trainable_parameters == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert report.trainable_parameters < report.total_parameters / 4


def test_every_adapter_got_a_gradient_and_the_base_did_not_move(trained: dict[str, Any]) -> None:
    student, base = trained["student"], trained["base"].state_dict()
    silent = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in student.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if "lora_" in name or plain.endswith(buffers) or plain.startswith(student.head_prefixes):
            continue
        assert torch.equal(value, base[plain]), name


def test_merged_equals_unmerged(trained: dict[str, Any]) -> None:
    student, images = trained["student"].eval(), trained["images"]
    merged = merge_lora(student).eval()
    with torch.no_grad():
        expected, got, base = student(images), merged(images), trained["base"].eval()(images)
    for want, have, before in zip(expected[:2], got[:2], base[:2], strict=True):
        scale = want.abs().max()
        assert float((have - want).abs().max() / scale) < 1e-5
        assert float((want - before).abs().max() / scale) > 1e-3, (
            "the adapters must matter for this test to tell"
        )
    assert merged.state_dict().keys() == trained["base"].state_dict().keys()
    assert not any("lora_" in name for name in merged.state_dict())


def test_saved_adapters_alone_restore_the_trained_student(trained: dict[str, Any], tmp_path: Path) -> None:
    torch.save(adapter_state(trained["student"]), tmp_path / "adapters.pt")
    again = copy.deepcopy(trained["base"])
    apply_lora(again, OPTIONS)
    load_adapter_state(again, torch.load(tmp_path / "adapters.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(trained["images"]), trained["student"].eval()(trained["images"])
        )
    saved = sum(v.numel() for v in adapter_state(again).values())
    assert saved < trained["base"].parameter_count() / 4


def test_batch_norm_statistics_travel_with_the_adapters(trained: dict[str, Any]) -> None:
    norms = [n for n in trained["student"].state_dict() if n.endswith("running_mean")]
    assert set(norms) <= adapter_state(trained["student"]).keys()


def test_adapters_of_other_options_are_refused(trained: dict[str, Any]) -> None:
    again = copy.deepcopy(trained["base"])
    apply_lora(again, OPTIONS)
    state = adapter_state(trained["student"])
    state.pop(next(key for key in state if "lora_A" in key))
    with pytest.raises(LoraError, match=r"do not fit .*: 1 keys differ, such as .*lora_A"):
        load_adapter_state(again, state)


def test_defaults_per_type() -> None:
    resnet = apply_lora(base_student("resnet18", 32, {}), OPTIONS).targets
    assert "layer1.0.conv1" in resnet
    assert "conv1" not in resnet
    vit = apply_lora(base_student("vit-tiny", 32, {"depth": 1}), OPTIONS).targets
    assert set(vit) == {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}


def test_chosen_targets() -> None:
    report = apply_lora(
        base_student("vit-tiny", 32, {"depth": 2}),
        LoraOptions(4, target_modules=("fc1", "blocks.0.attn.qkv")),
    )
    assert set(report.targets) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.0.attn.qkv"}


def test_unknown_targets_list_the_candidates() -> None:
    student = base_student("vit-tiny", 32, {"depth": 1})
    with pytest.raises(LoraError, match=r"query.*vit/vit-tiny.*candidates: fc1, fc2, proj, qkv"):
        apply_lora(student, LoraOptions(4, target_modules=("query",)))


@pytest.mark.slow
def test_depthwise_padded_and_bypassed_layers_are_no_candidates() -> None:
    depthwise = build_student("timm:mobilenetv4_conv_small", num_classes=3, image_size=64)
    layers = dict(depthwise.lora_root().named_modules())
    assert all(getattr(layers[name], "groups", 1) == 1 for name in adaptable_layers(depthwise))
    padded = build_student("timm:tf_efficientnet_lite0", num_classes=3, image_size=64)
    assert "conv_stem" not in adaptable_layers(padded)
    bypassed = build_student("timm:beit_base_patch16_224", num_classes=3, image_size=32, depth=1)
    assert not any(name.endswith("attn.qkv") for name in adaptable_layers(bypassed))


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 4), ("all", 8)])
def test_bias_settings(bias: Any, count: int) -> None:
    """One ViT block and the final norm: four adapted layers with a bias; norms and patches have the others."""
    student = base_student("vit-tiny", 32, {"depth": 1})
    apply_lora(student, LoraOptions(4, bias=bias))
    names = [
        n for n, p in student.named_parameters() if p.requires_grad and n.endswith("bias") and "head" not in n
    ]
    assert len(names) == count
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in names or "lora_B" in name:
                parameter.add_(0.1)
    images = images_for(student)
    torch.testing.assert_close(
        merge_lora(student).eval()(images), student.eval()(images), rtol=1e-4, atol=1e-4
    )
    assert {name.removeprefix("model.") for name in names} <= adapter_state(student).keys()


def test_random_weights_are_refused_with_the_reason() -> None:
    student = build_student("resnet18", num_classes=3, image_size=32)
    with pytest.raises(LoraError, match=r"random ones: give --student-path or --pretrained"):
        apply_lora(student, OPTIONS)
    apply_lora(student, OPTIONS, require_weights=False)


@pytest.mark.slow
def test_what_was_fresh_trains_like_a_head(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "w.pt")
    student: Any = build_student("lstm/small", num_classes=3, image_size=32, student_path=tmp_path / "w.pt")
    apply_lora(student, OPTIONS)
    assert student.lstm.weight_ih_l0.requires_grad
    assert not student.encoder.bn1.weight.requires_grad


def test_a_run_that_trained_with_lora_is_a_start_for_others(trained: dict[str, Any], tmp_path: Path) -> None:
    student = trained["student"]
    config = {
        "lora_rank": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": "",
        "lora_bias": "none",
    }
    content = {
        "format": 1,
        "student": student.spec.to_dict(),
        "config": config,
        "model_state_dict": student.state_dict(),
    }
    torch.save(content, tmp_path / "best.pt")
    spec = student.spec
    again = build_student(
        spec.name,
        num_classes=3,
        image_size=spec.image_size,
        student_path=tmp_path / "best.pt",
        **spec.options,
    )
    with torch.no_grad():
        expected = merge_lora(student).eval()(trained["images"]).logits
        torch.testing.assert_close(again.eval()(trained["images"]).logits, expected)
    torch.save(student.state_dict(), tmp_path / "alone.pt")
    with pytest.raises(StudentError, match="LoRA adapters that are not merged"):
        build_student(
            spec.name,
            num_classes=3,
            image_size=spec.image_size,
            student_path=tmp_path / "alone.pt",
            **spec.options,
        )


@pytest.mark.slow
def test_a_frozen_encoder_leaves_nothing_to_adapt() -> None:
    student = base_student("lstm/small", 32, {"freeze_encoder": True})
    with pytest.raises(LoraError, match="freeze_encoder keeps fixed"):
        apply_lora(student, OPTIONS)


def test_importing_the_module_imports_neither_peft_nor_transformers() -> None:
    code = "import sys, train.lora; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
