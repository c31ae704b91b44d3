"""Stage 0: what guides see and say, what encoder and language model are shown of it."""

import random
from pathlib import Path

import pytest
import torch

from modeling_lavit.evaluation.judge import Judge
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data import PictureDataset, SampleNoise, augment, augment_halves, normalize_pictures
from modeling_lavit.training.guided import GuidedPictures, blend_and_name
from modeling_lavit.training.pretrain_encoder import build as build_encoder_training
from modeling_lavit.training.run import load_recipe
from modeling_lavit.training.samples import PictureSamples, collate_samples
from modeling_lavit.training.train_judge import JudgeTraining
from modeling_lavit.training.train_language_model import build as build_language_model_training


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
CHECKPOINT = ROOT / "checkpoints" / "lavit-emoji"
EMOJI = str(Path(__file__).parent / "fixtures" / "emoji")
STILL = {"share": 0.0}
MOVED = {"share": 1.0, "scale": 0.3, "tint": 0.3}


@pytest.fixture(scope="module")
def pictures() -> PictureDataset:
    return PictureDataset(EMOJI, 48)


@pytest.fixture
def noise() -> SampleNoise:
    return SampleNoise(torch.arange(24), step=3)


def test_half_of_the_pictures_are_augmented_closely(pictures, noise):
    shown = pictures.pictures[:24].float() / 255
    views, close = augment_halves(shown, noise, MOVED, STILL)
    assert 4 < int(close.sum()) < 20
    same = (views == shown).flatten(1).all(1)
    assert torch.equal(same, close)
    again = augment_halves(shown, SampleNoise(torch.arange(24), step=3), MOVED, STILL)
    assert torch.equal(again[0], views)


def test_without_close_augmentation_all_get_the_same(pictures, noise):
    shown = pictures.pictures[:24].float() / 255
    views, close = augment_halves(shown, noise, MOVED, None)
    assert close.all()
    assert torch.equal(views, augment(shown, SampleNoise(torch.arange(24), step=3), **MOVED))


def test_a_style_guide_says_of_each_place_what_it_sees_around_it():
    torch.manual_seed(0)
    recipe = load_recipe(str(RECIPES / "style_guide.yaml"), ["model.width=1"])
    guide = Judge(["a"], ["x", "y", "z"], **recipe["model"]).eval()
    picture = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        style_map = guide.style_map(guide.feature_maps(picture)[-1])
        assert style_map.shape == (1, 3, 24, 24)
        torch.testing.assert_close(style_map.mean((2, 3)), guide(picture)[1])
        changed = picture.clone()
        changed[:, :, 24, 24] = 1 - changed[:, :, 24, 24]
        differs = (guide.style_map(guide.feature_maps(changed)[-1]) - style_map).abs().amax(1)[0] > 1e-6
    rows, columns = differs.nonzero().T
    assert differs.any()
    for places in (2 * rows, 2 * columns):  # of 48 pixels
        assert int((places - 24).abs().max()) <= 9


def test_a_mixed_picture_is_both_things_by_its_share(pictures):
    recipe = load_recipe(str(RECIPES / "guide.yaml"), ["objective.style=0"])
    recipe["augmentation"] = recipe["close_augmentation"] = STILL
    torch.manual_seed(0)
    judge = Judge(pictures.names, pictures.styles, **recipe["model"])
    shown = []
    judge.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    training = JudgeTraining(judge, recipe)
    batch = (pictures.pictures[:24], pictures.name[:24], pictures.style[:24])
    training(*batch, noise=SampleNoise(torch.arange(24), step=3), progress=0.0)
    own = batch[0].float() / 255
    between = own.roll(1, 0) - own
    share = ((shown[0] - own) * between).sum((1, 2, 3)) / between.square().sum((1, 2, 3))
    assert torch.allclose(shown[0], own + share[:, None, None, None] * between, atol=1e-5)
    assert ((share > -1e-6) & (share < 1 + 1e-6)).all()
    assert 4 < int((share > 1e-3).sum()) < 20  # close ones are not mixed


