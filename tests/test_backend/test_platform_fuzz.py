"""Whatever comes from a web form: a value, or one line that names the problem; never another exception."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend.task.call_queue import CallQueue, Patience
from backend.task.configs import StageConfigs
from backend.task.errors import OptionError
from backend.task.http_client import HttpClient
from backend.task.options import OPTIONS, camel_case
from backend.task.parsing import NESTED, SPECIAL, parse_arguments, read_training_config
from backend.task.platform_yaml import read_platform_config
from backend.task.request import TaskRequest, find_addressee, read_request
from store.errors import DistillError

QUICK, THOROUGH = 200, 5_000
# The same cases in every run, so that a suite that passed passes again; FUZZ_HUNT=1 looks for new ones.
HUNT = bool(os.environ.get("FUZZ_HUNT"))
RELAXED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

names = st.sampled_from([*OPTIONS, *(name.replace("_", "-") for name in OPTIONS)])
tricky = st.sampled_from(
    [
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "\x00",
        "a\nb",
        "\udc80",
        "--task_id",
        "-",
        "--",
        "=",
        "NaN",
        "-Infinity",
        "1e309",
        "0x10",
        "9" * 5000,
        "True",
        "null",
        "undefined",
        "{}",
        "[[",
        '{"a":' * 2000,
        "http://[::1",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "sqlite:////etc/passwd",
        "mysql://u:p@[::]:99999/x",
        "${jndi:ldap://x}",
        "$(reboot)",
        "`id`",
        "'; DROP TABLE md_training_task; --",
        "resnet50",
        "yolov8s",
        "timm:",
        "0,1,cpu",
        "²",
        "٣",
        "😀" * 300,
    ]
)
values = st.one_of(tricky, st.text(max_size=40), st.integers().map(str), st.floats().map(repr))
words = st.lists(
    st.one_of(
        names.map(lambda name: f"--{name}"),
        values,
        st.tuples(names, values).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        st.text(max_size=20).map(lambda text: f"--{text}"),
    ),
    max_size=30,
)
field_names = st.sampled_from([*(camel_case(name) for name in OPTIONS), *NESTED, *SPECIAL, "alpha", "x"])
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), values)
documents = st.recursive(
    st.dictionaries(field_names, leaves, max_size=8),
    lambda inner: st.dictionaries(
        field_names, st.one_of(leaves, inner, st.lists(st.one_of(leaves, inner), max_size=3)), max_size=6
    ),
    max_leaves=12,
)


def settle(line: list[str]) -> TaskRequest | None:
    """The request of a command line, or None after a proper refusal."""
    try:
        request = read_request(line)
        StageConfigs(request).features()
    except OptionError as error:
        check_refusal(error)
        return None
    return request


def check_refusal(error: OptionError | DistillError, start: str = "") -> None:
    """One printable line, exit code 2."""
    assert error.exit_code == 2
    assert str(error).startswith(start)
    assert str(error)
    assert "\n" not in str(error)


def check_line(line: list[str], root: Path) -> None:
    """A line of anything, in front of a good one and after it."""
    request = settle(line)
    assert request is None or request.task_id
    with contextlib.suppress(OptionError):
        find_addressee(line)
    good = base_line(root)
    for combined in (line + good, good + line):
        request = settle(combined)
        if request is not None:
            check_inside(request, root)
            check_both_stages(request)


def base_line(root: Path) -> list[str]:
    options = {
        "task_id": "7",
        "api_base_url": "http://localhost:1",
        "teacher_path": root / "teacher",
        "student_model": "resnet18",
        "student_model_type": "",
        "student_model_size": "",
        "dataset_id": "flowers",
        "datasets_root": root / "datasets",
        "output_dir": root / "out",
        "platform_config": "",
        "training_config": "",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def check_inside(request: TaskRequest, root: Path) -> None:
    """Whatever the ids were, data sets lie below their root."""
    if request.dataset_dir is not None and request.get("datasets_root") == str(root / "datasets"):
        assert (root / "datasets") in request.dataset_dir.resolve().parents
    assert "/" not in request.task_id
    assert ".." not in request.output_dir.parts


def check_both_stages(request: TaskRequest) -> None:
    """What the door lets through, the two configurations take or refuse in their own words."""
    try:
        configs = StageConfigs(request)
        configs.train_config(Path("store.zarr"))
        configs.extract_config(Path("store.zarr"))
    except (OptionError, DistillError) as error:
        check_refusal(error)


def check_document(document: Any, root: Path) -> None:
    text = json.dumps(document)
    try:
        read_training_config(text).check()
    except OptionError as error:
        check_refusal(error)
    request = settle([*base_line(root), f"--training_config={text}"])
    if request is not None:
        check_inside(request, root)
        check_both_stages(request)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "datasets" / "flowers").mkdir(parents=True)
    return tmp_path


@given(line=words)
@settings(max_examples=QUICK, deadline=None, derandomize=True, suppress_health_check=RELAXED)
@example(line=["--training_config={"])
@example(line=["--platform_config=/dev/null"])
@example(line=["--training_config", "/dev/zero"])
@example(line=["--training_config", "/"])
def test_any_command_line(root: Path, line: list[str]) -> None:
    check_line(line, root)


@given(document=documents)
@settings(max_examples=QUICK, deadline=None, derandomize=True, suppress_health_check=RELAXED)
def test_any_json(root: Path, document: Any) -> None:
    check_document(document, root)


@pytest.mark.slow
@given(line=words)
@settings(max_examples=THOROUGH, deadline=None, derandomize=not HUNT, suppress_health_check=RELAXED)
def test_five_thousand_command_lines(root: Path, line: list[str]) -> None:
    check_line(line, root)


@pytest.mark.slow
@given(document=documents)
@settings(max_examples=THOROUGH, deadline=None, derandomize=not HUNT, suppress_health_check=RELAXED)
def test_five_thousand_json_documents(root: Path, document: Any) -> None:
    check_document(document, root)


@given(text=st.one_of(st.text(), tricky))
@settings(max_examples=QUICK, deadline=None, derandomize=True)
def test_any_text_as_json(text: str) -> None:
    try:
        read_training_config("{" + text).check()
    except OptionError as error:
        check_refusal(error)


@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
    )
)
@settings(max_examples=QUICK, deadline=None, derandomize=True, suppress_health_check=RELAXED)
@example(content=b"a: &a [*a, *a]")
@example(content=b"distillation: &x\n  y: *x")
@example(content=b"? [a]\n: b")
@example(content=b"!!python/object/apply:os.system ['true']")
def test_any_bytes_as_yaml(root: Path, content: bytes) -> None:
    path = root / "platform.yml"
    path.write_bytes(content)
    try:
        read_platform_config(str(path), {})
    except OptionError as error:
        check_refusal(error, "--platform_config")


@given(line=words)
@settings(max_examples=QUICK, deadline=None, derandomize=True)
def test_the_grammar_alone_never_raises(line: list[str]) -> None:
    arguments = parse_arguments(line)
    assert all("\n" not in text for text in (*arguments.warnings, *arguments.problems))


@given(answer=st.binary(max_size=300))
@settings(max_examples=100, deadline=None, derandomize=True)
@example(answer=b'{"code": 200}')
@example(answer=b"[" * 20_000)
@example(answer=b'{"code": {"a": 1}, "message": [1]}')
def test_any_answer_of_the_server_is_an_outcome(answer: bytes) -> None:
    outcome = HttpClient("http://localhost").judge(200, answer)
    assert outcome.delivered == (answer == b'{"code": 200}')
    assert "\n" not in outcome.reason


def test_patience_is_the_default_of_the_reporter(tmp_path: Path) -> None:
    queue = CallQueue(HttpClient("http://localhost:1"), tmp_path / "u.jsonl")
    assert queue.patience == Patience()
    assert queue.close(0.1)
