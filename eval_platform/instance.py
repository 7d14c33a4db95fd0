"""Where does Dagster keep its runs? In SQLite files below the state folder, or in a team's PostgreSQL.

Which of them is said by $EVAL_PLATFORM_POSTGRES alone: its URL holds a password, so it stands in no file and is written
to none; DAGSTER_HOME names the variable. `docs/instances.md` is the how-to.

    python -m eval_platform.instance        writes DAGSTER_HOME alone
"""

import importlib.util
import os
import re
from importlib import resources
from urllib.parse import urlsplit

from eval_platform.config import Config, load_config
from eval_platform.errors import ConfigError

POSTGRES_VARIABLE = "EVAL_PLATFORM_POSTGRES"
# SQLAlchemy 2.1 takes postgresql:// for psycopg 3, with which dagster-postgres cannot listen for events.
POSTGRES_SCHEME = "postgresql+psycopg2"
ANSWER_SECONDS = 5
# Dagster runs at once: boards must not wait for evaluations to leave them a place.
LEAST_RUNS, RUNS_BESIDE = 8, 4


def instance_text(evaluations_at_once: int, *, postgres: bool) -> str:
    """The dagster.yaml of a box, or of a team where `postgres`."""
    runs = max(LEAST_RUNS, evaluations_at_once + RUNS_BESIDE)
    text = _template(postgres=postgres).replace("EVALUATE_LIMIT", str(evaluations_at_once))
    return text.replace("RUNS_LIMIT", str(runs))


def _template(*, postgres: bool) -> str:
    folder = resources.files("eval_platform")
    text = folder.joinpath("dagster.yaml").read_text(encoding="utf-8")
    if postgres:
        text += folder.joinpath("dagster_postgres.yaml").read_text(encoding="utf-8")
    return text


def write_instance(config: Config) -> None:
    """DAGSTER_HOME with our dagster.yaml, unless the user has put one there or edited ours.

    Raises ConfigError when $EVAL_PLATFORM_POSTGRES is set and the user's own file does not name it: runs would go to
    another place than the one that was asked for. OSError: the folder cannot be written.
    """
    config.dagster_home.mkdir(parents=True, exist_ok=True)
    target = config.dagster_home / "dagster.yaml"
    postgres = bool(os.environ.get(POSTGRES_VARIABLE))
    found = target.read_text(encoding="utf-8") if target.exists() else None
    if found is None or any(_is_ours(found, postgres=kind) for kind in (False, True)):
        # Cut off half-way it would be somebody's own file, which limits nothing.
        aside = target.with_name(f".dagster.yaml.{os.getpid()}")
        aside.write_text(instance_text(config.worker.slots, postgres=postgres), encoding="utf-8")
        os.replace(aside, target)
    elif postgres and POSTGRES_VARIABLE not in found:
        raise ConfigError(
            f"${POSTGRES_VARIABLE} is set, and {target}, which somebody has edited, does not use it",
            remedy=f"add `storage: {{postgres: {{postgres_url: {{env: {POSTGRES_VARIABLE}}}}}}}` to the file, or "
            "remove the file, or unset the variable",
        )


def _is_ours(text: str, *, postgres: bool) -> bool:
    pattern = re.sub("EVALUATE_LIMIT|RUNS_LIMIT", "[0-9]+", re.escape(_template(postgres=postgres)))
    return re.fullmatch(pattern, text) is not None


def postgres_place() -> str | None:
    """Where $EVAL_PLATFORM_POSTGRES points, as people may read it: database and host. None when it is not set.

    Asks the server. Raises ConfigError when the URL cannot be used, when its packages are not installed, or when the
    server does not let us in; no message holds the password.
    """
    url = os.environ.get(POSTGRES_VARIABLE)
    if not url:
        return None
    form = f"{POSTGRES_SCHEME}://user:password@host:5432/database"
    try:
        parts = urlsplit(url)
        place = f"database {parts.path.lstrip('/')} at {parts.hostname}:{parts.port or 5432}"
    except ValueError as error:  # `from None`: its text may hold a piece of the URL
        raise ConfigError(f"${POSTGRES_VARIABLE} is no URL: {type(error).__name__}", remedy=f"like {form}") from None
    if parts.scheme != POSTGRES_SCHEME:
        raise ConfigError(f"${POSTGRES_VARIABLE} begins with {parts.scheme or 'no scheme'}://", remedy=f"like {form}")
    if "@" in parts.path + parts.query + parts.fragment:  # it may be a piece of the password: nothing of it is told
        raise ConfigError(
            f"${POSTGRES_VARIABLE} has an @ behind its host",
            remedy="write / as %2F, ? as %3F and # as %23 in the password",
        )
    if not parts.hostname or not parts.path.lstrip("/"):
        raise ConfigError(f"${POSTGRES_VARIABLE} names no host or no database", remedy=f"like {form}")
    missing = [name for name in ("dagster_postgres", "psycopg2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"${POSTGRES_VARIABLE} is set, and {' and '.join(missing)} cannot be imported",
            remedy='pip install -c constraints.txt -e ".[postgres]"',
        )
    import psycopg2

    try:
        psycopg2.connect(url.replace(f"{POSTGRES_SCHEME}:", "postgresql:", 1), connect_timeout=ANSWER_SECONDS).close()
    except psycopg2.Error as error:
        # Of a URL that libpq cannot read it quotes a piece, which may be the password.
        said = str(error).strip() if isinstance(error, psycopg2.OperationalError) else type(error).__name__
        raise ConfigError(
            f"PostgreSQL does not let us in, {place}: {said}",
            remedy=f"start the server, make the database, or mend ${POSTGRES_VARIABLE}",
        ) from None
    return place


if __name__ == "__main__":  # for servers that are started one by one, not by `up`: docker/compose.yaml
    write_instance(load_config())