def encoder_recipe(tmp_path, pictures, *overrides: str) -> dict:
    torch.manual_seed(0)
    for folder, names in (("guide", pictures.names), ("others", pictures.names[1:])):
        Judge(names, pictures.styles, 48, [2, 2, 1, 2]).save(tmp_path / folder)
    guide = tmp_path / "guide"
    paths = [f"data.folder={EMOJI}", f"guide={guide}", "name_guides=[]", f"style_guide={guide}"]
    return load_recipe(str(RECIPES / "encoder.yaml"), [*paths, *overrides])


@pytest.mark.parametrize("key", ["guide", "name_guides", "style_guide"])
def test_guides_of_other_names_are_refused(tmp_path, pictures, key):
    recipe = encoder_recipe(tmp_path, pictures)
    other = str(tmp_path / "others")
    recipe[key] = [other] if key == "name_guides" else other
    with pytest.raises(ValueError, match="knows other names or styles than the data set"):
        build_encoder_training(recipe)


def test_a_weight_without_its_guide_is_refused(tmp_path, pictures):
    with pytest.raises(ValueError, match="objective.weights.style_guide must be 0"):
        build_encoder_training(encoder_recipe(tmp_path, pictures, "style_guide=null"))


def test_names_are_imitated_of_all_guides(tmp_path, pictures):
    recipe = encoder_recipe(tmp_path, pictures)
    torch.manual_seed(1)
    Judge(pictures.names, pictures.styles, 48, [2, 2, 1, 2], width=2).save(tmp_path / "wide")
    model, _, _ = build_encoder_training(recipe | {"name_guides": [str(tmp_path / "wide")]})
    model.train()
    shown = pictures.pictures[:4].float() / 255
    one, other = (Judge.load(tmp_path / folder)(shown)[0].log_softmax(-1) for folder in ("guide", "wide"))
    torch.testing.assert_close(model.guidance(shown)[0], (one + other) / 2)  # their statistics stand still


def test_questions_of_style_are_asked_of_close_pictures(pictures):
    processor = LavitProcessor.from_pretrained(CHECKPOINT)
    codes = [[torch.arange(5)] for _ in pictures.pictures]
    samples = {}
    for task in ("style_question", "caption"):
        dataset = PictureSamples(pictures, codes, processor, {task: 1.0}, 0.0)
        samples[task] = dataset[random.Random(0).randrange(len(pictures))]
    batch = collate_samples(list(samples.values()))
    assert batch["close"].tolist() == [True, False]
    overrides = [f"data.folder={EMOJI}", f"start={CHECKPOINT}", "tokenizer=null", "guided.number=0"]
    recipe = load_recipe(str(RECIPES / "language_model.yaml"), overrides)
    recipe["augmentation"], recipe["close_augmentation"] = MOVED, STILL
    model, _, _ = build_language_model_training(recipe)
    shown = batch["pictures"].float() / 255
    noise = SampleNoise(torch.arange(2), step=3)
    near, far = model.augmented(shown, noise, batch["close"]), model.augmented(shown, noise, ~batch["close"])
    still = model.augmented(shown, noise, torch.ones(2, dtype=torch.bool))
    assert torch.equal(near[0], still[0]) and not torch.equal(far[0], still[0])
    assert torch.equal(far[1], still[1]) and not torch.equal(near[1], still[1])


