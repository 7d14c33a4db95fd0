"""Starts a worker as a job of Slurm, and finds it again when whoever started it was killed (`jobs.py` says how).

In the worker's folder stands besides:

job.sh       the batch script: by its path, which Slurm keeps, the folder of a living job is found

Only what Slurm prints for programs is read (a format given by us, `|` between fields). Facts were seen on 22.05.
"""

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval_platform.config import S3, Config, Slurm
from eval_platform.errors import ConfigError
from eval_platform.launching import folders, inbox, jobs
from eval_platform.launching.environment import hidden_environment
from eval_platform.launching.face import Shard
from eval_platform.launching.jobs import STOP_SECONDS, ClusterError, JobHandle, Told
from eval_platform.plan import Plan, read_plan

log = logging.getLogger(__name__)

# On the node: what is printed before a worker that shares no folder is at work.
NODE_LOG = "/tmp/eval-platform"
KILL_SECONDS = 60.0
COMMAND_SECONDS = 60.0
# In place of a signal's number where a node could not begin a job, as when it cannot open the job's output.
_NOT_LAUNCHED = 53

_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
_UNKNOWN = "FORGOTTEN"  # by Slurm; not one of its own words
_ENDED = frozenset(
    (
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"),
        *("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", _UNKNOWN),
    )
)
# Options by which sbatch waits for the job, writes elsewhere, or submits what we would not find.
_NEVER_OPTIONS = frozenset({"SBATCH_WAIT", "SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SBATCH_ARRAY_INX", "SBATCH_ERROR"})
# A user's own options for the commands that ask and cancel: of another cluster's jobs, or of some of this one's.
_NEVER_ASKED = ("SLURM_CLUSTERS", "SQUEUE_", "SACCT_", "SCANCEL_")
# Reasons for which a job waits until somebody changes it: it would wait for ever, and the run with it.
_NEVER = {
    "AccountNotAllowed": "name another [slurm] account, or partition",
    "BadConstraints": "ask for what some node has: [slurm] gres and arguments",
    "InvalidAccount": "name an account of yours in [slurm] account; `sacctmgr show associations user=$USER` lists them",
    "InvalidQOS": "name another --qos in [slurm] arguments",
    "PartitionTimeLimit": "give [slurm] time_limit less than the partition allows; `sinfo -o '%P %l'` lists the limits",
    "DependencyNeverSatisfied": "take --dependency out of [slurm] arguments",
    "JobHoldMaxRequeue": "it failed to start again and again: `scontrol show job` names the nodes; exclude them",
}
# Of an association's or a QOS's limits those on what one job may ask for.
_NEVER_SO_MUCH = re.compile(r"(Assoc|QOS)Max\w*(PerJob|PerJobLimit|PerNode)")


class SlurmError(ClusterError):
    """Slurm cannot be asked, or does not answer."""


@dataclass(frozen=True)
class Job(Told):
    """A job as Slurm tells of it. `state` and `reason` are Slurm's own words."""

    time_limit: str = ""


@dataclass
class SlurmHandle(JobHandle[Job]):
    """A worker that is a job of Slurm's, or will be; see `face.Handle`."""

    cluster = "slurm"
    waiting = _WAITING
    ended = _ENDED
    by_itself = frozenset({"COMPLETED", "FAILED", _UNKNOWN})

    told: Job = field(default=Job("PENDING"), kw_only=True)

    def _look_up(self) -> Job:
        return _look_up(self.job)

    def _end_it(self) -> None:
        if self.told.state in _WAITING:
            _scancel(self.job)
        else:
            _scancel("--full", "--signal=TERM", self.job)
        if self.ends_within(STOP_SECONDS):
            return
        log.warning("the worker of Slurm's job %s did not leave in %s s: killed", self.job, STOP_SECONDS)
        # To the worker's process itself; KILL for the whole job would wait for the cluster's KillWait.
        _scancel("--batch", "--signal=KILL", self.job)
        _scancel(self.job)
        if not self.ends_within(KILL_SECONDS):
            raise SlurmError(
                f"Slurm has not ended job {self.job} in {KILL_SECONDS:.0f} s: it is {self.told.state}",
                remedy=f"`scontrol show job {self.job}` and the log of the node's slurmd say more",
            )

    def _has_ended(self, why: str) -> None:
        if self._end is None and self.told.state == "FAILED" and _exit_code(self.job) == (0, signal.SIGTERM):
            self._end = os.EX_TEMPFAIL  # told to leave before it could hear: it ends as one that has heard
        super()._has_ended(why)

    def _in_words(self) -> tuple[str, str]:
        return _in_words(self.job, self.told)

    def _unsent(self) -> str:
        return f"{NODE_LOG}-{self.job}.log on the node {self.told.node}"

    def _never(self) -> tuple[str, str] | None:
        remedy = _never(self.told)
        return None if remedy is None else (f"Slurm would never start job {self.job}: {self.told.reason}", remedy)


