"""Student names are parsed in one place, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train.students.families import UnknownStudentError, all_student_names, parse_student_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet/resnet18", "resnet/resnet18"),
        ("resnet18", "resnet/resnet18"),
        ("resnet/18", "resnet/resnet18"),
        ("vit-tiny", "vit/vit-tiny"),
        ("vit/tiny", "vit/vit-tiny"),
        ("vit_tiny", "vit/vit-tiny"),
        ("yolov8n", "yolov8/n"),
        ("yolov8/yolov8n", "yolov8/n"),
        ("unet/small", "unet/small"),
        ("unet-small", "unet/small"),
        ("LSTM/Large", "lstm/large"),
        (" resnet50 ", "resnet/resnet50"),
        ("timm:mobilenetv4_conv_small", "timm:mobilenetv4_conv_small"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
    ],
)
def test_spellings(text: str, expected: str) -> None:
    assert str(parse_student_name(text)) == expected


def test_every_canonical_name_parses_to_itself() -> None:
    names = [str(name) for name in all_student_names()]
    assert [str(parse_student_name(name)) for name in names] == names
    assert len(names) == 18


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("resnt18", "resnet/resnet18"),
        ("yolov8z", "yolov8/"),
        ("vit-small", "vit/"),
        ("unet", "unet/small, unet/medium, unet/large"),
        ("timm:", "timm:NAME"),
        ("qqqq", "resnet/resnet18"),
    ],
)
def test_unknown_names_list_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UnknownStudentError) as caught:
        parse_student_name(text)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_parsing_imports_no_torch() -> None:
    code = "import sys, train.students.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
