"""The store: the contract between the two stages. numpy and zarr, no torch.

Write (stage one):

    from store.create import create_store
    from store.finalize import finalize_store
    from store.format import Manifest, feature_arrays, target_arrays
    from store.keys import Plan
    from store.writer import StoreWriter, channel_scale

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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.reader import open_store

__all__ = ["open_store"]


def __getattr__(name: str) -> Any:
    """`from store import open_store` for users of the library; numpy is not imported before."""
    if name == "open_store":
        from store.reader import open_store

        return open_store
    raise AttributeError(f"module 'store' has no attribute {name!r}")
