"""The command line: a table of commands; each is imported only when it is called.

`cli --help` therefore imports neither torch nor zarr.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import os
import sys
from typing import Annotated, NamedTuple

import typer
from typer.core import TyperGroup

from processes.stop import Stopped


class Command(NamedTuple):
    """One row of the table: where the command is implemented, and its heading and help in the overview."""

    target: str  # "module:function"
    panel: str
    help: str


STAGE_ONE = "Stage one: the teacher sees the data once (large GPU)"
STAGE_TWO = "Stage two: train students from the stored features (small GPU or CPU)"
STORE = "The store between the stages"
MORE = "First steps and the training platform"

COMMANDS: dict[str, Command] = {
    "extract": Command("commands.extract:extract", STAGE_ONE, "Encode a data set into a store."),
    "probe": Command("commands.extract:probe", STAGE_ONE, "k-NN and probe accuracy of a store's features."),
    "teachers": Command("commands.extract:teachers", STAGE_ONE, "List the teachers."),
    "make-tiny-teacher": Command(
        "commands.extract:make_tiny_teacher", STAGE_ONE, "Make a small random Qwen checkpoint."
    ),
    "train": Command("commands.train:train", STAGE_TWO, "Train one student from a store."),
    "sweep": Command("commands.sweep:sweep", STAGE_TWO, "Train many students from one store."),
    "evaluate": Command("commands.train:evaluate", STAGE_TWO, "Measure a trained student on a split."),
    "predict": Command("commands.deliver:predict", STAGE_TWO, "Run a student on images, folders or clips."),
    "export": Command("commands.deliver:export", STAGE_TWO, "Export a student to ONNX or torch.export."),
    "quantize": Command("commands.deliver:quantize", STAGE_TWO, "Make a student int8 (PTQ or QAT)."),
    "report": Command("commands.sweep:report", STAGE_TWO, "One HTML file of runs and sweeps."),
    "students": Command("commands.train:students", STAGE_TWO, "List the students, sizes and recipes."),
    "inspect": Command("commands.store:inspect", STORE, "Show what is in a store."),
    "verify": Command("commands.store:verify", STORE, "Re-read every checksum of a store."),
    "copy": Command("commands.store:copy", STORE, "Copy a store between folders and URLs."),
    "convert": Command("commands.store:convert", STORE, "Store to one HDF5 file, or back."),
    "demo": Command("commands.demo:demo", MORE, "What a teacher is worth, on real images in a few minutes."),
    "serve": Command("commands.backend:serve", MORE, "Create, start and watch training tasks over HTTP."),
    "distill": Command("commands.backend:distill", MORE, "What a training platform starts."),
}

# Errors of the disk are one line wherever they occur, like errors that carry an `exit_code`.
DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose another folder",
    errno.EACCES: "change its permissions or choose another",
    errno.EPERM: "change its permissions or choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}

INTERRUPTED = 130  # what typer returns after a Ctrl-C that no command handled


class LazyGroup(TyperGroup):
    """A typer group whose commands come from COMMANDS, each imported when it is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def resolve_command(self, ctx: typer.Context, args: list[str]):  # type: ignore[no-untyped-def, override]
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
            ctx.fail(f"unknown command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: typer.Context, cmd_name: str):  # type: ignore[no-untyped-def, override]
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        if not overview_wanted():
            return load(cmd_name, command)
        app = typer.Typer(add_completion=False)  # a command that has a help line and nothing else
        app.command(cmd_name, help=command.help, rich_help_panel=command.panel)(lambda: None)
        return typer.main.get_command(app)


def overview_wanted() -> bool:
    """True when only the list of commands is printed, so that no command needs importing."""
    # Shell completion passes the line typed so far in the environment, not as arguments.
    completing = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", ""))
    return not any(word in COMMANDS for word in [*sys.argv[1:], *completing.split()])


def load(name: str, command: Command):  # type: ignore[no-untyped-def]
    """Import the command's function and turn it into a click command."""
    module, function = command.target.split(":")
    target = getattr(importlib.import_module(module), function)
    settings = getattr(target, "context_settings", None)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    text = flowing_text(target.__doc__ or command.help)
    app.command(name, help=text, rich_help_panel=command.panel, context_settings=settings)(target)
    made = typer.main.get_command(app)
    for parameter in made.params:
        if parameter.help:  # `[default: auto]` is not markup
            parameter.help = parameter.help.replace("[", r"\[")
    return made


def flowing_text(docstring: str) -> str:
    """The docstring with each paragraph on one line, so that the terminal's width breaks it."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(" ".join(text.split()).strip("`") for text in paragraphs)


app = typer.Typer(cls=LazyGroup, rich_markup_mode="rich", pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print("qwen-distill", version("qwen-distill"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Distill Qwen2.5-VL's vision encoder into small, fast vision models.

    1. cli extract DATA --out features.zarr --teacher-path Qwen2.5-VL-7B-Instruct

    2. cli train features.zarr --student resnet18 --out runs/resnet18

    `--debug` with any command shows the traceback of an error.
    """


def main() -> None:
    """Run the command line; an error is one readable line on stderr and a non-zero exit code."""
    from console.output import configure_logging, redact
    from files.names import printable

    configure_logging()
    for stream in (sys.stdout, sys.stderr):  # a file name that is not UTF-8 is printed with \xNN
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv or os.environ.get("QWEN_DISTILL_DEBUG") == "1"
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        # Not standalone: typer would frame its own errors (a missing option, a bad value) over several lines.
        name = os.path.basename(sys.argv[0])  # `python -m cli` is called `cli` too
        program = name if name == "qwen-distill" else "cli"
        code = app(sys.argv[1:] or ["--help"], prog_name=program, standalone_mode=False)
    except Exception as error:
        # An error meant for the user carries `exit_code`; anything else is a defect and keeps its traceback.
        refused = isinstance(error, OSError) and error.errno in DISK_ERRORS
        exit_code = getattr(error, "exit_code", 1 if refused else None)
        if debug or exit_code is None:
            raise
        print(printable(redact(error_line(error))), file=sys.stderr, flush=True)
        sys.exit(exit_code)
    if code == INTERRUPTED:
        print("stopped by Ctrl-C; the same command starts again", file=sys.stderr, flush=True)
    sys.exit(code if isinstance(code, int) else 0)


def error_line(error: Exception) -> str:
    """What went wrong, on one line; for a wrong command line also the command that prints its help."""
    if isinstance(error, OSError) and not hasattr(error, "exit_code"):
        name = str(error.filename or "")
        where = f"{name if len(name) <= 200 else name[:100] + '…' + name[-100:]}: " if name else ""
        return f"error: {where}{error.strerror}: {DISK_ERRORS[error.errno or 0]}, then run the same command again"
    if isinstance(error, Stopped):
        return str(error)  # the user asked for it: not an error
    describe = getattr(error, "format_message", None)  # typer's own errors
    context = getattr(error, "ctx", None)
    hint = f" ({context.command_path} --help)" if context is not None else ""
    text = abbreviated_option(error) or (describe() if describe else str(error)).removesuffix(".")
    return f"error: {text}{hint}"


def abbreviated_option(error: Exception) -> str:
    """`… did you mean --learning-rate?` for an unknown option such as --lr, whose letters begin an option's words."""
    context, name = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None or name is None:
        return ""
    options = [option for parameter in context.command.params for option in parameter.opts]
    letters = name.lstrip("-").replace("-", "")
    meant = [
        option for option in options if letters == "".join(word[0] for word in option.strip("-").split("-"))
    ]
    return f"No such option: {name}: did you mean {' or '.join(meant)}?" if meant else ""


if __name__ == "__main__":
    main()
