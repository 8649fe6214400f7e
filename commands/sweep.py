"""`cli sweep` and `cli report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.options import AsJson, offer_options
from console.options import nearest_names, read_option_file
from console.output import print_json, print_table
from train.config import TrainConfig
from train.errors import ConfigError
from train.sweep.config import OWN_OPTIONS, SweepConfig, load_sweep_config, split_list

if TYPE_CHECKING:
    from train.sweep.board import TrialState


def sweep(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML, TOML or JSON file with these options.")] = None,
    json: AsJson = False,
    **options: Any,
) -> None:
    """cli sweep features.zarr --out sweep --students resnet18,vit-tiny --set epochs=20

    Train many students from one store: students x seeds x option values, each with a control trained without
    the teacher. Finished trials are not repeated; a failed one does not end the sweep. Then: cli report sweep

    Every training option (cli train --help) goes through --set, with one value or several: --set epochs=20
    """
    store = options["store"]
    refuse_unknown(context, [*([store] if store else []), *context.args])
    from train.sweep.driver import run_sweep

    values = {**options, "set": parse_sets(options["set"] or [])}
    settings = load_sweep_config(values, read_option_file(config, ConfigError) if config else None)
    states = run_sweep(settings)
    if json:
        print_json({"out": settings.out, "trials": [state._asdict() for state in states]})
    else:
        print_states(states, settings.out)
    if any(state.state != "done" for state in states):
        raise typer.Exit(1)


offer_options(sweep, SweepConfig)
# A training option given as an option of the sweep is explained by `refuse_unknown`.
sweep.context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}  # type: ignore[attr-defined]


def refuse_unknown(context: typer.Context, words: list[str]) -> None:
    """Refuse what the command line has besides the store and the sweep's options."""
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
        context.fail(f"unexpected argument {words[1]!r} after the store")


def parse_sets(items: list[str]) -> dict[str, list[Any]]:
    """`["learning-rate=1e-4,3e-4"]` as `{"learning-rate": ["1e-4", "3e-4"]}`; the option's type is checked later."""
    values: dict[str, list[Any]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{item!r}: expected name=value or name=v1,v2", param_hint="--set")
        values[name.strip()] = split_list(text)
    return values


def print_states(states: list[TrialState], out: Path) -> None:
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
    json: AsJson = False,
) -> None:
    """cli report sweep

    One self-contained HTML file of runs and sweeps: accuracy against size, speed and cost, learning curves,
    what distillation gained over the control. Beside it results.csv and results.parquet.
    """
    from train.metrics import label_of, shown_in_table
    from train.report.build import build_report

    made = build_report(folders, out, samples)
    if json:
        print_json({"report": made.path, "results": made.rows})
        return
    rows = [{name: shown_in_table(name, row) for name in made.columns} for row in made.rows]
    print_table(rows, {name: label_of(name) for name in made.columns})
    print(f"report: {made.path}")
