"""TensorBoard, Weights & Biases and MLflow hold what metrics.jsonl holds."""

from __future__ import annotations

import pytest

from tests.test_train.runs import records
from train.errors import TrainError
from train.loop.trackers import open_trackers
from train.run import run_training


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_other_trackers_offline(make_store, make_config, tracker, monkeypatch):
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = make_store()
    config = make_config(store, tracker=tracker, epochs=1)
    run_training(config)
    folder = config.out / tracker
    assert any(path.is_file() for path in folder.rglob("*"))
    assert any((config.out / "tensorboard").iterdir())
    number = (config.out / f"{tracker}_run_id").read_text()
    run_training(make_config(store, tracker=tracker, epochs=2, resume=True))
    assert (config.out / f"{tracker}_run_id").read_text() == number
    if tracker == "mlflow":
        import mlflow

        history = mlflow.MlflowClient(folder.resolve().as_uri()).get_metric_history(number, "train_loss")
        assert [metric.step for metric in history] == [1, 2], "a resumed run goes on in its own curve"


def test_wandb_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(TrainError, match=r"No API key configured .*`wandb login` .*WANDB_MODE=offline"):
        open_trackers("wandb", tmp_path, {}, 0)


def test_tensorboard_holds_the_records(make_store, make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(make_store())
    run_training(config)
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    expected = [line["val_loss"] for line in records(config)]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(expected)
    assert [event.step for event in events.Scalars("top1")] == [1, 2]
