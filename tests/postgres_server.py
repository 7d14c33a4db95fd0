"""A real PostgreSQL for tests, on a free port of 127.0.0.1, its data in a folder that goes with it.

    python -m tests.postgres_server            (`make test-postgres`) the tests of a team's instance
    python -m tests.postgres_server COMMAND    any command, told of the server as the tests are

It asks for a password, as a team's does.
"""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import servers

# Names a server that runs already: what this program starts. Its user may make databases.
SERVER = "TEST_POSTGRES"
USER = "postgres"  # initdb refuses root


class ServerError(Exception):
    """The server cannot be had; says why, and what to do."""


@contextmanager
def postgres_server() -> Iterator[str]:
    """postgresql+psycopg2://user:password@host:port, without a database. Raises ServerError."""
    folder = _programs()
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(USER)
        except KeyError:
            raise ServerError(
                f"no user {USER}, and PostgreSQL does not run as root: apt-get install postgresql"
            ) from None
        as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    else:
        as_user = []
    password = secrets.token_urlsafe(12)
    with tempfile.TemporaryDirectory(prefix="postgres-") as made:
        data, said = Path(made) / "data", Path(made) / "password"
        said.write_text(password)
        if as_user:
            for path in (Path(made), said):
                shutil.chown(path, USER)
        begin = [*as_user, folder / "initdb", "-D", data, "-U", "tester", "--no-sync", "-E", "UTF8", "--locale=C"]
        _do([*begin, "--auth=scram-sha-256", f"--pwfile={said}"])
        (port,) = servers.free_ports(1)
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {made} -c fsync=off -c shared_buffers=32MB"
        control = [*as_user, folder / "pg_ctl", "-D", data, "-w"]
        _do([*control, "-l", Path(made) / "log", "-o", options, "start"])
        try:
            yield f"postgresql+psycopg2://tester:{password}@127.0.0.1:{port}"
        finally:
            _do([*control, "-m", "immediate", "stop"])


@contextmanager
def postgres_database(server: str, name: str) -> Iterator[str]:
    """The URL of a new, empty database."""
    import psycopg2

    def do(statement: str) -> None:
        connection = psycopg2.connect(f"{server.replace('+psycopg2', '')}/postgres")
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.close()

    do(f'create database "{name}"')
    try:
        yield f"{server}/{name}"
    finally:
        do(f'drop database "{name}" with (force)')


def _programs() -> Path:
    """The folder of initdb and pg_ctl; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    raise ServerError("no initdb here: apt-get install postgresql (as root)")


def _do(command: list[str | Path]) -> None:
    # Not captured by a pipe: the server that pg_ctl starts would hold it open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, timeout=120)
        if done.returncode:
            output.seek(0)
            raise ServerError(f"{command[-1]} ended with {done.returncode}: {output.read().decode(errors='replace')}")


def main() -> int:
    tests = [sys.executable, "-m", "pytest", str(Path(__file__).parent / "test_team.py")]
    try:
        with postgres_server() as url:
            return subprocess.run(sys.argv[1:] or tests, env={**os.environ, SERVER: url}, check=False).returncode
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
