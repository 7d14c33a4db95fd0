"""Someone is told when a run ends red, by a real HTTP server; a webhook that is down delays the word, it loses none."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_world import DagsterWorld, Webhook, dagster_world

pytestmark = pytest.mark.dagster


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    one = Webhook()
    yield one
    one.close()


@pytest.fixture
def world(tmp_path: Path, webhook: Webhook) -> Iterator[DagsterWorld]:
    with dagster_world(tmp_path, f'[alerts]\nwebhook = "{webhook.url}"\n') as one:
        yield one


def fail(world: DagsterWorld, words: str, **tags: str) -> str:
    """A real run that ends red."""

    @dg.op
    def give_up() -> None:
        raise dg.Failure(words, allow_retries=False)

    @dg.job(tags=tags)
    def red() -> None:
        give_up()

    return red.execute_in_process(instance=world.instance, raise_on_error=False).run_id


def cursor(world: DagsterWorld) -> dict[str, Any]:
    return json.loads(world.cursors["alerts"] or "{}")


def move(world: DagsterWorld, **values: Any) -> None:
    world.cursors["alerts"] = json.dumps({**cursor(world), **values})


def test_tells_of_each_red_run_once_and_of_none_before_it_began(world: DagsterWorld, webhook: Webhook) -> None:
    fail(world, "long ago")
    world.tick("alerts")
    world.tick("alerts")
    assert webhook.told == []
    tags = {"dagster/partition": "runs/x", "eval/arrival": "runs/x@1"}
    run_ids = [fail(world, "larger held: a NaN", **tags), fail(world, "another")]
    for _ in range(2):
        world.tick("alerts")
    assert [body["run_id"] for body in webhook.told] == run_ids
    first = webhook.told[0]
    assert first["checkpoint"] == "runs/x"
    assert first["arrival"] == "runs/x@1"
    assert first["reasons"] == ["larger held: a NaN"]


def test_a_run_that_will_be_retried_is_no_news(world: DagsterWorld, webhook: Webhook) -> None:
    world.tick("alerts")
    fail(world, "crashed", **{"dagster/will_retry": "true"})
    fail(world, "crashed again")
    world.tick("alerts")
    assert [body["reasons"] for body in webhook.told] == [["crashed again"]]


def test_a_webhook_that_is_down_delays_and_loses_nothing(world: DagsterWorld, webhook: Webhook) -> None:
    world.tick("alerts")
    webhook.status = 503
    run_ids = [fail(world, "one"), fail(world, "two")]
    result = world.tick("alerts")
    assert "503" in result.skip_reason.skip_message
    assert "secret" not in result.skip_reason.skip_message
    waits = [cursor(world)["wait"]]
    assert "waits" in world.tick("alerts").skip_reason.skip_message  # not asked again at once
    for _ in range(10):
        move(world, wait_until=time.time() - 1)
        world.tick("alerts")
        waits.append(cursor(world)["wait"])
    assert waits[0] < waits[1] < waits[-1] <= 600
    webhook.status = 200
    move(world, wait_until=time.time() - 1)
    world.tick("alerts")
    assert [body["run_id"] for body in webhook.told] == run_ids
    assert set(cursor(world)) == {"after"}


def test_after_a_day_it_says_in_the_runs_log_that_nobody_was_told(world: DagsterWorld, webhook: Webhook) -> None:
    world.tick("alerts")
    webhook.close()  # nothing listens there any more
    run_id = fail(world, "one")
    world.tick("alerts")
    assert "failing_since" in cursor(world)
    move(world, failing_since=time.time() - 25 * 3600, wait_until=time.time() - 1)
    world.tick("alerts")
    messages = [entry.message for entry in world.instance.all_logs(run_id)]
    assert any("nobody was told that this run failed" in message for message in messages)
    assert set(cursor(world)) == {"after"}
    assert "no run has failed" in world.tick("alerts").skip_reason.skip_message


def test_a_clock_that_stepped_back_does_not_silence_it(world: DagsterWorld, webhook: Webhook) -> None:
    world.tick("alerts")
    fail(world, "one")
    move(world, wait=600, wait_until=time.time() + 10 * 3600, failing_since=time.time() + 9 * 3600)
    world.tick("alerts")
    assert len(webhook.told) == 1


def test_silent_when_unset_and_then_begins_from_now(tmp_path: Path) -> None:
    with dagster_world(tmp_path) as world:
        world.tick("alerts")
        run_id = fail(world, "before there was a webhook")
        world.tick("alerts")
        hook = Webhook()
        try:
            world.file.write_text(world.file.read_text() + f'[alerts]\nwebhook = "{hook.url}"\n')
            world.tick("alerts")
            later = fail(world, "after")
            world.tick("alerts")
            assert [body["run_id"] for body in hook.told] == [later] != [run_id]
        finally:
            hook.close()
