"""What [slurm] may say, and what is kept of a job that waits: no Slurm is needed for these."""

import json
from pathlib import Path

from eval_platform.config import load_config
from eval_platform.launching import folders


def test_options_of_sbatch_go_through_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "eval_platform.toml"
    file.write_text('[slurm]\narguments = ["--mem=64G", "--qos=low", "--exclusive"]\ntime_limit = "1-00:00:00"')
    assert load_config(file).slurm.arguments == ("--mem=64G", "--qos=low", "--exclusive")


def test_the_folder_of_a_job_that_waits_is_not_forgotten(tmp_path: Path) -> None:
    names = [f"{number:020d}-worker" for number in range(folders.KEPT_WORKERS + 2)]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[:2]:
        (tmp_path / name / "job.json").write_text(json.dumps({"slurm": "7"}))
    (tmp_path / names[1] / "ended.json").write_text("{}")
    folders.forget_old(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [names[0], *names[2:]]
