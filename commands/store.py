"""`cli inspect`, `cli verify`, `cli copy`, `cli convert`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.options import AsJson
from console.output import print_json, print_table

if TYPE_CHECKING:
    from store.reader import Split, Store

StorePath = Annotated[
    str, typer.Argument(help="A store: a folder, or a URL (s3://bucket/a.zarr).", metavar="STORE")
]
HDF5_SUFFIXES = (".h5", ".hdf5")
SHOWN_CLASSES = 40


def inspect(
    store: StorePath,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Write pictures to this folder: images with their true labels, boxes and masks, and grids "
            "(principal components).",
            metavar="DIR",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 16,
    json: AsJson = False,
) -> None:
    """cli inspect flowers.zarr

    Show what is in a store: samples by kind and class, splits, arrays, sizes, manifest, progress.

    cli inspect flowers.zarr --pictures pictures

    cli inspect s3://features/flowers.zarr --json
    """
    from console.output import redact_values
    from store.summary import describe_store

    described = redact_values(describe_store(store))
    if described["complete"]:
        from store.reader import open_store

        contents = describe_contents(open_store(store))
        for name, split in contents["splits"].items():
            described["splits"][name] |= split
        described["warnings"] = contents["warnings"]
    if pictures is not None:
        from commands.pictures import write_pictures

        described["pictures"] = [str(file) for file in write_pictures(store, pictures, samples)]
    if json:
        print_json(described)
    else:
        print_description(described)
        if pictures is not None:
            print(f"\n{len(described['pictures'])} pictures in {pictures}")


def print_description(described: dict[str, Any]) -> None:
    """The same as tables and lines."""
    manifest = described["manifest"]
    state = "complete" if described["complete"] else "INCOMPLETE: run the same extraction again to resume"
    print(f"{described['path']}: format version {manifest['format_version']}, {state}")
    print_teacher(manifest, manifest["teacher"]["name"])
    for name, section in manifest["teachers"].items():
        print_teacher(section, f"{name}: {section['teacher']['name']}")
    print(f"classes        {len(manifest['class_names'])}, source {manifest['source'] or 'not recorded'}")
    print(f"data           {manifest['data_root'] or 'not recorded'}, digest {manifest['digest'] or '-'}")
    print(f"fingerprint    {described['fingerprint'] or '-'}")
    software = ", ".join(f"{name} {number}" for name, number in manifest["software"].items())
    print(textwrap.fill(software, 80, initial_indent="software       ", subsequent_indent=" " * 15))
    if described["bytes_on_disk"] is not None:
        print(f"on disk        {described['bytes_on_disk'] / 1e6:,.1f} MB, everything included")
    print_measured(described.get("measured", {}))
    for job, splits in described["pending"].items():
        done = ", ".join(f"{name} {have} of {rows}" for name, (have, rows) in splits.items())
        print(f"being written  {job}: {done} rows")
    print_contents(described)
    for name, split in described["splits"].items():
        bad = split.get("invalid_rows", 0)
        print(
            f"\n{name}: {split['rows']} rows, {bad} bad, {split['bytes_per_sample']:,.0f} bytes a sample, "
            f"{split['bytes'] / 1e6:,.1f} MB"
        )
        rows = [array_row(array, entry) for array, entry in split["arrays"].items()]
        print_table(rows, ["array", "shape", "dtype", "bytes a sample", "MB", "stored"])
        for key, reason in split.get("reasons", {}).items():
            print(f"  bad: {key}: {reason}")


def print_teacher(section: Mapping[str, Any], title: str) -> None:
    """What the manifest records of one teacher."""
    from store.format import RANDOM_WEIGHTS_NOTICE

    teacher, preprocessing = section["teacher"], section["preprocessing"]
    print(f"teacher        {title}, {teacher['width']} wide, {teacher['dtype']}")
    print(f"               {teacher['layer']}")
    print(f"               weights {teacher['fingerprint']}")
    for name, value in teacher["options"].items():
        print(f"               {name}: {value}")
    if section.get("license"):
        print(f"license        {section['license']}")
    if teacher["random_weights"]:
        print(f"               {RANDOM_WEIGHTS_NOTICE}")
    print(f"preprocessing  {preprocessing['image_size']} px, {preprocessing['resize']}")
    for name, value in preprocessing["options"].items():
        print(f"               {name}: {value}")
    for name, value in section["options"].items():
        print(f"option         {name}: {value}")


def print_measured(measured: dict[str, Any]) -> None:
    """Accuracies that `cli probe` measured."""
    if measured.get("probe_top1") is not None:
        print(f"accuracy       linear probe {measured['probe_top1']:.1%}, k-NN {measured['knn_top1']:.1%}")
    if measured.get("probe_objectness_ap") is not None:
        objectness, accuracy = measured["probe_objectness_ap"], measured["probe_class_accuracy"]
        print(f"detection      probe of cells: objectness AP {objectness:.1%}, class accuracy {accuracy:.1%}")
    if measured.get("probe_miou") is not None:
        print(f"mean IoU       probe of cells {measured['probe_miou']:.1%}")


def array_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in (entry["codec"], entry["encoding"]) if kind not in ("none", "plain")]
    return {
        "array": name,
        "shape": " × ".join(map(str, entry["shape"])),
        "dtype": entry["dtype"],
        "bytes a sample": round(entry["bytes_per_sample"], 1),
        "MB": round(entry["bytes"] / 1e6, 2),
        "stored": "+".join(["ragged"] * entry["ragged"] + kinds) or "plain",
    }


def describe_contents(store: Store) -> dict[str, Any]:
    """`splits`: name → `kinds` and `classes`; `warnings`. For a complete store.

    kinds: samples that are `labeled`, `unlabeled`, `background` and `bad`. classes: name → `samples` with the class, and
    `boxes` of it, or `pixels` of it in `masks_read` masks that are evenly spread over the split.
    """
    from store.summary import count_kinds, store_warnings

    splits = {
        name: {"kinds": count_kinds(split), **split_classes(store, split)} for name, split in store.items()
    }
    return {"splits": splits, "warnings": store_warnings(store)}


def split_classes(store: Store, split: Split) -> dict[str, Any]:
    from store.summary import count_classes, target_kind
    from train.data.splits import count_mask_classes

    names = store.manifest.class_names
    kind = target_kind(split)
    if kind == "mask":
        counts, read = count_mask_classes(split, len(names))
        return {"classes": by_name(names, counts), "masks_read": read}
    return {"classes": by_name(names, count_classes(split, len(names), kind))}


def by_name(names: tuple[str, ...], counts: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Counts by what is counted → by class; empty where nothing was."""
    if not counts:
        return {}
    return {
        name: {what: int(values[index]) for what, values in counts.items()}
        for index, name in enumerate(names)
    }


