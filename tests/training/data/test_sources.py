"""Any source of `datasets` becomes the same items; what is broken in it is counted, named and skipped."""

import io
import itertools
import json
import logging
import os
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from modeling_lavit.training.data.datasets import SourceStream, load_data, load_source, stream_loader
from modeling_lavit.training.recipe import Data


SIZE = 8


def load(data: dict, **options):
    """The data set of a recipe's section."""
    return load_source(Data(**data), SIZE, **options)


def png(number: int) -> bytes:
    """An image of 20x10 pixels in one colour, which tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (number, 2 * number, 255 - number)).save(file, "png")
    return file.getvalue()


def image_of(number: int) -> torch.Tensor:
    colour = torch.tensor([number, 2 * number, 255 - number], dtype=torch.uint8)
    return colour[:, None, None].expand(3, SIZE, SIZE)


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(file, "jpeg")
    return file.getvalue()[:500]


def huge_png() -> bytes:
    """An image that says it has 20000x20000 pixels, in a few bytes."""
    content = bytearray(png(0))
    content[16:24] = (20000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


BROKEN = {1: b"no image", 3: truncated_jpeg(), 4: huge_png()}
COUNT = 10


def images() -> list[bytes]:
    return [BROKEN.get(i, png(i)) for i in range(COUNT)]


def texts() -> list[str]:
    return [f"image {i}" if i != 6 else " " for i in range(COUNT)]


USABLE = [0, 2, 5, 7, 8, 9]


def image_folder(folder: Path) -> dict:
    folder.mkdir()
    for i, content in enumerate(images()):
        (folder / f"{i}.png").write_bytes(content)
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(folder)}


def parquet(folder: Path, num_files: int = 1) -> dict:
    folder.mkdir()
    files = [{"bytes": content, "path": None} for content in images()]
    table = pa.table({"other": list(range(COUNT)), "image": files, "caption": texts()})
    for i, part in enumerate(np.array_split(np.arange(COUNT), num_files)):
        pq.write_table(table.take(part), folder / f"{i}.parquet")
    return {"path": "parquet", "data_files": f"{folder}/*.parquet"}


def webdataset(folder: Path) -> dict:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, (content, text) in enumerate(zip(images(), texts(), strict=True)):
            for ending, data in (("jpg", content), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{i:03}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return {"path": "webdataset", "data_files": str(folder / "0.tar")}


def json_lines(folder: Path) -> dict:
    image_folder(folder)
    rows = [{"image": str(folder / f"{i}.png"), "text": [text, ""]} for i, text in enumerate(texts())]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "data_files": str(folder / "rows.jsonl")}


def one_epoch(stream: SourceStream) -> list[dict]:
    return list(itertools.takewhile(lambda _: stream.epoch == 0, stream))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", [image_folder, parquet, webdataset, json_lines])
def test_every_source_gives_the_same_items_without_its_broken_rows(tmp_path, caplog, make, streaming):
    source = load({**make(tmp_path / "data"), "streaming": streaming})
    items = one_epoch(source) if streaming else list(source)
    assert [item["position"] for item in items] == USABLE
    for item in items:
        assert item.keys() == {"position", "images", "text"}
        assert item["images"].dtype == torch.uint8 and torch.equal(item["images"], image_of(item["position"]))
        assert item["text"] == f"image {item['position']}"
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 5
    for row, words in (
        (1, "not an image"),
        (3, "truncated or damaged"),
        (4, "too many pixels"),
        (6, "without a text"),
    ):
        (message,) = [message for message in messages if message.startswith(f"skipped row {row}")]
        assert words in message
    assert "4 of 10 rows are skipped: 3 with a broken image, 1 without a text" in messages[-1]


def test_every_rank_and_worker_reads_rows_of_its_own_under_the_same_positions(tmp_path):
    many = load({**parquet(tmp_path / "four", num_files=4), "streaming": True})
    assert many.rows.num_shards == 4
    for stream in (many, load({**parquet(tmp_path / "one"), "streaming": True})):
        expected = {item["position"]: item["text"] for item in one_epoch(stream)}
        assert sorted(expected.values()) == [f"image {i}" for i in USABLE]
        for num_ranks, num_workers in ((2, 0), (1, 2), (2, 2), (3, 0)):
            read = Counter()
            for rank in range(num_ranks):
                part = SourceStream(stream.rows, stream.reader, rank=rank, num_ranks=num_ranks)
                if num_workers:
                    items = list(itertools.islice(DataLoader(part, None, num_workers=num_workers), 4 * COUNT))
                    for worker in range(num_workers):
                        # the loader takes turns
                        own = items[worker::num_workers]
                        again = [item["position"] for item in own].index(own[0]["position"], 1)
                        read.update((item["position"], item["text"]) for item in own[:again])
                else:
                    read.update((item["position"], item["text"]) for item in one_epoch(part))
            assert dict(read.keys()) == expected and set(read.values()) == {1}, (num_ranks, num_workers)


def test_two_ranks_share_the_rows_of_a_source_that_is_not_streamed(tmp_path):
    source = load(parquet(tmp_path / "data"))
    read = []
    for rank in range(2):
        loader = DataLoader(source, batch_size=1, num_workers=1)
        for batch in prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False):
            read += batch["position"].tolist()
    assert sorted(read) == USABLE


def test_a_stream_is_shuffled_anew_in_every_epoch_and_the_same_way_in_every_run(tmp_path):
    data = {**parquet(tmp_path / "data", num_files=2), "streaming": True, "shuffle_buffer": 4}
    runs = [[item["position"] for item in itertools.islice(load(data, seed=3), 18)] for _ in range(2)]
    in_order = [item["position"] for item in one_epoch(load({**data, "shuffle_buffer": 0}, seed=3))]
    assert runs[0] == runs[1]
    epochs = [runs[0][i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(epoch) == sorted(in_order) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, in_order)}) == 4


class Recorder(torch.nn.Module):
    """A model that only remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, position, images):
        self.seen.append(position.tolist())
        return {"loss": self.weight.sum() + 0 * images.float().mean()}


