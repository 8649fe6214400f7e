"""What `cli extract` does with its options: configuration, progress, the result as table or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from commands.suggestions import train_command
from console.log import configure_logging, get_logger
from console.output import print_json, print_table
from console.progress import Progress, clock, track_progress
from extract.config import ConfigError, ExtractConfig, load_config

SHOWN_BAD = 5  # bad samples that a dry run shows


def run_extract(options: Mapping[str, Any], file: Path | None, as_json: bool) -> None:
    """`cli extract`: build the configuration, run, print the result."""
    configure_logging()
    config = build_config(options, file)
    from extract.measured import ExtractionClock, note_probe
    from extract.run import run_extraction

    with ProgressObserver() as progress, ExtractionClock(config.out) as timer:
        result = run_extraction(config, [progress, timer])
    if result.probe is not None:
        note_probe(config.out, result.probe)
    if as_json:
        print_json(result.as_dict())
    elif result.estimate is not None:
        print_estimate(result.as_dict())
    else:
        print_result(result.as_dict())


def build_config(options: Mapping[str, Any], file: Path | None) -> ExtractConfig:
    """The configuration of `cli extract` from its options as typer gives them.

    Raises:
        ConfigError: with every problem.
    """
    values = {name: value for name, value in options.items() if value is not None}
    if "split" in values:
        values["split"] = parse_pairs("--split", values["split"])
    if "source_option" in values:
        values["source_options"] = parse_pairs("--source-option", values.pop("source_option"))
    return load_config(file, values)


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`["a=b", …]` as a mapping. Raises ConfigError for a text without `=`."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"{option} {text}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


class ProgressObserver:
    """Shows the progress of each phase (encoding, scoring); a display starts when its total is known."""

    def __init__(self) -> None:
        self.display: Progress | None = None
        self.phase: tuple[str, int] | None = None
        self.done = 0

    def progress(self, done: int, total: int, message: str) -> None:
        if (message, total) != self.phase or done < self.done:
            self.close()
            self.display = track_progress(total, message, "images", done)
            self.phase = message, total
        elif self.display is not None:
            self.display.advance(done - self.done)
        self.done = done
        if done >= total:
            self.close()  # what follows, a probe for one, must not count as the rate of this phase

    def close(self) -> None:
        if self.display is not None:
            self.display.close()
            self.display = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def print_estimate(result: Mapping[str, Any]) -> None:
    """What `--dry-run` found out."""
    figures = result["estimate"]
    splits = ", ".join(f"{rows:,} {name}" for name, rows in result["splits"].items())
    print(f"{result['rows']:,} images ({splits}), batches of {figures['batch_size']}")
    if result["changes"]:
        print_changes(result["changes"], result["changes_text"])
    if figures["to_encode"] < result["rows"]:
        print(f"to encode: {figures['to_encode']:,} images, the others are in the store")
    rows = [
        {"array": name, "bytes an image": size, "total": f"{size * result['rows'] / 1e6:,.1f} MB"}
        for name, size in figures["bytes_per_sample"].items()
    ]
    print_table(rows, ["array", "bytes an image", "total"])
    room = "enough" if figures["fits"] else "NOT ENOUGH"
    more = f", {figures['needed_bytes'] / 1e6:,.1f} MB more" if figures["to_encode"] < result["rows"] else ""
    print(
        f"store: {figures['total_bytes'] / 1e6:,.1f} MB{more}, free disk: "
        f"{figures['free_bytes'] / 1e6:,.1f} MB ({room})"
    )
    print(
        f"time: {clock(figures['estimated_seconds'])} (estimated from {figures['timed_samples']} samples: teacher "
        f"{figures['encode_ms_per_image']:.2f} ms, decoding {figures['decode_ms_per_image_and_core']:.2f} ms an image "
        f"with {figures['decoding_workers']} decoding)"
    )
    bad = figures["bad_samples"]
    print(f"checked: {figures['checked_samples']} samples with their targets, {len(bad)} bad")
    for item in bad[:SHOWN_BAD]:
        print(f"  bad: {item['split']} {item['key']}: {item['reason']}")
    if len(bad) > SHOWN_BAD:
        print(f"  and {len(bad) - SHOWN_BAD} more")
    print("dry run: nothing was written")


def print_changes(counts: Mapping[str, int], text: str) -> None:
    """What the store has otherwise than the data set has it now."""
    print(f"the data set has changed since the store was made: {text}")
    rows = [{"samples": name, "count": count} for name, count in counts.items() if name != "encode"]
    print_table(rows, ["samples", "count"])


def print_probe(result: Mapping[str, Any]) -> None:
    """Accuracies of the stored features."""
    line = f"linear probe: {result['out_of_fold_top1']:.1%} out of fold ({result['folds']} folds, "
    line += f"{result['rows']:,} rows, {result['classes']} classes)"
    if result["measured_on"] is not None:
        line += f"; on {result['measured_on']} {result['probe_top1']:.1%}, k-NN {result['knn_top1']:.1%}"
    print(line)


def run_probe(store: Path, seed: int, as_json: bool) -> None:
    """`cli probe`: write logits/probe, print the accuracies."""
    configure_logging()
    from extract.logits import add_probe
    from extract.measured import note_probe
    from store.format import RANDOM_WEIGHTS_NOTICE
    from store.reader import open_store

    result = vars(add_probe(store, seed=seed))
    note_probe(store, result)
    if open_store(store).manifest.teacher.random_weights:
        get_logger("extract").warning("%s: teacher of %s", store, RANDOM_WEIGHTS_NOTICE)
    if as_json:
        print_json({"store": str(store), **result})
    else:
        print_probe(result)
        print(f"{store}: logits/probe written")


def print_result(result: Mapping[str, Any]) -> None:
    """A few lines for people: what is in the store, how fast it was, what to do next."""
    splits = ", ".join(f"{rows:,} {name}" for name, rows in result["splits"].items())
    state = "complete" if result["complete"] else "incomplete"
    print(f"{result['store']}: {state}, {result['rows']:,} images ({splits}), {result['bad']:,} bad")
    if result["encoded"]:
        rate, seconds = result["images_per_second"], result["seconds"]
        print(f"encoded {result['encoded']:,} images in {seconds:.1f} s ({rate:.1f} images/s)")
    else:
        print("nothing to encode")
    if result["changes"]:
        print(f"followed the data set: {result['changes_text']}")
    if result["probe"]:
        print_probe(result["probe"])
    if result["bad"]:
        print(f"bad images: {result['store']}/bad_images.jsonl")
    if result["complete"]:
        print(f"next: {next_step(result)}")


def next_step(result: Mapping[str, Any]) -> str:
    others = [name for name in result["splits"] if name != "train"]
    if not others:
        return "training needs a val split as well: the same command with --val-fraction 0.3 --overwrite"
    command = train_command(result["store"], result["task"])
    return command if "val" in others else f"{command} --val-split {others[0]}"
