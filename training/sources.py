"""Pictures and texts from anything that `datasets` reads: folders, parquet, webdataset, the Hub, streamed or not.

Rows are read in Arrow, where pictures are still files: a broken one is found here, counted, named and skipped.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image
from torch.utils.data import DataLoader, default_collate, get_worker_info
from transformers import TrainingArguments

from ..processing import LavitImageProcessor, load_image


logger = logging.getLogger(__name__)

SOURCE_KEYS = {
    "source",
    "data_files",
    "split",
    "image_column",
    "text_column",
    "codes_column",
    "question_column",
    "answer_column",
    "messages_column",
    "streaming",
    "shuffle_buffer",
    "seed",
    "num_proc",
}
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
TEXT_COLUMNS = ("text", "caption", "txt")
SHOWN_PROBLEMS = 5
READ_BATCH = 16


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


def process_state() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started."""
    return PartialState(cpu=not torch.cuda.is_available())


def open_rows(
    source: str, data_files: str | list[str] | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Opens a source; its rows come as Arrow tables, pictures undecoded.

    Args:
        source: a local folder, a builder of `datasets` (`parquet`, `webdataset`, `imagefolder`, ...), or a repository
            on the Hub.
        data_files: files, patterns or addresses, where `source` is a builder or holds more than is wanted.
        split: of the source.
        streaming: read as needed, instead of having all files on the disk first.

    Raises:
        ValueError: there is no such split.
        OSError: the source or its files do not exist, or cannot be read.
    """
    try:
        return load_dataset(source, data_files=data_files, split=split, streaming=streaming).with_format("arrow")
    except (DatasetsError, pa.ArrowException) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"the source {data_files or source} cannot be read: {error.__cause__ or error}") from error


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """The columns of a source; of a stream that does not declare them, those of its first row."""
    names = rows.column_names
    return next(rows.iter(1)).column_names if names is None else names


def find_column(names: list[str], wanted: str | None, usual: tuple[str, ...], kind: str) -> str | None:
    """The column `wanted`, or else the first of the `usual` ones; None if there is none of these.

    Raises:
        ValueError: `wanted` is no column.
    """
    if wanted is not None and wanted not in names:
        raise ValueError(f"the source has no {kind} column {wanted!r}; its columns are {names}")
    return wanted or next((name for name in usual if name in names), None)


def find_image_column(names: list[str], wanted: str | None = None) -> str:
    """The column of pictures.

    Raises:
        ValueError: there is none.
    """
    column = find_column(names, wanted, IMAGE_COLUMNS, "image")
    if column is None:
        raise ValueError(f"which column holds the pictures? Name it as image_column; the source's columns are {names}")
    return column


def row_name(value: dict | bytes | str | None, position: int) -> str:
    """What a row is called in messages: its number, and the file of its picture `value` where it has one."""
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    return f"row {position} ({path})" if path else f"row {position}"


def read_image(value: dict | bytes | str | None) -> Image.Image:
    """Decodes a picture to RGB.

    Args:
        value: what Arrow holds for it: `{"bytes": ..., "path": ...}`, the bytes of a file, or its path or address.

    Raises:
        UnusableRow: there is none, it is no image, truncated, or has too many pixels.
        OSError: an address cannot be reached.
    """
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if not value:
        raise UnusableRow("without a picture", "the column is empty")
    try:
        if isinstance(value, str):
            with fsspec.open(value, "rb") as file:
                value = file.read()
        return load_image(value)
    except (FileNotFoundError, ValueError) as error:
        raise UnusableRow("with a broken picture", str(error)) from error


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
        image_size: side in pixels to which the image processor resizes.
        seed: decides with epoch and position which of several texts is drawn.
    """

    def __init__(self, columns: Columns, image_size: int, seed: int):
        self.columns, self.seed = columns, seed
        self.processor = LavitImageProcessor(
            size={"height": image_size, "width": image_size}, do_normalize=False, do_rescale=False
        )

    def __call__(self, row: dict, position: int, epoch: int) -> dict:
        """`{"position": int}`, with `pictures` (3, S, S) uint8, `text`, `codes` (n,) and `turns` [(question, answer)]
        where there are such columns.

        Raises:
            UnusableRow: one of them is missing or broken.
        """
        item = {"position": position}
        if self.columns.image:
            pixels = self.processor(images=[read_image(row[self.columns.image])], return_tensors="pt")["pixel_values"]
            item["pictures"] = pixels[0].round().to(torch.uint8)
        if self.columns.text:
            draw = random.Random(f"text {self.seed} {epoch} {position}")
            item["text"] = draw.choice(read_texts(row[self.columns.text]))
        if self.columns.codes:
            item["codes"] = read_codes(row[self.columns.codes])
        if self.columns.has_turns:
            item["turns"] = read_turns(row, self.columns)
        return item


def check_rows(table: pa.Table, columns: Columns) -> dict[str, list[str]]:
    """Why each row cannot be used, as `reason` and `detail`, both empty where it can."""
    problems = {"reason": [], "detail": []}
    readers = ((columns.image, read_image), (columns.text, read_texts), (columns.codes, read_codes))
    for row in table.to_pylist():
        reason = detail = ""
        try:
            for column, read in readers:
                if column:
                    read(row[column])
            if columns.has_turns:
                read_turns(row, columns)
        except UnusableRow as error:
            reason, detail = error.reason, str(error)
        problems["reason"].append(reason)
        problems["detail"].append(detail)
    return problems


class SourceDataset(torch.utils.data.Dataset):
    """The usable rows of a source, in any order.

    All pictures are decoded once to find the broken ones, and the result is kept in the cache of `datasets`: so every
    process knows the same rows, and each comes exactly once an epoch.

    Args:
        rows: of [`open_rows`], not streamed.
        reader: makes items, whose `position` is the row's number in the source.
        num_proc: processes that look for broken pictures.

    Raises:
        ValueError: no row can be used.
    """

    def __init__(self, rows: Dataset, reader: RowReader, num_proc: int | None = None):
        self.rows, self.reader, self.epoch = rows.select_columns(reader.columns.names()), reader, 0
        with process_state().local_main_process_first():
            checked = self.rows.map(
                check_rows,
                batched=True,
                batch_size=READ_BATCH,
                fn_kwargs={"columns": reader.columns},
                remove_columns=self.rows.column_names,
                num_proc=num_proc,
                desc="looking for broken pictures",
            ).with_format("arrow")
        self.positions, skipped = [], SkippedRows()
        problems = (problem for table in checked.iter(1000) for problem in table.to_pylist())
        for position, problem in enumerate(problems):
            if problem["reason"]:
                skipped.add(self.name(position), **problem)
            else:
                self.positions.append(position)
        skipped.report(len(self.rows), "the source")

    def row(self, position: int) -> dict:
        return self.rows[position].to_pylist()[0]

    def name(self, position: int) -> str:
        image = self.reader.columns.image
        return row_name(self.row(position)[image] if image else None, position)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer's data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        position = self.positions[index]
        return self.reader(self.row(position), position, self.epoch)


class SourceStream(torch.utils.data.IterableDataset):
    """The usable rows of a streamed source, epoch after epoch without end; `epoch` is the one that is being read.

    Every process of the training and every worker of its data loader has rows of its own: whole shards (files) where
    these can be dealt out evenly, else every n-th row. Load it by [`stream_loader`], which does not split it again. A
    process with fewer usable rows than others starts its next epoch earlier, so none waits for another.

    Args:
        rows: of [`open_rows`], streamed.
        reader: makes items, whose `position` is `shard + row in the shard · number of shards`.
        shuffle_buffer: rows held undecoded, of which the next is drawn; shards are shuffled too. 0: in order.
        rank, num_ranks: of this process.

    Raises:
        ValueError: during iteration: of a whole epoch no row can be used.
    """

    def __init__(
        self, rows: IterableDataset, reader: RowReader, shuffle_buffer: int = 0, rank: int = 0, num_ranks: int = 1
    ):
        self.rows, self.reader, self.shuffle_buffer = (
            rows.select_columns(reader.columns.names()),
            reader,
            shuffle_buffer,
        )
        self.rank, self.num_ranks, self.epoch = rank, num_ranks, 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, num_parts = self.rank * num_workers + worker_id, self.num_ranks * num_workers
        image = self.reader.columns.image
        for epoch in itertools.count():
            self.epoch, total, skipped = epoch, 0, SkippedRows()
            for position, row in self._shuffle(self._rows(epoch, part, num_parts), f"{epoch} {part}"):
                total += 1
                try:
                    item = self.reader(row, position, epoch)
                except UnusableRow as error:
                    skipped.add(row_name(row[image] if image else None, position), error.reason, str(error))
                else:
                    yield item
            skipped.report(total, f"part {part + 1} of {num_parts} of the source, epoch {epoch}")

    def _rows(self, epoch: int, part: int, num_parts: int) -> Iterator[tuple[int, dict]]:
        num_shards = self.rows.num_shards
        shards, by_shard = list(range(num_shards)), num_shards % num_parts == 0
        if self.shuffle_buffer:
            random.Random(f"shards {self.reader.seed} {epoch}").shuffle(shards)
        for shard in shards:
            if by_shard and shard % num_parts != part:
                continue
            # `iter` leaves out the split among workers that datasets would make
            tables = self.rows.shard(num_shards, shard).iter(READ_BATCH)
            rows = ((table, i) for table in tables for i in range(len(table)))
            for number, (table, i) in enumerate(rows):
                if by_shard or (number + shard) % num_parts == part:
                    yield shard + number * num_shards, table.slice(i, 1).to_pylist()[0]

    def _shuffle(self, rows: Iterable, seed: str) -> Iterator:
        draw, held = random.Random(f"buffer {self.reader.seed} {seed}"), []
        for row in rows:
            if len(held) < self.shuffle_buffer:
                held.append(row)
            elif held:
                chosen = draw.randrange(len(held))
                yield held[chosen]
                held[chosen] = row
            else:
                yield row
        draw.shuffle(held)
        yield from held


def stream_loader(dataset: SourceStream, arguments: TrainingArguments, collate=default_collate) -> DataLoader:
    """What a trainer's `get_train_dataloader` returns for a stream, which splits itself among processes."""
    return DataLoader(
        dataset,
        batch_size=arguments.train_batch_size,
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        prefetch_factor=arguments.dataloader_prefetch_factor,
    )


def load_source(data: dict, image_size: int, with_pictures: bool = True) -> SourceDataset | SourceStream:
    """Pictures, texts, codes and instructions of a recipe's `data` section.

    Args:
        data: `source`, `data_files`, `split` and `streaming` as in [`open_rows`]; `image_column`, `text_column` (by
            default columns of usual names) and `codes_column`; `shuffle_buffer` of a stream; `num_proc` processes that
            look for broken pictures where it is none; `seed`. `question_column` and `answer_column`, or
            `messages_column` (of `role` and `content`), make instructions of the rows. All but `source` may be left
            out or null. A source with codes or instructions needs no pictures.
        image_size: side in pixels.
        with_pictures: False to read texts alone.

    Returns:
        items as [`RowReader`] makes them. `position` is the same number whatever the number of processes.

    Raises:
        ValueError: an unknown key, split or column; no row can be used.
        OSError: the source cannot be read.
    """
    if unknown := sorted(data.keys() - SOURCE_KEYS):
        raise ValueError(f"the data section has unknown keys {unknown}; known are {sorted(SOURCE_KEYS)}")
    data = {key: value for key, value in data.items() if value is not None}
    if not data.get("streaming") and data.get("shuffle_buffer"):
        raise ValueError("shuffle_buffer is for streaming: true; other sources are shuffled as a whole")
    reading = {key: data[key] for key in ("source", "data_files", "split", "streaming") if key in data}
    rows = open_rows(**reading)
    names = column_names(rows)
    codes, question, answer, messages = (
        find_column(names, data.get(f"{kind}_column"), (), kind)
        for kind in ("codes", "question", "answer", "messages")
    )
    if not with_pictures:
        image = None
    elif codes or question or messages:
        image = find_column(names, data.get("image_column"), IMAGE_COLUMNS, "image")
    else:
        image = find_image_column(names, data.get("image_column"))
    text = None
    if not (question or messages):
        text = find_column(names, data.get("text_column"), TEXT_COLUMNS, "text")
    if not with_pictures and text is None:
        raise ValueError(f"which column holds the texts? Name it as text_column; the source's columns are {names}")
    columns = Columns(image, text, codes, question, answer, messages)
    reader = RowReader(columns, image_size, data.get("seed", 0))
    if isinstance(rows, Dataset):
        return SourceDataset(rows, reader, data.get("num_proc"))
    state = process_state()
    return SourceStream(rows, reader, data.get("shuffle_buffer", 0), state.process_index, state.num_processes)
