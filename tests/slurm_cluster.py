"""A real Slurm for tests: one node on free ports of 127.0.0.1 with four GPUs that are none, in a temporary folder.

    python -m tests.slurm_cluster            (`make test-slurm`) the tests of the launcher, on such clusters
    python -m tests.slurm_cluster COMMAND    any command, on a cluster that ends with it: SLURM_CONF leads there

munged, slurmctld and slurmd, without accounting and without cgroups; the scheduling, the requeueing, the limits and
the devices' assignment are Slurm's own. Root is needed, for the device files. Whatever happens, the daemons end with
this process: the kernel kills each when its parent dies.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import servers

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
REAL_CLUSTER = "REAL_SLURM"  # set where the tests of the launcher are to start clusters
GPUS = 4
PATIENCE_S = 60
# Two partitions on the one node: a job of `urgent` takes the place of one of `eval`, which is queued again. A node
# that says nothing for SlurmdTimeout seconds is down. KillWait: from SIGTERM to SIGKILL when Slurm ends a job itself.
# MinJobAge: so long it remembers a job that has ended. cred_expire: so long a job that was queued again waits at least;
# 2 minutes where it is not set.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout=5
MessageTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=300
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=1
DefMemPerCPU=100
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 Gres=gpu:h200:{gpus} State=UNKNOWN
PartitionName=eval Nodes={host} Default=YES MaxTime=1:00:00 PriorityTier=1 State=UP
PartitionName=urgent Nodes={host} MaxTime=1:00:00 PriorityTier=10 State=UP
"""


class ClusterError(Exception):
    """The cluster cannot be had; says why, and what to do."""


@dataclass
class Cluster:
    """`folder/slurm.conf` leads to it."""

    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a command of Slurm's answers. Raises ClusterError."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def start(self, name: str, *command: str) -> None:
        out = self.folder / "log" / f"{name}.out"
        self.running[name] = servers.start(command, cwd=self.folder, env=self.environment, out=out)

    def start_node(self, *within: str) -> None:
        """Its slurmd, begun by the command `within`; returns when jobs can be had."""
        node = ("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", _host())
        self.start("slurmd", *within, *node)
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%T").strip() in {"idle", "mixed", "allocated"}, "the node")

    def kill_node(self) -> None:
        """kill -9 of slurmd and of all that it started, as when the power fails."""
        self.running["slurmd"].kill()
        self.running["slurmd"].wait()
        self.kill_jobs()

    def kill_jobs(self) -> None:
        """kill -9 of every process of a job here, known by its environment, Slurm's own beside it too."""
        for process in self._of_jobs():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _of_jobs(self) -> Iterator[int]:
        ours = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):  # it ended meanwhile
                environment = (entry / "environ").read_bytes().split(b"\0")
                of_a_job = any(one.startswith(b"SLURM_JOB_ID=") for one in environment)
                if ours in environment and (of_a_job or (entry / "comm").read_text().startswith("slurmstepd")):
                    yield int(entry.name)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if ready():
                    return
                problem = ""
            except ClusterError as error:
                problem = str(error)
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                name = ended[0] if ended else list(self.running)[-1]
                said = "".join(file.read_text(errors="replace")[-2000:] for file in self.folder.glob(f"log/{name}.*"))
                raise ClusterError(f"{what} does not come up: {problem}; {name} says: {said or 'nothing'}")
            time.sleep(0.05)

    def end(self) -> None:
        """The daemons, then the jobs, which outlive them."""
        servers.end(self.running.values())
        self.kill_jobs()


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install --no-install-recommends {' '.join(PACKAGES)} (as root)"
    return None if os.geteuid() == 0 else "only root may make the device files of a cluster's GPUs"


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """A cluster of this process's own. Raises ClusterError."""
    reason = why_not()
    if reason is not None:
        raise ClusterError(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as made:
        cluster = Cluster(Path(made))
        try:
            _start(cluster)
            yield cluster
        finally:
            cluster.end()


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    for name in ("munge", "state", "spool", "log"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # a socket that not everybody may reach is refused by munged
    controller_port, node_port = servers.free_ports(2)
    settings = CONFIGURATION.format(
        host=_host(),
        folder=folder,
        controller_port=controller_port,
        node_port=node_port,
        gpus=GPUS,
    )
    (folder / "slurm.conf").write_text(settings)
    (folder / "gres.conf").write_text(f"NodeName={_host()} Name=gpu Type=h200 File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is made, but slurmd wants the file
    for gpu in range(GPUS):
        os.mknod(folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))  # /dev/null again: it must be a character device
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = {name: f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")}
    # --force: the folders above are open to everybody.
    command = ("munged", "--foreground", "--force", "--num-threads=2", f"--socket={folder}/munge/socket")
    cluster.start("munged", *command, *munge.values())
    cluster.until((folder / "munge" / "socket").exists, "munge")
    cluster.start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
    cluster.start_node()


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def main(command: list[str]) -> int:
    """The command's exit code; 2 where there is no cluster."""
    servers.end_on_sigterm()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    if not command:
        tests = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "test_slurm.py")]
        return subprocess.run(tests, env={**os.environ, REAL_CLUSTER: "1"}, check=False).returncode
    try:
        with slurm_cluster() as cluster:
            return subprocess.run(command, env=cluster.environment, check=False).returncode
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