def print_contents(described: dict[str, Any]) -> None:
    """The same as tables; nothing for a store whose contents were not described (an incomplete one)."""
    splits = {name: split for name, split in described["splits"].items() if "kinds" in split}
    if not splits:
        return
    print()
    kinds = [{"split": name, **split["kinds"]} for name, split in splits.items()]
    print_table(kinds, ["split", "labeled", "unlabeled", "background", "bad"], "samples")
    print_classes(splits)
    for text in described["warnings"]:
        print(f"warning: {text}")


def print_classes(splits: dict[str, Any]) -> None:
    """Samples of each class in each split, and boxes or the share of pixels in brackets."""
    from train.data.splits import MASKS_READ

    names = list(next(iter(splits.values()))["classes"])
    if not names:
        return
    totals = {
        name: sum(entry.get("pixels", 0) for entry in split["classes"].values())
        for name, split in splits.items()
    }

    def text(split: str, name: str) -> str:
        entry = splits[split]["classes"][name]
        if "pixels" in entry:
            return f"{entry['samples']:,} ({entry['pixels'] / max(1, totals[split]):.1%})"
        return f"{entry['samples']:,}" + (f" ({entry['boxes']:,})" if "boxes" in entry else "")

    rows = [
        {"class": name, **{split: text(split, name) for split in splits}} for name in names[:SHOWN_CLASSES]
    ]
    first = next(iter(splits.values()))
    what = "boxes" if "boxes" in first["classes"][names[0]] else "share of the pixels"
    has_more = any(len(entry) > 1 for entry in first["classes"].values())
    title = "samples of each class" + (f" ({what})" if has_more else "")
    if any(
        split.get("masks_read", 0) < split["kinds"]["labeled"]
        for split in splits.values()
        if "masks_read" in split
    ):
        title += f", in {MASKS_READ:,} masks of each split"
    print()
    print_table(rows, ["class", *splits], title)
    if len(names) > SHOWN_CLASSES:
        print(f"and {len(names) - SHOWN_CLASSES} more classes: --json has them all")


