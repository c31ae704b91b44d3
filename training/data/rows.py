"""Rows of anything that `datasets` reads (folders, parquet, webdataset, the Hub; streamed or not) to items.

Rows are read in Arrow, where images are still files: a broken one is found here, counted, named and skipped.
"""

import logging
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets.config
import fsspec
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image

from modeling_lavit.processing import LavitImageProcessor, load_image


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
TEXT_COLUMNS = ("text", "caption", "txt")
SHOWN_PROBLEMS = 5


class UnusableRow(ValueError):
    """A row that training skips: `reason` is what is counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Columns:
    """Names of a source's columns; None for what it lacks."""

    image: str | None
    text: str | None
    codes: str | None
    question: str | None = None
    answer: str | None = None
    messages: str | None = None

    def __post_init__(self):
        if (self.question is None) != (self.answer is None):
            raise ValueError("question_column and answer_column come together")
        if self.messages is not None and self.question is not None:
            raise ValueError("turns are in messages_column, or in question_column and answer_column, not in both")

    @property
    def has_turns(self) -> bool:
        """Whether rows are instructions."""
        return self.messages is not None or self.question is not None

    def names(self) -> list[str]:
        every = (self.image, self.text, self.codes, self.question, self.answer, self.messages)
        return [name for name in every if name is not None]