def test_features_are_dropped_and_nothing_else(pictures):
    overrides = [f"data.folder={EMOJI}", f"start={CHECKPOINT}", "tokenizer=null", "guided.number=0"]
    model, dataset, _ = build_language_model_training(
        load_recipe(str(RECIPES / "language_model.yaml"), [*overrides, "mixture={caption: 1.0, draw: 1.0}"])
    )
    batch = collate_samples([dataset[position] for position in range(8)])
    pixels = normalize_pictures(batch["pictures"].float() / 255)
    inputs = model.model.model.expand_inputs(
        *(batch["input_ids"], pixels, batch["attention_mask"], batch["labels"]), padding_side="right"
    )
    noise = torch.rand(8, 145, generator=torch.Generator().manual_seed(0))
    embeds, mask, labels = model.drop_features(inputs, noise)
    shares = []
    for row in range(8):
        whole = inputs.inputs_embeds[row][inputs.attention_mask[row].bool()]
        feature = inputs.is_feature[row][inputs.attention_mask[row].bool()]
        left = embeds[row][mask[row].bool()]
        places = [int((whole == vector).all(1).nonzero()[0]) for vector in left if (whole == vector).all(1).sum() == 1]
        assert places == sorted(places)  # in their order
        assert len(left) >= (~feature).sum()
        learnt = inputs.labels[row] != -100
        assert labels[row][labels[row] != -100].tolist() == inputs.labels[row][learnt].tolist()
        assert torch.equal(left[labels[row][mask[row].bool()] != -100], inputs.inputs_embeds[row][learnt])
        if feature.any():
            shares.append(1 - (len(left) - int((~feature).sum())) / int(feature.sum()))
        else:
            assert len(left) == len(whole)
    assert shares and max(shares) > 0.2 and max(shares) < 0.9
    model.recipe["feature_dropout"] = 0.0
    untouched = model.drop_features(inputs, noise)
    for one, other in zip(untouched, (inputs.inputs_embeds, inputs.attention_mask, inputs.labels), strict=True):
        assert torch.equal(one, other)


def test_blends_are_named_by_the_guides(tmp_path, pictures):
    torch.manual_seed(0)
    names = ["something else", *reversed(pictures.names)]  # guides may know more names, in another order
    folders = [str(tmp_path / folder) for folder in ("one", "two")]
    for folder in folders:
        Judge(names, pictures.styles, 48, [2, 2, 1, 2]).save(folder)
    guided = blend_and_name(pictures, folders, 300, seed=0)
    assert guided.pictures.shape == (300, 3, 48, 48) and guided.pictures.dtype == torch.uint8
    shown = guided.pictures.float() / 255
    votes = sum(Judge.load(folder)(shown)[0].softmax(-1) for folder in folders)
    votes[:, 0] = 0  # not a name of the data set
    assert [pictures.names[i] for i in guided.name] == [names[i] for i in votes.argmax(-1)]
    known = {tuple(picture.flatten().tolist()) for picture in pictures.pictures}
    assert sum(tuple(blend.flatten().tolist()) in known for blend in guided.pictures) < 100  # most are new
    again, other = (blend_and_name(pictures, folders, 300, seed=seed) for seed in (0, 1))
    assert torch.equal(again.pictures, guided.pictures) and not torch.equal(other.pictures, guided.pictures)
    more = blend_and_name(pictures, folders, 310, seed=0)
    assert torch.equal(more.pictures[:300], guided.pictures)


def test_blends_are_a_share_of_the_captions(tmp_path, pictures):
    processor = LavitProcessor.from_pretrained(CHECKPOINT)
    guided = GuidedPictures(torch.full((2, 3, 48, 48), 7, dtype=torch.uint8), torch.tensor([3, 3]))
    codes = [[torch.arange(5)] for _ in pictures.pictures]
    for task, low, high in (("caption", 0.4, 0.8), ("style_question", 0.0, 0.0)):
        dataset = PictureSamples(pictures, codes, processor, {task: 1.0}, 0.0, guided=guided, guided_share=0.6)
        items = [dataset[position] for position in range(len(pictures))]
        blends = [item for item in items if bool((item["pictures"][0] == 7).all())]
        assert low <= len(blends) / len(items) <= high
        for item in blends:
            learnt = [label for label in item["labels"] if label >= 0]
            assert processor.tokenizer.decode(learnt, skip_special_tokens=True) == pictures.names[3]


def test_blends_need_guides_that_know_the_names(tmp_path, pictures):
    with pytest.raises(ValueError, match="needs guides"):
        blend_and_name(pictures, [], 4, seed=0)
    with pytest.raises(OSError, match="train the stage judge first"):
        blend_and_name(pictures, [str(tmp_path / "nothing")], 4, seed=0)
    Judge(pictures.names[1:], pictures.styles, 48, [2, 2, 1, 2]).save(tmp_path / "less")
    with pytest.raises(ValueError, match="does not know 1 of the names"):
        blend_and_name(pictures, [str(tmp_path / "less")], 4, seed=0)
