"""`lavit evaluate retrieval` and `lavit search`."""

import json
from pathlib import Path

import numpy as np
import pytest

from modeling_lavit.command_line import main
from modeling_lavit.evaluation.retrieval import recall_of_images, recall_of_texts


FIXTURES = Path(__file__).parent.parent / "fixtures"
EMOJI = FIXTURES / "emoji" / "images" / "noto"


def test_recall_counts_what_is_better_than_the_own():
    scores = np.array([[-1.0, -5.0, -9.0, -3.0], [-2.0, -4.0, -8.0, -1.0]])
    owner = np.array([0, 0, 1, 1])
    assert recall_of_images(scores, owner) == {"R@1": 75, "R@5": 100, "R@10": 100}
    # less the texts' means: [[.5, -.5, -.5, -1], [-.5, .5, .5, 1]]
    assert recall_of_texts(scores, owner)["R@1"] == 100
    assert recall_of_texts(-scores, owner)["R@1"] == 0


def test_the_embedded_checkpoint_finds_images_by_their_captions(tmp_path):
    arguments = ["--annotations", FIXTURES / "evaluation" / "captions_karpathy_flickr30k.json"]
    arguments += ["--images", FIXTURES / "evaluation" / "images", "--output", tmp_path, "--batch-size", 2]
    assert main(["evaluate", "retrieval", *map(str, arguments)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["counts"] == {"images": 3, "texts": 15}
    assert results["image_to_text"]["R@1"] == 100 and results["text_to_image"]["R@1"] > 60
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [len(row["scores"]) for row in rows] == [15, 15, 15]


def test_a_search_prints_the_fitting_image_first(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for name in ("cat-face", "palm-tree", "hot-beverage"):
        (tmp_path / f"{name}.png").write_bytes((EMOJI / f"{name}.png").read_bytes())
    assert main(["search", "palm tree", str(tmp_path), "--top", "2"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(path).name for _, path in lines][0] == "palm-tree.png" and len(lines) == 2
    assert float(lines[0][0]) > float(lines[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["", "."], "it is empty"), (["x", "nowhere"], "no folder at nowhere"), (["x", "."], "no image in the folder")],
)
def test_a_search_that_cannot_be_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["search", *arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1
