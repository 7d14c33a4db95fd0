"""Starts a worker as a job of Slurm, and finds it again when whoever started it was killed.

The job is named after what its plan asks (`plan.launch_id`). A driver that comes again finds a living job of that name
and reads its messages from the beginning, instead of submitting another. What the worker says of its own end is
believed first; what Slurm says counts where it ended without a word, or where its last word may be that of an earlier
life: a job that Slurm queues again runs the same program in the same folder once more, and goes on in the same files.

In the worker's folder, which must lie on a file system that driver and nodes share, stand beside what `folders.py`
says:

job.sh       the batch script: by its path, which Slurm keeps, the folder of a living job is found
job.json     the job's number
ended.json   why nobody waits for it any more

Only what Slurm prints for programs is read (a format given by us, `|` between fields). Facts were seen on 22.05.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_platform.config import Config, Slurm
from eval_platform.errors import ConfigError, EvalPlatformError
from eval_platform.launching import folders
from eval_platform.launching.local import NEVER_SENT, WORKER_ENV
from eval_platform.plan import OtherRelease, Plan, launch_id, read_plan

log = logging.getLogger(__name__)

# A worker leaves within this after SIGTERM (docs/launchers.md), with a second for Slurm to pass it on and to notice.
STOP_SECONDS = 9.0
KILL_SECONDS = 60.0
# How long Slurm may be silent before we stop waiting for it. The job goes on, and is found by whoever comes next.
SILENT_SECONDS = 600.0
COMMAND_SECONDS = 60.0
# Between two questions to Slurm: often while something happens, seldom while a job works for hours.
_ASK_SECONDS = (1.0, 10.0)
_LOOK_SECONDS = 0.1

# What a worker that was stopped leaves with; `worker.EXIT_TRY_AGAIN`, whose module no driver should have to import.
_TRY_AGAIN = os.EX_TEMPFAIL

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
_COMES_BACK = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED"})  # in the next moment, where it is queued again
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

# What a worker may need of its driver's environment; the rest stays here. Never CUDA_VISIBLE_DEVICES: Slurm sets it.
_VARIABLES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "XDG_CACHE_HOME", "SLURM_CONF"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "GLIBC_TUNABLES"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
)
_VARIABLES_LIKE = (
    *("LC_", "PYTHON", "EVAL_PLATFORM_", "AWS_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SBATCH_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH_", "PYTORCH_", "TRITON_", "NCCL_"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
_VARIABLES_LIKE_OF_PROVIDERS = ("OPENAI_", "ANTHROPIC_", "AZURE_")  # where a served model is asked


class SlurmError(EvalPlatformError):
    """Slurm cannot be asked, or does not answer."""

    class_ = "infrastructure"


@dataclass(frozen=True)
class Job:
    """A job as Slurm tells of it. `state` and `reason` are Slurm's own words."""

    state: str
    reason: str = ""
    nodes: str = ""
    time_limit: str = ""


