"""`lavit evaluate captions` and `answers`: from files to figures, with predictions or with the embedded checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import modeling_lavit
from modeling_lavit.command_line import main
from modeling_lavit.evaluation.model_run import checkpoint_hash
from modeling_lavit.evaluation.output import OutputFolder, run_batches
from modeling_lavit.evaluation.reading import clean_question


FIXTURES = Path(__file__).parent.parent / "fixtures" / "evaluation"
RECORDS = Path(__file__).parent.parent / "fixtures" / "records"
BAD = FIXTURES / "bad"
IMAGES = FIXTURES / "images"
SCRIPT = Path(modeling_lavit.__file__).parent / "bin" / "lavit"


def run(*arguments) -> int:
    try:
        return main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_captions_of_a_file_are_scored_without_torch(tmp_path):
    folder = RECORDS / "captions"
    arguments = ["--annotations", folder / "references.json", "--predictions", folder / "predictions.json"]
    code = "import sys, runpy; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    command = [sys.executable, "-c", code, SCRIPT, "evaluate", "captions", *arguments, "--output", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr and "134.0" in done.stdout
    results = read(tmp_path / "out" / "results.json")
    assert all(abs(results[name] - value) < 1e-3 for name, value in read(folder / "scores.json").items())
    assert results["counts"] == {"images": 500, "scored": 500, "empty predictions": 6} and results["complete"]


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "gqa", "vizwiz"])
def test_answers_of_a_submission_file_are_scored(name, tmp_path, capsys):
    files = ["--questions", FIXTURES / f"questions_{name}.json"]
    if name in ("vqav2", "okvqa"):
        files += ["--annotations", FIXTURES / f"annotations_{name}.json"]
    predictions = FIXTURES / f"predictions_{name}.json"
    assert run("answers", *files, "--predictions", predictions, "--output", tmp_path) in (0, None)
    results = read(tmp_path / "results.json")
    # VQAv2: "Yes." where all ten say "yes", of which the official program normalises nothing
    wanted = {"vqav2": 100 * 2 / 3, "okvqa": 100, "gqa": 100 * 2 / 3, "vizwiz": 100 * 2 / 3}[name]
    assert results["overall"] == pytest.approx(wanted) and results["protocol"] == "official"
    assert read(tmp_path / "submission.json") == read(predictions)
    assert len(read(tmp_path / "by_question.json")) == results["ids"]["count"] == 3
    assert "LaVIT, paper" in capsys.readouterr().out


def test_the_embedded_checkpoint_captions_images_and_a_second_call_writes_nothing_again(tmp_path, capsys):
    arguments = ["captions", "--annotations", FIXTURES / "captions_nocaps.json", "--images", IMAGES, "--batch-size", 2]
    assert run(*arguments, "--output", tmp_path) in (0, None)
    results = read(tmp_path / "results.json")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in lines] == ["cat face", "bread", "red apple"]
    assert results["ROUGE_L"] == 1 and results["by_domain"].keys() == {"in-domain", "near-domain", "out-domain"}
    assert results["settings"]["checkpoint"] and results["versions"]["torch"] != "not installed"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    modified = (tmp_path / "settings.json").stat().st_mtime_ns
    assert run(*arguments, "--output", tmp_path) in (0, None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (tmp_path / "settings.json").stat().st_mtime_ns == modified
    capsys.readouterr()
    assert run(*arguments[:-1], 3, "--output", tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was begun with batch_size 2 (now 3)" in error


def test_the_embedded_checkpoint_answers_by_lavits_protocol(tmp_path):
    arguments = ["--questions", FIXTURES / "questions_vizwiz.json", "--images", IMAGES, "--protocol", "lavit"]
    assert run("answers", *arguments, "--output", tmp_path) in (0, None)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert all(set(row) == {"key", "answer", "answerable"} for row in rows)
    assert {row["image"] for row in read(tmp_path / "submission.json")} == {
        f"VizWiz_val_0000000{i}.jpg" for i in range(3)
    }
    assert "answerability" in read(tmp_path / "results.json")


def test_missing_and_broken_images_are_named_counted_and_left_out(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000074.jpg"):
        (tmp_path / "images" / name).write_bytes((IMAGES / name).read_bytes())
    (tmp_path / "images" / "COCO_val2014_000000000073.jpg").write_bytes(b"no image")
    arguments = ["--annotations", BAD / "captions_missing_image.json", "--images", tmp_path / "images"]
    assert run("captions", *arguments, "--output", tmp_path / "out") in (0, None)
    error = capsys.readouterr().err
    assert "missing images, left out: 1 (COCO_val2014_000000000999.jpg)" in error and "doubled ids" in error
    results = read(tmp_path / "out" / "results.json")
    assert results["counts"] == {
        "images": 4,
        "scored": 2,
        "empty reference captions, left out": 1,
        "doubled ids, the first of each is used": 1,
        "missing images, left out": 1,
        "broken images, left out": 1,
    }
    assert not results["complete"]


def test_a_limit_draws_the_same_samples_with_the_same_seed(tmp_path):
    arguments = ["--annotations", RECORDS / "captions/references.json", "--limit", 20]
    arguments += ["--predictions", RECORDS / "captions/predictions.json"]
    ids = []
    for i, seed in enumerate((1, 1, 2)):
        assert run("captions", *arguments, "--seed", seed, "--output", tmp_path / str(i)) in (0, None)
        results = read(tmp_path / str(i) / "results.json")
        assert results["counts"]["scored"] == 20 and not results["complete"]
        ids.append(results["ids"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["captions", "--annotations", "nowhere.json", "--images", "x"], "nowhere.json"),
        (["captions", "--annotations", FIXTURES / "captions_coco.json"], "give either --images"),
        (["captions", "--annotations", FIXTURES / "captions_coco.json", "--images", "nowhere"], "no folder of images"),
        (["captions", "--annotations", FIXTURES / "captions_coco.json", "--images", BAD], "has none of the 3 images"),
        (["captions", "--annotations", BAD / "captions_latin1.json", "--images", IMAGES], "no text in UTF-8"),
        (["answers", "--questions", FIXTURES / "questions_vqav2.json"], "give either --images"),
        (
            ["answers", "--questions", FIXTURES / "questions_gqa.json", "--predictions", BAD / "not_json.json"],
            "not_json.json, line 1, is no JSON",
        ),
        (
            ["answers", "--questions", FIXTURES / "questions_gqa.json", "--predictions"]
            + [FIXTURES / "predictions_vqav2.json"],
            "none of the 3 predictions is for these annotations",
        ),
        (
            ["captions", "--annotations", FIXTURES / "captions_coco.json", "--model", "x", "--predictions"]
            + [FIXTURES / "predictions_coco.json"],
            "--model is of a model, but --predictions exist already",
        ),
        (["answers", "--protocol", "vqa"], "invalid choice: 'vqa'"),
        (["--model", "x"], "KIND"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_and_leave_no_results(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = [] if arguments[0] == "--model" else ["--output", "out"]
    assert run(*arguments, *output) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert not (tmp_path / "out" / "results.json").exists()


def test_captions_without_file_names_are_of_images_that_are_missing(tmp_path, capsys):
    data = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    (tmp_path / "captions.json").write_text(json.dumps(data))
    arguments = [
        "--annotations",
        tmp_path / "captions.json",
        "--images",
        FIXTURES / "images",
        "--output",
        tmp_path / "out",
    ]
    assert run("captions", *arguments) == 2
    assert "has none of the 1 images, such as 1" in capsys.readouterr().err


def test_other_questions_under_the_same_ids_are_not_taken_for_answered(tmp_path, capsys):
    questions = json.loads((FIXTURES / "questions_gqa.json").read_text())
    path = tmp_path / "questions_gqa.json"
    for text in ("what is it?", "which style is this?"):
        for row in questions.values():
            row["question"] = text
        path.write_text(json.dumps(questions))
        code = run("answers", "--questions", path, "--images", FIXTURES / "images", "--output", tmp_path / "out")
        assert code == (0 if text == "what is it?" else 2)
    assert "text_hash" in capsys.readouterr().err


def test_questions_are_cleaned_as_the_authors_do():
    assert clean_question('What "is" this (thing): #1?  ') == "what is this thing 1?"
    assert clean_question("What now.  ") == "what now"
    assert len(clean_question("word " * 80).split()) == 50


def items(count: int) -> list[dict]:
    return [{"key": str(i)} for i in range(count)]


def test_lines_torn_by_a_kill_are_written_again_and_no_other(tmp_path):
    folder, computed = OutputFolder(tmp_path), []

    def predict(batch):
        computed.extend(item["key"] for item in batch)
        return [{"text": item["key"] * 2} for item in batch]

    run_batches(folder, items(5), predict, 2, "item")
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"3"') + 8])
    computed.clear()
    run_batches(folder, items(5), predict, 2, "item")
    assert computed == ["2", "3", "4"]  # the batch of the torn line as it always is, and what follows
    assert path.read_bytes() == whole
    assert [row["text"] for row in folder.merge([str(i) for i in range(5)])] == ["00", "11", "22", "33", "44"]


def test_processes_share_the_batches_and_another_number_of_them_goes_on(tmp_path):
    def predict(batch):
        return [{"text": item["key"]} for item in batch]

    for process in (0, 1):
        run_batches(OutputFolder(tmp_path, process, 3), items(10), predict, 2, "item")
    written = {path.name: path.read_text().count("\n") for path in tmp_path.glob("predictions-*")}
    assert written == {"predictions-0.jsonl": 4, "predictions-1.jsonl": 4}
    folder = OutputFolder(tmp_path)
    with pytest.raises(ValueError, match="lacks 2 predictions, the first is 4"):
        folder.merge([str(i) for i in range(10)])
    run_batches(folder, items(10), predict, 2, "item")
    assert [row["key"] for row in folder.merge([str(i) for i in range(10)])] == [str(i) for i in range(10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl"]


KILLED = """
import sys, time
from modeling_lavit.evaluation.model_run import checkpoint_hash
from modeling_lavit.evaluation.output import OutputFolder, run_batches
def predict(batch):
    time.sleep(0.02)
    return [{"text": "x" * 2000} for _ in batch]