class SkippedRows:
    """Counts rows that are skipped by reason, and warns of the first ones by name."""

    def __init__(self):
        self.counts = Counter()

    def add(self, name: str, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= SHOWN_PROBLEMS:
            logger.warning("skipped %s: %s (%s)", name, reason, detail)

    def report(self, total: int, where: str) -> None:
        """Warns of the totals, if there are any, among `total` rows.

        Raises:
            ValueError: every row was skipped.
        """
        skipped = self.counts.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        if skipped:
            logger.warning("%s: %d of %d rows are skipped: %s", where, skipped, total, reasons)
        if skipped == total:
            raise ValueError(f"{where} has no row that can be used ({total} rows: {reasons or 'it is empty'})")


# --- sources and their columns ---------------------------------------------------------------------------------------


def open_rows(
    path: str, data_files: str | list[str] | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Opens a source; its rows come as Arrow tables, images undecoded. Arguments: see [`Source`].

    Raises:
        ValueError: there is no such split.
        OSError: the source or its files do not exist, or cannot be read.
    """
    try:
        return load_dataset(path, data_files=data_files, split=split, streaming=streaming).with_format("arrow")
    except (DatasetsError, pa.ArrowException) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"the source {data_files or path} cannot be read: {error.__cause__ or error}") from error


def schema_of(rows: Dataset | IterableDataset) -> pa.Schema:
    """The columns of a source and their types; of a stream that does not declare them, those of its first row."""
    return rows.features.arrow_schema if rows.features else next(rows.iter(1)).schema


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    return _is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def _is_codes(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def _is_messages(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    struct = kind.value_type if is_list else kind
    return is_list and pa.types.is_struct(struct) and {"role", "content"} <= {field.name for field in struct}


# What a column of each kind may hold, and its usual names.
KINDS = {
    "image": (_is_image, "images: bytes, paths or addresses, or structs of bytes and path", IMAGE_COLUMNS),
    "text": (_is_text, "texts, or lists of texts", TEXT_COLUMNS),
    "codes": (_is_codes, "lists of integers", ()),
    "question": (_is_string, "texts", ()),
    "answer": (_is_string, "texts", ()),
    "messages": (_is_messages, "lists of structs of role and content", ()),
}


def find_column(schema: pa.Schema, kind: str, wanted: str | None) -> str | None:
    """The column `wanted`, or else the first of those with a usual name; None if there is none of these.

    Raises:
        ValueError: `wanted` is no column, or the column holds something else.
    """
    fits, expected, usual = KINDS[kind]
    if wanted is not None and wanted not in schema.names:
        raise ValueError(f"the source has no {kind} column {wanted!r}; its columns are {schema.names}")
    name = wanted or next((name for name in usual if name in schema.names), None)
    if name is not None and not (fits(schema.field(name).type) or pa.types.is_null(schema.field(name).type)):
        raise ValueError(f"the {kind} column {name!r} holds {schema.field(name).type}; it must hold {expected}")
    return name


def find_image_column(schema: pa.Schema, wanted: str | None = None) -> str:
    """The column of images.

    Raises:
        ValueError: there is none, or it holds something else.
    """
    column = find_column(schema, "image", wanted)
    if column is None:
        raise ValueError(
            f"which column holds the images? Name it as image_column; the source's columns are {schema.names}"
        )
    return column


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFiles:
    """Which files rows may name: a source of others must not read any file of this machine.

    Args:
        folders: those of the data; relative names start from the first one.
        allow_local_paths: whether files outside these folders may be read too.
    """

    folders: tuple[str, ...]
    allow_local_paths: bool = False

    @classmethod
    def of_source(
        cls, path: str, data_files: str | list[str] | None = None, allow_local_paths: bool = False
    ) -> "ImageFiles":
        """The folder of a source, or those of its files, and where `datasets` unpacks archives."""
        names = [data_files] if isinstance(data_files, str) else data_files or []
        folders = [path] if os.path.isdir(path) else []
        for name in names:
            if "://" not in name:
                fixed = name[: min((name.index(mark) for mark in "*?[{" if mark in name), default=len(name))]
                folders.append(os.path.dirname(os.path.join(path, fixed) if os.path.isdir(path) else fixed) or ".")
        folders.append(str(datasets.config.EXTRACTED_DATASETS_PATH))
        return cls(tuple(os.path.realpath(folder) for folder in folders), allow_local_paths)

    def read(self, name: str) -> bytes:
        """The content of a local file, of one in an archive (`zip://…::archive.zip`), or of an address.

        Raises:
            UnusableRow: it lies outside the folders, or is no regular file.
            OSError: an address cannot be reached.
        """
        place = name.split("::")[-1].removeprefix("file://").removeprefix("local://")
        if "://" in place:
            with fsspec.open(name, "rb") as file:
                return file.read()
        real = Path(os.path.realpath(os.path.join(self.folders[0], place)))
        if not self.allow_local_paths and not any(real.is_relative_to(folder) for folder in self.folders):
            detail = f"{name} is not in the folder of the data; allow_local_paths (--allow-local-paths) reads it too"
            raise UnusableRow("with a path outside the data", detail)
        if not real.is_file():  # devices and pipes have no end
            raise UnusableRow("with a broken image", f"there is no regular file {name}")
        if "::" not in name:
            return real.read_bytes()
        with fsspec.open(name, "rb") as file:
            return file.read()


def row_name(value: dict | bytes | str | None, position: int) -> str:
    """What a row is called in messages: its number, and the file of its image `value` where it has one."""
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    return f"row {position} ({path})" if path else f"row {position}"


def read_image(value: dict | bytes | str | None, files: ImageFiles) -> Image.Image:
    """Decodes an image to RGB.

    Args:
        value: what Arrow holds for it: `{"bytes": ..., "path": ...}`, the bytes of a file, or its path or address.
        files: which it may name.

    Raises:
        UnusableRow: there is none, it is no image, truncated, or has too many pixels, or may not be read.
        OSError: an address cannot be reached.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not value:
        raise UnusableRow("without an image", "the column is empty")
    try:
        return load_image(files.read(value) if isinstance(value, str) else value)
    except UnusableRow:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise UnusableRow("with a broken image", str(error)) from error


def read_texts(value: str | list[str] | None) -> list[str]:
    """The captions of a row, at least one.

    Raises:
        UnusableRow: there is none.
    """
    texts = [value] if isinstance(value, str) else value or []
    texts = [text for text in texts if text and text.strip()]
    if not texts:
        raise UnusableRow("without a text", "the column is empty")
    return texts


def read_codes(value: list[int] | None) -> torch.Tensor:
    """The visual codes (n,) of a row.

    Raises:
        UnusableRow: there are none.
    """
    if not value:
        raise UnusableRow("without codes", "the column is empty")
    return torch.tensor(value, dtype=torch.long)


def read_turns(row: dict, columns: Columns) -> list[tuple[str, str]]:
    """The questions of a row with their answers, at least one: those of its two columns, or of its messages, in which
    what the user says up to an answer is the question.

    Raises:
        UnusableRow: there is none.
    """
    if columns.messages is None:
        turns = [(row[columns.question], row[columns.answer])]
    else:
        turns, asked = [], []
        for message in row[columns.messages] or []:
            content = message["content"]
            if not isinstance(content, str):
                content = " ".join(block.get("text") or "" for block in content or [])
            content = content.replace("<image>", " ").strip()
            if message["role"] != "assistant":
                asked.append(content)
            else:
                turns.append((" ".join(asked).strip(), content))
                asked = []
    turns = [(question.strip(), answer.strip()) for question, answer in turns if question and answer]
    if not turns:
        raise UnusableRow("without a question and its answer", "the columns are empty")
    return turns


class RowReader:
    """Rows to items.

    Args:
        columns: of the source.
        files: that its rows may name.
        image_size: side in pixels to which the image processor resizes.
        seed: decides with epoch and position which of several texts is drawn.
    """

    def __init__(self, columns: Columns, files: ImageFiles, image_size: int, seed: int):
        self.columns, self.files, self.seed = columns, files, seed
        self.processor = LavitImageProcessor(
            size={"height": image_size, "width": image_size}, do_normalize=False, do_rescale=False
        )

    def __call__(self, row: dict, position: int, epoch: int) -> dict:
        """`{"position": int}`, with `images` (3, S, S) uint8, `text`, `codes` (n,) and `turns` [(question, answer)]
        where there are such columns.

        Raises:
            UnusableRow: one of them is missing or broken.
        """
        item = {"position": position}
        if self.columns.image:
            image = read_image(row[self.columns.image], self.files)
            pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"]
            item["images"] = pixels[0].round().to(torch.uint8)
        if self.columns.text:
            draw = random.Random(f"text {self.seed} {epoch} {position}")
            item["text"] = draw.choice(read_texts(row[self.columns.text]))
        if self.columns.codes:
            item["codes"] = read_codes(row[self.columns.codes])
        if self.columns.has_turns:
            item["turns"] = read_turns(row, self.columns)
        return item


def check_rows(table: pa.Table, columns: Columns, files: ImageFiles) -> dict[str, list[str]]:
    """Why each row cannot be used, as `reason` and `detail`, both empty where it can."""
    problems = {"reason": [], "detail": []}
    for row in table.to_pylist():
        reason = detail = ""
        try:
            if columns.image:
                read_image(row[columns.image], files)
            if columns.text:
                read_texts(row[columns.text])
            if columns.codes:
                read_codes(row[columns.codes])
            if columns.has_turns:
                read_turns(row, columns)
        except UnusableRow as error:
            reason, detail = error.reason, str(error)
        problems["reason"].append(reason)
        problems["detail"].append(detail)
    return problems
