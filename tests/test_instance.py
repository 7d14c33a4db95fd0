"""Where Dagster keeps its runs: a box's SQLite, or a team's PostgreSQL, whose password stands nowhere."""

from pathlib import Path

import pytest
import yaml

from eval_platform import doctor, up
from eval_platform.config import Config, Worker
from eval_platform.errors import ConfigError
from eval_platform.instance import POSTGRES_VARIABLE, instance_text, postgres_place, write_instance

PASSWORD = "s3cret-word"
# Nothing listens on port 1.
URL = f"postgresql+psycopg2://ada:{PASSWORD}@127.0.0.1:1/dagster"


def test_a_team_has_all_that_one_box_has_and_postgres_beside_it() -> None:
    box, team = (yaml.safe_load(instance_text(3, postgres=kind)) for kind in (False, True))
    assert team.pop("storage") == {"postgres": {"postgres_url": {"env": POSTGRES_VARIABLE}}}
    assert team == box
    runs = [yaml.safe_load(instance_text(n, postgres=False))["concurrency"]["runs"] for n in (1, 16)]
    # Boards find a place beside as many evaluations as there are slots.
    assert [(r["max_concurrent_runs"], r["tag_concurrency_limits"][0]["limit"]) for r in runs] == [(8, 1), (20, 16)]
    assert box["run_monitoring"]["enabled"]
    assert box["run_monitoring"]["free_slots_after_run_end_seconds"] == 1
    assert set(box["retention"]) == {"sensor", "auto_materialize"}


def test_the_home_follows_the_variable_until_somebody_edits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(folder=tmp_path, state=str(tmp_path), worker=Worker(slots=2))
    home = config.dagster_home / "dagster.yaml"
    write_instance(config)
    assert home.read_text() == instance_text(2, postgres=False)
    monkeypatch.setenv(POSTGRES_VARIABLE, URL)
    write_instance(config)
    assert home.read_text() == instance_text(2, postgres=True)
    assert PASSWORD not in home.read_text()
    home.write_text(home.read_text().replace("limit: 2", "limit: 2, extra: 1"))
    write_instance(config)  # edited, and it names the variable
    home.write_text("telemetry: {enabled: false}\n")
    with pytest.raises(ConfigError, match=r"(?s)dagster.yaml, which somebody has edited.*remedy: add `storage"):
        write_instance(config)
    monkeypatch.delenv(POSTGRES_VARIABLE)
    write_instance(config)
    assert home.read_text() == "telemetry: {enabled: false}\n"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (URL, "PostgreSQL does not let us in, database dagster at 127.0.0.1:1: "),
        (URL.replace("+psycopg2", ""), "begins with postgresql://"),
        (URL.replace("/dagster", ""), "names no host or no database"),
        (URL.replace(":1/", ":port/"), "is no URL"),
        (PASSWORD, "begins with no scheme"),
        (f"postgresql+psycopg2://ada:1/{PASSWORD}@127.0.0.1:1/dagster", "has an @ behind its host"),
        (f"postgresql+psycopg2://ada:1#{PASSWORD}@127.0.0.1:1/dagster", "has an @ behind its host"),
        (f"postgresql+psycopg2://ada:{PASSWORD}%zz@127.0.0.1:1/dagster", "PostgreSQL does not let us in"),
    ],
)
def test_a_database_that_cannot_be_had(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2")
    assert postgres_place() is None
    monkeypatch.setenv(POSTGRES_VARIABLE, url)
    with pytest.raises(ConfigError) as caught:
        postgres_place()
    assert said in str(caught.value)
    assert "remedy" in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_up_and_doctor_say_so_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2")
    monkeypatch.setenv(POSTGRES_VARIABLE, URL)
    config = Config(folder=tmp_path, state=str(tmp_path / "state"))
    with pytest.raises(ConfigError, match="PostgreSQL does not let us in"), up.platform(config):
        pass
    assert not (config.state_dir / "logs").exists()
    assert up.running(config) is None
    (found,) = doctor._postgres()
    assert not found.ok
    assert "127.0.0.1:1" in found.found
    assert POSTGRES_VARIABLE in found.remedy
