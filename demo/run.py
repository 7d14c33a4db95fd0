"""The main job, from nothing: a model trains here, and every checkpoint it drops is on the leaderboard by itself.

    python -m demo.run [--once] [--s3] [--launcher subprocess|slurm|ray]

Beside the trainer's checkpoints it plants three: one with NaN weights (must be held), one that is copied half, then
whole (must wait, then be evaluated once), and one copy under another name (must be linked, not evaluated again).
With --once it exits 0 when all that should be published is, else 1; without, it stays up until Ctrl-C. With --s3
checkpoints are uploaded to a bucket as they are finished and results are kept in another, both of an S3 server (moto's)
that runs on this machine as long as the demo. With --launcher slurm or ray workers are jobs of a cluster that runs here
as long; with any launcher named the engine is deterministic.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from eval_platform import report, status, terminal, warehouse
from eval_platform.config import Config, load_config
from eval_platform.quality import check_items
from eval_platform.store import open_store
from eval_platform.tasks import TaskLock, read_lock, sync_tasks
from eval_platform.up import Platform, platform

HERE = Path(__file__).resolve().parent
RUN = "tiny"
PLANTED = "planted"
HALF_SECONDS = 20.0  # how long the half-copied one stays half
GIVE_UP_SECONDS = 15 * 60.0
GIVE_UP_SLOWLY_SECONDS = 25 * 60.0  # a server takes its share of the cores, or every worker imports all anew
LOOK_SECONDS = 2.0
LOOK_ON_S3_SECONDS = 5.0

console = Console()


@dataclass(frozen=True)
class Place:
    """What the demo runs on. Checkpoints are written in `folder`: which is watched, or uploaded to what is."""

    config: Config
    folder: Path

    @property
    def watched(self) -> str:
        return self.config.checkpoints[0].path

    @property
    def on_s3(self) -> bool:
        return self.watched.startswith("s3://")

    def deliver(self, checkpoint: Path) -> None:
        """Bring the files of a planted checkpoint, as they are now, to where they are watched."""
        if self.on_s3:
            store = open_store(self.watched, self.config.s3)
            for file in sorted(checkpoint.iterdir()):
                store.put(file.relative_to(self.folder).as_posix(), file)


def _configuration(launcher: str | None) -> str:
    """The demo's own, for workers that `launcher` starts."""
    text = (HERE / "eval_platform.toml").read_text(encoding="utf-8")
    if launcher is None:
        return text
    text = text.replace("[engine]\n", "[engine]\ndeterministic = true\n") + f'\n[worker]\nlauncher = "{launcher}"\n'
    if launcher == "ray":
        text += f'\n[ray]\naddress = "{os.environ["RAY_API_SERVER_ADDRESS"]}"\nnum_cpus = 2\n'
    return text


@contextmanager
def _slurm() -> Iterator[None]:
    """A cluster of this machine alone; all that is started meanwhile finds it."""
    from tests.slurm_cluster import slurm_cluster, why_not

    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with slurm_cluster() as cluster:
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        yield


@contextmanager
def _ray() -> Iterator[None]:
    """The same of Ray's."""
    from tests.ray_cluster import ray_cluster, why_not

    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with ray_cluster() as cluster:
        os.environ.update(cluster.environment)
        yield


@contextmanager
def _folders(launcher: str | None) -> Iterator[Place]:
    """Checkpoints and results in folders beside this file, or in one named after the launcher, emptied first."""
    file = HERE / "eval_platform.toml"
    if launcher is not None:
        file = HERE / launcher / "eval_platform.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(_configuration(launcher), encoding="utf-8")
    config = load_config(file)
    folder = Path(config.checkpoints[0].path)
    for used in (config.results, config.state, folder):
        shutil.rmtree(used, ignore_errors=True)
    folder.mkdir(parents=True)
    yield Place(config, folder)


@contextmanager
def _buckets(launcher: str | None) -> Iterator[Place]:
    """The same in two new buckets; what lies on this machine is below `demo/s3`, emptied first."""
    from tests.s3_server import CREDENTIALS, s3_server  # moto, of the dev extra

    here = HERE / "s3"
    shutil.rmtree(here, ignore_errors=True)
    folder = here / "checkpoints"
    folder.mkdir(parents=True)
    os.environ.update(CREDENTIALS)
    with s3_server() as server:
        for bucket in ("results", "checkpoints"):
            server.make_bucket(f"demo-{bucket}")
        os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint  # for the trainer, which has no configuration of ours
        text = _configuration(launcher)
        for field, bucket in (("results", "results"), ("path", "checkpoints")):
            text = text.replace(f'{field} = "{bucket}"', f'{field} = "s3://demo-{bucket}"')
        file = here / "eval_platform.toml"
        file.write_text(f'{text}\n[s3]\nendpoint = "{server.endpoint}"\n', encoding="utf-8")
        yield Place(load_config(file), folder)


