"""Many processes, one store: bit-identical to a single run, whoever dies on the way."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from extract.config import ConfigError, load_config
from extract.run import ExtractResult, run_extraction
from store.job import count_committed, features_job
from store.reader import open_store


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".extract" not in path.parts
    }


class TestShardRange:
    def test_processes_of_an_array_job_make_the_store_of_a_single_run(
        self, extract_options: dict[str, Any]
    ) -> None:
        options = {**extract_options, "shard_rows": 16, "grid": "native"}
        extract(options)
        whole = files_of(options["out"])
        shutil.rmtree(options["out"])
        assert not extract(options, shard_range="2:").complete
        assert not extract(options, shard_range="0").complete
        assert extract(options, shard_range="1:2").complete  # whoever commits the last shard finalises
        assert files_of(options["out"]) == whole

    def test_a_range_beyond_the_plan_says_how_many_shards_there_are(
        self, extract_options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError, match=r"--shard-range 90:99: the plan has \d shards"):
            extract(extract_options, shard_range="90:99", shard_rows=16)


@pytest.mark.slow
class TestCluster:
    @pytest.fixture
    def many_digits(self, digit_folder: Path, tmp_path: Path) -> Path:
        """600 images: enough work for a kill to come in the middle."""
        root = tmp_path / "many"
        for file in digit_folder.rglob("*.png"):
            for copy in range(10):
                target = root / file.parent.name / f"{file.stem}-{copy}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.open(file).rotate(copy * 5).save(target)
        return root

    @pytest.fixture
    def cluster(self) -> Iterator[Any]:
        import dask
        from distributed import Client, LocalCluster

        with (
            dask.config.set({"distributed.worker.daemon": False}),
            LocalCluster(
                n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client

    def test_a_process_for_each_device(self, extract_options: dict[str, Any]) -> None:
        options = {**extract_options, "shard_rows": 8, "grid": "native"}
        extract(options)
        whole = files_of(options["out"])
        result = extract(options, device="cpu,cpu", overwrite=True)
        assert (result.complete, result.encoded) == (True, 60)
        assert files_of(options["out"]) == whole

    @pytest.mark.timeout(900)
    def test_a_store_follows_its_data_set(self, extract_options: dict[str, Any], tmp_path: Path) -> None:
        data = tmp_path / "data"
        shutil.copytree(extract_options["data"], data)
        options = {**extract_options, "data": str(data), "shard_rows": 16, "device": "cpu,cpu"}
        extract(options)
        for number in range(12):
            Image.new("RGB", (40, 40), (number * 12, 90, 0)).save(data / "3" / f"new{number}.png")
        assert extract(options).encoded == 12
        assert sum(map(len, open_store(options["out"]).values())) == 72
        (data / "3" / "new0.png").unlink()
        (data / "3" / "new1.png").rename(data / "4" / "renamed.png")
        Image.new("RGB", (40, 40), (1, 2, 3)).save(data / "3" / "new2.png")
        result = extract(options)
        assert result.changes is not None
        assert {name: result.changes[name] for name in ("renamed", "removed", "changed")} == {
            "renamed": 1,
            "removed": 1,
            "changed": 1,
        }
        assert (result.encoded, result.complete) == (1, True)
        assert sum(map(len, open_store(options["out"]).values())) == 71

    def test_a_killed_workers_shards_are_redone_by_others(
        self, extract_options: dict[str, Any], many_digits: Path, cluster: Any
    ) -> None:
        options = {**extract_options, "data": str(many_digits), "shard_rows": 64, "batch_size": 4}
        options |= {"image_size": 128, "grid": "native"}
        extract(options)
        whole = files_of(options["out"])
        shutil.rmtree(options["out"])
        victim = next(iter(cluster.run(os.getpid).values()))
        killed = []

        def kill_in_the_middle() -> None:
            while not killed:
                job = features_job(options["out"]) if (options["out"] / "zarr.json").exists() else None
                if job is not None and count_committed(options["out"], job) >= 64:
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)
                time.sleep(0.02)

        thread = threading.Thread(target=kill_in_the_middle, daemon=True)
        thread.start()
        result = extract(options, scheduler=cluster.scheduler.address)
        assert killed == [victim]
        assert result.complete
        assert files_of(options["out"]) == whole
        # The workers live on, but not what they kept for this extraction.
        assert set(cluster.run(keeps_a_teacher).values()) == {False}


def keeps_a_teacher() -> bool:
    from extract.cluster import STATE

    return STATE.teacher is not None or STATE.pipeline is not None
