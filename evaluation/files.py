"""Reading what users hold: JSON, JSON Lines and CSV files, folders of images, and what is wrong with them."""

import csv
import json
import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


SHOWN = 3  # examples of each finding
Id = Hashable


@dataclass
class Findings:
    """What is wrong with the data, and goes on all the same: named before anything runs, counted in results.json."""

    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: Any) -> None:
        self.cases.setdefault(kind, []).append(str(example))

    def lines(self) -> list[str]:
        """One line for each kind: how many, and the first few."""
        lines = []
        for kind, examples in self.cases.items():
            more = ", ..." if len(examples) > SHOWN else ""
            lines.append(f"{kind}: {len(examples)} ({', '.join(examples[:SHOWN])}{more})")
        return lines

    def counts(self) -> dict[str, int]:
        return {kind: len(examples) for kind, examples in self.cases.items()}


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}): save it in that encoding") from error


def read_json(path: str | Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is no JSON, or no text in UTF-8.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def read_records(path: str | Path) -> list[dict]:
    """The rows of a file of objects: a JSON list, or JSON Lines.

    Raises:
        ValueError: it holds anything else.
        OSError: it cannot be read.
    """
    text = read_text(path).strip()
    if text.startswith("{"):
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
    else:
        rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no list of objects")
    return rows


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first line."""
    csv.field_size_limit(2**24)
    try:
        return list(csv.DictReader(read_text(path).splitlines(keepends=True)))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def take(row: dict, name: str, types: type | tuple[type, ...], where: str) -> Any:
    """A value of a row.

    Raises:
        ValueError: it is missing or of another type.
    """
    if name not in row:
        raise ValueError(f"{where} has no {name!r}; its keys are {sorted(map(str, row))}")
    value = row[name]
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(one.__name__ for one in (types if isinstance(types, tuple) else (types,)))
        raise ValueError(f"{where}: {name!r} must be {wanted}, got {type(value).__name__} {value!r:.60}")
    return value


# what often lies beside an image under its name
NOTES = (".txt", ".json", ".xml", ".npz", ".caption")


@dataclass
class ImageFolder:
    """Finds images by the names that annotation files give them, in a folder or those below it.

    Raises:
        OSError: there is no such folder.
    """

    root: Path

    def __post_init__(self):
        self.root = Path(self.root)
        if not self.root.is_dir():
            raise NotADirectoryError(f"there is no folder of images at {self.root}")

    @cached_property
    def _found(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        names: dict[str, list[Path]] = {}
        stems: dict[str, list[Path]] = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = Path(folder, name)
                names.setdefault(name, []).append(path)
                if path.suffix.lower() not in NOTES:
                    stems.setdefault(path.stem, []).append(path)
        return names, stems

    def find(self, candidates: Iterable[str]) -> Path | None:
        """The first of some names that is there: as it stands, in any folder below, with any ending.

        Where several files have a name, that in the folders which the name has is it, else none: any would be a guess.
        """
        candidates = list(candidates)
        for name in candidates:
            path = self.root / name
            # a name that leads out of the folder is none of it
            if path.is_file() and path.resolve().is_relative_to(self.root.resolve()):
                return path
        names, stems = self._found
        found = [(name, names.get(Path(name).name, [])) for name in candidates]
        found += [(name, stems.get(Path(name).stem, [])) for name in candidates]
        for name, paths in found:
            above = Path(name).parent.parts
            same = [path for path in paths if above and path.parent.parts[-len(above) :] == above] or paths
            if len(same) == 1:
                return same[0]
        return None
