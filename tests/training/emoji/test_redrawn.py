"""What makes reading general: images that are redrawn, and images in further styles of which only names are learnt."""

from collections import Counter

import pytest
import torch
from parts import EMOJI
from test_prepare_images import icon_set, sets_with

from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.configuration_lavit import LavitConfig
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.augmentation import SampleNoise
from modeling_lavit.training.data.samples import Sequences
from modeling_lavit.training.emoji import prepare_images as emoji
from modeling_lavit.training.emoji.augmentation import augment_strongly, flatten, outline, recolour, redraw
from modeling_lavit.training.emoji.images import NO_STYLE, NamedImages
from modeling_lavit.training.emoji.recipe import ClassifierRecipe, NamedMixture, RedrawnAugmentation
from modeling_lavit.training.emoji.samples import NamedSamples
from modeling_lavit.training.emoji.train_classifier import ClassifierTraining


@pytest.fixture(scope="module")
def shown() -> torch.Tensor:
    return NamedImages(str(EMOJI), 48).images[:24].float() / 255


def noise() -> SampleNoise:
    return SampleNoise(torch.arange(24), step=3)


def test_a_share_of_images_is_redrawn_the_same_way_for_the_same_noise(shown):
    assert torch.equal(redraw(shown, noise(), 0.0), shown)
    redrawn = redraw(shown, noise(), 0.5)
    changed = (redrawn != shown).flatten(1).any(1)
    assert 4 < int(changed.sum()) < 20
    assert torch.equal(redraw(shown, noise(), 0.5), redrawn)
    assert 0 <= float(redrawn.min()) and float(redrawn.max()) <= 1
    corners = redraw(shown, noise(), 1.0)[:, :, 0, 0][(shown[:, :, :4, :4] == 1).flatten(1).all(1)]
    assert len(corners) and (corners == 1).all()  # the ground stays white


def test_greys_stay_whatever_the_colours_become():
    grey = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    torch.testing.assert_close(recolour(grey, torch.tensor([0.3, 1.4]), torch.tensor([0.5, -0.5])), grey)
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
    same = recolour(red, torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(same, red)
    without = recolour(red, torch.zeros(1), torch.zeros(1)).flatten()
    torch.testing.assert_close(without, torch.full((3,), 0.299))


def test_lines_are_drawn_where_colours_change_and_flat_areas_have_few_levels(shown):
    square = torch.ones(1, 3, 12, 12)
    square[..., 4:8, 4:8] = 0.5
    lined = outline(square, torch.ones(1))
    assert (lined[..., 0, 0] == 1).all() and (lined[..., 3:5, 5] < 0.5).all() and (lined[..., 5, 5] == 0.5).all()
    assert set(flatten(shown[:1], torch.tensor([2.0])).unique().tolist()) <= {0.0, 0.5, 1.0}


def test_the_strong_augmentation_redraws_first(shown):
    settings = RedrawnAugmentation(share=0.0, redraw=1.0)
    assert torch.equal(augment_strongly(shown, noise(), settings), redraw(shown, noise(), 1.0))


@pytest.fixture
def with_more() -> NamedImages:
    """12 images, and three more of which two have a known name."""
    images, more = NamedImages(str(EMOJI), 48), NamedImages(str(EMOJI), 48, ("held_out",))
    images.images, images.name, images.style = images.images[:12], images.name[:12], images.style[:12]
    images.order = list(range(12))
    more.names = [*more.names, "nobody knows this"]
    more.images, more.name = more.images[:3], torch.tensor([2, len(more.names) - 1, 0])
    more.order = [0, 1, 2]
    images.append(more)
    return images


def test_images_in_further_styles_have_a_name_and_no_style(with_more):
    assert len(with_more) == len(with_more.images) == 14
    assert with_more.style[12:].tolist() == [NO_STYLE, NO_STYLE] and with_more.name[12:].tolist() == [2, 0]
    assert [name for _, name in with_more.of_no_style()] == [with_more.names[2], with_more.names[0]]


def test_a_classifier_learns_no_style_from_them(with_more):
    torch.manual_seed(0)
    classifier = Classifier(with_more.names, with_more.styles, 48)
    training = ClassifierTraining(classifier, ClassifierRecipe()).eval()
    batch = [torch.stack([with_more[i][key] for i in range(10, 14)]) for key in ("images", "name", "style")]
    training.objective = training.objective.model_copy(update={"name": 0.0})

    def loss(rows: slice) -> torch.Tensor:
        return training(*(part[rows] for part in batch), noise=SampleNoise(torch.arange(4), 0), progress=0.0)["loss"]

    torch.testing.assert_close(loss(slice(0, 4)), loss(slice(0, 2)))
    assert loss(slice(2, 4)) == 0


def test_a_language_model_captions_them_and_draws_none(with_more):
    processor, images = LavitProcessor.from_pretrained(LAVIT_EMOJI), NamedImages(str(EMOJI), 48)
    sequences = Sequences(processor, LavitConfig.from_pretrained(LAVIT_EMOJI).vocabulary, 0.0)
    mixture = NamedMixture(**dict.fromkeys(NamedMixture.model_fields, 0.0) | {"more": 1.0, "draw": 1.0})
    codes = [[torch.tensor([1, 2])]] * len(images.images)
    more = with_more.of_no_style()
    samples = NamedSamples(images, codes, sequences, mixture, more=more)
    items = [samples[i] for i in range(len(samples))]
    read = [item["images"][0] for item in items if item["images"]]
    assert 0.3 < len(read) / len(items) < 0.7
    assert all(any(torch.equal(image, other) for other, _ in more) for image in read)
    assert not any(
        item["images"] for item in map(NamedSamples(images, codes, sequences, mixture).__getitem__, range(9))
    )


def test_the_further_sets_leave_out_unseen_names_and_what_they_do_not_draw(tmp_path, monkeypatch):
    sets = sets_with()
    further = icon_set({icon: '<path d="M2 2h8v8h-8z"/>' for icon in ("cat", "cat-1", "catface", "hat")})
    del further["icons"]["aliases"]
    package = emoji.PACKAGES[0]
    streamline, fx = (emoji.IconPackage(style, style, "1", "0") for style in ("streamline", "fx"))
    monkeypatch.setattr(emoji, "PACKAGES", (package,))
    monkeypatch.setattr(emoji, "MORE_PACKAGES", (streamline, fx))
    monkeypatch.setattr(emoji, "fetch", lambda package, cache: package.style)
    monkeypatch.setattr(emoji, "read_set", lambda style: sets.get(style, further))
    rows = emoji.prepare_more(tmp_path / "more", size=16)
    found = Counter((row["style"], row["name"], row["split"]) for row in rows)
    assert found == {
        ("streamline", "cat", "train"): 2,
        ("fx", "cat", "foreign"): 2,
        ("fx", "cat face", "foreign"): 1,
    }
    loaded = NamedImages(str(tmp_path / "more"), 16)
    assert loaded.images.shape == (2, 3, 16, 16) and loaded.names == ["cat", "cat face"]
    everything = {(name, "noto"): "unseen" if name == "cat" else "train" for name in ("cat", "cat face")}
    monkeypatch.setattr(emoji, "split_pairs", lambda pairs: everything)
    assert {row["name"] for row in emoji.prepare_more(tmp_path / "seen", size=16)} == {"cat face"}
