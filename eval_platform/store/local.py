"""The store on a local folder. A file appears whole or not at all: written aside, synced, then linked or renamed."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eval_platform.errors import StoreError
from eval_platform.store.base import Entry, check_key, check_prefix

_TEMPORARY = ".tmp-"


class LocalStore:
    """Keys are paths below `folder`. Writers on several machines of one NFS export may share it."""

    requests_at_once = 1

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.uri = str(self.folder)

    def path(self, key: str) -> Path:
        """Where `key` lies on disk (readers of Parquet need it)."""
        check_key(key)
        return self.folder / key

    def list(self, prefix: str, delimiter: str | None = None, after: str | None = None) -> Iterator[Entry]:
        if delimiter not in (None, "/"):
            raise ValueError("a local store lists with the delimiter '/' or none")
        check_prefix(prefix)
        base = prefix.rpartition("/")[0]
        top = self.folder / base if base else self.folder
        head = f"{base}/" if base else ""
        for entry in _walk(top, head, recursive=delimiter is None):
            if entry.key.startswith(prefix) and (after is None or entry.key > after):
                yield entry

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            with self.path(key).open("rb") as file:
                file.seek(start)
                return file.read() if end is None else file.read(end - start)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(key) from None
        except OSError as error:
            raise _explain(error, self.path(key), "read") from error

    def put(self, key: str, body: bytes | Path) -> None:
        with self._aside(key, body) as (aside, path):
            os.replace(aside, path)
            _sync_folder(path.parent)

    def create(self, key: str, body: bytes | Path) -> bool:
        if self.path(key).exists():
            return False
        with self._aside(key, body) as (aside, path):
            try:
                os.link(aside, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _explain(error, self.path(key), "delete") from error

    @contextmanager
    def _aside(self, key: str, body: bytes | Path) -> Iterator[tuple[Path, Path]]:
        """The body, complete and synced, beside its final path; what is left of it is removed at the end."""
        path = self.path(key)
        aside = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                if isinstance(body, Path):
                    with body.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(body)
                file.flush()
                os.fsync(file.fileno())
            yield aside, path
        except OSError as error:
            raise _explain(error, path, "write") from error
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):  # renamed away, or its folder could not be made
                aside.unlink()


def _walk(folder: Path, head: str, *, recursive: bool) -> Iterator[Entry]:
    """Entries below `folder` in the order of their full keys, as S3 lists them ("a-b" before "a/b")."""
    try:
        found = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _explain(error, folder, "list") from error
    # A folder sorts as its name and the slash that follows it in every key below it.
    named = sorted((entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry) for entry in found)
    for name, entry in named:
        if entry.name.startswith(_TEMPORARY):
            continue
        if name.endswith("/"):
            if recursive:
                yield from _walk(Path(entry.path), f"{head}{name}", recursive=True)
            else:
                yield Entry(f"{head}{name}", 0, "")
        else:
            try:
                status = entry.stat()
            except FileNotFoundError:  # deleted since it was listed
                continue
            etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
            yield Entry(f"{head}{name}", status.st_size, etag, status.st_mtime_ns)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut (on file systems that refuse to sync a folder, it is theirs to keep)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


_REMEDIES = {
    errno.ENOSPC: "free space on that disk; work goes on where it stopped",
    errno.EDQUOT: "raise the quota or free space; work goes on where it stopped",
    errno.EACCES: "give this user the right to it, or set another `results` folder",
    errno.EPERM: "give this user the right to it, or set another `results` folder",
    errno.EROFS: "the file system is mounted read-only; set another `results` folder",
}


def _explain(error: OSError, path: Path, verb: str) -> StoreError:
    remedy = _REMEDIES.get(error.errno or 0, "look at the disk or mount")
    return StoreError(f"cannot {verb} {path}: {error.strerror or error}", remedy=remedy)
