"""Devices that are absent or fail, and how processes share a machine's cores; with fake devices and injected errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extract.cluster import ClusterExecutor
from extract.config import load_config
from extract.encode import explained_errors
from extract.teachers import TeacherError
from extract.teachers.devices import device_error
from processes.stop import StopRequest
from tests.test_extract.extractions import extract

CUDA = torch.device("cuda:1")
FELL_OFF = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."


@pytest.mark.parametrize("devices", ["cuda:0,cuda:1", "cuda:1,cuda:0"])
def test_one_absent_gpu_of_several_is_found_before_processes_start(
    devices: str, extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cluster(config: Any) -> Any:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("extract.cluster.cluster_client", no_cluster)
    with pytest.raises(TeacherError, match="device cuda:1 is not there: this machine shows 1 CUDA devices"):
        extract(extract_options, device=devices)
    assert not Path(extract_options["out"]).exists()


def accelerator_error(text: str) -> RuntimeError:
    kind: Callable[[str], RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)
    return kind(text)


@pytest.mark.parametrize("make", [RuntimeError, accelerator_error])
def test_a_gpu_that_fails_is_one_line(make: Callable[[str], RuntimeError]) -> None:
    with (
        pytest.raises(
            TeacherError, match=r"^cuda:1 failed \(CUDA error: unspecified.*nvidia-smi.*kept, run"
        ) as raised,
        explained_errors(CUDA),
    ):
        raise make(FELL_OFF)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), CUDA),
        (torch.OutOfMemoryError("CUDA out of memory"), CUDA),
        (RuntimeError(FELL_OFF), torch.device("cpu")),
    ],
)
def test_other_errors_stay_what_they_are(error: RuntimeError, device: torch.device) -> None:
    assert device_error(error, device) is None
    with pytest.raises(type(error)) as raised, explained_errors(device):
        raise error
    assert raised.value is error


def test_a_failed_gpu_is_not_called_a_wrong_image_size(
    extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timm teacher explains errors of its model by the image's size, but not this one."""
    from extract.teachers import timm_encoder

    def fails(self: Any, values: Any) -> Any:
        raise RuntimeError(FELL_OFF)

    explain = timm_encoder.device_error
    monkeypatch.setattr(timm_encoder, "device_error", lambda error, device: explain(error, CUDA))
    monkeypatch.setattr(timm_encoder.TimmTeacher, "run_model", fails)
    with pytest.raises(TeacherError, match="cuda:1 failed"):
        extract(extract_options)


@pytest.mark.parametrize(
    ("hosts", "share"), [(["a"], 1), (["a", "a", "b"], 2), (["a", "b", "c"], 1), (["a"] * 8, 8), ([], 1)]
)
def test_workers_of_one_machine_share_its_cores(hosts: list[str], share: int) -> None:
    workers = {f"tcp://{host}:{number}": {"host": host} for number, host in enumerate(hosts)}
    client: Any = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": workers})
    config = load_config({"data": "d", "out": "o", "scheduler": "tcp://s:1"})
    assert ClusterExecutor(config, client, [], StopRequest()).share == share