CLUSTERS = {"slurm": _slurm, "ray": _ray}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="exit when everything is published")
    parser.add_argument("--s3", action="store_true", help="checkpoints and results in buckets")
    parser.add_argument("--launcher", choices=["subprocess", *CLUSTERS], help="what starts workers")
    arguments = parser.parse_args()
    places = _buckets if arguments.s3 else _folders
    cluster = CLUSTERS.get(arguments.launcher, nullcontext)()
    with cluster, places(arguments.launcher) as place:
        return _run(place, once=arguments.once)


def _run(place: Place, *, once: bool) -> int:
    config = place.config
    store = open_store(config.results, config.s3)
    synced = sync_tasks(config.tasks, store, config.lock_path, check=check_items)
    for error in synced.errors:
        console.print(f"[red]{error}[/]")
    if synced.errors:
        return 1
    lock = read_lock(config.lock_path)
    console.print(
        f"{len(lock.tasks)} tasks; checkpoints arrive in {place.watched}; starting Dagster …", highlight=False
    )
    with platform(config, console.print) as running:
        console.print(f"UI at {running.url}; training a model on this machine …", highlight=False)
        trainer = _trainer(place)
        try:
            problems = _watch(place, lock, trainer, running)
        finally:
            if trainer.poll() is None:
                trainer.terminate()
                trainer.wait()
        _print_board(config)
        for problem in problems:
            console.print(f"[red]not as it should be: {problem}[/]", highlight=False)
        _print_where_to_look(running, place)
        if not once:
            console.print("Ctrl-C ends it.")
            try:
                while True:
                    time.sleep(1)
                    running.revive()
            except KeyboardInterrupt:
                console.print("stopping …")
    return 1 if problems else 0


def _trainer(place: Place) -> subprocess.Popen[bytes]:
    log = place.config.state_dir / "logs" / "train.log"
    upload = ["--upload", f"{place.watched}/{RUN}"] if place.on_s3 else []
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), "--out", str(place.folder / RUN), "--run", RUN, *upload],
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _watch(place: Place, lock: TaskLock, trainer: subprocess.Popen[bytes], running: Platform) -> list[str]:
    """Plant the three, show progress, and return what is not as it should be at the end."""
    config = place.config
    store = open_store(config.results, config.s3)
    plants = _plants(place)
    is_slow = place.on_s3 or config.worker.launcher != "subprocess"
    patience = GIVE_UP_SLOWLY_SECONDS if is_slow else GIVE_UP_SECONDS
    deadline = time.monotonic() + patience
    planted = False
    found: list[status.CheckpointStatus] = []
    told = ""
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while time.monotonic() < deadline:
            running.revive()
            planted = planted or next(plants, True)
            found = status.status(config, store, lock)
            if console.is_terminal:
                live.update(_screen(config, found, trainer))
            told = _tell(found, told)
            if trainer.poll() not in (None, 0):
                return [f"the trainer ended with code {trainer.poll()}: see {config.state_dir}/logs/train.log"]
            busy = [one for one in found if one.state in {"waiting", "queued", "running", "missing"}]
            if planted and trainer.poll() == 0 and found and not busy:
                return list(_problems(place, lock))
            time.sleep(LOOK_ON_S3_SECONDS if place.on_s3 else LOOK_SECONDS)
    left = ", ".join(
        f"{one.key} is {one.state}" for one in found if one.state in {"waiting", "queued", "running", "missing"}
    )
    return [f"not done after {patience / 60:.0f} minutes: {left}"]


def _tell(found: list[status.CheckpointStatus], told: str) -> str:
    """Where nobody looks at a live screen (a log file, CI): one line whenever something has changed."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.state] = counts.get(one.state, 0) + 1
    published = sum(task.state == "published" for one in found for task in one.tasks)
    line = f"{len(found)} checkpoints: {', '.join(f'{n} {state}' for state, n in sorted(counts.items()))}; "
    line += f"{published} scores published"
    if line != told and not console.is_terminal:
        console.print(f"{time.strftime('%H:%M:%S')}  {line}", highlight=False)
    return line


def _plants(place: Place) -> Iterator[bool]:
    """One look a step; True once all three are planted."""
    while len(whole := _whole(place.folder / RUN)) < 3:
        yield False
    planted = place.folder / PLANTED
    _copy(whole[1], planted / "copy_of_second")
    place.deliver(planted / "copy_of_second")
    _with_nan(whole[1], planted / "nan_weights")
    place.deliver(planted / "nan_weights")
    half = planted / "half_copied"
    _copy(whole[2], half, only_half_the_weights=True)
    place.deliver(half)
    since = time.monotonic()
    while time.monotonic() - since < HALF_SECONDS:
        yield False
    _change_one_weight(whole[2], half)
    place.deliver(half)
    yield True


def _whole(run: Path) -> list[Path]:
    return sorted(success.parent for success in run.glob("*/_SUCCESS"))


def _copy(source: Path, target: Path, *, only_half_the_weights: bool = False) -> None:
    """A copy without `_SUCCESS`, so that the platform must see for itself whether it is whole."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("_SUCCESS", "checkpoint.json"))
    if only_half_the_weights:
        weights = target / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)


