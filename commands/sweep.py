"""`cli sweep` and `cli report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from train.sweep.board import TrialState


def sweep(
    context: typer.Context,
    store: Annotated[str, typer.Argument(help="The store of teacher features: a folder or a URL.")],
    out: Annotated[Path, typer.Option(help="The sweep's folder; the same command again goes on in it.")],
    students: Annotated[str | None, typer.Option(help="Comma-separated students (cli students).")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated seeds. [default: 0]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A training option and its values: name=v1,v2. Repeatable."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or TOML file with these options.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at a time. [default: one a GPU, else by the cores]")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask scheduler instead of a local cluster.")
    ] = None,
    control: Annotated[
        bool | None,
        typer.Option("--control/--no-control", help="Also train each student without the teacher."),
    ] = None,
    trial_timeout: Annotated[
        float | None, typer.Option(help="End a trial that takes more than this many seconds.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """cli sweep features.zarr --out sweep --students resnet18,vit-tiny --set epochs=20

    Train many students from one store: students x seeds x option values, each with a control trained without
    the teacher. Finished trials are not repeated; a failed one does not end the sweep. Then: cli report sweep

    Every training option (cli train --help) goes through --set, with one value or several: --set epochs=20
    """
    refuse_unknown(context, [store, *context.args])
    from console.options import read_option_file
    from console.output import print_json
    from train.errors import ConfigError
    from train.sweep.config import load_sweep_config
    from train.sweep.run import run_sweep

    options = {
        "store": store,
        "out": out,
        "students": students,
        "seeds": seeds,
        "set": parse_sets(set_ or []),
        "jobs": jobs,
        "scheduler": scheduler,
        "control": control,
        "trial_timeout_s": trial_timeout,
    }
    states = run_sweep(load_sweep_config(options, read_option_file(config, ConfigError) if config else None))
    if json_:
        print_json({"out": out, "trials": [state._asdict() for state in states]})
    else:
        print_states(states, out)
    if any(state.state != "done" for state in states):
        raise typer.Exit(1)


# A training option given as one of the sweep's is explained by `refuse_unknown`.
sweep.context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}  # type: ignore[attr-defined]


def refuse_unknown(context: typer.Context, words: list[str]) -> None:
    """What the command line holds beside the sweep's own options: only the store may be there."""
    from console.options import nearest_names
    from train.config import TrainConfig
    from train.sweep.config import OWN_OPTIONS

    own = [option for parameter in context.command.params for option in parameter.opts]
    for number, word in enumerate(words):
        option, _, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if option.startswith("--") and name in TrainConfig.model_fields.keys() - OWN_OPTIONS:
            value = value or next((text for text in words[number + 1 :] if not text.startswith("-")), "VALUE")
            context.fail(f"{option} is an option of cli train: pass it as --set {name}={value}")
        if option.startswith("-"):
            context.fail(f"No such option: {option}: {nearest_names(option, own)}")
    if len(words) > 1:
        context.fail(f"unexpected argument {words[1]!r} beside the store")


def parse_sets(items: list[str]) -> dict[str, list[Any]]:
    """`["learning-rate=1e-4,3e-4"]` as `{"learning-rate": ["1e-4", "3e-4"]}`; the option's type is checked later."""
    from train.sweep.config import split_list

    values: dict[str, list[Any]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{item!r}: expected name=value or name=v1,v2", param_hint="--set")
        values[name.strip()] = split_list(text)
    return values


def print_states(states: list[TrialState], out: Path) -> None:
    from console.output import print_table
    from train.metrics import label_of, shown_text

    rows = [
        {
            "trial": state.name,
            "state": state.state,
            "epochs": state.epoch,
            "metric": label_of(state.metric) if state.metric else None,
            "best": shown_text(state.metric, state.best) if state.metric else None,
            "reason": state.reason or None,
        }
        for state in states
    ]
    columns = ["trial", "state", "epochs", "metric", "best"]
    print_table(rows, columns if all(state.state == "done" for state in states) else [*columns, "reason"])
    if any(state.state == "done" for state in states):
        print(f"next: cli report {out}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Runs, sweeps, or folders of them, side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file or folder to write. [default: report.html in the first folder]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Worst samples to show with pictures; 0: none.")] = 24,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """cli report sweep

    One self-contained HTML file of runs and sweeps: accuracy against size, speed and cost, learning curves,
    what distillation gained over the control. Beside it results.csv and results.parquet.
    """
    from console.output import print_json, print_table
    from train.metrics import label_of, shown_in_table
    from train.report.build import build_report

    made = build_report(folders, out, samples)
    if json_:
        print_json({"report": made.path, "results": made.rows})
        return
    rows = [{name: shown_in_table(name, row) for name in made.columns} for row in made.rows]
    print_table(rows, {name: label_of(name) for name in made.columns})
    print(f"report: {made.path}")
