"""Tells someone when a run ends red: something was held or failed."""

import json
import urllib.request

import dagster as dg

from resources.store import StoreResource

TIMEOUT_SECONDS = 10.0


def alert_sensor() -> dg.SensorDefinition:
    """POSTs JSON to `[alerts] webhook`; silent when that is unset."""

    @dg.run_failure_sensor(
        name="alerts",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=5,
        description="Sends a JSON message to the configured webhook when an evaluation is held or failed.",
    )
    def alerts(context: dg.RunFailureSensorContext, store: StoreResource) -> None:
        webhook = store.config().alerts.webhook
        run = context.dagster_run
        if webhook is None or run.tags.get("dagster/will_retry") == "true":
            return
        errors = [
            event.step_failure_data.error.message if event.step_failure_data.error else event.message or ""
            for event in context.get_step_failure_events()
        ]
        body = {
            "checkpoint": run.tags.get("dagster/partition"),
            "arrival": run.tags.get("eval/arrival"),
            "run_id": run.run_id,
            "message": context.failure_event.message,
            "reasons": [error.strip() for error in errors],
        }
        request = urllib.request.Request(webhook, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            context.log.info(f"told {webhook.partition('?')[0]}: {answer.status}")

    return alerts