@dataclass
class SlurmHandle:
    """A worker that is a job of Slurm's, or will be; see `face.Handle`."""

    job: str
    folder: Path
    was_found: bool = False
    told: Job = Job("PENDING")  # the last answer
    _changed: float = field(default_factory=time.monotonic)  # when that answer became another
    _answered: float = field(default_factory=time.monotonic)
    _ask_at: float = 0.0
    _offset: int = 0
    _unread: list[dict[str, Any]] = field(default_factory=list)
    _end: int | None = None  # what the worker of the present life said of its end
    _code: int | None = None
    _stopped: bool = False

    def poll(self) -> int | None:
        """The worker's own exit code; 1 where it ended without a word; None while it waits or runs.

        Raises SlurmError when Slurm has not answered for SILENT_SECONDS.
        """
        if self._code is None:
            self._read()
            if self._end not in (None, _TRY_AGAIN):
                self._has_ended("its worker said so")
            elif time.monotonic() >= self._ask_at:
                self._ask()
                if self.told.state in _ENDED:
                    self._read()  # what was written between the last look and the end
                    self._has_ended(self.told.state)
        return self._code

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """What the worker said and printed, and of Slurm's own: `slurm` at each change, `slot` while it waits.

        Where Slurm ended it, or it ended without a word, a last `failed` says why and what can be done.
        """
        yield [self._says("found again: its driver had ended" if self.was_found else "submitted")]
        shown: Job | None = None
        printed = 0
        ends = False
        while not ends:
            ends = self.poll() is not None
            news: list[dict[str, Any]] = []
            if self.told != shown and not ends:
                shown = self.told
                news.append(self._waits() if shown.state in _WAITING else self._says(shown.state.lower()))
            words, printed = folders.log_from(self.folder, printed, is_all=ends)
            news += [*words, *self._unread]
            self._unread = []
            if not ends and shown is not None and (remedy := _never(shown)) is not None:
                self.stop()
                news.append(_failed(f"Slurm would never start job {self.job}: {shown.reason}", remedy))
                ends = True
            elif ends and (failed := self._why()) is not None:
                news.append(failed)
            if news:
                yield news
            if not ends:
                time.sleep(_LOOK_SECONDS)

    def stop(self) -> None:
        """A job that waits is cancelled; a worker that runs is asked to leave, and killed when it does not.

        Raises SlurmError when Slurm does not do so: the job may then go on.
        """
        if self.poll() is not None:
            return
        self._stopped = True
        _let_go(self.folder, self.job, "stopped by its driver")
        self._ask()
        if self.told.state in _WAITING:
            _scancel(self.job)
        else:
            _scancel("--full", "--signal=TERM", self.job)
        if not self._ends_within(STOP_SECONDS):
            log.warning("the worker of Slurm's job %s did not leave in %s s: killed", self.job, STOP_SECONDS)
            # To the worker's process itself; KILL for the whole job would wait for the cluster's KillWait.
            _scancel("--batch", "--signal=KILL", self.job)
            _scancel(self.job)
            if not self._ends_within(KILL_SECONDS):
                raise SlurmError(
                    f"Slurm has not ended job {self.job} in {KILL_SECONDS:.0f} s: it is {self.told.state}",
                    remedy=f"`scontrol show job {self.job}` and the log of the node's slurmd say more",
                )
        self._read()
        self._has_ended("stopped by its driver")

    def last_words(self, n: int = 20) -> str:
        return folders.last_words(self.folder, n)

    def _read(self) -> None:
        new, self._offset = folders.messages_from(self.folder, self._offset)
        for message in new:
            if message["type"] == "hello":  # a new life: what was said of an end was of the one before
                self._end = None
            elif message["type"] == "end":
                self._end = message["code"]
        self._unread += new

    def _ask(self) -> None:
        now = time.monotonic()
        try:
            told = _look_up(self.job)
        except SlurmError as error:
            if now - self._answered > SILENT_SECONDS:
                raise
            log.warning("job %s: %s", self.job, error)
            told = self.told
        else:
            self._answered = now
        if told.state != self.told.state:
            self._changed = now
        self.told = told
        shortest, longest = _ASK_SECONDS
        self._ask_at = time.monotonic() + min(longest, max(shortest, (now - self._changed) / 30))

    def _ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            self._ask()
            if self.told.state in _ENDED:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(2 * _LOOK_SECONDS)

    def _has_ended(self, why: str) -> None:
        self._code = 1 if self._end is None else self._end
        _let_go(self.folder, self.job, why)

    def _says(self, what: str) -> dict[str, Any]:
        where = {"node": self.told.nodes} if self.told.nodes else {}
        return {"type": "slurm", "job": self.job, "state": what, **where, "time": time.time()}

    def _waits(self) -> dict[str, Any]:
        because = f": {self.told.reason}" if self.told.reason not in ("", "None") else ""
        return {
            "type": "slot",
            "waiting": True,
            "reason": f"job {self.job} waits in Slurm's queue{because}",
            "time": time.time(),
        }

    def _why(self) -> dict[str, Any] | None:
        """Why it ended, where its worker did not say so itself."""
        state, worker_spoke = self.told.state, self._end is not None
        if self._stopped or (self._end not in (None, _TRY_AGAIN)):
            return None
        if worker_spoke and state in ("COMPLETED", "FAILED", _UNKNOWN):
            return None
        what, remedy = _in_words(self.job, self.told)
        return _failed(what, remedy)


def launch(plan: Plan, config: Config) -> SlurmHandle:
    """Submit a job for `plan`, or find the one that lives already.

    Raises ConfigError when Slurm refuses what [slurm] asks for, SlurmError when it cannot be asked.
    """
    name = f"eval-platform-{launch_id(plan)}"
    submitted = list(_submitted(config))
    told = _jobs()
    found = _living(name, told)
    if found is not None:
        return found
    at_work = {job for job, state, *_ in told if state not in _ENDED or state in _COMES_BACK}
    for folder, job in submitted:
        if job not in at_work:  # its driver was killed, and who comes after it finds it no more
            _let_go(folder, job, "it ended with nobody looking")
    folder = folders.make_folder(plan, config)
    # Made here, so that no client of a network file system remembers for a while that it is not there.
    (folder / "messages.jsonl").touch()
    script = folder / "job.sh"
    command = shlex.join([sys.executable, "-m", "eval_platform.worker", str(folder)])
    script.write_text(f"#!/bin/bash\n# A worker of eval-platform: docs/slurm.md\nexec {command}\n", encoding="utf-8")
    job = _submit(name, folder, script, config.slurm, _environment(plan, config.slurm, os.environ))
    _remember(folder, job)
    return SlurmHandle(job, folder)


def _remember(folder: Path, job: str) -> None:
    (folder / "job.json").write_text(json.dumps({"slurm": job}), encoding="utf-8")


