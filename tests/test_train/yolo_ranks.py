"""ultralytics' DDP launcher on CPU processes, for a test: gloo instead of NCCL, no GPU to place the model on."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn
from ultralytics.engine import validator
from ultralytics.utils import LOCAL_RANK, RANK

from train.yolo.trainer import StoreTrainer

PLAIN_DDP, PLAIN_BACKEND = nn.parallel.DistributedDataParallel, validator.AutoBackend
CPU = torch.device("cpu")


class CpuRanksTrainer(StoreTrainer):
    """StoreTrainer on two CPU processes. Importable by name, since the launcher pickles the class."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.world_size, self.ddp = 2, LOCAL_RANK == -1

    def _setup_ddp(self) -> None:
        if os.environ.get("FAIL_RANK") == str(RANK):
            raise RuntimeError("this rank fails")
        distributed.init_process_group("gloo", rank=RANK, world_size=self.world_size)
        nn.parallel.DistributedDataParallel = cpu_ddp  # type: ignore[misc, assignment]
        validator.AutoBackend = cpu_backend
        validator.get_torch_device_backend = lambda kind: SimpleNamespace(current_device=lambda: 0)


def cpu_ddp(model: nn.Module, device_ids: Any = None, **settings: Any) -> nn.Module:
    return PLAIN_DDP(model, **settings)


def cpu_backend(*, device: Any, **settings: Any) -> Any:
    return PLAIN_BACKEND(device=CPU, **settings)
