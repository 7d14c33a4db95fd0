"""In place of Slurm: shell scripts that run one job as a process of this machine, for tests of a job's worst moments.

The job begins in another folder than its driver's, and what it prints goes where sbatch was told. A test says what
becomes of it: killed, queued again, or stopped as scancel does it.
"""

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fault_tools import until

JOB = "71"
_SBATCH = """
for argument; do case $argument in
  --output=*) output=$(echo "${{argument#--output=}}" | sed 's|/tmp/|{folder}/|; s/%j/{job}/');;
  --job-name=*) echo "${{argument#--job-name=}}" > name;;
esac; done
echo "$argument" > command; cp "$argument" script
echo "$output" > output; export -p > environment; rm -f state
echo run >> submissions
sh {folder}/start >/dev/null 2>&1 &
echo {job}
"""
_START = """
rm -f code
. {folder}/environment
cd /
bash {folder}/script >> "$(cat {folder}/output)" 2>&1 &
echo $! > {folder}/pid
wait $!
echo $? > {folder}/code
"""
_SQUEUE = """
[ -f name ] || exit 0
if [ -f state ]; then state=$(cat state)
elif [ ! -f code ]; then state=RUNNING
elif [ "$(cat code)" = 0 ]; then state=COMPLETED
else state=FAILED; fi
case "$*" in
  *%o*) echo "{job}|$state|$(cat name)|$(cat command)";;
  *) echo "$state|node1|10:00|None";;
esac
"""


@dataclass(frozen=True)
class ScriptedSlurm:
    """`folder/bin` goes before the rest of PATH."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        self.put("bin/sbatch", _SBATCH)
        self.put("bin/squeue", _SQUEUE)
        self.put("bin/scancel", "kill -TERM $(cat pid)")
        self.put("bin/scontrol", 'echo " ExitCode=$(cat code):0 "')
        self.put("start", _START)

    def put(self, name: str, does: str) -> None:
        """What a shell does for a command of Slurm's, or to begin a job."""
        text = does.replace("{{", "{").replace("}}", "}").replace("{folder}", str(self.folder)).replace("{job}", JOB)
        file = self.folder / name
        file.write_text(f"#!/bin/sh\ncd {self.folder}\n{text}\n")
        file.chmod(0o755)

    @property
    def submissions(self) -> int:
        return len((self.folder / "submissions").read_text().splitlines())

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def lose_node(self) -> None:
        """kill -9 of the job, which waits in the queue from then on."""
        (self.folder / "state").write_text("PENDING")
        os.kill(self.pid, signal.SIGKILL)
        until((self.folder / "code").exists, "the job's end", 30)

    def begin_anew(self) -> None:
        """As Slurm does it with a job that was queued again."""
        subprocess.Popen(["sh", str(self.folder / "start")], start_new_session=True)
        until(lambda: not (self.folder / "code").exists(), "the job's second life", 30)
        (self.folder / "state").unlink()

    def end(self) -> None:
        if (self.folder / "pid").exists() and not (self.folder / "code").exists():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