folder = OutputFolder(sys.argv[1])
run_batches(folder, [{"key": str(i)} for i in range(400)], predict, 4, "item")
folder.merge([str(i) for i in range(400)])
"""


def test_a_killed_run_loses_and_repeats_nothing(tmp_path):
    command = [sys.executable, "-c", KILLED.replace("modeling_lavit.evaluation", "evaluation"), str(tmp_path)]
    root = Path(modeling_lavit.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    path = tmp_path / "predictions.jsonl"
    for _ in range(3):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while not path.exists() or path.stat().st_size <= before + 5000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == 0
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys == [str(i) for i in range(400)]


def test_results_written_into_a_checkpoint_leave_it_the_same(tmp_path):
    """Else an evaluation whose output lies in the checkpoint's folder could not be resumed."""
    for name in (
        "config.json",
        "unet/config.json",
        "model.safetensors",
        "evaluation/vqav2/settings.json",
        "figures.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = checkpoint_hash(str(tmp_path))
    (tmp_path / "evaluation/vqav2/results.json").write_text("{}")
    (tmp_path / "figures.json").write_text('{"a": 1}')
    assert checkpoint_hash(str(tmp_path)) == before
    for name in ("unet/config.json", "model.safetensors"):
        (tmp_path / name).write_text('{"a": 1}')
        assert checkpoint_hash(str(tmp_path)) != before
        (tmp_path / name).write_text("{}")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"image_id": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no prediction of an evaluation"):
        OutputFolder(tmp_path).rows()
    with pytest.raises(ValueError, match="has predictions but no settings.json"):
        OutputFolder(tmp_path).pin_settings({"a": 1})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a file: give the name of a folder"):
        OutputFolder(tmp_path / "file")


class Doubling:
    """A worker that doubles keys."""

    def __init__(self, model: str, device: str):
        pass

    def __call__(self, items: list[dict]) -> list[dict]:
        return [{"text": item["key"] * 2} for item in items]


def test_a_worker_of_a_cluster_takes_and_gives_what_one_here_does():
    pytest.importorskip("ray")
    from modeling_lavit.evaluation.ray_run import RayWorker

    worker = RayWorker(Doubling, {"model": "x", "device": "cpu"})
    rows = worker({"items": np.array([json.dumps(items(2))])})["rows"]
    assert json.loads(rows[0]) == [{"key": "0", "text": "00"}, {"key": "1", "text": "11"}]


def test_metrics_of_java_without_its_package_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    arguments = ["--annotations", FIXTURES / "captions_coco.json", "--predictions", FIXTURES / "predictions_coco.json"]
    assert run("captions", *arguments, "--output", tmp_path, "--java", "METEOR") == 2
    assert "pip install pycocoevalcap" in capsys.readouterr().err
