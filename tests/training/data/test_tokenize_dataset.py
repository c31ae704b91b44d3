"""`lavit tokenize --dataset`: every usable row exactly once, however often the job is cut and however it is split."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image
from tiny import tiny_model, tiny_processor

from modeling_lavit.command_line import main
from modeling_lavit.training.data.datasets import load_source
from modeling_lavit.training.recipe import Data


ROOT = Path(__file__).parents[3]
COUNT, SHARDS = 98, 25
BROKEN = [5, 17, 97]
SIZES = ("--batch-size", "2", "--shard-size", "4")


def images() -> list[bytes]:
    draw = np.random.default_rng(0)
    contents = []
    for i in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
        contents.append(b"no image" if i in BROKEN else file.getvalue())
    return contents


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, ...]:
    """Arguments for two parquet files of images, texts and numbers, some images broken."""
    folder = tmp_path_factory.mktemp("source")
    contents = [{"bytes": content, "path": None} for content in images()]
    table = pa.table({"image": contents, "text": [f"text {i}" for i in range(COUNT)], "number": range(COUNT)})
    pq.write_table(table[:50], folder / "0.parquet")
    pq.write_table(table[50:], folder / "1.parquet")
    return ("--dataset", "parquet", "--data-files", f"{folder}/*.parquet")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(source, checkpoint, tmp_path_factory) -> Path:
    """What a job writes that nobody cuts."""
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    assert tokenize(*source, *SIZES, "--output", str(folder), "--model", checkpoint) == 0
    return folder


def tokenize(*arguments: str) -> int:
    return main(["tokenize", *arguments])


def contents(folder: Path) -> dict:
    """Rows of every shard, skipped rows, and whatever else there is."""
    files = {path.name: path for path in folder.iterdir()}
    assert not [name for name in files if name.startswith(".")]
    return {
        name: pq.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_text()
        for name, path in sorted(files.items())
    }


def test_every_readable_row_has_the_codes_that_the_model_gives_its_image(whole, checkpoint):
    rows = load_dataset("parquet", data_files=f"{whole}/*.parquet", split="train")
    assert len(list(whole.glob("*.parquet"))) == SHARDS
    readable = [i for i in range(COUNT) if i not in BROKEN]
    assert rows.column_names == ["index", "text", "number", "codes", "length"]
    assert rows["index"] == readable and rows["number"] == readable
    model, image_processor = tiny_model(), tiny_processor().image_processor
    originals = images()
    for row in rows:
        pixel_values = image_processor(originals[row["index"]], return_tensors="pt").pixel_values
        assert row["codes"] == model.get_image_tokens(pixel_values).codes.tolist()
        assert row["length"] == len(row["codes"])


def test_rows_that_cannot_be_read_are_named_and_counted(source, checkpoint, whole, tmp_path, capsys):
    skipped = [json.loads(line) for path in sorted(whole.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [row["index"] for row in skipped] == BROKEN
    assert all("not an image" in row["detail"] for row in skipped)
    # a job that has nothing left to do says it too
    assert tokenize(*source, *SIZES, "--output", str(whole), "--model", checkpoint) == 0
    expected = f"95 rows tokenized in {SHARDS} shards of {whole}; 3 skipped, see {whole}/*.skipped.jsonl\n"
    assert capsys.readouterr().out == expected


def test_the_shards_are_a_source_for_training(whole):
    data = Data(path="parquet", data_files=f"{whole}/*.parquet", codes_column="codes")
    items = list(load_source(data, image_size=16))
    assert len(items) == COUNT - len(BROKEN)
    assert (
        items[5]["text"] == "text 6"
        and items[5]["codes"].tolist() == contents(whole)["shard-00001.parquet"][1]["codes"]
    )


def test_images_can_be_kept_beside_their_codes(source, checkpoint, whole, tmp_path):
    assert tokenize(*source, "--keep-images", "--output", str(tmp_path), "--model", checkpoint) == 0
    data = Data(path="parquet", data_files=f"{tmp_path}/*.parquet", codes_column="codes", streaming=True)
    item = next(iter(load_source(data, image_size=16)))
    pixels = np.asarray(Image.open(io.BytesIO(images()[0]))).transpose(2, 0, 1)
    assert np.array_equal(item["images"], pixels)
    assert item["codes"].tolist() == contents(whole)["shard-00000.parquet"][0]["codes"]


def test_a_stream_gives_the_same_shards(source, checkpoint, whole, tmp_path):
    assert tokenize(*source, *SIZES, "--streaming", "--output", str(tmp_path), "--model", checkpoint) == 0
    expected, found = contents(whole), contents(tmp_path)
    assert expected.pop("tokenize.json") != found.pop("tokenize.json")
    assert found == expected


def test_finished_shards_stay_and_missing_ones_are_computed(source, checkpoint, whole, tmp_path):
    output = tmp_path / "tokens"
    assert tokenize(*source, *SIZES, "--output", str(output), "--model", checkpoint) == 0
    (output / "shard-00001.parquet").unlink()
    for leftover in (".shard-00001.parquet.unfinished", ".shard-00001.skipped.jsonl.unfinished"):
        (output / leftover).write_text("half a file")
    (output / ".tokenize.json.old").write_text("{")
    os.utime(output / ".tokenize.json.old", (0, 0))
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert tokenize(*source, *SIZES, "--output", str(output), "--model", checkpoint) == 0
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    assert contents(output) == contents(whole)


def test_other_settings_are_refused_in_a_folder_that_was_begun(source, checkpoint, whole, tmp_path, capsys):
    before = contents(whole)
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_processor().save_pretrained(other)
    for arguments, message in (
        ((*SIZES, "--keep-ratio", "0.5", "--model", checkpoint), "keep_ratio None (now 0.5)"),
        (("--batch-size", "2", "--shard-size", "8", "--model", checkpoint), "shard_size 4 (now 8)"),
        ((*SIZES, "--model", str(other)), "fingerprint"),
    ):
        assert tokenize(*source, *arguments, "--output", str(whole)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{whole} was begun with" in error and message in error
    assert contents(whole) == before


@pytest.mark.parametrize("name", ["final", "final/visual_tokenizer"])
def test_a_result_of_stage_one_is_a_model_too(source, checkpoint, whole, tmp_path, name):
    tiny_model().model.visual_tokenizer.save_pretrained(tmp_path / "final" / "visual_tokenizer")
    model = str(tmp_path / name)
    assert tokenize(*source, *SIZES, "--output", str(tmp_path / "tokens"), "--model", model) == 0
    expected, found = contents(whole), contents(tmp_path / "tokens")
    assert (
        json.loads(expected.pop("tokenize.json"))["fingerprint"]
        == json.loads(found.pop("tokenize.json"))["fingerprint"]
    )
    assert found == expected


@pytest.mark.slow
def test_a_killed_process_holds_up_no_other_and_a_rerun_completes_every_row_exactly_once(
    source, checkpoint, whole, tmp_path
):
    output = tmp_path / "tokens"
    job = [*source, *SIZES, "--output", str(output), "--model", checkpoint]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    survivor, killed = (
        subprocess.Popen(
            [sys.executable, "-m", "modeling_lavit.command_line", "tokenize", *job],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"{rank}.log").open("w"),
            text=True,
        )
        for rank in ("0", "1")
    )
    while not numbers(output) & set(range(1, SHARDS, 2)):
        assert killed.poll() is None, (tmp_path / "1.log").read_text()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert not killed.communicate()[0]
    line = survivor.communicate()[0]
    assert survivor.returncode == 0 and f"tokenized in {SHARDS // 2 + 1} shards" in line, line
    evens = set(range(0, SHARDS, 2))
    assert evens < numbers(output) < set(range(SHARDS))

    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert tokenize(*job) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(output) == contents(whole)


def numbers(output: Path) -> set[int]:
    return {int(path.stem.removeprefix("shard-")) for path in output.glob("*.parquet")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_ray_finishes_the_shards_of_another_job(source, checkpoint, whole, tmp_path):
    ray = pytest.importorskip("ray")
    output = tmp_path / "tokens"
    shutil.copytree(whole, output)
    for shard in (0, 1, 3, SHARDS - 1):
        (output / f"shard-{shard:05d}.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    try:
        start(ray)
        assert tokenize(*source, *SIZES, "--ray", "1", "--output", str(output), "--model", checkpoint) == 0
    finally:
        ray.shutdown()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(output) == contents(whole)


def start(ray, attempts: int = 3) -> None:
    """Starts Ray here. It gives itself 30 seconds, which on a busy machine may not be enough."""
    for attempt in range(attempts):
        try:
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
            return
        except Exception:
            ray.shutdown()
            if attempt == attempts - 1:
                raise


def test_without_ray_the_option_says_what_to_install(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "modeling_lavit.training.data.tokenize_ray", raising=False)
    assert tokenize("--dataset", "x", "--output", str(tmp_path / "new"), "--ray", "2", "--model", checkpoint) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err


DATA = tuple("--dataset parquet --data-files data.parquet --output new".split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give images, or --dataset and --output, and not both"),
        (("apple.png", "--dataset", "images", "--output", "new"), "and not both"),
        (("apple.png", "--output", "new"), "--output goes with --dataset"),
        (("apple.png", "--shard-size", "4"), "--shard-size goes with --dataset"),
        (("--dataset", "images"), "--dataset needs --output"),
        (("--dataset", "images", "--output", "file"), "file is a file"),
        (("--dataset", "images", "--output", "new", "--show", "kept.png"), "go with images"),
        (("--dataset", "images", "--output", "new", "--batch-size", "0"), "'0' is no positive whole number"),
        (("--dataset", "./missing", "--output", "new"), "missing"),
        ((*DATA, "--shard-size", "100"), "no multiple"),
        (
            (*DATA, "--keep-ratio", "2"),
            "keep_ratio must",
        ),
        ((*DATA, "--split", "test"), "test"),
        (
            (*DATA, "--image-column", "x"),
            "['image', 'length']",
        ),
        (DATA, "already has columns ['length']"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    pq.write_table(pa.table({"image": [b""], "length": [1]}), "data.parquet")
    try:
        code = tokenize(*arguments, "--model", checkpoint)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "file"]


def test_a_source_in_which_everything_is_broken_is_an_error(checkpoint, tmp_path, capsys):
    pq.write_table(pa.table({"image": [b"no image"] * 3}), tmp_path / "data.parquet")
    arguments = ("--data-files", str(tmp_path / "data.parquet"), "--output", str(tmp_path / "tokens"))
    assert tokenize("--dataset", "parquet", *arguments, "--model", checkpoint) == 2
    assert "no row that can be used (3 rows: 3 with a broken image)" in capsys.readouterr().err


def test_a_damaged_shard_is_named_and_computed_again(source, checkpoint, whole, tmp_path, caplog):
    output = tmp_path / "tokens"
    shutil.copytree(whole, output)
    (output / "shard-00002.parquet").write_bytes(b"PAR1")
    assert tokenize(*source, *SIZES, "--output", str(output), "--model", checkpoint) == 0
    assert "shard-00002.parquet is damaged" in caplog.text
    assert contents(output) == contents(whole)


@pytest.mark.parametrize(("settings", "message"), [("[1]", "is a list"), ("{", "is no JSON")])
def test_settings_of_another_kind_are_named(source, checkpoint, tmp_path, capsys, settings, message):
    (tmp_path / "tokenize.json").write_text(settings)
    assert tokenize(*source, *SIZES, "--output", str(tmp_path), "--model", checkpoint) == 2
    assert f"{tmp_path}/tokenize.json {message}" in capsys.readouterr().err


def test_local_paths_need_to_be_allowed(checkpoint, tmp_path, capsys):
    outside = tmp_path / "outside.png"
    outside.write_bytes(images()[0])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [str(outside)]}), tmp_path / "data" / "rows.parquet")
    arguments = (
        "--dataset",
        "parquet",
        "--data-files",
        str(tmp_path / "data" / "rows.parquet"),
        "--model",
        checkpoint,
    )
    assert tokenize(*arguments, "--output", str(tmp_path / "refused")) == 2
    assert "1 with a path outside the data" in capsys.readouterr().err
    assert tokenize(*arguments, "--output", str(tmp_path / "tokens"), "--allow-local-paths") == 0
    assert "1 rows tokenized" in capsys.readouterr().out
    assert tokenize(*arguments, "--output", str(tmp_path / "tokens")) == 2
    assert "allow_local_paths True (now None)" in capsys.readouterr().err
