"""What a test needs of the machine: a file system that is really full, and root without root's power over files.

Where the machine cannot give it the test is skipped, with what is missing; on a Debian machine as root nothing is.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest

from eval_platform.errors import SandboxError
from eval_platform.sandbox import describe


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """`folder`, made and mounted as a tmpfs of `size` ("64k", "2m"). Only root may mount."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a full disk needs a file system of its own, and there is no mount command")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs a tmpfs, which this user may not mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: what a test has started may still have a file of it open.
        subprocess.run(["umount", "--lazy", folder], check=True)


def without_power_over_files(command: Sequence[str]) -> list[str]:
    """`command` for a process that permissions bind: for root, one that gives its right to ignore them up."""
    if os.geteuid() != 0:
        return list(command)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root ignores permissions, and there is no setpriv (Debian's util-linux) to give that up")
    powers = "-dac_override,-dac_read_search"
    return [setpriv, f"--bounding-set={powers}", f"--inh-caps={powers}", *command]


def needs_sandbox() -> None:
    """Skips the test where no program can be run in the sandbox, saying what is missing."""
    missing = _sandbox_missing()
    if missing:
        pytest.skip(f"programs run in a sandbox only: {missing}")


@lru_cache(maxsize=1)
def _sandbox_missing() -> str:
    try:
        describe()
    except SandboxError as error:
        return " ".join(str(error).split())
    return ""
