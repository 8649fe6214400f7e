"""One request from options, JSON and YAML: precedence, derived values, and what must not escape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.task.platform_yaml import read_platform_config
from backend.task.request import read_request
from tests.test_backend.platform_site import Site
from tests.test_backend.refusals import problem


def test_the_back_ends_own_command_line(site: Site) -> None:
    request = read_request(site.words(gpu_devices="0,1", auto_save_checkpoint="True", lora_rank=16))
    assert str(request.student) == "resnet/resnet50"
    assert request.task == "classification"
    assert request.teacher == "qwen2.5-vl"
    assert request.devices == ("cuda:0", "cuda:1")
    assert request.dataset_dir == request.val_dataset_dir == site.datasets / "flowers"
    assert request.cache_dir == site.output / "feature_cache"
    assert request.get("lora_rank") == 16
    assert request.get("epochs") == 100
    assert request.notes == ()


@pytest.mark.parametrize(
    ("model_type", "teacher", "size"),
    [
        ("qwen2_5_vl", "qwen2.5-vl", 252),
        ("qwen3_vl", "qwen3-vl", 256),
        ("qwen3_vl_moe", "qwen3-vl", 256),
        ("qwen3_5", "qwen3.5", 256),
        ("bert", "qwen2.5-vl", 252),  # its loader names what it expected
    ],
)
def test_the_checkpoint_says_which_teacher_it_is(
    site: Site, model_type: str, teacher: str, size: int
) -> None:
    from backend.task.configs import StageConfigs

    folder = site.models / "qwen2.5-vl-8b"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    request = read_request(site.words(image_size=256))
    assert request.teacher == teacher
    assert StageConfigs(request).features()["image_size"] == size
    named = site.words(teacher_path=folder, teacher_model="timm:test_vit")
    assert read_request(named).teacher == "timm:test_vit"


def test_options_win_over_json_and_json_over_yaml(site: Site, write: Callable[[str, str], Path]) -> None:
    yaml = write(
        "p.yml",
        f"distillation:\n  api:\n    base-url: http://yaml:1\n  datasets:\n    root: {site.datasets}\n",
    )
    text = json.dumps({"totalEpochs": 5, "batchSize": 4, "taskId": "json"})
    words = site.words(
        api_base_url=None, datasets_root=None, platform_config=yaml, training_config=text, epochs=9
    )
    request = read_request(words)
    assert (request.get("epochs"), request.get("batch_size"), request.task_id) == (9, 4, "7")
    assert request.api_base_url == "http://yaml:1"
    assert "learning_rate" not in request.chosen  # left to the student's recipe


def test_an_empty_option_leaves_the_json(site: Site) -> None:
    request = read_request([*site.words(training_config='{"totalEpochs": 5}'), "--epochs", ""])
    assert request.get("epochs") == 5


def test_the_json_alone_can_name_everything_but_roots(site: Site) -> None:
    text = json.dumps(
        {"taskId": 7, "teacherModel": "qwen2.5-vl-8b", "studentModel": "vit/vit-tiny", "datasetId": "flowers"}
    )
    words = [
        "--training-config",
        text,
        "--models_root",
        str(site.models),
        "--datasets_root",
        str(site.datasets),
    ]
    words += ["--output_dir", str(site.output / "7"), "--api_base_url", "http://h"]
    request = read_request(words)
    assert str(request.student) == "vit/vit-tiny"
    assert request.teacher_path == site.models / "qwen2.5-vl-8b"


@pytest.mark.parametrize(
    ("model", "kind", "size", "expected"),
    [
        ("resnet50", None, None, "resnet/resnet50"),
        ("resnet/resnet50", None, None, "resnet/resnet50"),
        ("resnet50", "resnet", "50", "resnet/resnet50"),
        ("yolov8s", None, None, "yolov8/s"),
        ("yolov8s", "yolov8", "s", "yolov8/s"),
        ("yolov8s", "yolov8", "small", "yolov8/s"),
        ("yolov8s", "YOLOv8", "yolov8s", "yolov8/s"),
        ("vit-tiny", "vit", "tiny", "vit/vit-tiny"),
        ("vit_base", None, None, "vit/vit-base"),
        ("unet", "unet", "medium", None),
        ("unet-medium", None, None, "unet/medium"),
        ("unet_small", "unet", "small", "unet/small"),
        ("lstm/large", None, None, "lstm/large"),
        (None, "lstm", "small", "lstm/small"),
        ("timm:mobilenetv4_conv_small", None, None, "timm:mobilenetv4_conv_small"),
    ],
)
def test_students_by_every_spelling(
    site: Site, model: str | None, kind: str | None, size: str | None, expected: str | None
) -> None:
    words = site.words(student_model=model, student_model_type=kind, student_model_size=size)
    if expected is None:
        assert "student_model" in problem(words)
    else:
        assert str(read_request(words).student) == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"student_model_type": "vit"}, "student_model_type"),
        ({"student_model_size": "resnet18"}, "student_model_size"),
        ({"student_model": "alexnet"}, "student_model"),
        ({"student_model": None, "student_model_type": None}, "student_model"),
        ({"student_model_type": "bert"}, "student_model_type"),
    ],
)
def test_contradicting_students_are_errors(site: Site, options: dict[str, str | None], name: str) -> None:
    assert problem(site.words(**options)).startswith(f"--{name}: ")


@pytest.mark.parametrize(
    ("student", "asked", "task"),
    [
        ("resnet50", None, "classification"),
        ("resnet50", "features", "features"),
        ("lstm/small", "classification", "sequence"),
        ("yolov8n", "detection", "detection"),
        ("unet/small", "segmentation", "segmentation"),
    ],
)
def test_tasks(site: Site, student: str, asked: str | None, task: str) -> None:
    words = site.words(
        student_model=student, student_model_type=None, student_model_size=None, task_type=asked
    )
    request = read_request(words)
    assert request.task == task
    assert request.notes == ()


@pytest.mark.parametrize(("student", "task"), [("yolov8n", "detection"), ("unet/small", "segmentation")])
def test_the_hard_coded_classification_becomes_the_students_task(site: Site, student: str, task: str) -> None:
    words = site.words(
        student_model=student, student_model_type=None, student_model_size=None, task_type="classification"
    )
    request = read_request(words)
    assert request.task == task
    assert request.notes == (f"task_type classification does not fit {request.student}: training {task}",)


def test_a_task_that_does_not_fit_is_an_error(site: Site) -> None:
    assert problem(site.words(task_type="detection")).startswith("--task_type: expected classification")


def test_a_student_path_where_nothing_lies_means_no_weights(site: Site) -> None:
    request = read_request(site.words(student_path=site.models / "resnet50"))
    assert request.student_path is None
    assert "no weights at student_path" in request.notes[0]
    assert "random" in request.notes[0]


def test_pretrain_path_of_the_json_when_the_back_ends_path_is_empty(site: Site) -> None:
    weights = site.models / "w.pt"
    weights.write_bytes(b"x")
    config = {"studentModelConfig": {"initMethod": "pretrained", "pretrainPath": str(weights)}}
    words = site.words(student_path=site.models / "resnet50", training_config=json.dumps(config))
    assert read_request(words).student_path == weights


def test_weights_that_are_nowhere_are_a_random_start(site: Site) -> None:
    """Also when the form says `pretrained`: it named a file, and guessing other weights would be another training."""
    config = {"studentModelConfig": {"initMethod": "pretrained", "pretrainPath": "gone.pt"}}
    words = site.words(
        student_path=site.models / "resnet50", models_root=site.models, training_config=json.dumps(config)
    )
    request = read_request(words)
    assert (request.student_path, request.pretrained) == (None, False)
    assert request.notes == (
        f"no weights at student_path {site.models}/resnet50 or pretrainPath {site.models}/gone.pt: "
        "the student starts from random weights",
    )


@pytest.mark.parametrize(
    ("option", "method", "expected"),
    [
        (None, "pretrained", True),
        (None, "random", False),
        (None, None, False),
        ("True", "random", True),
        ("False", "pretrained", False),
    ],
)
def test_published_weights_are_taken_when_asked_for(
    site: Site, option: str | None, method: str | None, expected: bool
) -> None:
    text = json.dumps({"studentModelConfig": {"initMethod": method}})
    words = site.words(student_path=site.models / "resnet50", pretrained=option, training_config=text)
    request = read_request(words)
    assert (request.student_path, request.pretrained) == (None, expected)
    assert ("timm's published weights" in request.notes[0]) is expected


def test_random_init_leaves_the_pretrain_path(site: Site) -> None:
    weights = site.models / "w.pt"
    weights.write_bytes(b"x")
    config = {"studentModelConfig": {"initMethod": "random", "pretrainPath": str(weights)}}
    assert read_request(site.words(training_config=json.dumps(config))).student_path is None


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0", ("cuda:0",)),
        ("0,1", ("cuda:0", "cuda:1")),
        ("cpu", ("cpu",)),
        ("CPU", ("cpu",)),
        ("cuda:1", ("cuda:1",)),
    ],
)
def test_devices(site: Site, text: str, devices: tuple[str, ...]) -> None:
    assert read_request(site.words(gpu_devices=text)).devices == devices


@pytest.mark.parametrize("text", ["0,cpu", "-1", "a", "0,0", "0;1", "²"])
def test_bad_devices(site: Site, text: str) -> None:
    assert problem(site.words(gpu_devices=text)).startswith("--gpu_devices: ")


@pytest.mark.parametrize(
    "name", ["task_id", "api_base_url", "student_model", "teacher_path", "dataset_id", "output_dir"]
)
def test_what_is_required_is_named(site: Site, name: str) -> None:
    options: dict[str, object] = {name: None}
    if name == "student_model":
        options |= {"student_model_type": None, "student_model_size": None}
    assert problem(site.words(**options)).startswith(f"--{name}: ")


@pytest.mark.parametrize(
    "text",
    ["..", ".", "../flowers", "a/../../b", "/etc", "a/b", "a\\b", "~root", "-rf", "a" * 300, "a:b", "%2e%2e"],
)
@pytest.mark.parametrize("option", ["dataset_id", "val_dataset_id", "task_id"])
def test_ids_do_not_escape(site: Site, option: str, text: str) -> None:
    assert problem(site.words(**{option: text})).startswith(f"--{option}: ")


def test_a_data_set_that_links_out_of_the_root_is_refused(
    site: Site, write: Callable[[str, str], Path]
) -> None:
    outside = site.root / "outside"
    outside.mkdir()
    (site.datasets / "linked").symlink_to(outside)
    assert "leads outside" in problem(site.words(dataset_id="linked"))
    allowed = write("p.yml", "distillation.security.allow-symlinks: true")
    assert read_request(site.words(dataset_id="linked", platform_config=allowed)).dataset_id == "linked"


def test_unicode_ids_are_fine(site: Site) -> None:
    (site.datasets / "花卉 2024").mkdir()
    assert read_request(site.words(dataset_id="花卉 2024", task_id="任务7")).dataset_id == "花卉 2024"


@pytest.mark.parametrize(
    "option", ["teacher_path", "student_path", "output_dir", "datasets_root", "cache_dir"]
)
def test_paths_that_the_back_end_joined_with_dots_are_refused(site: Site, option: str) -> None:
    assert problem(site.words(**{option: "/data/models/../../etc"})) == (
        f"--{option}: '..' is not allowed in a path, got '/data/models/../../etc'"
    )


def test_a_teacher_name_does_not_escape_the_models_root(site: Site) -> None:
    words = site.words(teacher_path=None, models_root=site.models, teacher_model="../datasets")
    assert problem(words).startswith("--teacher_model: ")


def test_paths_typed_into_the_form_stay_below_the_models_root(site: Site) -> None:
    text = json.dumps({"teacherModelConfig": {"modelPath": str(site.datasets)}})
    words = site.words(teacher_path=None, models_root=site.models, training_config=text)
    assert problem(words).startswith("--modelPath: ")


def test_the_output_stays_below_the_operators_root(site: Site, write: Callable[[str, str], Path]) -> None:
    config = write("p.yml", f"distillation:\n  output:\n    root: {site.output}")
    assert "leads outside" in problem(site.words(platform_config=config, output_dir=site.datasets))
    assert read_request(site.words(platform_config=config, output_dir=None)).output_dir == site.output / "7"
    assert (
        read_request(site.words(platform_config=config, output_dir="x/y")).output_dir == site.output / "x/y"
    )


def test_spring_yaml_forms(write: Callable[[str, str], Path]) -> None:
    path = write(
        "p.yml",
        "server:\n  port: 8080\n---\ndistillation:\n  api:\n    baseUrl: ${API_URL:http://localhost:8080}/api\n"
        "  models.root: ${MODELS}\n",
    )
    config = read_platform_config(str(path), {"MODELS": "/m"})
    assert config.values == {"api_base_url": "http://localhost:8080/api", "models_root": "/m"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected `key: value`"),
        ("distillation.models.root: ${NOT_SET_ANYWHERE}", "neither in the environment"),
        ("distillation.datasets.sql.a.url2: x", "datasets.sql.<dataset_id>"),
        ("distillation.models.root: [1]", "expected text"),
        ("distillation.security.allow-symlinks: maybe", "expected true or false"),
        ("a: &a [*a]", "not valid YAML: an anchored part contains an alias of itself"),
    ],
)
def test_bad_yaml_is_one_line(site: Site, write: Callable[[str, str], Path], text: str, words: str) -> None:
    path = write("p.yml", text)
    assert words in problem(site.words(platform_config=path))


def test_a_yaml_that_is_not_there(site: Site) -> None:
    assert problem(site.words(platform_config="/nowhere.yml")).startswith(
        "--platform_config /nowhere.yml: cannot read"
    )


@pytest.mark.parametrize("option", ["output_dir", "teacher_path", "student_path", "datasets_root"])
def test_paths_that_no_file_system_takes(site: Site, option: str) -> None:
    assert "File name too long" in problem(site.words(**{option: "/" + "9" * 5000}))
