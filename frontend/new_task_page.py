"""New task, and editing one that has not been started: a form and a JSON editor over one document, and the command."""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Iterable
from typing import Any

from nicegui import Client, background_tasks, ui

from backend.server.catalog import DataSet, detect_data_set, list_data_sets, list_teachers
from backend.server.document import (
    Setting,
    document_of,
    preview_task,
    read_settings,
    settings_of,
    settings_schema,
    student_families,
    student_of,
    with_setting,
)
from backend.server.errors import TaskError
from backend.server.tasks import Tasks
from frontend.form import Field, PickerField, make_field
from frontend.layout import (
    button,
    count_text,
    element,
    fact,
    frame,
    heading,
    icon_button,
    notice,
    page_texts,
    panel,
    size_text,
    text,
)
from frontend.messages import translate
from frontend.texts import Texts

TRAINING = ("epochs", "batch_size", "learning_rate", "image_size", "optimizer", "lr_scheduler")
MORE_TRAINING = (
    *("weight_decay", "grad_accum_steps", "max_grad_norm", "num_classes", "task_type"),
    *("teacher_image_size", "clip_frames", "val_fraction", "max_bad", "workers", "seed"),
)
DISTILLATION = (
    *("distillation_type", "feature_loss_type", "temperature", "soft_label_weight", "hard_label_weight"),
    *("align_feature", "control"),
)
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules")
RUNNING = ("gpu_devices", "auto_save_checkpoint", "checkpoint_interval")
#: Shown otherwise, or decided by another setting.
ELSEWHERE = (
    *(
        "task_name",
        "teacher_model",
        "teacher_path",
        "student_model",
        "student_model_type",
        "student_model_size",
    ),
    *("student_path", "pretrained", "dataset_id", "val_dataset_id", "alpha", "distill_loss_type"),
)
FIRST_STUDENT = "resnet/resnet18"
SHOWN_CLASSES = 14


def build(client: Client, tasks: Tasks, copied: str | None = None, edited: str | None = None) -> None:
    """The page; `copied` is the task whose settings it starts with, `edited` the one it changes.

    Raises NotFoundError.
    """
    texts = page_texts(client)
    title = texts("new.edit" if edited else "new.title")
    source = edited or copied
    document = first_document(tasks) if source is None else document_of(tasks.read(source))
    if copied:
        document["taskName"] = texts("new.copy", name=document.get("taskName") or copied)
    with frame(texts, client, title, "tasks"):
        with heading(title, texts("new.lead")):
            pass
        TaskForm(texts, client, tasks, document, edited)


def first_document(tasks: Tasks) -> dict[str, Any]:
    """What a new task starts with: a student, and what there is no choice of."""
    document: dict[str, Any] = {"studentModel": FIRST_STUDENT}
    teachers = [item for item in list_teachers(tasks.settings.models_root) if not item.is_file]
    data = list_data_sets(tasks.settings.datasets_root)
    if teachers:
        document["teacherModel"] = teachers[0].name
    if len(data) == 1:
        document["datasetId"] = data[0]
    return document


