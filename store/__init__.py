"""The store: the contract between the two stages. numpy and zarr, no torch.

Write (stage one):

    from store import Manifest, Plan, StoreWriter, channel_scale, create_store, finalize_store
    from store.format import feature_arrays, target_arrays

    plan = Plan({"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}, batch_rows=32)
    create_store(path, Manifest(teacher=TeacherSpec(...), preprocessing=Preprocessing(...)), plan,
                 feature_arrays(1280, grid=16) + target_arrays(label=True, boxes=True),
                 scales={"features/pooled": channel_scale(pooled), "features/grid": channel_scale(grid)})
    for split in plan.splits:
        with StoreWriter(path, split) as writer:        # or StoreWriter(path, split, (0, 65536))
            for start, stop in writer.batches():        # a second run starts where the first was killed
                writer.append({"features/pooled": pooled,           # [b, 1280], true units: scaled inside
                               "features/grid": grid,               # [b, 16, 16, 1280]
                               "sizes": sizes, "content": content, "targets/label": labels,
                               "targets/boxes/values": [xyxy, ...], "targets/boxes/classes": [ids, ...]},
                              valid=valid, reasons=reasons)         # [b] bool; b texts, "" for good rows
    finalize_store(path)                                # small arrays, statistics, digest, complete

More, later: `add_arrays(path, [logits_array("probe", 10)])` returns a job's name for
`StoreWriter(path, split, job=name)` and `finalize_store(path, job=name)`; `extend_store(path, {"train": [new keys]})`
makes room for new rows, which are then written as above.

Read (stage two):

    from store import open_store

    train = open_store(path)["train"]
    rows = train.rows_of(["b.jpg"])                     # KeyError names the key
    batch = train.gather(rows, ["features/pooled"])     # stored float16; true = stored × train.scale[name]
    boxes = train.ragged(rows, "targets/boxes/values")  # list of [n, 4]
    train.valid, train.statistics["features/pooled"].mean, train.read("targets/label")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "open_store": "store.reader",
    "Store": "store.reader",
    "Split": "store.reader",
    "Statistics": "store.reader",
    "create_store": "store.create",
    "StoreWriter": "store.writer",
    "finalize_store": "store.finalize",
    "extend_store": "store.extend",
    "add_arrays": "store.extend",
    "Plan": "store.plan",
    "KeyTable": "store.keys",
    "Manifest": "store.format",
    "TeacherSpec": "store.format",
    "Preprocessing": "store.format",
    "ArraySpec": "store.format",
    "channel_scale": "store.scale",
    "DistillError": "store.errors",
    "StoreError": "store.errors",
    "LockedError": "store.errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