def launch(plan: Plan, plans: Sequence[Plan], config: Config) -> list[Shard]:
    """Submit a job for `plan`, where there are several `plans` an array that shares it out, or find what lives already.

    What is found is shared out as it was when it was submitted. Raises ConfigError when Slurm refuses what [slurm] asks
    for, SlurmError when it cannot be asked.
    """
    name = jobs.name_of(plan)
    submitted = list(jobs.submitted(config, "slurm"))
    told = _jobs()
    found = _living(name, plan, told, config)
    if found:
        return found
    at_work = {job for job, state, *_ in told if state not in _ENDED}
    for folder, job in submitted:
        if job not in at_work:  # its driver was killed, and who comes after it finds it no more
            jobs.let_go(folder, job, "it ended with nobody looking")
    made = folders.make_folders(plans, config)
    jobs.prepare(made, config)
    job = _submit(name, made, config.slurm, config.s3, _environment(plan, config.slurm))
    numbers = [job] if len(made) == 1 else [f"{job}_{i}" for i in range(len(made))]
    for folder, number in zip(made, numbers, strict=True):
        jobs.remember(folder, "slurm", number)
    return [
        Shard(own, _handle(number, folder, config)) for own, number, folder in zip(plans, numbers, made, strict=True)
    ]


def _handle(job: str, folder: Path, config: Config, *, was_found: bool = False) -> SlurmHandle:
    return SlurmHandle(job, folder, was_found=was_found, inbox=inbox.inbox_of(folder, config.s3))


def _submit(name: str, made: Sequence[Path], asked: Slurm, s3: S3, environment: Mapping[str, str]) -> str:
    """The job's number. Several folders, whose names differ in the number at their end, make it an array."""
    wanted = {
        "partition": asked.partition,
        "account": asked.account,
        "gres": asked.gres,
        "time": asked.time_limit,
        "array": f"0-{len(made) - 1}" if len(made) > 1 else None,
    }
    place, number, pattern = jobs.place_of(made[0]), "", ""
    if len(made) > 1:
        place, number, pattern = place.removesuffix("-0"), "-$SLURM_ARRAY_TASK_ID", "-%a"
    if place.startswith("s3://"):
        output, starts_in = f"{NODE_LOG}-{'%A_%a' if number else '%j'}.log", "/tmp"
    else:
        output, starts_in = place.replace("%", "%%") + pattern + "/worker.log", str(Path.cwd())
    worker = jobs.worker_command(place, s3) + number
    script = made[0] / "job.sh"
    script.write_text(f"#!/bin/bash\n# A worker of eval-platform: docs/slurm.md\nexec {worker}\n", encoding="utf-8")
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        "--ntasks=1",
        f"--output={output}",
        "--open-mode=append",  # a job that is queued again keeps what its earlier life printed
        f"--chdir={starts_in}",
        "--export=ALL",  # of the environment that it is given here: values never stand on a command line
        "--requeue" if asked.requeue else "--no-requeue",
        *(f"--{option}={value}" for option, value in wanted.items() if value is not None),
        *asked.arguments,
        str(script),
    ]
    done = _run(command, environment)
    if done.returncode == 0:
        # Last: what a site's own sbatch has to say comes before it. "71;cluster" where there are several.
        number = re.search(r"^(\d+)(;\S*)?\s*\Z", done.stdout, re.MULTILINE)
        if number is None:
            raise SlurmError(f"sbatch gives no job number: {done.stdout[:200]!r}", remedy=_mend(""))
        return number[1]
    said = _said(done)
    if "contact" in said or "timed out" in said:
        raise SlurmError(f"Slurm does not take the job: {said}", remedy="`scontrol ping` says whether it is up")
    raise ConfigError(f"Slurm refuses the job: {said}", remedy=_mend(said))