class SourceTrainer(Trainer):
    def get_train_dataloader(self):
        if isinstance(self.train_dataset, SourceStream):
            return stream_loader(self.train_dataset, self.args, self.args.train_batch_size, self.data_collator)
        return super().get_train_dataloader()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_with_the_rows_that_an_uncut_one_reads(tmp_path, streaming):
    data = {**parquet(tmp_path / "data", num_files=2), "streaming": streaming}
    data |= {"shuffle_buffer": 4} if streaming else {}

    def collate(items: list[dict]) -> dict:
        return torch.utils.data.default_collate([{key: item[key] for key in ("position", "images")} for item in items])

    def train(output: str, max_steps: int, resume: bool = False) -> list:
        arguments = TrainingArguments(
            str(tmp_path / output),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            dataloader_num_workers=2,
            save_steps=4,
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        model = Recorder()
        trainer = SourceTrainer(model, arguments, train_dataset=load(data), data_collator=collate)
        trainer.train(resume_from_checkpoint=resume)
        return model.seen

    whole = train("whole", 8)
    assert len(whole) == 8
    assert train("cut", 4) == whole[:4]
    assert train("cut", 8, resume=True) == whole[4:]


def test_one_of_several_captions_is_drawn_for_each_epoch(tmp_path):
    captions = [[f"{word} {i}" for word in ("one", "two", "three")] for i in range(3)]
    table = pa.table({"image": [{"bytes": png(i), "path": None} for i in range(3)], "captions": captions})
    pq.write_table(table, tmp_path / "data.parquet")
    data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet"), "text_column": "captions"}
    source = load(data, seed=1)
    drawn = []
    for epoch in range(6):
        source.set_epoch(epoch)
        drawn.append([item["text"] for item in source])
        assert all(text in captions[i] for i, text in enumerate(drawn[-1]))
    assert {text for epoch in drawn for text in epoch if text.endswith("0")} == set(captions[0])
    stream = load({**data, "streaming": True}, seed=1)
    assert [item["text"] for item in itertools.islice(stream, 18)] == [text for epoch in drawn for text in epoch]


def test_codes_that_were_computed_before_need_no_images(tmp_path):
    table = pa.table({"codes": pa.array([[1, 2, 3], [], None, [4]], pa.list_(pa.int32())), "text": list("abcd")})
    pq.write_table(table, tmp_path / "data.parquet")
    data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet"), "codes_column": "codes"}
    first, last = load(data)
    assert first.keys() == {"position", "text", "codes"} and (first["position"], last["position"]) == (0, 3)
    assert first["codes"].dtype == torch.long and first["codes"].tolist() == [1, 2, 3] and last["text"] == "d"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "./missing"}, OSError, "missing"),
        ({"data_files": "missing.parquet"}, OSError, "missing.parquet"),
        ({"split": "test"}, ValueError, "test"),
        ({"image_column": "photo"}, ValueError, r"no image column 'photo'; its columns are \['other', 'image'"),
        ({"text_column": "title"}, ValueError, "no text column 'title'"),
        ({"codes_column": "codes"}, ValueError, "no codes column 'codes'"),
        ({"shuffle_buffer": 10}, ValueError, "shuffle_buffer is for streaming"),
    ],
)
def test_a_mistake_in_the_data_section_is_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load(parquet(tmp_path / "data") | changes)


