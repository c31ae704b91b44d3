"""Stage 0: what teachers see and say, what encoder and language model are shown of it."""

import random

import pytest
import torch
from parts import EMOJI

from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.configuration_lavit import LavitConfig
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.augmentation import SampleNoise, augment, normalize_images
from modeling_lavit.training.data.samples import Sequences
from modeling_lavit.training.emoji.augmentation import augment_halves
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.mixup import LabelledMixtures, label_mixtures
from modeling_lavit.training.emoji.pretrain_encoder import EncoderStage
from modeling_lavit.training.emoji.recipe import (
    ClassifierRecipe,
    EmojiLanguageModelRecipe,
    EncoderRecipe,
    NamedMixture,
)
from modeling_lavit.training.emoji.samples import NamedSamples, collate_named
from modeling_lavit.training.emoji.train import RECIPES
from modeling_lavit.training.emoji.train_language_model import EmojiLanguageModelStage
from modeling_lavit.training.recipe import Augmentation
from modeling_lavit.training.recipe_file import load_recipe


pytestmark = pytest.mark.slow


STILL = Augmentation(share=0.0)
MOVED = Augmentation(share=1.0, scale=0.3, tint=0.3)
DATA = [f"data.path={EMOJI}", "data.more=null", "data.validation=null"]


def only(**tasks: float) -> NamedMixture:
    return NamedMixture(**dict.fromkeys(NamedMixture.model_fields, 0.0) | tasks)


def sequences() -> Sequences:
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    return Sequences(processor, LavitConfig.from_pretrained(LAVIT_EMOJI).vocabulary, 0.0)


@pytest.fixture(scope="module")
def images() -> NamedImages:
    return NamedImages(str(EMOJI), 48)


@pytest.fixture
def noise() -> SampleNoise:
    return SampleNoise(torch.arange(24), step=3)


def test_half_of_the_images_are_augmented_weakly(images, noise):
    shown = images.images[:24].float() / 255
    views, weak = augment_halves(shown, noise, MOVED, STILL)
    assert 4 < int(weak.sum()) < 20
    same = (views == shown).flatten(1).all(1)
    assert torch.equal(same, weak)
    again = augment_halves(shown, SampleNoise(torch.arange(24), step=3), MOVED, STILL)
    assert torch.equal(again[0], views)


def test_without_weak_augmentation_all_get_the_same(images, noise):
    shown = images.images[:24].float() / 255
    views, weak = augment_halves(shown, noise, MOVED, None)
    assert weak.all()
    assert torch.equal(views, augment(shown, SampleNoise(torch.arange(24), step=3), **MOVED.model_dump()))


def test_a_style_teacher_says_of_each_position_what_it_sees_around_it():
    torch.manual_seed(0)
    recipe = load_recipe(RECIPES / "style_teacher.yaml", ["model.width=1"], ClassifierRecipe)
    teacher = Classifier(["a"], ["x", "y", "z"], **recipe.model.model_dump()).eval()
    image = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        style_map = teacher.style_map(teacher.feature_maps(image)[-1])
        assert style_map.shape == (1, 3, 24, 24)
        torch.testing.assert_close(style_map.mean((2, 3)), teacher(image)[1])
        changed = image.clone()
        changed[:, :, 24, 24] = 1 - changed[:, :, 24, 24]
        differs = (teacher.style_map(teacher.feature_maps(changed)[-1]) - style_map).abs().amax(1)[0] > 1e-6
    rows, columns = differs.nonzero().T
    assert differs.any()
    for places in (2 * rows, 2 * columns):  # of 48 pixels
        assert int((places - 24).abs().max()) <= 9


def encoder_recipe(tmp_path, images, **values) -> EncoderRecipe:
    torch.manual_seed(0)
    for folder, names in (("teacher", images.names), ("others", images.names[1:])):
        Classifier(names, images.styles, 48, [2, 2, 1, 2]).save(tmp_path / folder)
    teacher = str(tmp_path / "teacher")
    values = {"teacher": teacher, "name_teachers": [], "style_teacher": teacher} | values
    return EncoderRecipe(data={"path": str(EMOJI), "validation": None, "more": None}, **values)


@pytest.mark.parametrize("key", ["teacher", "name_teachers", "style_teacher"])
def test_teachers_of_other_names_are_refused(tmp_path, images, key):
    other = str(tmp_path / "others")
    recipe = encoder_recipe(tmp_path, images, **{key: [other] if key == "name_teachers" else other})
    with pytest.raises(ValueError, match="knows other names or styles than the data set"):
        EncoderStage().build(recipe)


def test_names_are_imitated_of_all_teachers(tmp_path, images):
    torch.manual_seed(1)
    Classifier(images.names, images.styles, 48, [2, 2, 1, 2], width=2).save(tmp_path / "wide")
    recipe = encoder_recipe(tmp_path, images, name_teachers=[str(tmp_path / "wide")])
    model = EncoderStage().build(recipe).model.train()
    shown = images.images[:4].float() / 255
    one, other = (Classifier.load(tmp_path / folder)(shown)[0].log_softmax(-1) for folder in ("teacher", "wide"))
    torch.testing.assert_close(model.teach(shown)[0], (one + other) / 2)  # their statistics stand still


def language_model(*overrides: str):
    """The parts of stage 2 on the embedded checkpoint."""
    more = [*DATA, "start=lavit-emoji", "tokenizer=null", "mixup.number=0", *overrides]
    recipe = load_recipe(RECIPES / "language_model.yaml", more, EmojiLanguageModelRecipe)
    return EmojiLanguageModelStage().build(recipe)


