"""The learning rate over the steps, and the order of the samples."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.batches import Balance, EpochBatches, micro_batches, rank_share
from train.loop import loop
from train.loop.loop import group_sizes, learning_rate_at, warmup_steps
from train.run import run_training


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_rise_linearly_and_end_at_the_real_last_step(kind):
    rates = [learning_rate_at(s, total=50, warmup=5, kind=kind, peak=1.0) for s in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.0, abs=1e-12)
    assert 0 < rates[49] < 0.03
    middle = 5 + 22
    expected = 0.5 * (1 + np.cos(np.pi * 22 / 45)) if kind == "cosine" else 1 - 22 / 45
    assert rates[middle] == pytest.approx(expected)


def test_constant_rate_and_length_of_the_warm_up():
    assert learning_rate_at(49, total=50, warmup=0, kind="constant", peak=0.3) == 0.3
    assert warmup_steps(1.0, 10, 1000) == 10
    assert warmup_steps(5.0, 10, 50) == 10, "at most a fifth of the run"


def test_the_run_really_uses_the_schedule_over_ragged_groups(make_store, make_config, monkeypatch):
    seen: list[float] = []
    plain = loop.Loop.learning_rate
    monkeypatch.setattr(loop.Loop, "learning_rate", lambda s, step: seen.append(plain(s, step)) or seen[-1])
    config = make_config(make_store(train=27), batch_size=6, grad_accum_steps=2, epochs=3, warmup_epochs=0)
    run_training(config)
    # 27 samples: batches 6, 6, 6, 6, 3, so groups of 2, 2 and 1: nine steps in all.
    steps = list(dict.fromkeys(seen))
    expected = [learning_rate_at(s, total=9, warmup=0, kind="cosine", peak=1e-3) for s in range(9)]
    assert steps == pytest.approx(expected)


def test_plan_covers_every_sample_once_in_an_order_of_its_own_each_epoch():
    rows = np.arange(100, 127)
    batches = EpochBatches(rows, 6, seed=1)
    orders = []
    for epoch in (0, 1):
        batches.epoch, batches.start = epoch, 0
        orders.append([item.row for batch in batches for item in batch])
        assert sorted(orders[-1]) == rows.tolist()
    assert orders[0] != orders[1]
    batches.start = 3
    assert [item.row for batch in batches for item in batch] == orders[1][18:]
    assert [s.stop - s.start for s in micro_batches(13, 6)] == [6, 7], "never a batch of one"
    assert group_sizes(5, 2) == [2, 2, 1]


def test_the_first_epoch_of_a_remote_store_shows_shard_after_shard():
    rows = np.arange(3, 250)
    batches = EpochBatches(rows, 10, seed=1, shard_rows=64)
    order, _ = batches.order()
    assert sorted(order.tolist()) == rows.tolist()
    shards = order // 64
    assert np.count_nonzero(np.diff(shards)) == 3, "each of the four shards once"
    assert order[:20].tolist() != sorted(order[:20].tolist())
    batches.epoch = 1
    later, _ = batches.order()
    assert later.tolist() == EpochBatches(rows, 10, seed=1, epoch=1).order()[0].tolist(), (
        "then mixed over all"
    )


def test_a_store_at_a_url_trains_like_a_local_one(make_store, make_config, monkeypatch):
    """Each shard is copied once, whatever reads it."""
    import shutil

    from store import mirror

    copied: list[str] = []
    plain = mirror.Mirror._download
    monkeypatch.setattr(
        mirror.Mirror,
        "_download",
        lambda self, array, *rest: copied.append(array) or plain(self, array, *rest),
    )
    path = make_store(train=27)
    options = {"batch_size": 6, "epochs": 2, "distillation_type": "feature"}
    remote = make_config(f"file://{path}", **options)
    summary = run_training(remote)
    assert summary["store"]["path"] == f"file://{path}"
    assert copied.count("train/features/grid") == copied.count("train/images/encoded/values") == 1
    shutil.rmtree(remote.out)
    again = run_training(remote)
    assert copied.count("train/features/grid") == 1, "a second training finds them in the cache"
    assert again["metrics"] == summary["metrics"]


def test_ranks_share_a_batch_equally_and_padding_has_no_weight():
    rows, showings = np.array([7, 8, 9, 10, 11]), np.array([0, 1, 0, 2, 0])
    shares = [rank_share(rows, showings, rank, 2) for rank in (0, 1)]
    assert shares == [[(0, 7, 1.0), (1, 8, 1.0), (0, 9, 1.0)], [(2, 10, 1.0), (0, 11, 1.0), (0, 7, 0.0)]]
    assert rank_share(rows[:1], showings[:1], 1, 2) == [(0, 7, 0.0)]


def test_a_balanced_epoch_repeats_labeled_rows_and_spreads_the_others():
    rows = np.arange(100)
    balance = Balance(rows[:6], rows[6:], 0.25)
    batches = EpochBatches(rows, 8, seed=1, balance=balance)
    shown: list[list[tuple[int, int]]] = []
    for epoch in range(4):
        batches.epoch, batches.start = epoch, 0
        found = list(batches)
        assert [len(batch) for batch in found] == [8] * 12 + [4], "as many samples as without"
        assert all(sum(item.row < 6 for item in batch) == max(1, len(batch) // 4) for batch in found)
        shown += [[(item.row, item.showing) for item in batch] for batch in found]
    every = [item for batch in shown for item in batch]
    assert len(set(every)) == len(every), "no row is shown twice in the same view"
    counts = np.bincount([row for row, _ in every], minlength=100)
    assert counts[:6].max() - counts[:6].min() <= 1
    assert counts[6:].max() - counts[6:].min() <= 1
    batches.epoch, batches.start = 2, 5
    assert [[(item.row, item.showing) for item in batch] for batch in batches] == shown[26 + 5 : 39]


def test_a_control_of_mixed_rows_sees_the_labeled_ones_alone_in_full_batches():
    rows = np.arange(20)
    batches = EpochBatches(rows, 8, seed=1, balance=Balance(rows[:3], rows[:0], 1.0))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert {item.row for batch in batches for item in batch} == {0, 1, 2}