def test_a_source_without_a_usual_image_column_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"photo": [b"", b""], "text": ["a", "b"]}), tmp_path / "data.parquet")
    data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet")}
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"image_column; the source's columns are \['photo', 'text'\]"):
            load({**data, "streaming": streaming})


def test_a_file_that_is_no_parquet_is_an_error(tmp_path):
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(OSError, match="data.parquet cannot be read: Parquet magic bytes not found"):
        load({"path": "parquet", "data_files": str(tmp_path / "data.parquet")})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_in_which_everything_is_broken_is_an_error(tmp_path, streaming):
    pq.write_table(pa.table({"image": [b"no image"] * 7}), tmp_path / "data.parquet")
    data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet"), "streaming": streaming}
    with pytest.raises(ValueError, match=r"no row that can be used \(7 rows: 7 with a broken image\)"):
        next(iter(load(data)))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("image", [{"name": "a.png", "size": 3}], r"the image column 'image' holds struct<.*>; it must hold images"),
        ("image", [3], "the image column 'image' holds int64"),
        ("text", [3], "the text column 'text' holds int64; it must hold texts"),
        ("codes", ["1 2"], "the codes column 'codes' holds string; it must hold lists of integers"),
        (
            "messages",
            [["hello"]],
            "the messages column 'messages' holds list<.*>; it must hold lists of structs of role",
        ),
    ],
)
def test_a_column_that_holds_something_else_is_named(tmp_path, column, values, message):
    table = {"image": [png(0)], "text": ["a"]} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    data = {"path": "parquet", "data_files": str(tmp_path / "data.parquet")}
    data |= {f"{column}_column": column} if column not in ("image", "text") else {}
    with pytest.raises(ValueError, match=message):
        load(data)


def named_files(tmp_path: Path, names: list[str]) -> dict:
    """Parquet in a folder of its own whose rows name files."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inside.png").write_bytes(png(7))
    (tmp_path / "outside.png").write_bytes(png(8))
    pq.write_table(pa.table({"image": names, "text": ["a"] * len(names)}), tmp_path / "data" / "rows.parquet")
    return {"path": "parquet", "data_files": str(tmp_path / "data" / "*.parquet")}


def test_rows_name_files_of_the_datas_folder_alone(tmp_path, caplog):
    (tmp_path / "data-2").mkdir()
    outside = [
        str(tmp_path / "outside.png"),
        "../outside.png",
        f"file://{tmp_path}/outside.png",
        str(tmp_path / "data" / "link.png"),
        str(tmp_path / "data-2" / "twin.png"),
    ]
    data = named_files(tmp_path, ["inside.png", str(tmp_path / "data" / "inside.png"), *outside])
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "data-2" / "twin.png").write_bytes(png(8))
    items = list(load(data))
    assert [item["position"] for item in items] == [0, 1]
    assert all(torch.equal(item["images"], image_of(7)) for item in items)
    assert "5 with a path outside the data" in caplog.text and "allow_local_paths" in caplog.text
    allowed = list(load(data | {"allow_local_paths": True}))
    assert [item["position"] for item in allowed] == list(range(7))
    assert torch.equal(allowed[2]["images"], image_of(8))


def test_devices_and_pipes_are_never_read(tmp_path, caplog):
    data = named_files(tmp_path, ["inside.png", "/dev/zero", "pipe.png"])
    os.mkfifo(tmp_path / "data" / "pipe.png")
    assert len(load(data | {"allow_local_paths": True})) == 1
    assert caplog.text.count("there is no regular file") == 2


def test_a_share_of_the_rows_is_held_out_the_same_one_for_the_same_seed(tmp_path):
    data = Data(**parquet(tmp_path / "data"), validation=0.34)
    (train, held_out), again, other = (load_data(data, SIZE, seed) for seed in (0, 0, 1))
    assert len(held_out) == 2 and sorted(train.positions + held_out.positions) == USABLE
    assert again[1].positions == held_out.positions and other[1].positions != held_out.positions
    with pytest.raises(ValueError, match=r"data.validation=0.95 leaves none of 6 rows to train on"):
        load_data(data.model_copy(update={"validation": 0.95}), SIZE, 0)


def test_a_split_is_held_out_and_a_streamed_one_is_read_once(tmp_path):
    files = parquet(tmp_path / "data") | {"validation": "train[:5]"}
    assert load_data(Data(**files), SIZE, 0)[1].positions == [0, 2]
    stream, held_out = load_data(Data(**files | {"validation": "train", "streaming": True}), SIZE, 0)
    assert stream.epochs is None and [item["position"] for item in held_out] == USABLE
    with pytest.raises(ValueError, match="data.validation must be a split"):
        load_data(Data(**files | {"validation": 0.5, "streaming": True}), SIZE, 0)
