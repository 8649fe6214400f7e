"""`from extract import extract`: stage one for Python programs and notebooks."""

from __future__ import annotations

from typing import Any

from console.options import takes_options
from extract.config import ConfigError, ExtractConfig, load_config
from store.reader import Store, open_store


@takes_options(ExtractConfig)
def extract(**options: Any) -> Store:
    """Encode every image of `data` with the teacher, once, into the store `out`, and open it.

    The keywords are the options of `cli extract`. Calling it again resumes, or follows a data set that has changed.
    With `shard_range` the store may still lack the shards of the other runs: `store.manifest.complete` is then False.

        store = extract(data="photos", out="photos.zarr", teacher_path="Qwen2.5-VL-7B-Instruct")
        store["train"].gather([0, 1], ["features/pooled"])

    Raises:
        ConfigError: options that make no sense, all problems together.
        store.errors.DistillError: anything else that the caller can do something about.
        processes.stop.Stopped: after Ctrl-C or SIGTERM, with everything encoded committed; the same call resumes.
    """
    config = load_config(options)
    if config.dry_run:
        raise ConfigError(
            "dry_run: extract() returns a store, and a dry run writes none: use `cli extract --dry-run`"
        )
    from extract.run import extract_and_measure

    result = extract_and_measure(config)
    return open_store(config.out, allow_incomplete=not result.complete)
