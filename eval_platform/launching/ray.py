"""Starts a worker as a job of Ray, and finds it again when whoever started it was killed (`jobs.py` says how).

Everything is said to the cluster's job server by its REST API, so that neither the platform nor its workers need a
package of Ray's. Ray takes no id of a job twice: an id is the plan's name, the number of its life and, where several
workers share a checkpoint out, the worker's. With each job Ray keeps the worker's place (`jobs.place_of`): its folder,
or an address in a bucket. Of two drivers that come at once only one gets the id that is next; the other takes that job
where its place is the one that it wanted a job for, so that a place never has two. Facts were seen on 2.60.
"""

import http.client
import json
import logging
import os
import re
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from eval_platform.config import S3, Config, Ray
from eval_platform.devices import SHARE_VARIABLE
from eval_platform.errors import ConfigError
from eval_platform.launching import folders, inbox, jobs
from eval_platform.launching.environment import open_environment
from eval_platform.launching.face import Shard
from eval_platform.launching.jobs import STOP_SECONDS, ClusterError, JobHandle, Told
from eval_platform.plan import Plan, read_plan

log = logging.getLogger(__name__)

ANSWER_SECONDS = 20.0
# Ray kills what has not left STOP_SECONDS after SIGTERM, and then has to notice.
END_SECONDS = 30.0

_ID = re.compile(r"(eval-platform-[0-9a-f]{16})-(\d+)(?:-(\d+))?")
_UNKNOWN = "FORGOTTEN"  # by Ray; not one of its own words
_ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED", _UNKNOWN})
# Ray fails a job that has waited for 15 minutes (RAY_JOB_START_TIMEOUT_SECONDS of its head node says otherwise).
_NEVER_STARTED = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"


class RayError(ClusterError):
    """Ray's job server cannot be asked, or does not answer."""


@dataclass(frozen=True)
class Job(Told):
    """A job as Ray tells of it. reason: its message. place: the worker's. error: a kind of Ray's."""

    place: str = ""
    error: str = ""
    exit_code: int | None = None


@dataclass
class RayHandle(JobHandle[Job]):
    """A worker that is a job of Ray's, or will be; see `face.Handle`."""

    cluster = "ray"
    waiting = frozenset({"PENDING"})
    ended = _ENDED
    by_itself = frozenset({"SUCCEEDED", "FAILED", _UNKNOWN})

    asked: Ray = field(kw_only=True)
    s3: S3 = field(kw_only=True)
    told: Job = field(default=Job("PENDING"), kw_only=True)

    def _look_up(self) -> Job:
        told = _look_up(self.asked, self.job)
        if told.error == _NEVER_STARTED and jobs.may_be_waited_for(self.folder) and _too_much(self.asked) is None:
            name, life, shard = _read_id(self.job)
            self.job = _submit_or_take(name, life + 1, shard, jobs.place_of(self.folder), self.asked, self.s3)
            jobs.remember(self.folder, "ray", self.job)
            return Job("PENDING", "it has waited for so long that Ray wanted it to be submitted anew")
        return told

    def _end_it(self) -> None:
        if self.told.state in _ENDED:
            return
        status, said = _request(self.asked, f"/api/jobs/{self.job}/stop", {})
        if status != 200 and not _is_unknown(status, said):
            raise RayError(f"Ray does not stop job {self.job}: {_line(said)}", remedy=f"`ray job stop {self.job}`")
        if self.told.state in self.waiting:
            return  # it holds nothing; Ray ends it as soon as it begins
        if not self.ends_within(END_SECONDS):
            raise RayError(
                f"Ray has not ended job {self.job} in {END_SECONDS:.0f} s: it is {self.told.state}",
                remedy=f"`ray job status {self.job}` and the dashboard at {self.asked.address} say more",
            )

    def _in_words(self) -> tuple[str, str]:
        return _in_words(self.job, self.told, self.asked)

    def _unsent(self) -> str:
        return f"`ray job logs {self.job}`"


