"""Tells someone when a run ends red: something was held or failed."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import dagster as dg

from assets.results import ARRIVAL_TAG
from resources.store import StoreResource

TIMEOUT_SECONDS = 5.0
PER_TICK = 5
FIRST_WAIT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 600.0
GIVE_UP_SECONDS = 24 * 3600.0


def alert_sensor() -> dg.SensorDefinition:
    """POSTs JSON to `[alerts] webhook`; silent when that is unset.

    Not a `run_failure_sensor`: that one moves on when its function fails, so an alert would be lost whenever the
    webhook is down. This one keeps its place, waits longer each time, and after a day says in the run's log that nobody
    was told. An alert may come twice when a tick is cut off, never less than once.
    """

    @dg.sensor(
        name="alerts",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=15,
        description="Sends a JSON message to the configured webhook when a run ends red: something is held or failed.",
    )
    def alerts(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult:
        webhook = store.config().alerts.webhook
        cursor = json.loads(context.cursor or "{}")
        if "after" not in cursor or webhook is None:
            # From now on, not for all that ever failed.
            return _result({"after": _newest_failure(context.instance)}, None if webhook else "no [alerts] webhook")
        if time.time() < cursor.get("wait_until", 0) <= time.time() + LONGEST_WAIT_SECONDS:
            return _result(cursor, f"waits for {_shown(webhook)}, which did not take the last alert")
        told = 0
        for storage_id, run_id in _failures(context.instance, cursor["after"]):
            body = _body(context.instance, run_id)
            if body is not None:
                error = _post(webhook, body)
                if error is not None:
                    since = cursor.get("failing_since", time.time())
                    if time.time() - since < GIVE_UP_SECONDS:
                        wait = min(2 * cursor.get("wait", FIRST_WAIT_SECONDS / 2), LONGEST_WAIT_SECONDS)
                        waiting = {"failing_since": since, "wait": wait, "wait_until": time.time() + wait}
                        said = f"{_shown(webhook)} did not take the alert of run {run_id}: {error}"
                        context.log.error(f"{said}; tried again in {wait:.0f} s")
                        return _result({"after": cursor["after"], **waiting}, said)
                    _give_up(context.instance, run_id, f"nobody was told that this run failed: {error}")
                told += error is None
            cursor = {"after": storage_id}
        return _result(cursor, f"told {_shown(webhook)} of {told} runs" if told else "no run has failed")

    return alerts


def _result(cursor: dict[str, Any], reason: str | None) -> dg.SensorResult:
    return dg.SensorResult(cursor=json.dumps(cursor), skip_reason=reason or "begins to look for failed runs")


def _newest_failure(instance: dg.DagsterInstance) -> int:
    records = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    return records[0].storage_id if records else -1


def _failures(instance: dg.DagsterInstance, after: int) -> Sequence[tuple[int, str]]:
    """(storage id, run id) of the next failed runs."""
    where = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=after)
    records = instance.fetch_run_status_changes(where, limit=PER_TICK, ascending=True).records
    return [(record.storage_id, record.event_log_entry.run_id) for record in records]


def _body(instance: dg.DagsterInstance, run_id: str) -> dict[str, Any] | None:
    """What is told of a run; None when there is nothing to tell: it will be retried, or was deleted."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.tags.get("dagster/will_retry") == "true":
        return None
    reasons = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        event = entry.dagster_event
        if event is not None:
            data = event.step_failure_data
            described = data.user_failure_data.description if data.user_failure_data else None
            reasons.append((described or (data.error.message if data.error else None) or event.message or "").strip())
    failure = next(iter(instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)), None)
    return {
        "job": run.job_name,
        "checkpoint": run.tags.get("dagster/partition"),
        "arrival": run.tags.get(ARRIVAL_TAG),
        "run_id": run_id,
        "message": failure.dagster_event.message if failure and failure.dagster_event else "",
        "reasons": reasons,
    }


def _post(webhook: str, body: dict[str, Any]) -> str | None:
    """None when it was taken, else why not."""
    request = urllib.request.Request(webhook, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.reason}"
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError; ValueError: no URL
        return str(getattr(error, "reason", error))


def _shown(webhook: str) -> str:
    """Without its query, which often is a secret."""
    return webhook.partition("?")[0]


def _give_up(instance: dg.DagsterInstance, run_id: str, text: str) -> None:
    instance.report_engine_event(text, instance.get_run_by_id(run_id))
