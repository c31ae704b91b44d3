"""The model card: what lies in a folder, as the Hub reads it, and what people changed in it."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import tiny_detokenizer, tiny_model, tiny_processor, tiny_scheduler, tiny_unet, tiny_visual_config

from modeling_lavit import LavitPipeline, LavitVisualTokenizer
from modeling_lavit.publishing.card import merge_cards, model_card, write_model_card
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


RESULT = {
    "task": "captions",
    "dataset": "COCO",
    "metric": "CIDEr x 100",
    "score": 134.02345,
    "protocol": "greedy, karpathy",
    "settings": {"split": "test", "num_beams": 2, "model": "me/mine"},
    "ids": {"count": 5000, "sha256": "ab" * 32},
    "complete": True,
}


def save_pipeline(folder: Path):
    LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(),
        detokenizer=tiny_detokenizer(),
        unet=tiny_unet(channels=12),
        vae=LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1)),
        scheduler=tiny_scheduler("sample"),
        aspect_ratios={"1:1": (16, 16), "2:1": (8, 16)},
        default_num_inference_steps=7,
    ).save_pretrained(folder)


def save_adapter(folder: Path):
    model = tiny_model()
    model.name_or_path = "me/base"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


KINDS = {
    "pipeline": (
        save_pipeline,
        "any-to-any",
        ["DiffusionPipeline", "AutoModelForImageTextToText", "2:1", "7 denoising"],
    ),
    "reader": (lambda f: tiny_model().save_pretrained(f), "image-text-to-text", ["AutoModelForImageTextToText"]),
    "visual tokenizer": (
        lambda f: LavitVisualTokenizer(tiny_visual_config()).save_pretrained(f),
        "image-feature-extraction",
        ["tokenizer.tokenize(", "codebook of 24 codes", "16 × 16 pixels, 16 patches"],
    ),
    "detokenizer": (lambda f: tiny_detokenizer().save_pretrained(f), None, ["detokenizer(codes, lengths)"]),
    "processor": (lambda f: tiny_processor().save_pretrained(f), None, ["AutoProcessor"]),
    "adapter": (save_adapter, "image-text-to-text", ["PeftModel", "[me/base](https://huggingface.co/me/base)"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_has_a_card_of_its_own(tmp_path, kind):
    save, tag, texts = KINDS[kind]
    save(tmp_path)
    card = ModelCard(model_card(tmp_path, repository="me/mine"), ignore_metadata_errors=False)
    assert card.data.pipeline_tag == tag and {"lavit", "arxiv:2309.04669"} <= set(card.data.tags)
    for text in ("# ", "me/mine", "## Use", "## Limits", "## Citation", *texts):
        assert text in card.text, text
    assert ("DiffusionPipeline" in card.text) == (kind == "pipeline")
    assert ("## Code" in card.text) == (kind != "adapter") and ("adapter" in card.text) == (kind == "adapter")
    page = MarkdownIt().enable("table").render(card.text)
    assert "{%" not in page and "{{" not in page and "<p>|" not in page and page.count("<pre>") >= 2


def test_an_adapter_has_our_card_in_place_of_the_empty_form_that_peft_writes(tmp_path):
    save_adapter(tmp_path)
    there = tmp_path / "README.md"
    assert "[More Information Needed]" in there.read_text()
    there.write_text(
        there.read_text().replace("me/base", "/home/me/base").replace("## Uses\n", "## Uses\n\nMy own.\n")
    )
    (tmp_path / "understanding.safetensors").write_bytes(b"")
    write_model_card(tmp_path, repository="me/mine")
    card = ModelCard(there.read_text(), ignore_metadata_errors=False)
    assert card.text.strip().startswith("# LoRA adapter of LaVIT") and "## Uses\n\nMy own." in card.text
    assert card.text.count("[More Information Needed]") == 3, "those of the section with text of its own"
    assert "Framework versions" not in card.text and "/home" not in there.read_text()
    assert "lora" in card.data.tags and card.data.base_model == "me/base"
    assert "understanding.load_state_dict(understanding)" in card.text


def test_a_folder_of_something_else_has_no_card(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds no model, adapter, processor or pipeline of LaVIT"):
        model_card(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole repository: results, a training run, images, licences."""
    folder = tmp_path_factory.mktemp("card") / "mine"
    save_pipeline(folder)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "coco.json").write_text(json.dumps({"results": [RESULT]}))
    (folder / "evaluation" / "other.json").write_text('{"notes": 1}')
    (folder / "evaluation" / "submission.json").write_text('[{"image_id": 1, "caption": "a cat"}]\n')
    training = {"recipe": "finetune.yaml", "steps": 100, "base_model": "me/base", "datasets": ["me/data"]}
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "examples").mkdir()
    for name in ("losses.png", "samples.png", "examples/a_red_apple.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "LICENSE").write_text("Mine.")
    return folder


def test_results_become_metadata_as_the_hub_reads_it_and_a_table(folder):
    card = ModelCard(model_card(folder))
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("image-to-text", "COCO", "test")
    assert result.metric_value == 134.0234 or result.metric_value == 134.0235
    assert result.metric_name == "CIDEr x 100; greedy, karpathy" and result.metric_args["num_beams"] == 2
    index = yaml.safe_load(model_card(folder).split("---")[1])["model-index"]
    assert model_index_to_eval_results(index)[1][0].metric_value == result.metric_value
    assert "| COCO (test) | CIDEr x 100 | 134 | 5000 | greedy, karpathy |" in card.text


def test_training_images_and_licences_are_shown(folder):
    card = ModelCard(model_card(folder, repository="me/mine"))
    assert card.data.base_model == "me/base" and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["me/data"]
    assert "- recipe: finetune.yaml\n- steps: 100" in card.text and "![losses](losses.png)" in card.text
    assert "![what it draws](samples.png)" in card.text and "## Licence texts\n\n[LICENSE](LICENSE)" in card.text
    assert card.data.widget == [{"text": "a red apple", "output": {"url": "examples/a_red_apple.png"}}]
    assert card.data.thumbnail.endswith("/me/mine/resolve/main/examples/a_red_apple.png")


def test_figures_that_are_measured_again_replace_the_old_ones_but_not_what_people_wrote(folder):
    first = model_card(folder)
    edited = first.replace("library_name: transformers", "library_name: transformers\nlicense: mit\nlanguage:\n- de")
    edited = edited.replace("language:\n- en\n", "", 1).replace("it can be confidently wrong", "and it is often wrong")
    second = first.replace("134 |", "140 |").replace("134.02", "140.02")
    # the mark of the section on evaluation is that of the old text
    merged = merge_cards(edited, second)
    data = ModelCard(merged).data
    assert data.license == "mit" and data.language == ["de"]
    assert round(data.eval_results[0].metric_value) == 140
    assert "and it is often wrong" in merged and "140 |" in merged and "134 |" not in merged


def test_a_card_that_is_merged_with_itself_stays(folder):
    card = model_card(folder)
    again = merge_cards(card, card)
    assert ModelCard(again).text.strip() == ModelCard(card).text.strip()
    assert merge_cards(again, card) == again


@pytest.mark.parametrize("theirs", ["", "just text", "---\nnot: [closed\n---\ntext", "---\n- a list\n---\n# Mine\n"])
def test_odd_cards_are_kept(theirs, folder):
    merged = merge_cards(theirs, model_card(folder))
    assert theirs.split("---")[-1].strip() in merged


def test_a_section_that_is_not_made_again_stays(folder):
    with_notice = model_card(folder, notice="Their licence holds.", license="other")
    merged = merge_cards(with_notice, model_card(folder))
    assert "Their licence holds." in merged and ModelCard(merged).data.license == "other"
