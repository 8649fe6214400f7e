"""The grammar of the platform's options, and every default of the external contract."""

from __future__ import annotations

import pytest

from backend.task.errors import OptionError
from backend.task.options import GROUPS, OPTIONS, camel_case, help_text
from backend.task.parsing import Arguments, parse_arguments

# SPEC section 3, copied by hand: the contract, not the code, is what is compared with.
CONTRACT_DEFAULTS = {
    "datasets_root": "/data/datasets",
    "task_type": "classification",
    "num_classes": 10,
    "image_size": 224,
    "epochs": 100,
    "batch_size": 32,
    "learning_rate": 1e-4,
    "optimizer": "adamw",
    "lr_scheduler": "cosine",
    "weight_decay": 0.01,
    "grad_accum_steps": 1,
    "max_grad_norm": 1.0,
    "distillation_type": "hybrid",
    "temperature": None,  # chosen for the logits
    "hard_label_weight": 0.5,
    "soft_label_weight": 0.5,
    "feature_loss_type": "mse",
    "align_feature": True,
    "distill_loss_type": "kl_div",
    "lora_rank": 0,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_bias": "none",
    "gpu_devices": "0",
    "auto_save_checkpoint": False,
    "checkpoint_interval": 10,
    "student_path": None,
    "val_dataset_id": None,
    "lora_target_modules": None,
}


def one(*words: str) -> Arguments:
    arguments = parse_arguments(words)
    arguments.check()
    return arguments


def problem(*words: str) -> str:
    with pytest.raises(OptionError) as caught:
        one(*words)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "default"), CONTRACT_DEFAULTS.items())
def test_defaults_are_those_of_the_contract(name: str, default: object) -> None:
    assert OPTIONS[name].default == default


def test_no_option_is_listed_twice() -> None:
    assert sum(len(group) for group in GROUPS.values()) == len(OPTIONS)


@pytest.mark.parametrize("word", ["--batch_size", "--batch-size", "--batch_size=8"])
def test_underscores_dashes_and_equals_are_one_spelling(word: str) -> None:
    assert one(word, *([] if "=" in word else ["8"])).values == {"batch_size": 8}


def test_the_last_of_repeated_options_wins() -> None:
    words = ["--soft_label_weight", "0.1", "--epochs", "3", "--soft-label-weight=0.7"]
    assert one(*words).values == {"soft_label_weight": 0.7, "epochs": 3}


def test_a_bad_value_that_is_overridden_does_not_matter() -> None:
    assert one("--epochs", "x", "--epochs", "2").values == {"epochs": 2}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--align_feature", "True"], True),
        (["--align_feature", "true"], True),
        (["--align_feature", "False"], False),
        (["--align_feature", "false"], False),
        (["--align_feature", "0"], False),
        (["--align_feature=FALSE"], False),
        (["--align_feature"], True),
        (["--align_feature", "--epochs", "1"], True),
        (["--align_feature", ""], None),
    ],
)
def test_every_form_of_a_boolean(words: list[str], value: bool | None) -> None:
    assert one(*words).values["align_feature"] is value


@pytest.mark.parametrize("text", ["0.0001", "1.0E-4", "1e-4", ".0001", "+0.0001", " 1E-04 "])
def test_every_form_of_a_number(text: str) -> None:
    assert one("--learning_rate", text).values["learning_rate"] == 1e-4


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "1e999", "1_0", "0x1", "１", "abc", "true"])
def test_bad_numbers_are_named(text: str) -> None:
    assert problem("--learning_rate", text).startswith("--learning_rate: expected")


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "1e3", "9" * 400, "1_000", "٣", "3 4"])
def test_bad_integers_are_named(text: str) -> None:
    assert problem("--epochs", text).startswith("--epochs: expected")


def test_clipping_can_be_switched_off() -> None:
    assert one("--max_grad_norm", "0").values["max_grad_norm"] == 0


def test_an_integral_float_is_an_integer() -> None:
    assert one("--epochs", "32.0").values["epochs"] == 32


def test_all_problems_come_on_one_line() -> None:
    text = problem("--epochs", "x", "--optimizer", "rmsprop", "--lora_dropout", "1")
    assert "--epochs: expected a whole number, got 'x'" in text
    assert "--optimizer: expected one of adamw, adam, sgd, got 'rmsprop'" in text
    assert "--lora_dropout: expected less than 1, got 1.0" in text


def test_an_unknown_option_is_named_and_ignored_with_its_value() -> None:
    arguments = one("--warmup_ratio", "0.1", "--epochs", "2", "--use_swa", "-x", "9")
    assert arguments.values == {"epochs": 2}
    assert arguments.warnings == [
        "unknown option --warmup_ratio: ignored",
        "unknown option --use_swa: ignored",
    ]


def test_options_are_not_abbreviated() -> None:
    assert one("--epoch", "2").values == {}


def test_empty_text_is_unset() -> None:
    arguments = one("--student_path", "", "--epochs", "", "--val_dataset_id=", "--gpu_devices", "")
    assert arguments.values == dict.fromkeys(("student_path", "epochs", "val_dataset_id", "gpu_devices"))


@pytest.mark.parametrize("words", [["--dataset_id", "--epochs", "2"], ["--dataset_id"]])
def test_a_missing_value_is_named(words: list[str]) -> None:
    assert problem(*words) == "--dataset_id: expected a value, got none"


def test_text_from_a_form_cannot_become_an_option() -> None:
    assert "--task_name" in problem("--task_name", "--output_dir=/etc", "--epochs", "2")
    assert one("--task_name=--output_dir=/etc").values == {"task_name": "--output_dir=/etc"}


def test_control_characters_are_refused() -> None:
    for text in ("a\nb", "a\rb", "a\x00b", "a\x1b[31m", "a\u2028b", "a\udc80b"):
        assert problem("--dataset_id", text).startswith("--dataset_id: control characters")


def test_surplus_and_stray_words_are_named() -> None:
    arguments = one("stray", "--epochs", "2", "3")
    assert arguments.warnings == ["ignored: 'stray'", "--epochs takes one value, ignored: '3'"]


def test_lists_lose_their_blanks() -> None:
    assert one("--gpu_devices", " 0, 1,").values == {"gpu_devices": "0,1"}


def test_help_fits_and_names_every_option() -> None:
    page = help_text("train_qwen_vl_distillation.py")
    assert all(f"--{name}" in page for name in OPTIONS)
    assert max(len(line) for line in page.splitlines()) <= 88


def test_camel_case() -> None:
    assert camel_case("hard_label_weight") == "hardLabelWeight"
