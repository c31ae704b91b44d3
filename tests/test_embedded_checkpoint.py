"""The checkpoint that ships with the package reads and draws, by itself and as a folder of the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from modeling_lavit import LavitPipeline
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.evaluation.emoji.report import main as evaluate
from modeling_lavit.evaluation.emoji.report import to_tensor
from modeling_lavit.evaluation.emoji.table import table
from modeling_lavit.publishing.verify import verify


ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "lavit-emoji"
SAMPLES = Path(__file__).parent / "fixtures" / "emoji"
CLASSIFIER = Path(__file__).parent / "fixtures" / "classifier"


def samples(split: str) -> list[dict]:
    rows = [json.loads(line) for line in (SAMPLES / "metadata.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    pipe = LavitPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.load(CLASSIFIER)


def test_weights_are_half_precision_safetensors_under_40_megabytes():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if not path.is_symlink()) < 40_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    for path in CHECKPOINT.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}
        single = [key for key, kind in types.items() if kind != "F16"]
        # small ones: codebooks, norms of the visual tokenizer, how often batch norm was updated, known images' codes
        small = ("codebook", "norm", "num_batches", "codes")
        assert all(any(part in key for part in small) for key in single), single


def test_its_code_is_generated_from_the_package_and_formatted(tmp_path):
    """`make generate` writes it again."""
    verdict = verify(CHECKPOINT)
    assert verdict.is_ours and len(verdict.same) == 2, verdict
    code = [str(path) for path in CHECKPOINT.glob("*.py")]
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-force-exclude", "--config", ROOT / "pyproject.toml"]
        done = subprocess.run([*command, *code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_everything_it_was_made_of_is_named():
    notice = (CHECKPOINT / "NOTICE").read_text()
    for author in ("Google", "Microsoft", "EmojiTwo", "Twemoji"):
        assert author in notice
    held_out = json.loads((CHECKPOINT / "held_out.json").read_text())
    pairs = {tuple(pair) if isinstance(pair, list) else (pair["name"], pair["style"]) for pair in held_out["held_out"]}
    assert {(row["name"], row["style"]) for row in samples("held_out")} <= pairs


def test_it_captions_images_it_was_trained_on(pipe):
    rows = samples("train")
    images = [Image.open(SAMPLES / row["file_name"]) for row in rows]
    inputs = pipe.processor(images=images)
    ids = pipe.model.generate(**inputs, generation_preset="caption")
    captions = pipe.processor.post_process_caption(ids, input_ids=inputs["input_ids"])
    right = sum(caption == row["name"] for caption, row in zip(captions, rows, strict=True))
    assert right / len(rows) > 0.8, list(zip(captions, [row["name"] for row in rows], strict=True))


def test_it_draws_what_is_asked_for(pipe, classifier):
    rows = samples("train")
    prompts = [f"{row['name']} in {row['style']} style" for row in rows]
    images = pipe(prompts, generator=seeded(len(prompts))).images
    scores = classifier.score(to_tensor(images, 48), [row["name"] for row in rows])
    # by chance it would be .02
    assert scores["name_top5"] > 0.2


def test_the_same_image_gives_the_same_tokens_and_they_tell_what_it_was(pipe, classifier):
    rows = samples("train")
    images = [Image.open(SAMPLES / row["file_name"]).convert("RGB") for row in rows]
    output = pipe.reconstruct(images, generator=seeded(len(images)))
    alone = pipe.reconstruct(images[3], generator=seeded(1)[0])
    assert torch.equal(alone.visual_tokens.codes, output.visual_tokens.split()[3])
    assert classifier.score(to_tensor(output.images, 48), [row["name"] for row in rows])["name_top5"] > 0.6


def test_a_image_and_a_text_are_one_prompt(pipe):
    rows = samples("train")
    image = Image.open(SAMPLES / rows[0]["file_name"])
    first, second = (
        pipe([image, f"in {style} style"], generator=seeded(1)[0]).images[0].tobytes() for style in ("flat", "noto")
    )
    assert first != second


@pytest.mark.slow
def test_the_folder_works_without_the_package_in_a_fresh_process(tmp_path):
    program = """
import sys
sys.modules["modeling_lavit"] = None
import torch
from diffusers import DiffusionPipeline
from transformers import pipeline
folder = sys.argv[1]
draw = pipeline("text-to-image", model=folder, trust_remote_code=True)
one = draw("hamburger", generator=torch.Generator().manual_seed(0))
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
two = pipe("hamburger", generator=torch.Generator().manual_seed(0)).images[0]
assert one.size == two.size == (48, 48)
assert one.tobytes() == two.tobytes()
assert len(set(one.getdata())) > 50
print("SAME")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", program, str(CHECKPOINT)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip().endswith("SAME"), done.stderr[-2000:]


def foreign_samples(folder: Path, name: str | None = None) -> Path:
    """Six images of the split `foreign`, one of which, or all, with a name that no other image has."""
    rows = samples("train")[:6]
    for i, row in enumerate(rows):
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLES / row["file_name"], target)
        row |= {"split": "foreign"} | ({"name": name or "a stranger"} if name or not i else {})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_style_without_known_names_cannot_be_evaluated(tmp_path):
    arguments = ["--model", CHECKPOINT, "--data", SAMPLES, "--classifier", CLASSIFIER]
    arguments += ["--foreign", foreign_samples(tmp_path, "a stranger")]
    with pytest.raises(ValueError, match="no image of the split 'foreign'"):
        evaluate([str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_evaluation_reports_every_figure(tmp_path):
    arguments = ["--model", CHECKPOINT, "--data", SAMPLES, "--classifier", CLASSIFIER, "--count", 3, "--seeds", 1]
    arguments += ["--output", tmp_path / "figures.json", "--sheet", tmp_path / "sheet.png"]
    arguments += ["--foreign", foreign_samples(tmp_path / "foreign")]
    evaluate([str(argument) for argument in arguments])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for split in ("seen", "held_out"):
        assert 0 <= figures[split]["caption_exact"] <= 1
        assert figures[split]["classifier_on_real"]["name_top5"] > 0.9
        assert {"name_top5", "style"} <= figures[split]["text_to_image"].keys()
    assert 0 < figures["tokens"]["keep_rate"] < 1
    # images that the checkpoint was trained on, so it names most of them; what has another name is left out
    assert figures["foreign"]["images"] == 5 and figures["foreign"]["caption_exact"] >= 0.6
    assert "| caption of 5 images in a style that was never seen |" in table(figures)
    assert Image.open(tmp_path / "sheet.png").size[0] > 500


def test_the_tables_of_its_page_are_the_recorded_figures():
    figures = json.loads((CHECKPOINT / "figures.json").read_text())
    assert table(figures) in (ROOT / "docs" / "emoji_checkpoint.md").read_text()