def launch(plan: Plan, plans: Sequence[Plan], config: Config) -> list[Shard]:
    """Submit a job for each of `plans`, which share `plan` out, or find those that live already.

    What is found is shared out as it was when it was submitted. Raises ConfigError when no node has what [ray] asks for
    or Ray refuses it, RayError when it cannot be asked.
    """
    asked, name = config.ray, jobs.name_of(plan)
    while True:
        submitted = list(jobs.submitted(config, "ray"))
        told = _jobs(asked)
        ours = {job: one for job, one in told.items() if _read_id(job)[0] == name}
        found = _living(plan, ours, config)
        if found:
            return found
        newest = _newest(told)
        for folder, job in submitted:
            last = told.get(newest.get(jobs.place_of(folder), job))
            if last is None or _is_over(last):  # its driver was killed, and who comes after finds no job
                jobs.let_go(folder, job, "it ended with nobody looking")
        problem = _too_much(asked)
        if problem is not None:
            what, remedy = problem
            raise ConfigError(what, remedy=remedy)
        made = folders.make_folders(plans, config)
        jobs.prepare(made, config)
        shards = _submitted(name, _next_life(ours), plans, made, config)
        if shards:
            return shards
        for folder in made:  # another driver was quicker: what it submitted is ours as well
            shutil.rmtree(folder)
        if config.worker.exchange is not None:
            inbox.forget([folder.name for folder in made], config.worker.exchange, config.s3)


def _submitted(name: str, life: int, plans: Sequence[Plan], made: Sequence[Path], config: Config) -> list[Shard]:
    """A job for each plan, in its folder; nothing where another driver has begun this life."""
    first = _id(name, life, 0)
    if not _submit(first, jobs.place_of(made[0]), config.ray, config.s3):
        return []
    shards = [_shard(plans[0], first, made[0], config)]
    try:
        for i, (plan, folder) in enumerate(zip(plans[1:], made[1:], strict=True), 1):
            job = _submit_or_take(name, life, i, jobs.place_of(folder), config.ray, config.s3)
            shards.append(_shard(plan, job, folder, config))
    except BaseException:  # a share of the work is of no use to anybody
        for shard in shards:
            try:
                shard.handle.stop()
            except ClusterError as error:
                log.warning("the worker in %s goes on: %s", shard.handle.folder, error)
        raise
    return shards


def _living(plan: Plan, told: Mapping[str, Job], config: Config) -> list[Shard]:
    """The newest jobs of this plan that wait or run, unless nobody waits for them any more.

    Where several workers share a checkpoint out all of them, also those that have ended: what they said is read again.
    """
    newest = _newest(told)
    for job in sorted(newest.values(), key=_read_id, reverse=True):
        if _is_over(told[job]):
            continue
        folder = jobs.folder_at(told[job].place, config)
        if not jobs.may_be_waited_for(folder):
            continue
        if told[job].state != "RUNNING" and jobs.is_of_another_release(folder):
            continue  # when its turn comes it refuses
        shards = []
        name, life, _ = _read_id(job)
        made = folders.shards(folder)
        for i, own in enumerate(made):
            place = jobs.place_of(own)
            its_job = newest.get(place)  # none: its driver was killed, or has not come so far
            its_job = its_job or _submit_or_take(name, life, i, place, config.ray, config.s3)
            its_plan = read_plan(own / "plan.json") if folders.is_shard(own) else plan
            shards.append(_shard(its_plan, its_job, own, config, was_found=True))
        return shards
    return []


def _shard(plan: Plan, job: str, folder: Path, config: Config, *, was_found: bool = False) -> Shard:
    jobs.remember(folder, "ray", job)
    fills = inbox.inbox_of(folder, config.s3)
    return Shard(plan, RayHandle(job, folder, was_found=was_found, inbox=fills, asked=config.ray, s3=config.s3))


def _id(name: str, life: int, shard: int) -> str:
    return f"{name}-{life}-{shard}" if shard else f"{name}-{life}"


def _read_id(job: str) -> tuple[str, int, int]:
    """(name, life, shard) of an id that `_id` made."""
    found = _ID.fullmatch(job)
    assert found is not None  # `_jobs` leaves out all others
    return found[1], int(found[2]), int(found[3] or 0)