def _mend(said: str) -> str:
    """What to change in [slurm] where sbatch said so."""
    said = said.lower()
    if "account" in said or "qos" in said:
        return "name an account of yours in [slurm] account; `sacctmgr show associations user=$USER` lists them"
    if "partition" in said:
        return "name one of the partitions that `sinfo` lists in [slurm] partition"
    if "configuration is not available" in said or "gres" in said:
        return (
            "no node of the partition has so much: lower [slurm] gres, or what [slurm] arguments ask; "
            "`sinfo -N -o '%N %P %G %c %m'` lists what there is"
        )
    if "time" in said:
        return "write [slurm] time_limit as minutes, H:MM:SS or D-HH:MM:SS, within what the partition allows"
    return "mend the section [slurm] of the configuration (docs/slurm.md)"


def _environment(plan: Plan, asked: Slurm) -> dict[str, str]:
    """The variables that go over to the node: through Slurm, as `--export` does it, and in no file or command line.

    Those of sbatch's options are its user's defaults, save what [slurm] arguments may not say either.
    """
    mine = {name: value for name, value in os.environ.items() if name not in _NEVER_OPTIONS}
    return hidden_environment(plan, mine, ("SLURM_CONF", *asked.variables), ("SBATCH_",))


def _jobs() -> list[tuple[str, str, str, str]]:
    """(number, state, name, command) of every job of this user that Slurm has not forgotten, each element of an array
    ("71_0") on its own; the name has no "|" where it is one of ours."""
    asked = ("--states=all", "--array", f"--user={os.getuid()}", "--format=%i|%T|%j|%o")
    lines = (line.strip().split("|", 3) for line in _slurm("squeue", "--noheader", *asked).splitlines())
    return [(line[0], line[1], line[2], line[3]) for line in lines if len(line) == 4]


def _living(name: str, plan: Plan, told: Sequence[tuple[str, str, str, str]], config: Config) -> list[Shard]:
    """The newest job with this name that waits or runs, unless nobody waits for it any more.

    Of an array all elements, also those that have ended: what they said is read again.
    """
    ours = [(job, state, Path(script).parent) for job, state, its_name, script in told if its_name == name]
    for job, state, first in sorted(ours, key=lambda one: _order(one[0]), reverse=True):
        if state in _ENDED or state == "COMPLETING":
            continue
        number, _, element = job.partition("_")
        first = jobs.folder_at(str(first), config)
        folder = first.with_name(f"{first.name.removesuffix('-0')}-{element}") if element else first
        if not jobs.may_be_waited_for(folder):
            continue
        if state in _WAITING and jobs.is_of_another_release(folder):
            continue  # when its turn comes it refuses
        shards = []
        for own in folders.shards(folder):
            its_job = f"{number}_{own.name.rpartition('-')[2]}" if element else job
            jobs.remember(own, "slurm", its_job)  # its driver may have been killed before it could
            its_plan = read_plan(own / "plan.json") if element else plan
            shards.append(Shard(its_plan, _handle(its_job, own, config, was_found=True)))
        return shards
    return []


def _order(job: str) -> tuple[int, ...]:
    """Of a job's number, or of an element's of an array."""
    return tuple(int(part) for part in job.split("_"))


def _never(told: Job) -> str | None:
    """What to do about a job that would wait for ever; None for any other."""
    if told.state not in _WAITING:
        return None
    if _NEVER_SO_MUCH.fullmatch(told.reason):
        return "ask for less in [slurm] gres, time_limit or arguments; `sacctmgr show qos` lists the limits"
    # The one reason that is a sentence.
    return _NEVER.get("JobHoldMaxRequeue" if told.reason.startswith("launch failed requeued held") else told.reason)


def _look_up(job: str) -> Job:
    """What Slurm says of it now. Raises SlurmError when it says nothing."""
    done = _run(["squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T|%N|%l|%r"])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise _no_answer(done)
    lines = done.stdout.splitlines()
    if lines and not done.returncode:
        state, nodes, limit, reason = lines[0].strip().split("|", 3)
        return Job(state, "" if reason == "None" else reason, nodes, limit)
    # It keeps a job for MinJobAge seconds after its end; its accounting, where there is one, keeps it longer.
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State"])
    words = done.stdout.split() if done.returncode == 0 else []
    return Job(words[0]) if words else Job(_UNKNOWN)  # "CANCELLED by 1000" is two words and more


