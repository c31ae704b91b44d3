"""The usable rows of a source as data sets: in any order, or as an endless stream; and those held out of them."""

import copy
import itertools
import random
from collections.abc import Iterable, Iterator

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, default_collate, get_worker_info
from transformers import TrainingArguments

from modeling_lavit.training.data.rows import (
    Columns,
    ImageFiles,
    RowReader,
    SkippedRows,
    UnusableRow,
    check_rows,
    find_column,
    find_image_column,
    open_rows,
    row_name,
    schema_of,
)
from modeling_lavit.training.distributed import process_state
from modeling_lavit.training.recipe import Data, Source


READ_BATCH = 16


class SourceDataset(torch.utils.data.Dataset):
    """The usable rows of a source, in any order.

    All images are decoded once to find the broken ones, and the result is kept in the cache of `datasets`: so every
    process knows the same rows, and each comes exactly once an epoch.

    Args:
        rows: of [`open_rows`], not streamed.
        reader: makes items, whose `position` is the row's number in the source.
        num_proc: processes that look for broken images.

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
                fn_kwargs={"columns": reader.columns, "files": reader.files},
                remove_columns=self.rows.column_names,
                num_proc=num_proc,
                desc="looking for broken images",
            ).with_format("arrow")
        self.positions, skipped = [], SkippedRows()
        problems = (problem for table in checked.iter(1000) for problem in table.to_pylist())
        for position, problem in enumerate(problems):
            if problem["reason"]:
                skipped.add(self.name(position), **problem)
            else:
                self.positions.append(position)
        skipped.report(len(self.rows), "the source")

    def hold_out(self, share: float, seed: int) -> "SourceDataset":
        """Takes a share of the rows out, at least one, drawn by the seed, and returns them as a data set.

        Raises:
            ValueError: no row would be left.
        """
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise ValueError(f"data.validation={share} leaves none of {len(self)} rows to train on")
        drawn = set(random.Random(f"validation {seed}").sample(self.positions, count))
        held_out = copy.copy(self)
        held_out.positions = [position for position in self.positions if position in drawn]
        self.positions = [position for position in self.positions if position not in drawn]
        return held_out

    def row(self, position: int) -> dict:
        return self.rows[position].to_pylist()[0]

    def name(self, position: int) -> str:
        image = self.reader.columns.image
        return row_name(self.row(position)[image] if image else None, position)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        position = self.positions[index]
        return self.reader(self.row(position), position, self.epoch)


class SourceStream(torch.utils.data.IterableDataset):
    """The usable rows of a streamed source, epoch after epoch; `epoch` is the one that is being read.

    Every process of the training and every worker of its data loader has rows of its own: whole shards (files) where
    these can be dealt out evenly, else every n-th row. Load it by [`stream_loader`], which does not split it again. A
    process with fewer usable rows than others starts its next epoch earlier, so none waits for another.

    Args:
        rows: of [`open_rows`], streamed.
        reader: makes items, whose `position` is `shard + row in the shard · number of shards`.
        shuffle_buffer: rows held undecoded, of which the next is drawn; shards are shuffled too. 0: in order.
        rank, num_ranks: of this process.
        epochs: None: without end.

    Raises:
        ValueError: during iteration: of a whole epoch no row can be used.
    """

    def __init__(
        self,
        rows: IterableDataset,
        reader: RowReader,
        shuffle_buffer: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        epochs: int | None = None,
    ):
        self.rows, self.reader = rows.select_columns(reader.columns.names()), reader
        self.shuffle_buffer, self.epochs = shuffle_buffer, epochs
        self.rank, self.num_ranks, self.epoch = rank, num_ranks, 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, num_parts = self.rank * num_workers + worker_id, self.num_ranks * num_workers
        image = self.reader.columns.image
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
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


def stream_loader(dataset: SourceStream, arguments: TrainingArguments, batch_size: int, collate) -> DataLoader:
    """A loader for a stream, which splits itself among processes."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        prefetch_factor=arguments.dataloader_prefetch_factor,
    )


def collate_images(items: list[dict]) -> dict[str, torch.Tensor]:
    """Batches what the stages of images alone take: positions and images."""
    return default_collate([{key: item[key] for key in ("position", "images")} for item in items])


def load_source(
    data: Source, image_size: int, seed: int = 0, with_images: bool = True, held_out: bool = False
) -> SourceDataset | SourceStream:
    """The data set of a recipe's section. A source with codes or instructions needs no images.

    Args:
        image_size: side in pixels.
        seed: of the run.
        with_images: False to read texts alone.
        held_out: for validation: of a stream every rank reads the whole, once.

    Returns:
        items as [`RowReader`] makes them. `position` is the same number whatever the number of processes.

    Raises:
        ValueError: a split or column is not there; no row can be used.
        OSError: the source cannot be read.
    """
    if not data.streaming and data.shuffle_buffer:
        raise ValueError("shuffle_buffer is for streaming: true; other sources are shuffled as a whole")
    rows = open_rows(data.path, data.data_files, data.split, data.streaming)
    schema = schema_of(rows)
    codes, question, answer, messages = (
        find_column(schema, kind, getattr(data, f"{kind}_column"))
        for kind in ("codes", "question", "answer", "messages")
    )
    if not with_images:
        image = None
    elif codes or question or messages:
        image = find_column(schema, "image", data.image_column)
    else:
        image = find_image_column(schema, data.image_column)
    text = None if question or messages else find_column(schema, "text", data.text_column)
    if not with_images and text is None:
        raise ValueError(
            f"which column holds the texts? Name it as text_column; the source's columns are {schema.names}"
        )
    columns = Columns(image, text, codes, question, answer, messages)
    files = ImageFiles.of_source(data.path, data.data_files, data.allow_local_paths)
    reader = RowReader(columns, files, image_size, seed)
    if isinstance(rows, Dataset):
        return SourceDataset(rows, reader, data.num_proc)
    if held_out:
        return SourceStream(rows, reader, epochs=1)
    state = process_state()
    return SourceStream(rows, reader, data.shuffle_buffer, state.process_index, state.num_processes)


def load_data(
    data: Data, image_size: int, seed: int
) -> tuple[SourceDataset | SourceStream, SourceDataset | SourceStream | None]:
    """What a stage is trained on, and what it is validated on, None where the recipe names nothing.

    Raises:
        ValueError, OSError: see [`load_source`]; a share of a stream is asked for.
    """
    dataset = load_source(data, image_size, seed)
    if data.validation is None:
        return dataset, None
    if isinstance(data.validation, str):
        other = data.model_copy(update={"split": data.validation, "shuffle_buffer": 0})
        return dataset, load_source(other, image_size, seed, held_out=True)
    if isinstance(dataset, SourceStream):
        raise ValueError("data.validation must be a split: of a stream no share can be held out")
    return dataset, dataset.hold_out(data.validation, seed)
