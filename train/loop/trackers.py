"""Where curves go besides metrics.jsonl: TensorBoard always, Weights & Biases or MLflow when asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.errors import TrainError


class Tracker(Protocol):
    """Takes one record per epoch."""

    def log(self, record: Mapping[str, Any], epoch: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `RUN/tensorboard`; after a resume, later epochs of the interrupted run are dropped."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first_epoch + 1)

    def log(self, record: Mapping[str, Any], epoch: int) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; `WANDB_MODE=offline` keeps everything in the run folder."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_epoch: int) -> None:
        try:
            import wandb
        except ImportError:
            raise TrainError("--tracker wandb needs the wandb package: pip install wandb") from None
        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qwen-distill"),
                name=run.name,
                dir=str(run),
                config=dict(config),
                id=earlier_id(run, "wandb"),
                resume="allow",
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).removesuffix(".")
            raise TrainError(
                f"--tracker wandb: {reason} (`wandb login` logs in, WANDB_MODE=offline keeps all in the run folder)"
            ) from error
        remember_id(run, "wandb", self.run.id)

    def log(self, record: Mapping[str, Any], epoch: int) -> None:
        self.run.log(scalars(record), step=epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow; without `MLFLOW_TRACKING_URI` everything stays in `RUN/mlflow`."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_epoch: int) -> None:
        try:
            import mlflow
        except ImportError:
            raise TrainError("--tracker mlflow needs the mlflow package: pip install mlflow-skinny") from None
        self.mlflow: Any = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow asks to confirm its plain files; a folder of the run is what they are good for.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((run / "mlflow").resolve().as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "qwen-distill"))
        earlier = earlier_id(run, "mlflow")
        active = mlflow.start_run(run_id=earlier, run_name=run.name)
        remember_id(run, "mlflow", active.info.run_id)
        if earlier is None:
            mlflow.log_params({name: str(value)[:250] for name, value in config.items()})

    def log(self, record: Mapping[str, Any], epoch: int) -> None:
        self.mlflow.log_metrics(scalars(record), step=epoch)

    def close(self) -> None:
        self.mlflow.end_run()


def earlier_id(run: Path, tracker: str) -> str | None:
    """The tracker's own id of the run that is being resumed, so that its curves go on; None at the start."""
    path = run / f"{tracker}_run_id"
    return path.read_text().strip() if path.exists() else None


def remember_id(run: Path, tracker: str, value: str) -> None:
    (run / f"{tracker}_run_id").write_text(value)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that are there."""
    numbers = {
        name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "epoch"
    }
    return {name: float(value) for name, value in numbers.items()}


def open_trackers(name: str, run: Path, config: Mapping[str, Any], first_epoch: int) -> list[Tracker]:
    """TensorBoard, and the one asked for. Raises TrainError when its package is missing."""
    trackers: list[Tracker] = []
    if name == "wandb":
        trackers.append(WandB(run, config, first_epoch))
    elif name == "mlflow":
        trackers.append(MLflow(run, config, first_epoch))
    return [TensorBoard(run, config, first_epoch), *trackers]
