"""What [worker] launcher and the sections of the launchers may not say: no cluster is needed for these."""

from pathlib import Path

import pytest

from eval_platform.config import load_config
from eval_platform.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[worker]\nlauncher = "lsf"', "worker.launcher"),
        ('[worker]\nlauncher = "slurm"\ndevices = [0]', "devices: they are of this machine"),
        ('[worker]\nlauncher = "slurm"\nexchange = "/shared"', "exchange: '/shared' must be like s3://bucket/prefix"),
        ('[worker]\nlauncher = "ray"\nexchange = "s3://bucket"', "must be like s3://bucket/prefix"),
        ('[worker]\nexchange = "s3://bucket/prefix"', "exchange: it is for Slurm's and Ray's workers"),
        ('[slurm]\narguments = ["--mem", "4G"]', "'4G' must be one option written whole"),
        ('[slurm]\narguments = ["script.sh"]', "'script.sh' must be one option written whole"),
        ('[slurm]\narguments = ["--export=NONE"]', "--export is set by the platform"),
        ('[slurm]\narguments = ["--gres=gpu:1"]', "--gres is set by the platform, or by a field of its own"),
        ('[slurm]\npartition = "gpu --wrap=x"', "must be one word"),
        ("[slurm]\ngpus = 2", "slurm.gpus"),
        ('[worker]\nlauncher = "ray"\ndevices = [0]', "devices: they are of this machine"),
        ('[ray]\naddress = "head:8265"', "must begin with http:// or https://"),
        ('[ray]\naddress = "ray://head:10001"', "must begin with http:// or https://"),
        ('[ray]\naddress = "http://me:secret@head:8265"', "RAY_AUTH_TOKEN"),
        ("[ray]\nnum_gpus = 1.5", "must be a whole number where it is more than one"),
        ("[ray]\nnum_gpus = -1", "ray.num_gpus"),
        ("[ray]\nnum_cpus = 0", "ray.num_cpus"),
        ("[ray]\nresources = {GPU = 1}", "GPU: give num_cpus and num_gpus"),
        ("[ray]\nresources = {big = 0}", "ray.resources.big"),
        ("[ray]\ngpus = 2", "ray.gpus"),
        ('[worker]\nlauncher = "kubernetes"\ndevices = [0]', "devices: they are of this machine"),
        ('[kubernetes]\ngpu_resource = "gpu"', "must be like nvidia.com/gpu"),
        ('[kubernetes]\ncache = "cache"', "it is a path in the pod"),
        ("[kubernetes]\ngpus = -1", "kubernetes.gpus"),
        ("[kubernetes]\nnode_selector = 1", "kubernetes.node_selector"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "eval_platform.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert problem in str(raised.value)
