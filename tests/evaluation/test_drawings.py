"""`lavit evaluate drawings`: the suites' folders, FID, CLIP score and the choice among candidates."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_scorers import TinyExtractor, save_tiny_clip
from torchmetrics.image.fid import FrechetInceptionDistance

from modeling_lavit.command_line import main
from modeling_lavit.evaluation.clip_score import ClipScorer
from modeling_lavit.evaluation.drawings import DrawingWorker, seed_of
from modeling_lavit.evaluation.fid import Fid
from modeling_lavit.evaluation.images import grid, to_tensor
from modeling_lavit.evaluation.prompt_files import read_prompts


FIXTURES = Path(__file__).parent.parent / "fixtures" / "evaluation"
IMAGES = FIXTURES / "images"
COCO = FIXTURES / "captions_coco.json"
FAST = ["--steps", 1]


def run(*arguments) -> int:
    try:
        return main(["evaluate", "drawings", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def geneval(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    rows = [{"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "an apple"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_recognised_by_their_form(tmp_path, geneval):
    (tmp_path / "dpg").mkdir()
    for name in ("b", "a"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"a long prompt {name}\n")
    (tmp_path / "color_val.txt").write_text("a red cup and a blue bowl\n\na green car/bus\n")
    (tmp_path / "coco.csv").write_text("image_id,caption\n7,a cat\n7,the cat\n9,a dog\n")
    suite, prompts = read_prompts(geneval)
    assert suite == "geneval" and prompts[0].files == [f"00000/samples/{k:04d}.png" for k in range(4)]
    suite, prompts = read_prompts(tmp_path / "dpg")
    assert suite == "dpg" and [(row.id, row.files, row.images) for row in prompts][0] == ("a", ["a.png"], 4)
    suite, prompts = read_prompts(tmp_path / "color_val.txt", images=2)
    assert suite == "t2i-compbench"
    assert prompts[1].files == ["samples/a green car bus_000002.png", "samples/a green car bus_000003.png"]
    suite, prompts = read_prompts(tmp_path / "coco.csv")
    assert suite == "coco" and [(row.id, row.text, row.files) for row in prompts] == [
        ("7", "a cat", ["7.png"]),
        ("9", "a dog", ["9.png"]),
    ]
    suite, prompts = read_prompts(COCO, seed=1)
    assert suite == "coco" and [row.id for row in prompts] == ["42", "73", "74"] and prompts[0].real
    assert {read_prompts(COCO, seed=seed)[1][0].text for seed in range(9)} > {prompts[0].text}


@pytest.mark.parametrize("key", ["/etc/logo", "../../logo", "a\\b"])
def test_an_id_names_a_file_in_the_folder_and_nowhere_else(key, tmp_path):
    captions = {"images": [{"id": key, "file_name": "a.jpg"}], "annotations": [{"image_id": key, "caption": "a cat"}]}
    (tmp_path / "coco.json").write_text(json.dumps(captions))
    (tmp_path / "list.json").write_text(json.dumps([{"id": key, "caption": "a cat"}]))
    for name in ("coco.json", "list.json"):
        _, (prompt,) = read_prompts(tmp_path / name)
        assert not {"/", "\\"} & set(prompt.files[0]) and prompt.files[0].endswith(".png")


def test_drawings_of_other_prompts_are_not_taken_for_these(tmp_path, geneval, capsys):
    arguments = ["--prompts", geneval, "--n", 1, "--output", tmp_path / "out", *FAST]
    assert run(*arguments) == 0
    geneval.write_text(geneval.read_text().replace("an apple", "a pear"))
    assert run(*arguments) == 2
    assert "text_hash" in capsys.readouterr().err


def test_geneval_gets_its_folder(tmp_path, geneval):
    assert run("--prompts", geneval, "--output", tmp_path / "out", "--n", 2, *FAST) in (0, None)
    folder = tmp_path / "out" / "images"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png"]
    assert read(folder / "00000" / "metadata.jsonl")["prompt"] == "an apple"
    pixels = [to_tensor(Image.open(folder / name)) for name in files[1:]]
    assert not torch.equal(*pixels)


def test_dpg_gets_grids_of_two_by_two(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "COCOval2014_1.txt").write_text("a red apple")
    assert run("--prompts", tmp_path / "prompts", "--output", tmp_path / "out", *FAST) in (0, None)
    files = list((tmp_path / "out" / "images").iterdir())
    assert [path.name for path in files] == ["COCOval2014_1.png"]
    assert Image.open(files[0]).size == (96, 96)


def test_coco_gets_fid_and_clip_score_beside_the_papers(tmp_path, clip, capsys):
    output = tmp_path / "out"
    scored = ["--images", IMAGES, "--inception", "tiny_scorers:TinyExtractor", "--clip", clip]
    assert run("--prompts", COCO, "--output", output, *FAST, *scored) in (0, None)
    results = read(output / "results.json")
    assert results["dataset"] == "coco-fid" and results["FID"] > 0 and 0 <= results["clip_score"] <= 100
    assert results["fid_settings"]["real_images"] == results["counts"]["drawn"] == 3 and results["complete"]
    assert (output / "ids.txt").read_text() == "42\n73\n74\n"
    assert "| LaVIT, paper (LLaMA-1 7B) | 7.4 |" in capsys.readouterr().out
    again = tmp_path / "again"
    arguments = ["--prompts", COCO, "--predictions", output / "images", "--output", again, *scored]
    assert run(*arguments) in (0, None)
    assert read(again / "results.json")["FID"] == results["FID"]


def test_the_best_of_the_candidates_is_kept_and_a_score_by_the_same_clip_is_marked(tmp_path, clip):
    options = {"model": None, "device": None, "num_inference_steps": 1}
    item = {"key": "0", "text": "a red apple", "files": ["0.png"], "images": 1}
    worker = DrawingWorker(folder=str(tmp_path), candidates=2, rerank=clip, **options)
    worker([item])
    generators = [torch.Generator().manual_seed(seed_of(0, "0", 0, c)) for c in range(2)]
    drawn = worker.pipe([item["text"]] * 2, generator=generators, num_inference_steps=1).images
    best = int(ClipScorer.from_pretrained(clip)(drawn, [item["text"]] * 2).argmax())
    assert torch.equal(to_tensor(Image.open(tmp_path / "0.png")), to_tensor(drawn[best]))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt\n1,a red apple\n")
    arguments = ["--rerank", clip, "--candidates", 2, "--clip", clip, "--output", tmp_path / "out"]
    assert run("--prompts", prompts, *arguments, *FAST) in (0, None)
    assert read(tmp_path / "out" / "results.json")["clip_score_by_the_clip_that_chose"] is True


def test_an_image_is_the_same_in_every_batch(tmp_path):
    items = [
        {"key": str(i), "text": text, "files": [f"{i}.png"], "images": 1} for i, text in enumerate(("cat", "dog"))
    ]
    worker = DrawingWorker(None, None, str(tmp_path / "both"), num_inference_steps=1)
    worker(items)
    worker.folder = tmp_path / "alone"
    worker(items[1:])
    both, alone = (to_tensor(Image.open(tmp_path / name / "1.png")) for name in ("both", "alone"))
    assert torch.equal(both, alone)


def test_fid_is_that_of_torchmetrics_on_squares_of_256(tmp_path):
    paths = sorted(IMAGES.glob("*.jpg"))
    fid = Fid("tiny_scorers:TinyExtractor")
    fid.add(paths[:8], real=True, batch_size=3)
    fid.add(paths[8:], real=False)
    metric = FrechetInceptionDistance(feature=TinyExtractor())
    for part, real in ((paths[:8], True), (paths[8:], False)):
        pixels = torch.stack([to_tensor(Image.open(path), (256, 256)) for path in part])
        metric.update((pixels * 255).round().to(torch.uint8), real=real)
    assert fid.compute() == pytest.approx(float(metric.compute()))
    same = Fid("tiny_scorers:TinyExtractor")
    for real in (True, False):
        same.add(paths, real)
    assert same.compute() == pytest.approx(0, abs=1e-3)


def test_the_clip_score_is_a_hundred_times_the_cosine(clip):
    scorer = ClipScorer.from_pretrained(clip)
    images = [Image.open(path) for path in sorted(IMAGES.glob("*.jpg"))[:2]]
    scores = scorer(images, ["a cat", "some bread"])
    assert scores.shape == (2,) and torch.equal(scores[1:], scorer(images[1:], ["some bread"]))
    inputs = scorer.processor(images=images, text=["a cat", "some bread"], return_tensors="pt", padding=True)
    outputs = scorer.model(**inputs)
    cosines = (outputs.image_embeds * outputs.text_embeds).sum(-1)
    assert torch.allclose(scores, (100 * cosines).clamp_min(0), atol=1e-3)


def test_images_of_a_grid_stand_in_reading_order():
    colours = ["red", "lime", "blue", "white"]
    sheet = grid([Image.new("RGB", (2, 2), colour) for colour in colours], 2)
    assert sheet.size == (4, 4)
    assert [sheet.getpixel(place) for place in ((0, 0), (3, 0), (0, 3), (3, 3))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", COCO, "--inception", "x"], "both --images"),
        (
            ["--prompts", COCO, "--limit", 1, "--images", IMAGES, "--inception", "tiny_scorers:TinyExtractor"],
            "FID compares two drawings or more",
        ),
        (["--prompts", COCO, "--candidates", 2], "--rerank chooses among --candidates"),
        (["--prompts", COCO, "--images", IMAGES, "--inception", "nowhere.pth"], "no such file of weights"),
        (["--prompts", COCO, "--images", IMAGES, "--inception", "tiny_scorers:None"], "no such class"),
        (["--prompts", COCO, "--predictions", FIXTURES / "bad"], "has none of the drawings, such as 42.png"),
        (["--prompts", COCO, "--n", 2], "leave out --n 2"),
        (["--prompts", FIXTURES / "predictions_vqav2.json"], "has no id"),
        (["--prompts", FIXTURES], "has no prompt"),
        (["--prompts", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_drawn(arguments, message, tmp_path, capsys):
    assert run(*arguments, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "images").exists()