def _in_words(job: str, told: Job) -> tuple[str, str]:
    """(what happened, what can be done) for a job that did not end by its worker's own word."""
    kept = "what was answered is in the journal, and the next try asks only the rest"
    again = "the next run asks again"
    match told.state:
        case "TIMEOUT" | "DEADLINE":
            limit = f" of {told.time_limit}" if told.time_limit else ""
            return (
                f"Slurm ended job {job} at its time limit{limit}; {kept}",
                "raise [slurm] time_limit, or let as many runs as it takes follow each other",
            )
        case "NODE_FAIL" | "BOOT_FAIL":
            return (
                f"the node {told.node or 'it ran on'} failed under job {job}; {kept}",
                "[slurm] requeue = true lets Slurm begin it anew by itself; else the next run does",
            )
        case "PREEMPTED" | "REVOKED":
            return (
                f"Slurm gave the place of job {job} to a more urgent one; {kept}",
                "[slurm] requeue = true lets Slurm begin it anew by itself; else the next run does, or name a "
                "partition that is not preempted",
            )
        case "OUT_OF_MEMORY":
            return (
                f"job {job} used more main memory than it had asked for; {kept}",
                'ask for more in [slurm] arguments, such as "--mem=64G", or lower [engine] batch_tokens',
            )
        case "CANCELLED":
            return f"somebody cancelled job {job} (scancel); {kept}", "run it again when it is wanted"
        case "FAILED" if (code := _exit_code(job)) is not None:
            status, number = code
            if number == _NOT_LAUNCHED or code == (0, 0):
                return (
                    f"the node {told.node} could not start job {job}: mostly it cannot write in the worker's folder",
                    "put `state` of the configuration on a file system that the nodes share, and the installation too, "
                    "or set [worker] exchange",
                )
            if status in (126, 127):
                return (
                    f"the worker of job {job} ended with code {status}: the node has no such Python",
                    "put the installation where the nodes see it; the worker's log says more",
                )
            how = f"was killed by signal {number}" if number else f"ended with code {status}"
            return f"the worker of job {job} {how} without a word", again
    return f"Slurm says of job {job} that it is {told.state.lower()}, and its worker left without a word", again


def _exit_code(job: str) -> tuple[int, int] | None:
    """(exit status, signal) of its worker's process, while Slurm knows and answers."""
    try:
        done = _run(["scontrol", "--oneliner", "show", "job", job])
    except SlurmError as error:  # how it ended is known; this would only say more
        log.warning("job %s: %s", job, error)
        return None
    found = re.search(r" ExitCode=(\d+):(\d+) ", done.stdout) if done.returncode == 0 else None
    return (int(found[1]), int(found[2])) if found else None


def _scancel(*words: str) -> None:
    """Raises SlurmError, but not for a job that has ended already."""
    done = _run(["scancel", *words])
    if done.returncode and "Invalid job id" not in done.stderr and "already" not in done.stderr:
        raise _no_answer(done)


def _slurm(*command: str) -> str:
    done = _run(list(command))
    if done.returncode:
        raise _no_answer(done)
    return done.stdout


def _no_answer(done: subprocess.CompletedProcess[str]) -> SlurmError:
    return SlurmError(
        f"`{done.args[0]}` ended with {done.returncode}: {_said(done)}", remedy="`scontrol ping` says whether it is up"
    )


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command of Slurm's complained of, in one line."""
    lines = (
        line.strip().removeprefix(f"{done.args[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()
    )
    return "; ".join(line for line in lines if line) or "it did not say why"


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """environment: None: this process's own, without what would make the command speak of other jobs than ours."""
    if environment is None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NEVER_ASKED)}
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
            env=dict(environment),
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no `{command[0]}` on this machine",
            remedy="run the platform where Slurm's commands are (a login node), or set [worker] launcher = "
            '"subprocess"',
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"`{command[0]}` has not answered in {COMMAND_SECONDS:.0f} s",
            remedy="`scontrol ping` says whether it is up",
        ) from error
