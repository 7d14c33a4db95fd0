"""A results root, a watched folder and a real Dagster instance; ticks of the real sensors are applied as the daemon
applies them."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test
from warehouse_world import World

from assets.partitions import checkpoints
from eval_platform import definitions, warehouse
from eval_platform.config import Config, load_config
from eval_platform.tasks import TaskLock
from eval_platform.tasks.lock import LockedTask, write_lock
from resources.store import StoreResource
from resources.warehouse import WarehouseResource

os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"

CONFIG = """
results = "results"
state = "state"
[[checkpoints]]
name = "runs"
path = "checkpoints"
quiet_seconds = 0
[engine]
device = "cpu"
dtype = "float32"
max_length = 256
[worker]
retry_wait_seconds = 0.1
"""


# Where a run in Dagster's queue says that its code is; nothing is ever loaded from there.
_ORIGIN = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("tests"), "repository"), "evaluate")


def locked(task_id: str, ask_id: str = "ask", dataset_id: str = "data") -> LockedTask:
    return LockedTask(
        task_id=task_id,
        ask_id=ask_id,
        dataset_id=dataset_id,
        n_documents=10,
        output_type="multiple_choice",
        num_fewshot=0,
        repeats=1,
        primary_metric="acc",
        higher_is_better=True,
        chance=0.25,
        score_names=("acc",),
        title="",
        about="About it.",
        tags=(),
        source="",
        licence="",
    )


class DagsterWorld(World):
    """`World` writes the store's records; this adds a configuration, a lock and Dagster."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, more: str = "") -> None:
        super().__init__(folder)
        self.folder, self.instance = folder, instance
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir()
        self.file = folder / "eval_platform.toml"
        self.file.write_text(CONFIG + more)
        self.catalog = self.config.catalog_path
        self.cursors: dict[str, str | None] = {}
        self._sensors: dict[str, dg.SensorDefinition] = {}

    @property
    def config(self) -> Config:
        return load_config(self.file)

    def lock(self, **tasks: str) -> TaskLock:
        """Write a lock of name -> task_id, and the store's records of it; ask_id and dataset_id follow the name."""
        for name, task_id in tasks.items():
            self.task(name, task_id)
        lock = TaskLock({name: locked(task_id, f"ask-{name}", f"data-{name}") for name, task_id in tasks.items()})
        write_lock(self.config.lock_path, lock)
        self.reload()
        return lock

    def reload(self) -> None:
        """As after `tasks sync`, or a restart: the sensors forget what they kept in memory, the cursors stay."""
        self._sensors = {}

    def definitions(self) -> dg.Definitions:
        return definitions.gather(self.config)

    def tick(self, name: str, *, apply: bool = True) -> Any:
        """One tick of a sensor. With `apply`, what it asks for happens: runs, events and partitions are stored."""
        if not self._sensors:
            self._definitions = self.definitions()
            self._sensors = {s.name: s for s in self._definitions.get_repository_def().sensor_defs}
        store = StoreResource(config_file=str(self.file))
        needed = self._sensors[name].required_resource_keys
        resources = {"store": store, "warehouse": WarehouseResource(store=store)}
        with dg.build_sensor_context(
            self.instance,
            cursor=self.cursors.get(name),
            resources={key: value for key, value in resources.items() if key in needed},
            definitions=self._definitions,
            sensor_name=name,
        ) as context:
            result = self._sensors[name](context)
        if apply and isinstance(result, dg.SensorResult):
            self.apply(name, result)
        return result

    def apply(self, name: str, result: dg.SensorResult) -> None:
        self.cursors[name] = result.cursor
        for request in result.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(str(checkpoints.name), list(request.partition_keys))
        for request in result.run_requests or ():
            self.run(request)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)

    def run(
        self,
        request: dg.RunRequest,
        status: dg.DagsterRunStatus = dg.DagsterRunStatus.NOT_STARTED,
        *,
        parent: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> dg.DagsterRun | None:
        """A run as the daemon creates it; none for a run_key that has had one."""
        tags = {"dagster/partition": str(request.partition_key), **request.tags, **(tags or {})}
        if parent is None and request.run_key is not None:
            tags["dagster/run_key"] = request.run_key
            if self.instance.get_runs_count(dg.RunsFilter(tags={"dagster/run_key": request.run_key})):
                return None
        return create_run_for_test(
            self.instance,
            job_name="evaluate",
            status=status,
            tags=tags,
            parent_run_id=parent,
            root_run_id=parent,
            remote_job_origin=_ORIGIN,
            asset_selection=frozenset(request.asset_selection) if request.asset_selection else None,
        )

    def runs(self, key: str | None = None) -> Sequence[dg.DagsterRun]:
        """Newest first."""
        return self.instance.get_runs(dg.RunsFilter(tags={"dagster/partition": key}) if key else None)

    def end(self, run: dg.DagsterRun, status: dg.DagsterRunStatus = dg.DagsterRunStatus.FAILURE) -> None:
        kinds = {
            dg.DagsterRunStatus.FAILURE: dg.DagsterEventType.RUN_FAILURE,
            dg.DagsterRunStatus.SUCCESS: dg.DagsterEventType.RUN_SUCCESS,
            dg.DagsterRunStatus.CANCELED: dg.DagsterEventType.RUN_CANCELED,
        }
        event = dg.DagsterEvent(kinds[status].value, run.job_name, message="ended by the test")
        self.instance.report_dagster_event(event, run.run_id)

    def sql(self, text: str) -> list[dict[str, Any]]:
        warehouse.refresh(self.store, self.catalog)
        return warehouse.query(self.catalog, self.store, text).to_pylist()

    def partitions(self) -> set[str]:
        return set(self.instance.get_dynamic_partitions(str(checkpoints.name)))

    def check(self, task: str, partition: str) -> tuple[bool, dg.AssetCheckSeverity]:
        """(passed, severity) of the gate as the UI shows it: the newest evaluation."""
        key = dg.AssetCheckKey(dg.AssetKey(["results", task]), "gate")
        found = self.instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [key], partition_filter=PartitionKeyFilter(key=partition)
        )
        event = found[key].event
        assert event is not None
        assert event.dagster_event is not None
        evaluation = event.dagster_event.asset_check_evaluation_data
        return evaluation.passed, evaluation.severity

    def events(self, asset: str | list[str], partition: str | None = None) -> list[dg.AssetMaterialization]:
        """Materializations, newest first."""
        where = dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(asset), asset_partitions=[partition] if partition is not None else None
        )
        records = self.instance.fetch_materializations(where, limit=1000).records
        return [record.asset_materialization for record in records if record.asset_materialization is not None]


def write_task(folder: Path, name: str) -> None:
    rows = [{"question": f"{name} {i}?", "label": i % 2} for i in range(8)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = {
        "task": name,
        "documents": {"file": f"{name}.jsonl"},
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": ["Yes", "No"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
        "primary_metric": "acc",
        "higher_is_better": True,
        "chance": 0.5,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(body))


class Webhook:
    """A server that keeps what it is told, and answers with `status`."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.status = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if hook.status == 200:
                    hook.told.append(body)
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?key=secret"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def dagster_world(folder: Path, more: str = "") -> Iterator[DagsterWorld]:
    """A world on this process's one instance in memory (making one costs a quarter of a second), emptied after."""
    instance = _instance()
    try:
        yield DagsterWorld(folder, instance, more)
    finally:
        instance.run_storage.wipe()
        instance.event_log_storage.wipe()


@cache
def _instance() -> dg.DagsterInstance:
    return dg.DagsterInstance.ephemeral()