def verify(
    store: StorePath,
    repair: Annotated[
        bool, typer.Option(help="Delete uncommitted leftovers of interrupted runs first; nothing else.")
    ] = False,
    teacher_path: Annotated[
        str | None, typer.Option(help="The teacher's weights: encode some samples again and compare.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Which of several teachers that is; default: the first.", metavar="NAME"),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many samples to encode again.", min=1)] = 16,
    data: Annotated[str | None, typer.Option(help="The data set, when it has moved.")] = None,
    device: Annotated[str, typer.Option(help="Where to encode: auto, cpu, cuda.")] = "auto",
    check_content: Annotated[
        bool,
        typer.Option("--check-content", help="Read every file of the data set, whatever its size and time."),
    ] = False,
    json: AsJson = False,
) -> None:
    """cli verify flowers.zarr

    Read every file of a store again and check it, and compare the store with its data set where that can be opened;
    exit code 1 when anything is wrong. A store at a URL is downloaded for it, and not compared with its data set.

    cli verify flowers.zarr --teacher-path Qwen2.5-VL-7B-Instruct

    cli verify flowers.zarr --repair --json
    """
    from store.errors import StoreError
    from store.metadata import is_url
    from store.verify import Finding, repair_store, verify_store

    remote = is_url(store)
    if remote and (repair or teacher_path is not None or data is not None or check_content):
        raise StoreError(
            f"{store}: --repair, --teacher-path, --data and --check-content work on local stores: copy it with cli copy"
        )
    if teacher is not None and teacher_path is None:
        raise StoreError(f"--teacher {teacher}: say where its weights are with --teacher-path")
    repaired = repair_store(store) if repair else []
    findings = verify_store(store)
    audit, fidelity, sound = None, [], not findings
    if teacher_path is not None and sound:
        from commands.fidelity import view_fidelity
        from extract.verify import audit_store, teacher_of
        from store.reader import open_store

        opened = open_store(store)
        opened = opened if teacher is None else opened.of_teacher(teacher)
        loaded = teacher_of(opened, teacher_path, device)
        audit = audit_store(
            Path(store), teacher_path, samples=samples, data=data, name=teacher, teacher=loaded
        )
        if not audit.findings:
            fidelity = [vars(found) for found in view_fidelity(opened, loaded, samples=samples, data=data)]
        findings = [Finding(store, problem) for problem in audit.findings]
    compared = None
    if sound and not remote:
        from extract.verify import compare_with_data

        compared = compare_with_data(Path(store), data, check_content=check_content)
        findings += [Finding(store, compared.problem)] if compared.problem else []
    if json:
        listed = [{"path": finding.path, "problem": finding.problem} for finding in findings]
        report = {"store": store, "ok": not findings, "findings": listed, "repaired": repaired}
        skipped = "the store itself is damaged or incomplete" if compared is None else compared.skipped
        if remote and sound:
            skipped = "only a local store is compared with its data set"
        report["data"] = {"compared": skipped is None, "skipped": skipped}
        teacher_report = None if audit is None else {**vars(audit), "fidelity": fidelity}
        print_json({**report, "teacher": teacher_report})
    else:
        if audit is not None:
            print_audit(vars(audit))
            print_fidelity(fidelity)
        for path in repaired:
            print(f"deleted {path}")
        if compared is not None and compared.skipped:
            print(compared.skipped)
        for finding in findings:
            print(finding)
        number = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        print(f"{store}: {number}" if findings else f"{store}: everything is as recorded")
    if findings:
        raise typer.Exit(1)


def print_audit(audit: dict[str, Any]) -> None:
    """The result of encoding samples again."""
    line = f"{audit['samples']} samples encoded again: least cosine {audit['pooled']:.6f} (pooled)"
    if audit["grid"] is not None:
        line += f", {audit['grid']:.6f} (grid tokens)"
    least = min(
        value for value in (audit["pooled_standardised"], audit["grid_standardised"]) if value is not None
    )
    print(f"{line}; {least:.5f} standardized")


def print_fidelity(fidelity: list[dict[str, Any]]) -> None:
    """What each augmentation costs, where a store has grids."""
    if not fidelity:
        return
    print(
        "\ngrids moved with the image, against the teacher's answer to the moved image (standardized cosine):"
    )
    rows = [
        {
            "view": found["view"] + (" (exact)" if found["exact"] else ""),
            "cells": found["cells"],
            "mean": f"{found['mean']:.3f}",
            "1st percentile": f"{found['first_percentile']:.3f}",
        }
        for found in fidelity
    ]
    print_table(rows, ["view", "cells", "mean", "1st percentile"])
    if any(found["exact"] for found in fidelity):
        print(
            "exact: the store has the teacher's answer to mirror images; what is left is the renderer's part"
        )


def copy(
    source: Annotated[str, typer.Argument(help="A complete store: a folder or a URL.", metavar="FROM")],
    target: Annotated[str, typer.Argument(help="Where the copy goes: a folder or a URL.", metavar="TO")],
    arrays: Annotated[
        str | None,
        typer.Option(help="Only these arrays, e.g. features/pooled,targets,logits.", metavar="NAMES"),
    ] = None,
    json: AsJson = False,
) -> None:
    """cli copy flowers.zarr s3://features/flowers.zarr

    Copy a store between folders and URLs. Every file is compared with the store's checksums. Running the same
    command again continues a copy that was interrupted.

    cli copy s3://features/flowers.zarr flowers.zarr --arrays features/pooled,targets
    """
    from console.progress import PhaseProgress
    from processes.stop import Stopped, StopRequest
    from store.replicate import replicate_store

    names = None if arrays is None else [name.strip() for name in arrays.split(",")]
    with StopRequest() as stop, PhaseProgress("files") as shown:
        copied = replicate_store(
            source,
            target,
            names,
            lambda done, total: shown.progress(done, total, "copying"),
            lambda: stop.requested,
        )
        if copied is None:
            raise Stopped("stopped: the same command continues the copy", stop.exit_code)
    result = {"source": source, "target": target, **copied._asdict()}
    if json:
        print_json(result)
        return
    again = f", {copied.skipped} files were there" if copied.skipped else ""
    print(f"{target}: {copied.files} files, {copied.bytes / 1e6:,.1f} MB copied{again}")


def convert(
    source: Annotated[
        str, typer.Argument(help="A store (a folder or a URL), or a .h5 file made from one.", metavar="FROM")
    ],
    target: Annotated[
        str, typer.Argument(help="What to make: a .h5 file or a store; a path or a URL.", metavar="TO")
    ],
    zstd: Annotated[bool, typer.Option(help="Store to store: compress, lossless.")] = False,
    int8: Annotated[
        bool, typer.Option(help="Store to store: features as int8, scales a channel and a token.")
    ] = False,
    pca: Annotated[
        int | None, typer.Option(help="Store to store: keep this many principal components.", min=1)
    ] = None,
    json: AsJson = False,
) -> None:
    """cli convert flowers.zarr flowers.h5

    Convert a store to one HDF5 file or back (lossless), or to a smaller store (and print the loss).

    cli convert flowers.h5 flowers.zarr

    cli convert flowers.zarr small.zarr --int8 --zstd
    """
    costs = convert_paths(source, target, zstd=zstd, int8=int8, pca=pca)
    listed = [{**asdict(cost), "saved": cost.saved} for cost in costs]
    if json:
        print_json({"source": source, "target": target, "costs": listed})
        return
    if listed:
        print_costs(listed)
    print(f"{target}: written")


def convert_paths(source: str, target: str, *, zstd: bool, int8: bool, pca: int | None) -> list[Any]:
    """Convert in the way that the two paths and the options ask for. Raises StoreError where there is none."""
    from store.errors import StoreError
    from store.hdf5 import hdf5_to_store, store_to_hdf5
    from store.replicate import reading_from, writing_to
    from store.transfer import pack_store

    packing = zstd or int8 or pca is not None
    to_hdf5, from_hdf5 = (path.lower().endswith(HDF5_SUFFIXES) for path in (target, source))
    if packing and (to_hdf5 or from_hdf5):
        raise StoreError("--zstd, --int8 and --pca make a store from a store, not from or to HDF5")
    if to_hdf5 == from_hdf5 and not packing:
        raise StoreError(
            f"convert {source} to {target}: one of the two must end in .h5, or choose --zstd, --int8 or --pca"
        )
    with writing_to(target) as place:
        if packing:
            return pack_store(source, place, zstd=zstd, int8=int8, pca=pca)
        if from_hdf5:
            with reading_from(source) as file:
                hdf5_to_store(file, place)
        else:
            store_to_hdf5(source, place)
        return []


def print_costs(costs: list[dict[str, Any]]) -> None:
    rows = [
        {
            "array": cost["array"],
            "cosine (mean)": cosine_text(cost["cosine_mean"]),
            "cosine (1st percentile)": cosine_text(cost["cosine_p1"]),
            "MB before": round(cost["bytes_before"] / 1e6, 2),
            "MB after": round(cost["bytes_after"] / 1e6, 2),
            "saved": f"{cost['saved']:.1%}",
        }
        for cost in costs
    ]
    print_table(rows, list(rows[0]), "cosine of standardised features, before and after")


def cosine_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