def test_questions_of_style_are_asked_of_images_that_are_augmented_weakly(images):
    codes = [[torch.arange(5)] for _ in images.images]
    samples = {}
    for task in ("style_question", "caption"):
        dataset = NamedSamples(images, codes, sequences(), only(**{task: 1.0}))
        samples[task] = dataset[random.Random(0).randrange(len(images))]
    batch = collate_named(list(samples.values()))
    assert batch["weak"].tolist() == [True, False]
    moved = "{share: 1.0, scale: 0.3, tint: 0.3}"
    model = language_model(f"augmentation={moved}", "weak_augmentation={share: 0.0}").model.train()
    shown = batch["images"].float() / 255
    noise = SampleNoise(torch.arange(2), step=3)
    near, far = (model.pixel_values(shown, noise, weak=weak) for weak in (batch["weak"], ~batch["weak"]))
    still = normalize_images(shown)
    assert torch.equal(near[0], still[0]) and not torch.equal(far[0], still[0])
    assert torch.equal(far[1], still[1]) and not torch.equal(near[1], still[1])
    assert torch.equal(model.eval().pixel_values(shown, noise, weak=batch["weak"]), still)


def test_features_are_dropped_and_nothing_else():
    parts = language_model("mixture={style_question: 0, name_question: 0, restyle: 0}")
    model = parts.model.train()
    batch = collate_named([parts.dataset[position] for position in range(8)])
    pixels = normalize_images(batch["images"].float() / 255)
    inputs = model.model.model.expand_inputs(
        *(batch["input_ids"], pixels, batch["attention_mask"], batch["labels"]), padding_side="right"
    )
    noise = [SampleNoise(torch.arange(8), step=0) for _ in range(3)]
    embeds, mask, labels = model.read_features(inputs, noise[0])
    shares = []
    for row in range(8):
        whole = inputs.inputs_embeds[row][inputs.attention_mask[row].bool()]
        feature = inputs.is_feature[row][inputs.attention_mask[row].bool()]
        left = embeds[row][mask[row].bool()]
        positions = [int((whole == v).all(1).nonzero()[0]) for v in left if (whole == v).all(1).sum() == 1]
        assert positions == sorted(positions)  # in their order
        assert len(left) >= (~feature).sum()
        learnt = inputs.labels[row] != -100
        assert labels[row][labels[row] != -100].tolist() == inputs.labels[row][learnt].tolist()
        assert torch.equal(left[labels[row][mask[row].bool()] != -100], inputs.inputs_embeds[row][learnt])
        if feature.any():
            shares.append(1 - (len(left) - int((~feature).sum())) / int(feature.sum()))
        else:
            assert len(left) == len(whole)
    assert shares and max(shares) > 0.2 and max(shares) < 0.9
    untouched = model.eval().read_features(inputs, noise[1])
    for one, other in zip(untouched, (inputs.inputs_embeds, inputs.attention_mask, inputs.labels), strict=True):
        assert torch.equal(one, other)


def test_mixtures_are_named_by_the_teachers(tmp_path, images):
    torch.manual_seed(0)
    names = ["something else", *reversed(images.names)]  # teachers may know more names, in another order
    folders = [str(tmp_path / folder) for folder in ("one", "two")]
    for folder in folders:
        Classifier(names, images.styles, 48, [2, 2, 1, 2]).save(folder)
    labelled = label_mixtures(images, folders, 300, seed=0)
    assert labelled.images.shape == (300, 3, 48, 48) and labelled.images.dtype == torch.uint8
    shown = labelled.images.float() / 255
    votes = sum(Classifier.load(folder)(shown)[0].softmax(-1) for folder in folders)
    votes[:, 0] = 0  # not a name of the data set
    assert [images.names[i] for i in labelled.name] == [names[i] for i in votes.argmax(-1)]
    known = {tuple(image.flatten().tolist()) for image in images.images}
    assert sum(tuple(mixture.flatten().tolist()) in known for mixture in labelled.images) < 100  # most are new
    again, other = (label_mixtures(images, folders, 300, seed=seed) for seed in (0, 1))
    assert torch.equal(again.images, labelled.images) and not torch.equal(other.images, labelled.images)
    more = label_mixtures(images, folders, 310, seed=0)
    assert torch.equal(more.images[:300], labelled.images)


def test_mixtures_are_a_share_of_the_captions(tmp_path, images):
    processor = LavitProcessor.from_pretrained(LAVIT_EMOJI)
    labelled = LabelledMixtures(torch.full((2, 3, 48, 48), 7, dtype=torch.uint8), torch.tensor([3, 3]))
    codes = [[torch.arange(5)] for _ in images.images]
    for task, low, high in (("caption", 0.4, 0.8), ("style_question", 0.0, 0.0)):
        dataset = NamedSamples(images, codes, sequences(), only(**{task: 1.0}), mixtures=labelled, mixture_share=0.6)
        items = [dataset[position] for position in range(len(images))]
        mixtures = [item for item in items if bool((item["images"][0] == 7).all())]
        assert low <= len(mixtures) / len(items) <= high
        for item in mixtures:
            learnt = [label for label in item["labels"] if label >= 0]
            assert processor.tokenizer.decode(learnt, skip_special_tokens=True) == images.names[3]


def test_mixtures_need_teachers_that_know_the_names(tmp_path, images):
    with pytest.raises(ValueError, match="needs mixup.teachers"):
        label_mixtures(images, [], 4, seed=0)
    with pytest.raises(OSError, match="train the stage classifier first"):
        label_mixtures(images, [str(tmp_path / "nothing")], 4, seed=0)
    Classifier(images.names[1:], images.styles, 48, [2, 2, 1, 2]).save(tmp_path / "less")
    with pytest.raises(ValueError, match="does not know 1 of the names"):
        label_mixtures(images, [str(tmp_path / "less")], 4, seed=0)
