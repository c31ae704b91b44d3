"""What a model draws for itself to learn from: with the embedded checkpoint on a few images."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import EMOJI

from modeling_lavit import LavitForConditionalGeneration, LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.training.data.samples import Sequences
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.pseudo_targets import draw_pseudo_targets, missing_pairs, read_codes
from modeling_lavit.training.emoji.recipe import EmojiLanguageModelRecipe, NamedMixture, PseudoTargets
from modeling_lavit.training.emoji.samples import NamedSamples, tokenize_all
from modeling_lavit.training.emoji.train import RECIPES
from modeling_lavit.training.emoji.train_language_model import EmojiLanguageModelStage
from modeling_lavit.training.recipe_file import load_recipe


pytestmark = pytest.mark.slow


NAMES = ("cat face", "sunflower")


def only(**tasks: float) -> NamedMixture:
    return NamedMixture(**dict.fromkeys(NamedMixture.model_fields, 0.0) | tasks)


def sequences(embedded, prompt_dropout: float = 0.0) -> Sequences:
    return Sequences(embedded[1], embedded[0].config.vocabulary, prompt_dropout)


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
def images(folder) -> NamedImages:
    return NamedImages(str(folder), 48)


@pytest.fixture(scope="module")
def embedded():
    model = LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI, dtype=torch.float32).eval()
    return model, LavitProcessor.from_pretrained(LAVIT_EMOJI)


@pytest.fixture(scope="module")
def codes(embedded, images) -> list[list[torch.Tensor]]:
    return tokenize_all(embedded[0].model.visual_tokenizer, images)


@pytest.fixture(scope="module", params=["image", "name"])
def how(request) -> PseudoTargets:
    return PseudoTargets(number=4, source=request.param, guidance_scale=3.0)


@pytest.fixture(scope="module")
def targets(embedded, images, codes, how):
    return draw_pseudo_targets(*embedded, images, codes, how, seed=0)


def test_missing_pairs_are_those_without_an_image(images):
    there = {
        (images.names[n], images.styles[s]) for n, s in zip(images.name.tolist(), images.style.tolist(), strict=True)
    }
    missing = {(images.names[name], images.styles[style]) for name, style in missing_pairs(images)}
    assert missing
    assert not missing & there
    assert len(missing) + len(there) == len(images.names) * len(images.styles)


def test_what_is_kept_is_recognised_and_the_seed_decides_it(embedded, images, codes, how, targets):
    model, processor = embedded
    assert targets
    assert {(target.name, target.style) for target in targets} <= set(missing_pairs(images))
    for target in targets:
        assert read_codes(model, processor, [target.codes]) == [images.names[target.name]]
    again = draw_pseudo_targets(model, processor, images, codes, how, seed=0, batch_size=2)
    assert [target.codes.tolist() for target in again] == [target.codes.tolist() for target in targets]
    others = draw_pseudo_targets(model, processor, images, codes, how, seed=1)
    if how.source == "image":  # what is drawn from a name it knows by heart
        assert [target.codes.tolist() for target in others] != [target.codes.tolist() for target in targets]


def test_those_whose_style_is_read_otherwise_are_left_out(embedded, images, codes, how, targets):
    checked = how.model_copy(update={"check_style": True})
    strict = draw_pseudo_targets(*embedded, images, codes, checked, seed=0)
    answers = read_codes(*embedded, [target.codes for target in targets], "which style is this?")
    expected = [t for t, answer in zip(targets, answers, strict=True) if answer == images.styles[t.style]]
    assert expected
    assert [target.codes.tolist() for target in strict] == [target.codes.tolist() for target in expected]
    others = copy.copy(images)
    others.styles = [f"engraved {style}" for style in images.styles]  # which it cannot answer
    assert draw_pseudo_targets(*embedded, others, codes, how, seed=0)
    assert not draw_pseudo_targets(*embedded, others, codes, checked, seed=0)


@pytest.mark.parametrize(("task", "asked"), [("code_caption", False), ("code_style_question", True)])
def test_codes_are_read_as_images_are(embedded, images, codes, task, asked):
    processor, vocabulary = embedded[1], embedded[0].config.vocabulary
    samples = NamedSamples(images, codes, sequences(embedded, 0.1), only(**{task: 1.0}))
    for position in range(len(samples)):
        item = samples[position]
        start = next(i for i, label in enumerate(item["labels"]) if label >= 0)
        visual = [vocabulary.codes_of(i) for i in item["ids"] if vocabulary.is_code(i)]
        assert visual == codes[position][0].tolist()
        end = processor.tokenizer.eos_token_id
        index = samples.images.order[position]
        answer = images.styles[images.style[index]] if asked else images.names[images.name[index]]
        assert item["ids"][start:] == item["labels"][start:] == [*samples.sequences.text(answer), end]
        question = processor.tokenizer.decode(item["ids"][item["ids"].index(vocabulary.eoi_token_id) + 1 : start])
        assert ("style" in question) == asked


@pytest.mark.parametrize("task", ["draw", "restyle"])
def test_pseudo_targets_are_targets_of_their_share(embedded, images, targets, task):
    processor, vocabulary = embedded[1], embedded[0].config.vocabulary
    codes = [[torch.tensor([7, 8, 9])] for _ in images.images]
    known = {tuple(vocabulary.ids_of(target.codes).tolist()): target for target in targets}
    seen = 0
    for epoch in range(20):
        samples = NamedSamples(images, codes, sequences(embedded), only(**{task: 1.0}), 0, targets, 0.5)
        samples.set_epoch(epoch)
        for position in range(len(samples)):
            item = samples[position]
            learnt = tuple(i for i in item["labels"] if vocabulary.is_code(i))
            read = processor.tokenizer.decode([i for i in item["ids"][: item["ids"].index(learnt[0])] if i < 1000])
            if learnt in known:
                seen += 1
                assert images.styles[known[learnt].style] in read or task == "draw"
                # its source in another style stands before it
                assert (vocabulary.boi_token_id in item["ids"][:1]) == (task == "restyle")
    assert 0.3 < seen / (20 * len(images)) < 0.7


def test_a_stage_that_draws_its_targets_needs_a_start(folder):
    overrides = [f"data.path={folder}", "data.more=null", "data.validation=null", "tokenizer=null", "mixup.number=0"]
    overrides += ["pseudo_targets={number: 4, share: 0.3}"]
    recipe = load_recipe(RECIPES / "language_model.yaml", [*overrides, "start=lavit-emoji"], EmojiLanguageModelRecipe)
    stage = EmojiLanguageModelStage()
    parts = stage.build(recipe)
    assert parts.dataset.pseudo_targets and parts.dataset.pseudo_share == 0.3
    processor, model = parts.dataset.sequences.processor, parts.model.model
    with pytest.raises(ValueError, match="pseudo_targets.number needs a start"):
        stage.samples(recipe.model_copy(update={"start": None}), parts.dataset.images, None, model, processor)
