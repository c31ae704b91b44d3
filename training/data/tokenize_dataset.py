"""Visual tokens of a whole data set, computed once: `lavit tokenize --dataset SOURCE --output DIR`.

The source's rows are cut into shards, and each becomes a parquet file, which is there whole or not at all. So a job
that was killed goes on with the shards that are not there; processes of one job (`accelerate launch`, `torchrun`) have
shards of their own and never meet, and the workers of a Ray Data job take the next one that is left.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from tqdm import tqdm
from transformers import PreTrainedConfig

from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.training.data.rows import (
    ImageFiles,
    SkippedRows,
    UnusableRow,
    find_image_column,
    open_rows,
    read_image,
    row_name,
    schema_of,
)
from modeling_lavit.training.distributed import process_state
from modeling_lavit.training.results import load_visual_tokenizer


logger = logging.getLogger(__name__)

SETTINGS_FILE = "tokenize.json"
NEW_COLUMNS = ("index", "codes", "length")
LEFTOVER_AGE = 3600  # seconds after which a file that was begun belongs to no process any more


def fingerprint(tokenizer: LavitVisualTokenizer) -> str:
    """A hash of everything that decides the codes: weights, the codebook among them, and configuration."""
    config = tokenizer.config.to_dict()
    own = sorted(config.keys() - PreTrainedConfig().to_dict().keys() - {"_name_or_path", "auto_map"})
    digest = hashlib.sha256(json.dumps([(key, config[key]) for key in own]).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class TokenizeBatch:
    """Turns the images of Arrow tables into visual tokens.

    Args:
        model: checkpoint of LaVIT, or of its visual tokenizer alone.
        image_column: of the images.
        files: that rows may name.
        keep_ratio: share of the patches to keep; as many as the selector keeps by default.
        keep_images: leave the images in the table.
        device, dtype: of the model.
    """

    def __init__(
        self,
        model: str,
        image_column: str,
        files: ImageFiles,
        keep_ratio: float | None = None,
        keep_images: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.image_column, self.files = image_column, files
        self.keep_ratio, self.keep_images = keep_ratio, keep_images
        tokenizer, self.image_processor = load_visual_tokenizer(model, dtype)
        self.tokenizer = tokenizer.to(device).eval()

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> tuple[pa.Table, list[dict]]:
        """
        Args:
            table: rows with their number `index` in the source.

        Returns:
            the rows whose image can be read, with `codes` (list of int32) and `length`; and of every other row
            `{"index", "row", "reason", "detail"}`.
        """
        images, usable, broken = [], [], []
        values, indices = table[self.image_column].to_pylist(), table["index"].to_pylist()
        for i, (value, index) in enumerate(zip(values, indices, strict=True)):
            try:
                images.append(read_image(value, self.files))
                usable.append(i)
            except UnusableRow as error:
                row = row_name(value, index)
                broken.append({"index": index, "row": row, "reason": error.reason, "detail": str(error)})
        codes = []
        if images:
            pixel_values = self.image_processor(images, return_tensors="pt").pixel_values.to(self.tokenizer.device)
            tokens = self.tokenizer.tokenize(pixel_values, keep_ratio=self.keep_ratio)
            codes = [row.tolist() for row in tokens.split()]
        table = table.take(pa.array(usable, pa.int64()))
        if not self.keep_images:
            table = table.drop_columns(self.image_column)
        table = table.append_column("codes", pa.array(codes, pa.list_(pa.int32())))
        return table.append_column("length", pa.array(map(len, codes), pa.int32())), broken


class ShardTokenizer:
    """The shards of a source and the files they become.

    Shard `k` holds the source's rows from `k · shard_size` on and becomes `shard-0000k.parquet`. Its broken rows, if
    it has any, are named in `shard-0000k.skipped.jsonl`.

    Args:
        output: folder of the files.
        source, data_files, split, streaming: see [`open_rows`].
        image_column: of the images; one of the usual names by default.
        batch_size: images that go through the model at once.
        shard_size: rows of the source for each file, a multiple of `batch_size`.
        allow_local_paths: see [`ImageFiles`].
        model, keep_ratio, keep_images, device, dtype: see [`TokenizeBatch`].

    Raises:
        ValueError: a size or a column does not fit.
        OSError: the source or the checkpoint cannot be read.
    """

    def __init__(
        self,
        output: str | Path,
        source: str,
        model: str,
        data_files: list[str] | None = None,
        split: str = "train",
        streaming: bool = False,
        image_column: str | None = None,
        batch_size: int = 64,
        shard_size: int = 4096,
        keep_ratio: float | None = None,
        keep_images: bool = False,
        allow_local_paths: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if shard_size % batch_size:
            raise ValueError(f"the shard size {shard_size} is no multiple of the batch size {batch_size}")
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
        rows = open_rows(source, data_files, split, streaming)
        schema = schema_of(rows)
        image_column = find_image_column(schema, image_column)
        if taken := [name for name in NEW_COLUMNS if name in schema.names]:
            raise ValueError(f"the source already has columns {taken}, which are names of what is computed here")
        images = [name for name, feature in (rows.features or {}).items() if isinstance(feature, ImageFeature)]
        self.rows = rows.remove_columns([name for name in images if name != image_column])
        self.output, self.batch_size, self.shard_size = Path(output), batch_size, shard_size
        files = ImageFiles.of_source(source, data_files, allow_local_paths)
        self.tokenize = TokenizeBatch(model, image_column, files, keep_ratio, keep_images, device, dtype)
        self.settings = {
            "model": model,
            "fingerprint": fingerprint(self.tokenize.tokenizer),
            "dtype": str(dtype).removeprefix("torch."),
            "source": source,
            "data_files": data_files,
            "split": split,
            "streaming": streaming,
            "rows": None if streaming else len(rows),
            "image_column": image_column,
            "shard_size": shard_size,
            "keep_ratio": keep_ratio,
            "keep_images": keep_images,
        }
        if allow_local_paths:
            self.settings["allow_local_paths"] = True

    def pin_settings(self) -> None:
        """Writes down what the folder's files are made of, or checks that it is the same.

        Raises:
            ValueError: the folder was begun with other settings.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / SETTINGS_FILE
        for leftover in self.output.glob(f".{SETTINGS_FILE}.*"):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink(missing_ok=True)
        if not path.exists():
            # processes of one job may do it at once, and write the same
            with replacing(path) as partial:
                partial.write_text(json.dumps(self.settings, indent=2) + "\n")
        try:
            pinned = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): give another folder") from error
        if not isinstance(pinned, dict):
            raise ValueError(f"{path} is a {type(pinned).__name__}, not the settings of a job: give another folder")
        now = self.settings
        if different := [key for key in {**now, **pinned} if pinned.get(key) != now.get(key)]:
            changes = ", ".join(f"{key} {pinned.get(key)!r} (now {now.get(key)!r})" for key in different)
            raise ValueError(f"{self.output} was begun with {changes}: give the same settings or another folder")

    def shards(self) -> Iterator[tuple[int, Iterator[pa.Table]]]:
        """Numbers of the shards, in order, each with its rows in batches; a shard that is passed over costs no work,
        except that a stream is read."""
        if isinstance(self.rows, Dataset):
            for shard in range(math.ceil(len(self.rows) / self.shard_size)):
                yield shard, self.tables(shard)
        else:
            tables = self.rows.iter(self.batch_size)
            batches = ((i * self.batch_size, table) for i, table in enumerate(tables))
            for shard, group in groupby(batches, key=lambda batch: batch[0] // self.shard_size):
                yield shard, (with_index(start, table) for start, table in group)

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """The rows of one shard in batches, of a source that is not streamed."""
        end = min((shard + 1) * self.shard_size, len(self.rows))
        for start in range(shard * self.shard_size, end, self.batch_size):
            yield with_index(start, self.rows[start : min(start + self.batch_size, end)])

    def path(self, shard: int) -> Path:
        return self.output / f"shard-{shard:05d}.parquet"

    def is_written(self, shard: int) -> bool:
        """Whether a shard's file is there; one that is damaged is named and counts as missing."""
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s is damaged (%s): it is computed again", path, error)
            return False
        return True

    def skipped_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".skipped.jsonl")

    def write(self, shard: int, tables: Iterable[pa.Table]) -> None:
        """Computes a shard and puts its files in place."""
        for leftover in self.output.glob(f".{self.path(shard).stem}.*"):  # of a job that was killed
            leftover.unlink()
        results = map(self.tokenize, tables)
        with replacing(self.path(shard)) as partial:
            table, all_broken = next(results)
            with pq.ParquetWriter(partial, table.schema) as writer:
                writer.write_table(table)
                for table, broken in results:
                    writer.write_table(table.cast(writer.schema))
                    all_broken += broken
            if all_broken:
                with replacing(self.skipped_path(shard)) as partial_skipped:
                    partial_skipped.write_text("".join(json.dumps(row) + "\n" for row in all_broken))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Writes the shards of a Ray batch `{"shard": (M,)}` and returns it."""
        for shard in batch["shard"].tolist():
            self.write(shard, self.tables(shard))
        return batch

    def summarize(self, shards: list[int], whole: bool) -> str:
        """Says what is in the files of some shards (`whole`: of all), and warns of what was skipped.

        Raises:
            ValueError: of the whole source no row can be used.
        """
        rows, skipped = 0, SkippedRows()
        for shard in shards:
            rows += pq.read_metadata(self.path(shard)).num_rows
            if self.skipped_path(shard).exists():
                for line in self.skipped_path(shard).read_text().splitlines():
                    broken = json.loads(line)
                    skipped.add(broken["row"], broken["reason"], broken["detail"])
        count = skipped.counts.total()
        if rows or whole:
            skipped.report(rows + count, "the source")
        note = f"; {count} skipped, see {self.output}/*.skipped.jsonl" if count else ""
        return f"{rows} rows tokenized in {len(shards)} shards of {self.output}{note}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is complete."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def with_index(start: int, table: pa.Table) -> pa.Table:
    """Puts the rows' numbers in front, and leaves out the source's notes on its own columns."""
    index = pa.array(range(start, start + len(table)), pa.int64())
    return table.add_column(0, "index", index).replace_schema_metadata(None)


def tokenize_dataset(source: str, output: str | Path, **options) -> str:
    """Computes the visual tokens of a source, in as many processes as `accelerate launch` or `torchrun` started.

    Args:
        source, output, options: see [`ShardTokenizer`].

    Returns:
        a line that says what this process did.
    """
    state = process_state()
    job = ShardTokenizer(output, source, **options)
    job.pin_settings()
    mine = []
    for shard, tables in tqdm(job.shards(), desc="shards", disable=state.process_index > 0):
        if shard % state.num_processes == state.process_index:
            mine.append(shard)
            if not job.is_written(shard):
                job.write(shard, tables)
    state.destroy_process_group()
    return job.summarize(mine, whole=state.num_processes == 1)