def _with_nan(source: Path, target: Path) -> None:
    _copy(source, target)
    weights = load_file(target / "model.safetensors")
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    _replace(weights, target)


def _change_one_weight(source: Path, target: Path) -> None:
    """The other half arrives; one weight differs, so that this is a model of its own and not one more copy."""
    weights = load_file(source / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    _replace(weights, target)


def _replace(weights: dict, target: Path) -> None:
    aside = target / ".weights"
    save_file(weights, aside, metadata={"format": "pt"})
    os.replace(aside, target / "model.safetensors")


def _screen(config: Config, found: list[status.CheckpointStatus], trainer: subprocess.Popen[bytes]) -> Group:
    table = Table("checkpoint", "state", "tasks", "what to know", box=None, expand=True)
    for one in found[-24:]:
        counts: dict[str, int] = {}
        for task in one.tasks:
            counts[task.state] = counts.get(task.state, 0) + 1
        why = one.reason or next((task.reason for task in one.tasks if task.reason and task.state != "published"), "")
        tally = ", ".join(f"{count} {state}" for state, count in counts.items())
        table.add_row(one.key, one.state, tally, Text(why.splitlines()[0] if why else "", overflow="ellipsis"))
    training = "training" if trainer.poll() is None else "trained"
    return Group(Text(f"{training}; {len(found)} checkpoints"), table, report.leaderboard_table(_board(config)))


def _board(config: Config) -> pa.Table:
    store = open_store(config.results, config.s3)
    return warehouse.query(
        config.catalog_path, store, "select * from leaderboard order by run, step desc nulls last, key, task"
    )


def _problems(place: Place, lock: TaskLock) -> Iterator[str]:
    """What the demo promises, asked of the store in SQL as a user would."""
    config = place.config
    store = open_store(config.results, config.s3)
    warehouse.refresh(store, config.catalog_path)

    def ask(text: str) -> list[dict]:
        return warehouse.query(config.catalog_path, store, text).to_pylist()

    name = config.checkpoints[0].name
    published: dict[str, set[str]] = {}
    for row in ask("select key, task from leaderboard"):
        published.setdefault(row["key"], set()).add(row["task"])
    trained = [f"{name}/{RUN}/{folder.name}" for folder in _whole(place.folder / RUN)]
    should = [*trained, f"{name}/{PLANTED}/copy_of_second", f"{name}/{PLANTED}/half_copied"]
    for key in should:
        if missing := set(lock.tasks) - published.get(key, set()):
            yield f"{key} lacks {', '.join(sorted(missing))} on the leaderboard"
    if len(trained) < 8:
        yield f"only {len(trained)} checkpoints were trained"
    nan = f"{name}/{PLANTED}/nan_weights"
    held = {row["task"] for row in ask(f"select task from held where key = '{nan}' and len(reasons) > 0")}
    if held != set(lock.tasks):
        yield f"{nan} is not held on {', '.join(sorted(set(lock.tasks) - held))}"
    if nan in published:
        yield f"{nan} is on the leaderboard"
    # Whichever of the two had its turn first was evaluated; the other is linked to that.
    twice = ask(
        "select e.task, count(*) as n from evaluations e "
        f"where e.checkpoint_id in (select checkpoint_id from arrivals where key = '{name}/{PLANTED}/copy_of_second') "
        "group by e.task having count(*) > 1"
    )
    if twice:
        yield f"the copy and its original were both evaluated: {twice}"
    once = ask(
        f"select count(*) as n, count(distinct task) as tasks, max(arrival) as arrival from evaluations "
        f"where key = '{name}/{PLANTED}/half_copied'"
    )[0]
    if (once["n"], once["tasks"], once["arrival"]) != (len(lock.tasks), len(lock.tasks), 1):
        yield f"the half-copied checkpoint was evaluated {once}"
    learnt = ask(
        "select task, chance, first(value order by step) as first, last(value order by step) as last "
        f"from leaderboard where run = '{RUN}' and chance is not null group by all"
    )
    if sum(row["last"] >= 0.8 and row["first"] <= row["chance"] + 0.1 for row in learnt) < 3:
        yield f"fewer than three tasks were learnt: {learnt}"


def _print_board(config: Config) -> None:
    terminal.print_board(_board(config).to_pylist())


def _print_where_to_look(running: Platform, place: Place) -> None:
    command = f"eval-platform --config {os.path.relpath(place.config.file or HERE)}"
    credentials = ""
    if place.on_s3:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        credentials = f"\n  export {' '.join(f'{name}={os.environ[name]}' for name in names)}"
    console.print(
        f"""
Look at it
  asset graph   {running.url}/asset-groups
  leaderboard   {running.url}/assets/leaderboard
  curves        {running.url}/assets/learning_curves
Ask it (in another shell: . .venv/bin/activate){credentials}
  {command} sql "select key, task, value, ci_low, ci_high from leaderboard order by task, value desc"
  {command} sql "select key, task, reasons from held"
  {command} sql "select task, step, value from learning_curves where is_primary order by task, step"
  {command} status
""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