def _let_go(folder: Path, job: str, why: str) -> None:
    """From now on a job of this folder is nobody's to wait for."""
    (folder / "ended.json").write_text(json.dumps({"job": job, "why": why}), encoding="utf-8")


def _submitted(config: Config) -> Iterator[tuple[Path, str]]:
    """Workers' folders, and their jobs' numbers, of which no end was seen."""
    for file in folders.workers(config).glob("*/job.json"):
        with suppress(FileNotFoundError, ValueError):  # being forgotten; being written
            job = json.loads(file.read_text(encoding="utf-8")).get("slurm")
            if job is not None and not (file.parent / "ended.json").exists():
                yield file.parent, job


def _submit(name: str, folder: Path, script: Path, asked: Slurm, environment: Mapping[str, str]) -> str:
    """The job's number."""
    wanted = {
        "partition": asked.partition,
        "account": asked.account,
        "gres": asked.gres,
        "time": asked.time_limit,
    }
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        "--ntasks=1",
        "--output=" + str(folder / "worker.log").replace("%", "%%"),
        "--open-mode=append",  # a job that is queued again keeps what its earlier life printed
        f"--chdir={Path.cwd()}",
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


def _environment(plan: Plan, asked: Slurm, mine: Mapping[str, str]) -> dict[str, str]:
    """The variables that go over to the node, credentials of S3 and of the hub among them: through Slurm, as `--export`
    does it, and in no file or command line of ours."""
    entry = plan.served_model()
    named = {*_VARIABLES, *asked.variables, *([entry.key_variable] if entry is not None and entry.key_variable else [])}
    like = (*_VARIABLES_LIKE, *(_VARIABLES_LIKE_OF_PROVIDERS if entry is not None else ()))
    kept = {name: value for name, value in mine.items() if name in named or name.startswith(like)}
    return {**WORKER_ENV, **{name: value for name, value in kept.items() if name not in NEVER_SENT}}


def _jobs() -> list[tuple[str, str, str, str]]:
    """(number, state, name, command) of every job of this user that Slurm has not forgotten; the name has no "|" where
    it is one of ours."""
    asked = ("--states=all", f"--user={os.getuid()}", "--format=%i|%T|%j|%o")
    lines = (line.strip().split("|", 3) for line in _slurm("squeue", "--noheader", *asked).splitlines())
    return [(line[0], line[1], line[2], line[3]) for line in lines if len(line) == 4]


def _living(name: str, told: Sequence[tuple[str, str, str, str]]) -> SlurmHandle | None:
    """The newest job with this name that waits or runs, unless nobody waits for it any more."""
    ours = [(int(job), state, Path(script).parent) for job, state, its_name, script in told if its_name == name]
    for number, state, folder in sorted(ours, reverse=True):
        is_ours = (folder / "plan.json").exists() and not (folder / "ended.json").exists()
        if not is_ours or state in _ENDED or state == "COMPLETING":
            continue
        if state in _WAITING and _is_of_another_release(folder / "plan.json"):
            continue  # when its turn comes it refuses
        _remember(folder, str(number))  # its driver may have been killed before it could
        return SlurmHandle(str(number), folder, was_found=True)
    return None


def _is_of_another_release(file: Path) -> bool:
    try:
        read_plan(file).refuse_other_release()
    except OtherRelease:
        return True
    return False


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
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%N|%l|%r"], os.environ)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise _no_answer(done)
    lines = done.stdout.splitlines()
    if lines and not done.returncode:
        state, nodes, limit, reason = lines[0].strip().split("|", 3)
        return Job(state, reason, nodes, limit)
    # It keeps a job for MinJobAge seconds after its end; its accounting, where there is one, keeps it longer.
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State"], os.environ)
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
                f"the node {told.nodes or 'it ran on'} failed under job {job}; {kept}",
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
                    f"the node {told.nodes} could not start job {job}: mostly it cannot write in the worker's folder",
                    "put `state` of the configuration on a file system that the nodes share, and the installation too",
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
    """(exit status, signal) of its worker's process, while Slurm knows."""
    done = _run(["scontrol", "--oneliner", "show", "job", job], os.environ)
    found = re.search(r" ExitCode=(\d+):(\d+) ", done.stdout) if done.returncode == 0 else None
    return (int(found[1]), int(found[2])) if found else None


def _failed(what: str, remedy: str) -> dict[str, Any]:
    reason = str(SlurmError(what, remedy=remedy))
    return {"type": "failed", "task": None, "class": "infrastructure", "reason": reason, "time": time.time()}


def _scancel(*words: str) -> None:
    """Raises SlurmError, but not for a job that has ended already."""
    done = _run(["scancel", *words], os.environ)
    if done.returncode and "Invalid job id" not in done.stderr and "already" not in done.stderr:
        raise _no_answer(done)


def _slurm(*command: str) -> str:
    done = _run(list(command), os.environ)
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


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
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
