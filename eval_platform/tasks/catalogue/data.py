"""What a dataset's module is given to find its rows with, and the card it shows.

Public items lie in one folder, $EVAL_PLATFORM_DATA, or on the Hugging Face hub. `Data` looks in both and notes what it
looked at, so that a task that is skipped says what was tried.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_platform.errors import NoData, TaskError
from eval_platform.tasks import hub as the_hub
from eval_platform.tasks.files import read_json
from eval_platform.tasks.sections import did_you_mean

__all__ = ["Card", "Data", "NoData", "no_config", "one_of"]

FOLDER_VARIABLE = "EVAL_PLATFORM_DATA"


@dataclass(frozen=True, slots=True)
class Card:
    """What people must know of a dataset.

    hub: its name on the Hugging Face hub, revision: the commit there that is meant (40 hex digits, None: the newest).
    files: what `rows` reads below $EVAL_PLATFORM_DATA, with {config} and {split} standing for themselves.
    """

    title: str
    homepage: str
    licence: str
    citation: str
    hub: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()


@dataclass
class Data:
    """The places where the rows of one dataset may be. tried: what was looked at in vain, a line each.

    Every method gives None, and adds to `tried`, when there is nothing; what is there and broken is a TaskError.
    """

    folder: Path | None
    tried: list[str] = field(default_factory=list)

    @classmethod
    def from_environment(cls) -> "Data":
        named = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(named) if named else None)

    def file(self, path: str) -> bytes | None:
        """The bytes of the file at `path`, or of `path`.gz without its compression."""
        if self.folder is None:
            self._in_vain(f"{FOLDER_VARIABLE} is not set")
            return None
        for name in (path, f"{path}.gz"):
            there = self.folder / name
            try:
                body = there.read_bytes()
                return gzip.decompress(body) if name.endswith(".gz") else body
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, EOFError, zlib.error) as error:
                raise TaskError(f"{there} cannot be read: {error}", remedy="mend the file or its rights") from error
        self._in_vain(f"{FOLDER_VARIABLE} has no {path}")
        return None

    def hub(
        self, name: str, config: str | None, split: str, revision: str | None = None
    ) -> list[dict[str, Any]] | None:
        """The rows of a split on the hub."""
        try:
            return the_hub.read(name, config, split, revision)
        except the_hub.Unreachable as error:
            self._in_vain(str(error))
            return None

    def from_hub(self, dataset: str, card: Card, config: str | None, split: str) -> list[dict[str, Any]]:
        """The rows of a split of `card.hub`: the last place to look. Raises NoData when they cannot be had."""
        assert card.hub is not None
        found = self.hub(card.hub, config, split, card.revision)
        if found is None:
            raise NoData(dataset, self.tried)
        return found

    def json(self, path: str) -> Any | None:
        """The one JSON value of a file."""
        body = self.file(path)
        if body is None:
            return None
        try:
            return json.loads(body.decode("utf-8-sig"))
        except ValueError as error:
            raise self._broken(path, "JSON", error) from error

    def jsonl(self, path: str) -> list[dict[str, Any]] | None:
        """The objects of a file with one a line."""
        body = self.file(path)
        if body is None:
            return None
        try:
            return read_json(body)
        except ValueError as error:
            raise self._broken(path, "JSON Lines", error) from error

    def csv(
        self, path: str, *, delimiter: str = ",", columns: Iterable[str] | None = None
    ) -> list[dict[str, str]] | None:
        """The lines of a CSV file, every value as the text that stands there. columns: of a file without a head."""
        body = self.file(path)
        if body is None:
            return None
        names = None if columns is None else list(columns)
        try:
            lines = list(csv.DictReader(io.StringIO(body.decode("utf-8-sig"), newline=""), names, delimiter=delimiter))
        except (ValueError, csv.Error) as error:
            raise self._broken(path, "CSV", error) from error
        for number, line in enumerate(lines, start=1):
            if None in line or None in line.values():
                raise self._broken(
                    path, "CSV", ValueError(f"record {number} has not as many values as there are names")
                )
        return lines

    def _in_vain(self, what: str) -> None:
        if what not in self.tried:
            self.tried.append(what)

    def _broken(self, path: str, kind: str, error: Exception) -> TaskError:
        return TaskError(f"{self.folder}/{path} is not {kind}: {error}", remedy="mend the file or copy it anew")


def one_of(dataset: str, what: str, value: str | None, known: Mapping[str, Any] | Iterable[str]) -> str:
    """`value`, when the dataset has it; what: "split" or "config". A typo must be an error, and not missing data."""
    there = list(known)
    if value in there:
        return value
    said = f"no {what} is named" if value is None else f"there is no {what} {value!r}{did_you_mean(value, there)}"
    raise TaskError(f"dataset {dataset}: {said}", remedy=f"name one of {', '.join(there)}")


def no_config(dataset: str, config: str | None) -> None:
    """Refuse a configuration where the dataset has none."""
    if config is not None:
        raise TaskError(f"dataset {dataset} has no configurations, so no {config!r}", remedy="remove config")