def _next_life(told: Iterable[str]) -> int:
    return 1 + max((_read_id(job)[1] for job in told), default=0)


def _newest(told: Mapping[str, Job]) -> dict[str, str]:
    """The last job of each place: those before it were never started."""
    return {told[job].place: job for job in sorted(told, key=_read_id)}


def _is_over(told: Job) -> bool:
    """Whether it has ended for good: one that was never started is submitted anew by its driver, or by the next."""
    return told.state in _ENDED and told.error != _NEVER_STARTED


def _submit_or_take(name: str, life: int, shard: int, place: str, asked: Ray, s3: S3) -> str:
    """The id under which it is submitted: of this life, or of the next that is free. Or under which another driver was
    quicker to submit a job in this place."""
    while not _submit(job := _id(name, life, shard), place, asked, s3):
        if _look_up(asked, job).place == place:
            break
        life += 1
    return job


def _submit(job: str, place: str, asked: Ray, s3: S3) -> bool:
    """False where a job of this id was there before. Raises ConfigError when Ray refuses it for another reason."""
    # Where no folder is shared Ray keeps what is printed before the worker is at work.
    output = "" if place.startswith("s3://") else f" >>{shlex.quote(f'{place}/worker.log')} 2>&1"
    variables = {
        **open_environment(os.environ, asked.variables),
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(STOP_SECONDS)),  # from SIGTERM to SIGKILL
        SHARE_VARIABLE: f"{min(asked.num_gpus, 1) or 1:.6g}",
    }
    body = {
        "submission_id": job,
        "entrypoint": f"exec {jobs.worker_command(place, s3)}{output}",
        "entrypoint_num_cpus": asked.num_cpus,
        "entrypoint_num_gpus": asked.num_gpus,
        "entrypoint_resources": asked.resources,
        "runtime_env": {"env_vars": variables},
        "metadata": {"folder": place},
    }
    status, said = _request(asked, "/api/jobs/", body)
    if status == 200:
        return True
    if "already exists" in said:
        return False
    last = (said.strip().splitlines() or ["it did not say why"])[-1]
    if status == 400 or "ValueError" in last or "status code 400" in said:
        raise ConfigError(
            f"Ray refuses the job: {last}", remedy="mend the section [ray] of the configuration (docs/ray.md)"
        )
    raise RayError(f"Ray does not take the job: {last}", remedy="`ray status` on the head node says whether it is up")


def _jobs(asked: Ray) -> dict[str, Job]:
    """The platform's jobs that Ray has not forgotten, by id."""
    with _of_rays_form(asked):
        listed = _answer(asked, "/api/jobs/")
        return {one["submission_id"]: _job(one) for one in listed if _ID.fullmatch(one["submission_id"] or "")}


def _look_up(asked: Ray, job: str) -> Job:
    """What Ray says of it now. Raises RayError when it says nothing."""
    status, said = _request(asked, f"/api/jobs/{job}")
    with _of_rays_form(asked):
        return Job(_UNKNOWN) if _is_unknown(status, said) else _job(_parsed(asked, status, said))


def _is_unknown(status: int, said: str) -> bool:
    """Whether Ray has no such job: a proxy that does not reach it answers 404 as well."""
    return status == 404 and "does not exist" in said


def _job(told: Mapping[str, Any]) -> Job:
    return Job(
        state=told["status"],
        reason=told.get("message") or "",
        node=urlsplit(told.get("driver_agent_http_address") or "").hostname or "",
        place=(told.get("metadata") or {}).get("folder", ""),
        error=told.get("error_type") or "",
        exit_code=told.get("driver_exit_code"),
    )