class TaskForm:
    """The document, and everything that shows it. A change of any part goes through `set_document`."""

    def __init__(
        self, texts: Texts, client: Client, tasks: Tasks, document: dict[str, Any], edited: str | None
    ) -> None:
        self.texts, self.client, self.tasks, self.edited = texts, client, tasks, edited
        self.families = {family.type: family for family in student_families()}
        self.task_id = edited or uuid.uuid4().hex[:12]
        self.document = document
        self.student_type = FIRST_STUDENT.partition("/")[0]
        self.settings: dict[str, Setting] = {}
        self.fields: dict[str, Field] = {}
        self.json_problem = ""
        self.detected: DataSet | None = None
        self.looked_for: str | None = None
        self.read_student()
        with element("div", "form-page"):
            with element("div", "stack"):
                self.make_task()
                self.make_student()
                self.make_data()
                placed = {*ELSEWHERE, *TRAINING, *MORE_TRAINING, *DISTILLATION, *LORA, *RUNNING}
                others = tuple(name for name in self.settings if name not in placed)
                self.make_settings("new.training", TRAINING, (*MORE_TRAINING, *others))
                self.make_settings("new.distillation", DISTILLATION)
                self.make_settings("new.lora", LORA)
                self.make_settings("new.running", RUNNING)
            with element("div", "form-side"):
                self.make_editor()
                self.make_command()
        self.show()

    # -- making the parts ----------------------------------------------------------------------------------

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            self.fields[name] = make_field(self.texts, self.settings[name], self.set_field)

    def make_task(self) -> None:
        found = list_teachers(self.tasks.settings.models_root)
        names = {item.name: f"{item.name} · {size_text(item.bytes)}" for item in found}
        teachers = {item.name: names[item.name] for item in found if not item.is_file}
        with panel(self.texts("new.task")), element("div", "fields"):
            self.add(["task_name"])
            self.fields["teacher_model"] = PickerField(
                self.texts, self.settings["teacher_model"], self.set_field, teachers, free=True, required=True
            )
            self.fields["teacher_path"] = PickerField(
                self.texts, self.settings["teacher_path"], self.set_field, names, free=True, required=False
            )
            if not found:
                with element("div", "wide"), notice("note"):
                    text(self.texts("new.teacher.none", root=self.tasks.settings.models_root), "p", "small")

    def make_student(self) -> None:
        families = {kind: kind for kind in self.families}
        with panel(self.texts("new.student")):
            with element("div", "fields"):
                self.family = ui.select(families, label=self.texts("new.family"))
                self.family.props("outlined dense stack-label options-dense hide-bottom-space")
                self.family.on_value_change(self.choose_family)
                self.size = ui.select({}, label=self.texts("new.size"))
                self.size.props("outlined dense stack-label options-dense hide-bottom-space")
                self.size.on_value_change(self.choose_size)
                self.model = ui.input(self.texts("new.size.name"), on_change=self.choose_size)
                self.model.props(
                    "outlined dense stack-label debounce=300 hide-bottom-space placeholder=resnet10t"
                )
                self.add(["student_path"])
                self.add(["pretrained"])
            self.student_facts = text("", "p", "muted small")

    def make_data(self) -> None:
        root = self.tasks.settings.datasets_root
        found = {name: name for name in list_data_sets(root)}
        with panel(self.texts("new.data")):
            with element("div", "fields"):
                for name, required in (("dataset_id", True), ("val_dataset_id", False)):
                    self.fields[name] = PickerField(
                        self.texts, self.settings[name], self.set_field, found, free=True, required=required
                    )
            self.data_facts = element("div", "stack")
            if not found:
                with notice("note"):
                    text(self.texts("new.data.none", root=root), "p", "small")

    def make_settings(self, title: str, names: tuple[str, ...], more: tuple[str, ...] = ()) -> None:
        with panel(self.texts(title)):
            with element("div", "fields"):
                self.add(names)
            if more:
                with (
                    ui.expansion(self.texts("new.more")).classes("more").props("dense"),
                    element("div", "fields"),
                ):
                    self.add(more)

    def make_editor(self) -> None:
        with panel(self.texts("new.json"), self.texts("new.json.lead")):
            properties = {
                "content": {"json": self.document},
                "mode": "text",
                "mainMenuBar": False,
                "navigationBar": False,
                "statusBar": False,
                "askToFormat": False,
                "indentation": 2,
            }
            self.editor_frame = element("div", "json-editor").props(
                f'role="group" aria-label="{self.texts("new.json")}"'
            )
            with self.editor_frame:
                self.editor = ui.json_editor(
                    properties, schema=settings_schema(self.student_type), on_change=self.edited_json
                )
            self.json_message = text("", "p", "small problem").props('role="alert"')

    def make_command(self) -> None:
        with panel(self.texts("new.command"), self.texts("new.command.lead")):
            with element("div", "command-box"):
                self.command = text("", "pre", "command").props('tabindex="0"')
                self.copy = icon_button("content_copy", self.texts("copy"), self.copy_command)
            self.messages = element("div", "stack")
            with element("div", "save-bar"):
                names = ("new.save", "new.save.start") if self.edited else ("new.create", "new.start")
                self.save = button(self.texts(names[0]), lambda: self.submit(start=False))
                self.start = button(
                    self.texts(names[1]), lambda: self.submit(start=True), "primary", "play_arrow"
                )

    # -- changes -------------------------------------------------------------------------------------------

    def set_field(self, name: str, value: Any) -> None:
        """A field was changed by the user."""
        self.set_document(with_setting(self.document, name, value), changed=name)

    def edited_json(self, event: Any) -> None:
        """The JSON was changed by the user. While it is not valid, the form keeps the last valid one."""
        content = event.content.get("json")
        try:
            if content is None:
                content = json.loads(event.content.get("text") or "{}")
            if not isinstance(content, dict):
                raise ValueError(self.texts("error.json.object"))
        except ValueError as error:
            self.json_problem = str(error)
            self.show_json_problem()
            self.show_preview()
            return
        self.json_problem = ""
        self.set_document(content, changed="json")

    def set_document(self, document: dict[str, Any], changed: str = "") -> None:
        self.document = document
        if changed != "json":
            self.json_problem = ""
        self.read_student()
        self.show(changed)

    def read_student(self) -> None:
        """The defaults follow the student; a name that is not known leaves them as they are."""
        named = student_of(self.document)
        self.student = named
        if named is not None:
            self.student_type = named.type
        self.settings = {setting.name: setting for setting in settings_of(self.student_type)}

    def choose_family(self, event: Any) -> None:
        if self.showing or not event.value:
            return
        family = self.families[event.value]
        self.choose(family.type, family.sizes[0].name if family.sizes else "resnet10t")

    def choose_size(self, event: Any) -> None:
        if not self.showing and event.value:
            self.choose(self.student_type, event.value)

    def choose(self, kind: str, size: str) -> None:
        document = self.document
        for name in ("student_model_type", "student_model_size"):
            document = with_setting(document, name, None)
        name = f"timm:{size}" if kind == "timm" else f"{kind}/{size}"
        self.set_document(with_setting(document, "student_model", name), changed="student_model")

    # -- showing -------------------------------------------------------------------------------------------

    showing = False

    def show(self, changed: str = "") -> None:
        """Everything as the document has it, but for the part that the user is changing."""
        self.showing = True
        settings = read_settings(self.document)
        for name, field in self.fields.items():
            value = settings.values.get(name)
            field.setting = self.settings[name]
            if name == changed:
                field.check(value)
            else:
                field.show(self.settings[name], value)
            field.set_visible(self.has_effect(name, settings.values))
        self.show_student()
        self.show_json(typing=changed == "json")
        self.show_json_problem()
        self.show_data(settings.values.get("dataset_id"))
        self.show_preview()
        self.showing = False

    def has_effect(self, name: str, values: Any) -> bool:
        """Whether a setting means anything with the others as they are. One that was given is always shown."""
        setting = self.settings[name]
        if name in values:
            return True
        if setting.unavailable:
            return False
        if setting.needs == "lora" and not values.get("lora_rank"):
            return False
        kind = values.get("distillation_type") or self.settings["distillation_type"].default
        if setting.needs == "logits" and kind == "feature":
            return False
        if name == "checkpoint_interval":
            return values.get("auto_save_checkpoint") is True
        return name != "clip_frames" or self.student_type == "lstm"

    def show_student(self) -> None:
        family = self.families[self.student_type]
        self.family.set_value(family.type)
        self.size.set_visibility(bool(family.sizes))
        self.model.set_visibility(not family.sizes)
        size = self.student.size if self.student else None
        if family.sizes:
            self.size.set_options({item.name: item.name for item in family.sizes}, value=size)
        elif self.model.value != size:
            self.model.set_value(size or "")
        facts = next((item for item in family.sizes if item.name == size), None)
        task = self.texts.or_word(f"task.{family.task}", family.task)
        self.student_facts.set_text(
            task
            if facts is None
            else self.texts(
                "new.student.facts",
                parameters=count_text(facts.parameters),
                macs=count_text(facts.macs),
                task=task,
            )
        )

    def show_json(self, typing: bool) -> None:
        """The document in the editor, and the schema of its student. What the user is typing is not touched."""
        schema = settings_schema(self.student_type)
        if typing and self.editor.props["schema"] == schema:
            return
        if typing:
            self.editor.properties.pop("content", None)
        else:
            self.editor.properties["content"] = {"json": self.document}
        self.editor.props["schema"] = schema
        self.editor.update()

    def show_json_problem(self) -> None:
        self.editor_frame.classes(
            add="bad" if self.json_problem else "", remove="" if self.json_problem else "bad"
        )
        words = self.texts("new.json.wrong", problem=self.json_problem) if self.json_problem else ""
        self.json_message.set_text(words)
        self.json_message.set_visibility(bool(words))

    def show_data(self, dataset_id: Any) -> None:
        wanted = str(dataset_id) if dataset_id else None
        if wanted == self.looked_for and self.data_facts.default_slot.children:
            if self.detected is not None:
                self.fill_data(self.detected)
            return
        self.looked_for, self.detected = wanted, None
        self.data_facts.clear()
        with self.data_facts:
            if wanted is None:
                text(self.texts("new.data.choose"), "p", "muted small")
                return
            with element("div", "line"):
                ui.spinner(size="18px")
                text(self.texts("new.data.detecting", name=wanted), "span", "muted small")
        background_tasks.create(self.detect(wanted), name=f"detect {wanted}")

    async def detect(self, dataset_id: str) -> None:
        found = await detect_data_set(self.tasks.settings.datasets_root, dataset_id)
        if dataset_id == self.looked_for and not self.client.is_deleted:
            self.detected = found
            with self.client:
                self.fill_data(found)

    def fill_data(self, found: DataSet) -> None:
        texts = self.texts
        self.data_facts.clear()
        with self.data_facts:
            if found.problem:
                with notice("bad"):
                    text(translate(texts, found.problem), "p", "small")
                return
            with element("dl", "facts data-facts"):
                fact(texts("data.kind"), texts.or_word(f"kind.{found.kind}", found.kind))
                fact(texts("data.task"), texts.or_word(f"task.{found.task}", found.task))
                fact(texts("data.images"), f"{found.samples:,}")
                fact(texts("data.classes"), f"{len(found.class_names):,}")
                share = found.labeled_share
                fact(texts("data.labeled"), texts("none") if share is None else f"{share:.0%}")
            with element("div", "chips"):
                for name, split in found.splits.items():
                    text(f"{name} {split.samples:,}", "span", "chip strong")
                for name in found.class_names[:SHOWN_CLASSES]:
                    text(name, "span", "chip")
                if len(found.class_names) > SHOWN_CLASSES:
                    text(f"+{len(found.class_names) - SHOWN_CLASSES}", "span", "chip")
            family = self.families[self.student_type]
            suits = {found.task, "features"} | ({"classification"} if found.task == "sequence" else set())
            if family.task not in suits:
                with notice("note"):
                    own, other = (texts.or_word(f"task.{name}", name) for name in (family.task, found.task))
                    text(texts("data.mismatch", task=other, own=own), "p", "small")
            for warning in found.warnings:
                with notice("note"):
                    text(translate(texts, warning), "p", "small")

    def show_preview(self) -> None:
        """The command as it will be started, or what is missing or wrong."""
        settings = read_settings(self.document)
        wrong = [field for field in self.fields.values() if field.problem]
        chosen = bool(settings.values.get("dataset_id")) and self.student is not None
        chosen = chosen and bool({"teacher_model", "teacher_path"} & settings.values.keys())
        preview = preview_task(self.tasks, self.document, self.task_id)
        ready = bool(preview.command) and not self.json_problem and not wrong
        self.command.set_text(
            command_text(preview.command) if preview.command else self.texts("new.command.none")
        )
        self.copy.set_visibility(bool(preview.command))
        self.messages.clear()
        with self.messages:
            if preview.problems and not wrong and (chosen or settings.problems):
                with notice("bad", self.texts("new.problems")):
                    for problem in preview.problems:
                        text(translate(self.texts, problem), "p", "small")
            notes = dict.fromkeys((*preview.notes, *(() if preview.command else settings.warnings)))
            if notes:
                with notice("note", self.texts("new.notes")):
                    for note in notes:
                        text(translate(self.texts, note), "p", "small")
            if wrong:
                text(self.texts("new.invalid"), "p", "small problem")
        for made in (self.save, self.start):
            made.set_enabled(ready)

    # -- the end -------------------------------------------------------------------------------------------

    def copy_command(self) -> None:
        ui.clipboard.write(shlex.join(preview_task(self.tasks, self.document, self.task_id).command))
        ui.notify(self.texts("copied"), timeout=1500)

    def submit(self, *, start: bool) -> None:
        preview = preview_task(self.tasks, self.document, self.task_id)
        if preview.fields is None:
            ui.notify(translate(self.texts, "; ".join(preview.problems)), type="negative", multi_line=True)
            return
        try:
            self.keep(preview)
            if start:
                self.tasks.start(self.task_id)
        except TaskError as error:
            ui.notify(translate(self.texts, str(error)), type="negative", multi_line=True, timeout=8000)
            return
        ui.navigate.to(f"/tasks/{self.task_id}")

    def keep(self, preview: Any) -> None:
        if self.edited:
            self.tasks.change(self.task_id, preview.fields)
        else:
            self.tasks.create(preview.fields)


def command_text(words: Iterable[str]) -> str:
    """The command as a shell takes it, an option a line."""
    first, *rest = (shlex.quote(word) for word in words)
    return " \\\n  ".join([f"{first} {rest[0]}", *rest[1:]]) if rest else first
