"""The folder of one evaluation: settings that it was begun with, predictions as they come, results at the end.

    OUTPUT/settings.json        what the predictions depend on; another call with other settings is refused
    OUTPUT/predictions.jsonl    one line a sample, written as they come (predictions-K.jsonl by process K of several)
    OUTPUT/submission.json      in the data set's own form
    OUTPUT/results.json         figures, protocol, settings, versions, counts
    OUTPUT/results.md           a table beside the paper's row

A run that was killed goes on where it was: lines that are complete are kept, a torn one is written again. Batches are
always the same ones, so that what is written does not depend on where a run was cut or how many processes it had.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


PREDICTIONS = "predictions.jsonl"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """A JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class OutputFolder:
    """Predictions of one evaluation, by key.

    Args:
        path: of the folder; made if it is not there.
        process: number of this process among several, each of which writes a file of its own.
        processes: how many there are.

    Raises:
        OSError: the folder cannot be made, or `path` is a file.
    """

    def __init__(self, path: str | Path, process: int = 0, processes: int = 1):
        self.path = Path(path)
        if self.path.is_file():
            raise NotADirectoryError(f"{path} is a file: give the name of a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self.process, self.processes = process, processes
        own = PREDICTIONS if processes == 1 else f"predictions-{process}.jsonl"
        self.own_file = self.path / own

    def pin_settings(self, settings: dict) -> None:
        """Writes down what the predictions depend on, or checks that it is the same.

        Raises:
            ValueError: the folder was begun with other settings.
        """
        path = self.path / "settings.json"
        if not path.exists():
            if any(self.path.glob("predictions*.jsonl")):
                raise ValueError(f"{self.path} has predictions but no settings.json: give another folder")
            write_json(path, settings)
            return
        try:
            pinned = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: give another folder, or remove it") from error
        if not isinstance(pinned, dict):
            raise ValueError(f"{path} is no settings file of an evaluation: give another folder")
        wanted = json.loads(json.dumps(settings))
        changed = [key for key in wanted.keys() | pinned.keys() if pinned.get(key) != wanted.get(key)]
        if changed:
            changes = ", ".join(f"{key} {pinned.get(key)!r} (now {wanted.get(key)!r})" for key in sorted(changed))
            raise ValueError(f"{self.path} was begun with {changes}: give the same settings or another folder")

    def rows(self) -> dict[str, dict]:
        """The rows that are complete, by key. A torn line at the end of this process's own file is cut off."""
        rows: dict[str, dict] = {}
        for path in sorted(self.path.glob("predictions*.jsonl")):
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content) and path == self.own_file:
                os.truncate(path, whole)
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                try:
                    row = json.loads(line)
                    rows.setdefault(row["key"], row)
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{path}, line {number}, is no prediction of an evaluation: {error}") from error
        return rows

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows, each with its `key`; they are on the disk when this returns."""
        with open(self.own_file, "ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def merge(self, keys: Sequence[str]) -> list[dict]:
        """All rows in the order of their keys, now in one file.

        Raises:
            ValueError: some are missing.
        """
        rows = self.rows()
        if missing := [key for key in keys if key not in rows]:
            raise ValueError(f"{self.path} lacks {len(missing)} predictions, the first is {missing[0]}: run it again")
        ordered = [rows[key] for key in keys]
        with replacing(self.path / PREDICTIONS) as partial:
            partial.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered), encoding="utf-8"
            )
        for part in self.path.glob("predictions-*.jsonl"):
            part.unlink()
        return ordered


def pending_batches(items: Sequence[dict], done: set[str] | dict, batch_size: int) -> list[tuple[int, list[dict]]]:
    """Numbers and items of the batches that are not complete; item `i` is always in batch `i // batch_size`."""
    batches = [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    return [(i, batch) for i, batch in enumerate(batches) if any(item["key"] not in done for item in batch)]


def run_batches(
    output: OutputFolder,
    items: Sequence[dict],
    predict: Callable[[list[dict]], list[dict]],
    batch_size: int,
    unit: str,
) -> None:
    """Computes what is missing, this process's share of it, with a progress bar that shows the rate.

    Args:
        items: all samples, each with its `key`.
        predict: items of a batch to one row each, in order; `key` is added here.
        unit: what an item is called.
    """
    from tqdm import tqdm

    done = output.rows()
    mine = [
        (number, batch)
        for number, batch in pending_batches(items, done, batch_size)
        if number % output.processes == output.process
    ]
    left = sum(item["key"] not in done for _, batch in mine for item in batch)
    with tqdm(total=left, unit=unit, desc=f"{unit}s", disable=output.process > 0) as bar:
        for _, batch in mine:
            new = [
                {"key": item["key"], **row}
                for item, row in zip(batch, predict(batch), strict=True)
                if item["key"] not in done
            ]
            output.append(new)
            bar.update(len(new))
