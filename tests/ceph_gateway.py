"""A real S3 server for tests: one node of Ceph with its gateway, on free ports of 127.0.0.1, its data in memory.

    python -m tests.ceph_gateway            (`make test-s3-real`) the tests of buckets, on this gateway
    python -m tests.ceph_gateway COMMAND    any command, told of the gateway as the tests are

Other than moto it asks who is asking, and its conditions are its own: nothing takes turns here. Whatever happens, its
four processes end with this one: the kernel kills each when its parent dies.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import servers
from tests.s3_server import CREDENTIALS, REAL_SERVER

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-mgr", "ceph-common")
PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "monmaptool", "ceph-authtool", "radosgw-admin")
PATIENCE_S = 120
# What a bucket must do, from the store's own tests up to a whole evaluation.
TESTS = (
    "test_store_face.py",
    "test_store_s3.py",
    "test_store_leases.py",
    "test_store_commits.py",
    "test_store_arrivals.py",
    "test_store_journal.py",
    "test_store_s3_faults.py",
    "test_checkpoints_buckets.py",
    "test_trainer_callback.py",
    "test_warehouse_s3.py",
    "test_store_s3_road.py",
)
# Daemons trust each other here; who asks the gateway must sign. Memstore keeps nothing on disk.
CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
ms bind msgr2 = false
ms bind ipv6 = false
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 939524096
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.asok
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
crash dir = {folder}/run
keyring = {folder}/keyring
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
mgr initial modules =
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 32
"""


class GatewayError(Exception):
    """The gateway cannot be had; says why, and what to do."""


@contextmanager
def ceph_gateway() -> Iterator[str]:
    """Its endpoint; whoever has CREDENTIALS may do everything there. Raises GatewayError."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise GatewayError(
            f"no {', '.join(missing)} here: apt-get install --no-install-recommends {' '.join(PACKAGES)} (as root)"
        )
    with tempfile.TemporaryDirectory(prefix="ceph-") as made:
        folder = Path(made)
        running: list[subprocess.Popen[bytes]] = []
        try:
            yield _started(folder, running)
        finally:
            servers.end(running)


def _started(folder: Path, running: list[subprocess.Popen[bytes]]) -> str:
    mon_port, port = servers.free_ports(2)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    for name in ("mon", "mgr", "osd", "rgw", "run", "log"):
        (folder / name).mkdir()
    where = {"folder": folder, "fsid": fsid, "mon_port": mon_port, "port": port}
    (folder / "ceph.conf").write_text(CONFIGURATION.format(**where))
    environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}

    def do(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        if done.returncode:
            raise GatewayError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def start(*command: str) -> None:
        out = folder / "log" / f"{command[0]}.out"
        running.append(servers.start(command, cwd=folder, env=environment, out=out))

    do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "monmap")
    do("ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    rights = [word for daemon in ("mon", "osd", "mgr") for word in ("--cap", daemon, "allow *")]
    do("ceph-authtool", "keyring", "--gen-key", "-n", "client.admin", *rights)
    do("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
    start("ceph-mon", "-i", "a", "-f")
    start("ceph-mgr", "-i", "x", "-f")
    number = do("ceph", "--connect-timeout", str(PATIENCE_S), "osd", "new", osd).strip()
    do("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", osd)
    for tries_left in (4, 3, 2, 1, 0):
        start("ceph-osd", "-i", number, "-f")
        try:
            _until(lambda: "1 up" in do("ceph", "osd", "stat"), "the object store", running, folder)
            break
        except GatewayError:
            # On a busy machine it may ask the monitor before it knows the cluster's id, and is refused ("wrong fsid").
            if running[-1].poll() is None or not tries_left:
                raise
            running.pop()
    start("radosgw", "-f", "-n", "client.rgw")
    _until(lambda: _listens(port), "the gateway", running, folder)
    key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    user = ("--uid=tests", "--display-name=tests", f"--access-key={key}", f"--secret-key={secret}")
    do("radosgw-admin", "user", "create", *user, "--max-buckets=0")
    return f"http://127.0.0.1:{port}"


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _until(ready: Callable[[], bool], what: str, running: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        ended = [one for one in running if one.poll() is not None]
        if ended or time.monotonic() > deadline:
            name = Path(str(ended[0].args[0] if ended else running[-1].args[0])).name  # type: ignore[index]
            said = (folder / "log" / f"{name}.out").read_text(errors="replace")[-2000:]
            raise GatewayError(f"{what} does not come up; {name} says: {said or 'nothing'}")
        time.sleep(0.2)


def main(command: list[str]) -> int:
    """The command's exit code; 2 where there is no gateway."""
    here = Path(__file__).parent
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "not [folder]", *(str(here / name) for name in TESTS)]
    servers.end_on_sigterm()
    try:
        began = time.monotonic()
        with ceph_gateway() as endpoint:
            print(f"a Ceph gateway at {endpoint} after {time.monotonic() - began:.0f} s", flush=True)
            environment = {**os.environ, **CREDENTIALS, REAL_SERVER: endpoint}
            return subprocess.run(command or tests, env=environment, check=False).returncode
    except GatewayError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
