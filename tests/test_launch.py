"""What starting a worker leaves on the machine."""

import json
import os
from pathlib import Path

from eval_platform import launch
from eval_platform.config import S3, Config
from eval_platform.store.process import process_record


def test_only_folders_of_workers_that_have_ended_are_forgotten(tmp_path: Path) -> None:
    names = [f"{number:020d}-worker" for number in range(launch.KEPT_WORKERS + 3)]
    for name in names:
        (tmp_path / name).mkdir()
    living, dead = process_record(os.getpid()), {**process_record(os.getpid()), "started": "never"}
    for name, worker in zip(names, (living, dead), strict=False):
        (tmp_path / name / "process.json").write_text(json.dumps({"worker": worker}))
    launch._forget_old(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [names[0], *names[3:]]


def test_buckets_of_one_name_on_two_servers_have_a_catalog_each(tmp_path: Path) -> None:
    def catalog(results: str, endpoint: str | None) -> Path:
        return Config(folder=tmp_path, results=results, state=str(tmp_path), s3=S3(endpoint=endpoint)).catalog_path

    endpoints = (None, "http://127.0.0.1:9000", "http://127.0.0.1:9001")
    assert len({catalog("s3://bucket/results", endpoint) for endpoint in endpoints}) == 3
    assert len({catalog("results", endpoint) for endpoint in endpoints}) == 1
