"""The stages of the embedded checkpoint have the losses they had, see `test_golden_losses.py`."""

import json
from pathlib import Path

import pytest
from parts import EMOJI, EMOJI_SIZES, detokenizer_sizes, fill, sizes, write_emoji_parts
from safetensors.torch import load_file, save_file
from test_golden_losses import arguments, check
from tiny import tiny_visual_config

from modeling_lavit import LavitVisualTokenizer
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.pretrain_encoder import EncoderStage, ImageHeads
from modeling_lavit.training.emoji.train import main
from modeling_lavit.training.emoji.train_classifier import ClassifierStage
from modeling_lavit.training.emoji.train_visual_tokenizer import EmojiTokenizerStage


DATA = (f"data.path={EMOJI}", "data.more=null", "data.validation=null")
STILL = "augmentation.redraw=0"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Tiny parts, teachers, and a result of stage 0."""
    folder = tmp_path_factory.mktemp("parts")
    write_emoji_parts(folder)
    images = NamedImages(str(EMOJI), 48)
    for name, width, strides in (("teacher", 1, [2, 2, 1, 2]), ("wide", 2, [2, 2, 1, 2]), ("style", 1, [1, 2, 1])):
        fill(Classifier(images.names, images.styles, 48, strides, width)).save(folder / name)
    heads = fill(ImageHeads(tiny_visual_config(**EMOJI_SIZES), images.names, len(images.styles)))
    encoder = LavitVisualTokenizer.from_pretrained(folder / "emoji_stage1" / "visual_tokenizer").encoder
    (folder / "encoder").mkdir()
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    tensors |= {f"heads.{key}": tensor for key, tensor in heads.state_dict().items()}
    save_file(tensors, folder / "encoder" / "model.safetensors")
    labels = {"names": images.names, "styles": images.styles}
    (folder / "encoder" / "labels.json").write_text(json.dumps(labels))
    assert load_file(folder / "encoder" / "model.safetensors")
    return folder


def filled(monkeypatch, stage: type, find) -> None:
    """New weights of a stage, those that `find(model)` gives, depend on nothing but their names."""
    build = stage.build

    def build_filled(self, recipe):
        parts = build(self, recipe)
        for module in find(parts.model):
            fill(module)
        return parts

    monkeypatch.setattr(stage, "build", build_filled)


@pytest.mark.parametrize("name", ["teacher", "classifier"])
def test_classifiers_have_the_losses_they_had(tmp_path, monkeypatch, name):
    filled(monkeypatch, ClassifierStage, lambda model: [model.classifier])
    main([name, *DATA, STILL, *arguments(tmp_path)])
    check(f"emoji_{name}", tmp_path)


def test_stage_zero_has_the_losses_it_had(parts, tmp_path, monkeypatch):
    filled(monkeypatch, EncoderStage, lambda model: [model.encoder, model.heads, model.teacher_maps, model.style_map])
    teachers = f"teacher={parts / 'teacher'}", f"name_teachers=[{parts / 'wide'}]", f"style_teacher={parts / 'style'}"
    repeat = "data.repeat={Animals & Nature: 4, Food & Drink: 4}"
    main(
        [
            "encoder",
            *DATA,
            STILL,
            repeat,
            *teachers,
            f"model={sizes(image_size=48, patch_size=8)}",
            *arguments(tmp_path),
        ]
    )
    check("emoji_encoder", tmp_path)


def test_stage_one_with_its_further_terms_has_the_losses_it_had(parts, tmp_path, monkeypatch):
    filled(
        monkeypatch,
        EmojiTokenizerStage,
        lambda model: [term.local_head for term in model.terms if hasattr(term, "local_head")],
    )
    overrides = [
        f"encoder={parts / 'encoder'}",
        f"start={parts / 'emoji_stage1'}",
        f"model={sizes(**EMOJI_SIZES)}",
        f"detokenizer={detokenizer_sizes(num_queries=36)}",
        "objective.quantize_from=0.3",
    ]
    main(["emoji-tokenizer", "tokenizer", *DATA, *overrides, *arguments(tmp_path)])
    check("emoji_tokenizer", tmp_path)


def test_stage_two_of_named_images_has_the_losses_it_had(parts, tmp_path):
    mixture = "caption: 0.2, style_question: 0.2, name_question: 0.1, code_caption: 0.1, code_style_question: 0.1"
    overrides = [
        f"start={parts / 'emoji_lavit'}",
        "tokenizer=null",
        "objective.packing=null",
        f"mixup={{number: 12, teachers: [{parts / 'teacher'}, {parts / 'wide'}]}}",
        "code_views.number=1",
        f"mixture={{{mixture}, draw: 0.2, restyle: 0.1}}",
    ]
    main(["language_model", *DATA, STILL, *overrides, *arguments(tmp_path, per_device_train_batch_size=12)])
    check("emoji_language_model", tmp_path)


@pytest.mark.parametrize("condition", ["features", "codes"])
def test_stage_three_of_named_images_has_the_losses_it_had(parts, tmp_path, condition):
    recipe, name = "pixel_decoder_features", "emoji_pixel_decoder_features"
    overrides = [
        f"encoder={parts / 'encoder'}",
        f"model={sizes(**EMOJI_SIZES)}",
        f"detokenizer={detokenizer_sizes(num_queries=36)}",
    ]
    if condition == "codes":
        recipe, name = "pixel_decoder", "emoji_pixel_decoder"
        overrides = [f"tokenizer={parts / 'emoji_stage1'}", "objective.perceptual_weight=0.3"]
    main([recipe, *DATA, f"start={parts / 'emoji_pixels'}", *overrides, *arguments(tmp_path)])
    check(name, tmp_path)
