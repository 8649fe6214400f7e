"""The pages in a real browser, over a real server process that starts real trainings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.test_frontend.browser import DESKTOP, PHONE, Site, Visitor

pytestmark = pytest.mark.slow

TEACHER = "Qwen2.5-VL-tiny"  # the folder that the fixture `site` makes
Visit = Callable[..., Visitor]
#: Small enough for seconds an epoch on one core.
EPOCHS = 40  # enough that a browser on a busy core finds the task running
QUICK = {"imageSize": 32, "teacherImageSize": 56, "learningRate": 0.003, "gpuDevices": "cpu", "workers": 0}


def task_body(name: str, **changes: Any) -> dict[str, Any]:
    own = {"taskName": name, "teacherModel": TEACHER, "studentModel": "timm:resnet10t", "datasetId": "digits"}
    config = {key: QUICK[key] for key in ("imageSize", "teacherImageSize", "workers")}
    return {**own, "learningRate": 0.003, "gpuDevices": "cpu", "trainingConfig": config, **changes}


@pytest.fixture(scope="module")
def completed(site: Site) -> str:
    """The id of a task that has completed, with a control."""
    body = task_body("Digits with control", totalEpochs=3)
    body["trainingConfig"]["control"] = True
    task_id = site.call("POST", "/tasks", json=body)["taskId"]
    site.call("POST", f"/tasks/{task_id}/start")
    site.wait_for(task_id, "COMPLETED")
    return str(task_id)


def write_json(page: Any, document: dict[str, Any] | str) -> None:
    """Replace the text of the JSON editor, as a user pastes it."""
    editor = page.locator(".json-editor .cm-content")
    editor.click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(document if isinstance(document, str) else json.dumps(document, indent=2))


def read_editor(page: Any) -> Any:
    lines = page.locator(".json-editor .cm-line").all_inner_texts()
    return json.loads("\n".join(lines))


@pytest.mark.parametrize(("size", "theme", "language"), [(DESKTOP, "light", "en"), (PHONE, "dark", "zh")])
def test_empty_pages_say_what_to_do_next(visit: Visit, size: Any, theme: str, language: str) -> None:
    window = visit(size, language, theme)
    words = {
        "/": {"en": "Create the first one", "zh": "创建第一个任务"},
        "/stores": {"en": "The first task extracts", "zh": "第一个任务会把教师特征提取到"},
        "/compare": {"en": "A task appears here", "zh": "任务完成后会出现在这里"},
    }
    for path, texts in words.items():
        page = window.open(path)
        expect(page.locator(".empty")).to_contain_text(texts[language])
        expect(page.locator(".empty .q-btn")).to_be_visible()
        assert page.evaluate("document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[language]
        assert window.overflow() <= 0
        assert window.unnamed() == []
        window.keep(f"empty-{path.strip('/') or 'tasks'}-{language}-{theme}")
    page.locator(".empty .q-btn").click()
    expect(page).to_have_url(re.compile("/new$"))


def test_language_and_colors_are_chosen_on_the_page_and_kept(visit: Visit) -> None:
    window = visit()
    page = window.open("/")
    page.get_by_role("button", name="切换到中文").click()
    expect(page.locator("h1")).to_have_text("任务")
    page.get_by_role("button", name="切换到深色").click()
    expect(page.locator("body")).to_have_class(re.compile("body--dark"))
    window.open("/new")
    expect(page.locator("h1")).to_have_text("新建任务")
    expect(page.locator("body")).to_have_class(re.compile("body--dark"))


def test_the_keyboard_alone_reaches_the_form(visit: Visit) -> None:
    page = visit().open("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert "New task" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/new$"))


def test_form_and_json_hold_the_same_settings(visit: Visit) -> None:
    window = visit()
    page = window.open("/new")
    expect(page.locator(".data-facts")).to_contain_text("Class folders")
    expect(page.locator(".data-facts")).to_contain_text("60")
    expect(page.locator(".data-facts")).to_contain_text("100%")

    page.get_by_label("Epochs", exact=True).fill("12")
    page.get_by_label("Family").click()
    page.get_by_role("option", name="vit").click()
    expect(page.get_by_label("Batch size")).to_have_attribute("placeholder", "64")  # the recipe of vit
    expect(page.locator(".command")).to_contain_text("--student_model=vit/vit-tiny")
    expect(page.locator(".command")).to_contain_text("--epochs=12")
    assert read_editor(page) == {
        "studentModel": "vit/vit-tiny",
        "teacherModel": TEACHER,
        "datasetId": "digits",
        "totalEpochs": 12,
    }

    document = {"studentModel": "unet/medium", "teacherModel": TEACHER, "datasetId": "digits", "batchSize": 4}
    write_json(page, document)
    expect(page.get_by_label("Batch size")).to_have_value("4")
    expect(page.get_by_label("Epochs", exact=True)).to_have_value("")
    expect(page.get_by_label("Image size", exact=True)).to_have_attribute("placeholder", "512")
    expect(page.locator(".notice")).to_contain_text("the student learns segmentation")

    page.get_by_label("Batch size").fill("0")
    expect(page.locator(".q-field--error")).to_contain_text("At least 1")
    expect(page.get_by_role("button", name="Create and start")).to_be_disabled()
    write_json(page, {**document, "batchSize": 4, "optimizer": "lion"})
    expect(page.locator(".q-field--error")).to_contain_text("expected one of")
    expect(
        page.locator(".cm-lint-marker-error, .cm-lintRange-error, .cm-lintRange-warning").first
    ).to_be_attached()
    window.keep("new-wrong-value-en-light")
    write_json(page, '{"studentModel": ')
    expect(page.locator("p[role=alert]")).to_contain_text("The JSON is not valid")
    expect(page.get_by_role("button", name="Create and start")).to_be_disabled()
    write_json(page, document)
    expect(page.get_by_role("button", name="Create and start")).to_be_enabled()
    assert read_editor(page) == document  # what was typed stays as it was typed
    assert window.unnamed() == []
    window.keep("new-en-light")


def test_what_the_server_refuses_is_explained_in_chinese_on_the_chinese_pages(visit: Visit) -> None:
    window = visit(language="zh")
    page = window.open("/new")
    document = {"studentModel": "resnet18", "teacherModel": TEACHER, "datasetId": "digits"}
    write_json(page, {**document, "gpuDevices": "0,0"})
    expect(page.locator(".notice")).to_contain_text("gpuDevices：应为 cpu，或每块 GPU 各一次，实际为 '0,0'")
    write_json(page, {**document, "optimizer": "lion"})
    expect(page.locator(".q-field--error")).to_contain_text("可选值为 adamw, adam, sgd，实际为 'lion'")
    window.keep("new-refused-zh-light")


@pytest.mark.parametrize(("language", "theme"), [("zh", "light"), ("en", "dark")])
def test_every_page_fits_a_phone(visit: Visit, completed: str, language: str, theme: str) -> None:
    window = visit(PHONE, language, theme)
    for path in ("/", "/new", f"/tasks/{completed}", "/stores", "/compare", "/tasks/missing"):
        window.open(path)
        window.page.wait_for_timeout(500)
        assert window.overflow() <= 0, path
        assert window.unnamed() == [], path
        name = "task" if completed in path else path.strip("/").replace("/", "-") or "tasks"
        window.keep(f"phone-{name}-{language}-{theme}")


@pytest.mark.timeout(900)
def test_a_task_is_created_started_watched_stopped_and_resumed_over_a_restart_of_the_server(
    site: Site, visit: Visit
) -> None:
    window = visit()
    page = window.open("/new")
    document = read_editor(page) | {"studentModel": "timm:resnet10t", "totalEpochs": EPOCHS, **QUICK}
    write_json(page, document)
    page.get_by_label("Name", exact=True).fill("Watched in a browser")
    expect(page.locator(".command")).to_contain_text("--task_name=Watched in a browser")
    page.get_by_role("button", name="Create and start").click()
    page.wait_for_url(re.compile("/tasks/"))
    task_id = page.url.rpartition("/")[2]

    expect(page.locator("h1")).to_have_text("Watched in a browser")
    state = page.locator(".head .state")
    expect(state).to_have_text("Running")
    page.get_by_role("tab", name="Log").click()
    expect(page.get_by_role("log")).to_contain_text(f"epoch 2/{EPOCHS}", timeout=90_000)
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator(".chart svg").first).to_be_visible()
    expect(page.locator(".progress .words")).to_contain_text(f"of {EPOCHS}")
    window.keep("task-running-en-light")

    other = visit(language="zh", theme="dark")
    row = other.open("/").locator(f"tr[data-task='{task_id}']")
    expect(row.locator(".state")).to_have_text("运行中")
    other.keep("tasks-running-zh-dark")

    page.bring_to_front()  # Chromium slows down pages in the background
    page.get_by_role("button", name="Stop").click()
    expect(state).to_have_text("Stopped")
    expect(row.locator(".state")).to_have_text("已停止")
    done = site.call("GET", f"/tasks/{task_id}")["currentEpoch"]
    assert 0 < done < EPOCHS

    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("Running")
    site.wait(lambda: (site.call("GET", f"/tasks/{task_id}")["currentEpoch"] or 0) > done, 60)
    site.kill()  # SIGKILL: the training goes on
    site.start()
    page = window.open(f"/tasks/{task_id}")
    expect(page.locator(".head .state")).to_have_text(re.compile("Running|Completed"))
    expect(page.locator(".head .state")).to_have_text("Completed", timeout=240_000)
    expect(page.locator(".progress .words")).to_have_text(f"epoch {EPOCHS} of {EPOCHS}")
    epochs = [point["epoch"] for point in site.call("GET", f"/tasks/{task_id}/history")]
    assert epochs == list(range(1, EPOCHS + 1))
    page.get_by_role("tab", name="Evaluation").click()
    expect(page.locator(".table").first).to_contain_text("top-1 accuracy")
    expect(page.get_by_text("No control was trained")).to_be_visible()
    window.keep("task-completed-en-light")


def test_what_a_completed_task_shows(site: Site, visit: Visit, completed: str, tmp_path: Path) -> None:
    window = visit()
    page = window.open(f"/tasks/{completed}")
    expect(page.locator(".chart svg")).to_have_count(3)
    window.keep("task-curves-en-light")
    page.get_by_role("tab", name="Evaluation").click()
    summary = json.loads((site.output / completed / "summary.json").read_text())
    difference = 100 * summary["control"]["difference"]["top1"]
    expect(page.locator(".gain")).to_have_text(f"{difference:+.2f} points".replace("-", "−"))
    window.keep("task-evaluation-en-light")
    page.get_by_role("tab", name="Predictions").click()
    page.get_by_role("button", name="Show predictions").click()
    count = min(12, summary["validation_samples"])
    expect(page.locator("figure")).to_have_count(count, timeout=90_000)
    expect(page.locator("figcaption").first).to_contain_text("predicted")
    window.keep("task-predictions-en-light")
    page.get_by_role("tab", name="Files").click()
    page.get_by_role("button", name="Export to ONNX").click()
    link = page.get_by_role("link", name=re.compile(r"Download .*\.onnx"))
    expect(link).to_be_visible(timeout=90_000)
    with page.expect_download() as download:
        link.click()
    saved = tmp_path / "student.onnx"
    download.value.save_as(saved)
    assert saved.stat().st_size > 1_000_000
    window.keep("task-files-en-light")
    page.get_by_role("tab", name="Settings").click()
    expect(page.locator(".command").first).to_contain_text('"control": true')
    page.get_by_role("button", name="Clone").click()
    expect(page.get_by_label("Name", exact=True)).to_have_value("Digits with control (copy)")


def test_stores_are_drawn_verified_and_measured(site: Site, visit: Visit, completed: str) -> None:
    window = visit()
    page = window.open("/stores")
    card = page.locator("[data-store]").first
    expect(card).to_contain_text("digits · 56 px")
    expect(card).to_contain_text("linear-probe accuracy")
    expect(card).to_contain_text("random weights")
    card.get_by_role("button", name="Pictures").click()
    expect(card.locator("figure")).to_have_count(12, timeout=60_000)
    window.keep("stores-pictures-en-light")
    card.get_by_role("button", name="Verify").click()
    expect(card).to_contain_text("Everything is as recorded", timeout=60_000)
    card.get_by_role("button", name="Details").click()
    expect(card.locator("table").first).to_contain_text("features/pooled", timeout=60_000)
    shard = next(path for path in (site.output / "feature_cache").rglob("c/*") if path.is_file())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    card.get_by_role("button", name="Verify").click()
    expect(card.locator(".notice.bad")).to_contain_text("finding", timeout=60_000)
    window.keep("stores-damaged-en-light")
    shard.write_bytes(content)


def test_a_report_of_completed_tasks_is_embedded(visit: Visit, completed: str) -> None:
    window = visit(language="zh", theme="dark")
    page = window.open("/compare")
    page.get_by_role("button", name="生成报告").click()
    frame = page.frame_locator("iframe.report-frame")
    expect(frame.locator("h1")).to_be_visible(timeout=120_000)
    expect(frame.locator("table").first).to_contain_text("resnet10t")
    page.wait_for_timeout(1500)
    window.keep("compare-zh-dark")


def test_tasks_are_searched_started_edited_and_deleted(site: Site, visit: Visit, completed: str) -> None:
    task_id = site.call("POST", "/tasks", json=task_body("To be deleted"))["taskId"]
    for number in range(21):
        site.call("POST", "/tasks", json=task_body(f"Planned {number}"))
    window = visit()
    page = window.open("/")
    expect(page.locator("tbody tr")).to_have_count(20)
    page.get_by_role("button", name="Next page").click()
    expect(page.locator(".pages")).to_contain_text("Page 2 of 2")
    page.get_by_label("Search by name, student or data set").fill("deleted")
    expect(page.locator("tbody tr")).to_have_count(1)
    row = page.locator(f"tr[data-task='{task_id}']")
    row.get_by_role("button", name="Edit").click()
    page.get_by_label("Name", exact=True).fill("Was edited")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("h1")).to_have_text("Was edited")
    page = window.open("/")
    page.get_by_label("Search by name, student or data set").fill("edited")
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".empty")).to_contain_text("No task matches")
    page.get_by_role("button", name="Clear the filter").click()
    expect(page.locator("tbody tr")).to_have_count(20)
    window.keep("tasks-many-en-light")


def test_an_address_without_a_page_is_answered_with_404(site: Site, visit: Visit) -> None:
    answer = httpx.get(f"{site.url}/model-distillation/nothing", timeout=60)
    assert (answer.status_code, answer.json()["code"], answer.json()["data"]) == (404, 404, None)
    window = visit(language="zh")
    page = window.page
    assert page.goto(f"{site.url}/nothing").status == 404
    expect(page.locator(".empty")).to_contain_text("页面不存在")
    page.get_by_role("button", name="任务").click()
    expect(page).to_have_url(f"{site.url}/")
    window.troubles.clear()  # the console reports the 404
