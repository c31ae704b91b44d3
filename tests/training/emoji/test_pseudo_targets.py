"""What a model draws for itself to learn from: with the embedded checkpoint on a few pictures."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from modeling_lavit import LavitForConditionalGeneration, LavitProcessor
from modeling_lavit.training.data import PictureDataset
from modeling_lavit.training.imagined import imagine, missing_pairs, read_codes
from modeling_lavit.training.run import load_recipe
from modeling_lavit.training.samples import PictureSamples
from modeling_lavit.training.train_language_model import build, imagine_for, tokenize_all


ROOT = Path(__file__).parents[1]
EMOJI = Path(__file__).parent / "fixtures" / "emoji"
CHECKPOINT = ROOT / "checkpoints" / "lavit-emoji"
NAMES = ("cat face", "sunflower")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two things, each in two of three styles."""
    folder = tmp_path_factory.mktemp("emoji")
    records = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    records = [record for record in records if record["name"] in NAMES and record["split"] == "train"]
    for record in records:
        (folder / record["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EMOJI / record["file_name"], folder / record["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def pictures(folder) -> PictureDataset:
    return PictureDataset(str(folder), 48)


@pytest.fixture(scope="module")
def embedded():
    model = LavitForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, LavitProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def codes(embedded, pictures) -> list[list[torch.Tensor]]:
    return tokenize_all(embedded[0].model.visual_tokenizer, pictures, {"number": 0}, seed=0)


@pytest.fixture(scope="module", params=["picture", "name"])
def how(request) -> dict:
    return {"number": 4, "source": request.param, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def imagined(embedded, pictures, codes, how):
    return imagine(*embedded, pictures, codes, seed=0, **how)


def test_missing_pairs_are_those_without_a_picture(pictures):
    there = {
        (pictures.names[n], pictures.styles[s])
        for n, s in zip(pictures.name.tolist(), pictures.style.tolist(), strict=True)
    }
    missing = {(pictures.names[name], pictures.styles[style]) for name, style in missing_pairs(pictures)}
    assert missing
    assert not missing & there
    assert len(missing) + len(there) == len(pictures.names) * len(pictures.styles)


def test_what_is_kept_is_recognised_and_the_seed_decides_it(embedded, pictures, codes, how, imagined):
    model, processor = embedded
    assert imagined
    assert {(picture.name, picture.style) for picture in imagined} <= set(missing_pairs(pictures))
    for picture in imagined:
        assert read_codes(model, processor, [picture.codes]) == [pictures.names[picture.name]]
    again = imagine(model, processor, pictures, codes, seed=0, batch_size=2, **how)
    assert [p.codes.tolist() for p in again] == [p.codes.tolist() for p in imagined]
    others = imagine(model, processor, pictures, codes, seed=1, **how)
    if how["source"] == "picture":  # what is drawn from a name it knows by heart
        assert [p.codes.tolist() for p in others] != [p.codes.tolist() for p in imagined]


def test_those_whose_style_is_read_otherwise_are_left_out(embedded, pictures, codes, how, imagined):
    strict = imagine(*embedded, pictures, codes, seed=0, check_style=True, **how)
    answers = read_codes(*embedded, [picture.codes for picture in imagined], "which style is this?")
    expected = [p for p, answer in zip(imagined, answers, strict=True) if answer == pictures.styles[p.style]]
    assert expected
    assert [p.codes.tolist() for p in strict] == [p.codes.tolist() for p in expected]
    others = copy.copy(pictures)
    others.styles = [f"engraved {style}" for style in pictures.styles]  # which it cannot answer
    assert imagine(*embedded, others, codes, seed=0, **how)
    assert not imagine(*embedded, others, codes, seed=0, check_style=True, **how)


@pytest.mark.parametrize(("task", "asked"), [("code_caption", False), ("code_style_question", True)])
def test_codes_are_read_as_pictures_are(embedded, pictures, codes, task, asked):
    processor = embedded[1]
    samples = PictureSamples(pictures, codes, processor, {task: 1.0}, 0.1)
    for position in range(len(samples)):
        item = samples[position]
        start = next(i for i, label in enumerate(item["labels"]) if label >= 0)
        visual = [i - processor.visual_offset for i in item["ids"] if i >= processor.visual_offset]
        assert visual == codes[position][0].tolist()
        end = processor.tokenizer.eos_token_id
        index = samples.pictures.order[position]
        answer = pictures.styles[pictures.style[index]] if asked else pictures.names[pictures.name[index]]
        assert item["ids"][start:] == item["labels"][start:] == [*samples.sequences.text(answer), end]
        question = processor.tokenizer.decode(item["ids"][item["ids"].index(processor.eoi_token_id) + 1 : start])
        assert ("style" in question) == asked


@pytest.mark.parametrize("task", ["draw", "restyle"])
def test_imagined_pictures_are_targets_of_their_share(embedded, pictures, imagined, task):
    processor = embedded[1]
    codes = [[torch.tensor([7, 8, 9])] for _ in pictures.pictures]
    targets = {tuple((picture.codes + processor.visual_offset).tolist()): picture for picture in imagined}
    seen = 0
    for epoch in range(20):
        samples = PictureSamples(pictures, codes, processor, {task: 1.0}, 0.0, 0, imagined, 0.5)
        samples.set_epoch(epoch)
        for position in range(len(samples)):
            item = samples[position]
            learnt = tuple(i for i in item["labels"] if i >= processor.visual_offset)
            read = processor.tokenizer.decode([i for i in item["ids"][: item["ids"].index(learnt[0])] if i < 1000])
            if learnt in targets:
                seen += 1
                assert pictures.styles[targets[learnt].style] in read or task == "draw"
                # its source in another style stands before it
                assert (processor.boi_token_id in item["ids"][:1]) == (task == "restyle")
    assert 0.3 < seen / (20 * len(pictures)) < 0.7


def test_a_stage_that_imagines_needs_a_start(folder):
    recipe = load_recipe(
        str(ROOT / "training" / "recipes" / "language_model.yaml"),
        [
            f"data.folder={folder}",
            f"start={CHECKPOINT}",
            "tokenizer=null",
            "guided.number=0",
            "imagined.number=4",
        ],
    )
    dataset = build(recipe)[1]
    assert dataset.imagined
    assert random.Random(0).choice(dataset.imagined).codes.dtype == torch.long
    processor = dataset.sequences.processor
    recipe["start"] = None
    with pytest.raises(ValueError, match="imagined.model"):
        imagine_for(recipe, None, processor, dataset.pictures, dataset.codes, 0)
    recipe["imagined"]["model"] = str(CHECKPOINT)
    with pytest.raises(ValueError, match="other codes"):
        imagine_for(recipe, tiny_model(), processor, dataset.pictures, dataset.codes, 0)
    recipe["start"], recipe["imagined"] = str(CHECKPOINT), recipe["imagined"] | {"model": None, "source": "style"}
    with pytest.raises(ValueError, match="imagined.source"):
        imagine_for(recipe, tiny_model(), processor, dataset.pictures, dataset.codes, 0)
