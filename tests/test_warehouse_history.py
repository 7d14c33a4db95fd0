"""What the gate may ask of the past."""

import pytest
from warehouse_world import World

from eval_platform import warehouse
from eval_platform.warehouse.connection import open_catalog


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.task("add", "add-1")
    return world


def test_the_same_answers_of_other_weights_are_found_whatever_their_status(world):
    for checkpoint, status in (("A", "published"), ("B", "held")):
        evaluation = world.commit(checkpoint, "add", "add-1", answers_digest="same", key=f"r/run/{checkpoint}")
        world.decide(evaluation, status)
    world.commit("C", "add", "add-1", answers_digest="other", key="r/run/C")
    world.commit("D", "add", "add-1", answers_digest="same", ask_id="asked otherwise", key="r/run/D")
    warehouse.refresh(world.store, world.catalog)

    def same(weights_id, digest="same"):
        with open_catalog(world.catalog) as con:
            return warehouse.same_answers(con, answers_digest=digest, ask_id="ask-add", weights_id=weights_id)

    assert same("w-new") == ["r/run/A", "r/run/B"]
    assert same("w-A") == ["r/run/B"]
    assert same("w-new", "never seen") == []


def test_prompts_are_compared_within_ask_tokenizer_and_settings(world):
    for i, fields in enumerate(({}, {"tokenizer_id": "other"}, {"settings_id": "other"}, {"ask_id": "other"}, {})):
        world.commit(f"C{i}", "add", "add-1", prompts_id=f"p{i}", **fields)
    warehouse.refresh(world.store, world.catalog)
    with open_catalog(world.catalog) as con:
        found = warehouse.prompts_ids(con, ask_id="ask-add", tokenizer_id="tok", settings_id="s")
    assert found == ["p0", "p4"]


def test_the_past_of_a_run_is_its_published_earlier_steps_newest_first(world):
    for step, checkpoint, value in ((1, "A", 0.1), (2, "B", 0.2), (3, "C", 0.3), (4, "D", 0.4)):
        world.arrive(f"r/run/{step}", checkpoint, step=step)
        evaluation = world.commit(checkpoint, "add", "add-1", value)
        world.decide(evaluation, "held" if checkpoint == "B" else "published")
    world.arrive("r/other/1", "E", step=1, run="other")
    world.publish("E", "add", "add-1", 0.9)
    world.publish("A", "add", "add-1", 0.8, settings_id="other")
    warehouse.refresh(world.store, world.catalog)

    def past(before):
        with open_catalog(world.catalog) as con:
            found = warehouse.previous_scores(
                con, run="run", task_id="add-1", settings_id="s", metric="acc", before_step=before
            )
        return [(score.key, score.step, score.value, score.standard_error) for score in found]

    assert past(4) == [("r/run/3", 3, 0.3, 0.05), ("r/run/1", 1, 0.1, 0.05)]
    assert past(1) == []