def _too_much(asked: Ray) -> tuple[str, str] | None:
    """(what, what can be done) where no node of the cluster has what a worker asks for; None where one has."""
    wanted = {"GPU": asked.num_gpus, "CPU": asked.num_cpus, **asked.resources}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    with _of_rays_form(asked):
        listed = _answer(asked, "/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        nodes = [one["resources_total"] for one in listed if one["state"] == "ALIVE"]
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return None
    has = "; ".join(_shown({name: node.get(name, 0) for name in wanted}) for node in nodes)
    return (
        f"no node of the Ray cluster has {_shown(wanted)}: its nodes have {has or 'nothing'}",
        "lower [ray] num_gpus, num_cpus or resources; `ray status` lists what there is",
    )


def _shown(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _in_words(job: str, told: Job, asked: Ray) -> tuple[str, str]:
    """(what happened, what can be done) for a job that did not end by its worker's own word."""
    kept = "what was answered is in the journal, and the next try asks only the rest"
    again = "the next run asks again"
    code = told.exit_code
    if told.state == "STOPPED":
        return f"somebody stopped job {job} (`ray job stop`); {kept}", "run it again when it is wanted"
    if told.state == _UNKNOWN:
        return f"Ray has forgotten job {job}: mostly its head node was restarted; {kept}", again
    if told.error == _NEVER_STARTED:
        with suppress(RayError):  # no more can be had than is known
            if (problem := _too_much(asked)) is not None:
                return problem
        return f"Ray has not started job {job}: {told.reason}", again
    if "node has died" in told.reason:
        return f"the node {told.node} failed under job {job}; {kept}", again
    if code is None:
        return f"Ray lost job {job}: {_line(told.reason)}; {kept}", again
    if any("worker.log" in line for line in told.reason.splitlines() if not line.startswith("Running entrypoint")):
        return (
            f"the node {told.node} could not start job {job}: it cannot write in the worker's folder",
            "put `state` of the configuration on a file system that the nodes share, and the installation too, or set "
            "[worker] exchange",
        )
    if code in (126, 127):
        return (
            f"the worker of job {job} ended with code {code}: the node {told.node} has no such Python",
            "put the installation where the nodes see it; the worker's log says more",
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"the worker of job {job} {how} without a word", again


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


def _answer(asked: Ray, path: str) -> Any:
    return _parsed(asked, *_request(asked, path))


def _parsed(asked: Ray, status: int, said: str) -> Any:
    if status != 200:
        raise RayError(
            f"{asked.address} answers {status}: {_line(said)}",
            remedy="is [ray] address that of the cluster's dashboard, by default port 8265 of the head node? There "
            "`ray status` says how it is",
        )
    return json.loads(said)


@contextmanager
def _of_rays_form(asked: Ray) -> Iterator[None]:
    """Within, an answer is read; what is not as Ray answers is told."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise RayError(
            f"{asked.address} answers as no job server of Ray's does: {type(error).__name__}: {error}",
            remedy="set [ray] address to that of the cluster's dashboard, by default port 8265 of the head node",
        ) from error


def _request(asked: Ray, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """(HTTP status, text) of the job server's answer to a GET, or with a body to a POST. Raises RayError for none."""
    request = urllib.request.Request(
        asked.address + quote(path, safe="/?&="),
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **_token()},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            status, said = error.code, error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise RayError(
            f"Ray's job server at {asked.address} does not answer: {reason}",
            remedy="is the cluster up, with `ray[default]` installed? [ray] address is that of its dashboard, by "
            "default port 8265 of the head node",
        ) from error
    if status in (401, 403):
        raise RayError(
            f"Ray's job server at {asked.address} does not let us in: {status} {_line(said)[:200]}",
            remedy="put the cluster's token (`ray get-auth-token`) in RAY_AUTH_TOKEN, or in a file that "
            "RAY_AUTH_TOKEN_PATH names",
        )
    return status, said


def _token() -> dict[str, str]:
    """The header for a cluster that wants a token, from where Ray's own programs take it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        file = Path(named) if named else Path.home() / ".ray" / "auth_token"
        try:
            if named or file.exists():
                token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RayError(
                f"the token for Ray's job server cannot be read from {file}: {type(error).__name__}",
                remedy="name a file that holds it in RAY_AUTH_TOKEN_PATH, or put it in RAY_AUTH_TOKEN; "
                "`ray get-auth-token` shows it",
            ) from error
    return {"Authorization": f"Bearer {token}"} if token else {}
