"""Uploading and loading as people do it, against a stand-in for the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, ModularPipeline
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from tiny import an_image, tiny_detokenizer, tiny_model, tiny_processor, tiny_scheduler, tiny_unet, tiny_visual_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from modeling_lavit import LavitForConditionalGeneration, LavitImageProcessor, LavitPipeline, LavitVisualTokenizer
from modeling_lavit.command_line import main
from modeling_lavit.compat_lavit import AutoImageProcessor
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    return LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(),
        detokenizer=tiny_detokenizer(),
        unet=tiny_unet(channels=12),
        vae=LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1)),
        scheduler=tiny_scheduler("sample"),
    )


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "lavit-tiny"
    pipe.save_pretrained(folder)
    pipe.unet.save_pretrained(folder / "unet", variant="mine")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, an empty cache, and a token."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        # transformers keeps one client
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield server


def upload_as_it_is(hub: HubServer, folder: Path, name: str) -> None:
    files = (path for path in folder.rglob("*") if path.is_file())
    hub.repositories[name] = {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fetched(hub: HubServer) -> set[str]:
    """The files whose content was asked for."""
    gets = (call.split("/resolve/")[1] for call in hub.calls if call.startswith("GET ") and "/resolve/" in call)
    return {name.split("/", 1)[1] for name in gets}


CLASSES = {
    "model": (lambda pipe: pipe.model, {"config.json", "model.safetensors", "generation_config.json"}),
    "tokenizer": (
        lambda pipe: pipe.model.model.visual_tokenizer,
        {"config.json", "model.safetensors", "preprocessor_config.json"},
    ),
    "detokenizer": (lambda pipe: pipe.detokenizer, {"config.json", "model.safetensors"}),
    "processor": (lambda pipe: pipe.processor, {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}),
    "image_processor": (lambda pipe: pipe.processor.image_processor, {"preprocessor_config.json"}),
    "config": (lambda pipe: pipe.model.config, {"config.json"}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_uploads_itself_with_its_code_and_a_card(hub, pipe, name):
    part, files = CLASSES[name]
    url = part(pipe).push_to_hub(f"group/{name}", commit_message="First", private=True, tags=["tiny"])
    pushed = hub.repositories[f"group/{name}"]
    assert url.startswith(f"{hub.url}/group/{name}/commit/")
    assert set(pushed) - {"chat_template.jinja"} == files | {"README.md", "lavit_transformers.py"}
    assert f"group/{name}" in hub.private and hub.commits[0]["summary"] == "First"
    card = ModelCard(pushed["README.md"].decode())
    assert {"lavit", "tiny"} <= set(card.data.tags)
    assert f'"group/{name}"' in card.text or name == "config"


def test_a_pipeline_goes_to_a_branch_or_into_a_pull_request(hub, pipe):
    pipe.push_to_hub("group/pipe")
    main_branch = dict(hub.repositories["group/pipe"])
    changed = tiny_processor()
    assert "/discussions/1" in pipe.push_to_hub("group/pipe", create_pr=True, tags=["proposed"])
    assert b"proposed" in hub.branches["group/pipe", "refs/pr/1"]["README.md"]
    changed.push_to_hub("group/pipe", revision="next", tags=["next"])
    assert "model.safetensors" in hub.branches["group/pipe", "next"]
    assert hub.repositories["group/pipe"] == main_branch
    with pytest.raises(ValueError, match="either create_pr or revision"):
        pipe.push_to_hub("group/pipe", create_pr=True, revision="next")


def test_saving_uploads_too(hub, tmp_path):
    tiny_model().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="group/saved", commit_message="Saved")
    assert "model.safetensors" in hub.repositories["group/saved"]
    tiny_processor().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert "processor_config.json" in hub.repositories["me/mine"]


def test_what_people_wrote_into_a_card_stays(hub, pipe):
    pipe.push_to_hub("group/edited")
    card = hub.repositories["group/edited"]["README.md"].decode()
    edited = card.replace("## Limits\n", "## Limits\n\nIt cannot draw hands.\n").replace(
        "library_name:", "license: mit\nlibrary_name:"
    )
    hub.repositories["group/edited"]["README.md"] = (edited + "\n## Thanks\n\nTo all.\n").encode()
    pipe.push_to_hub("group/edited", tags=["second"])
    card = hub.repositories["group/edited"]["README.md"].decode()
    assert "It cannot draw hands." in card and "## Thanks\n\nTo all." in card
    assert ModelCard(card).data.license == "mit" and "second" in ModelCard(card).data.tags
    assert card.count("## Limits") == card.count("## Use") == card.count("## Code") == 1


def test_a_card_written_by_hand_is_completed_not_replaced(hub, pipe):
    hub.repositories["group/byhand"] = {"README.md": b"# My model\n\nWritten by hand.\n"}
    pipe.push_to_hub("group/byhand")
    card = hub.repositories["group/byhand"]["README.md"].decode()
    assert "# My model\n\nWritten by hand." in card and "## Use" in card
    assert card.startswith("---\n") and ModelCard(card).data.pipeline_tag == "any-to-any"


def test_a_card_that_cannot_be_read_is_not_written_over(hub, pipe):
    hub.repositories["group/hiccup"] = before = {"README.md": b"# My model\n"}
    hub.unreadable = {"README.md"}
    with pytest.raises(OSError, match="README.md could not be read from the Hub: call again"):
        pipe.push_to_hub("group/hiccup")
    assert hub.repositories["group/hiccup"] == before == {"README.md": b"# My model\n"}


@pytest.mark.parametrize("sizes", [("10GB", "20KB"), ("20KB", "10GB")])
def test_weights_in_more_or_fewer_files_replace_those_that_were_there(hub, sizes):
    old, new = tiny_model(), tiny_model()
    with torch.no_grad():
        new.lm_head.weight += 1
    for model, size in zip((old, new), sizes, strict=True):
        model.push_to_hub("group/shards", max_shard_size=size)
    hub.repositories["group/shards"]["notes.txt"] = b"mine"
    new.push_to_hub("group/shards", max_shard_size=sizes[1])
    names = set(hub.repositories["group/shards"])
    assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names) and "notes.txt" in names
    loaded = LavitForConditionalGeneration.from_pretrained("group/shards")
    torch.testing.assert_close(loaded.lm_head.weight, new.lm_head.weight, rtol=0, atol=0)


REFUSALS = {
    "no right": ({"group/theirs": (403, "You don't have the rights")}, "group/theirs", "token may not write there"),
    "no space": (
        {"group/full": (507, "Storage limit reached")},
        "group/full",
        r"no space left.*limit reached",
    ),
    "too large": ({"group/large": (413, "File too large")}, "group/large", "larger than the Hub takes"),
    "odd": ({"group/odd": (418, "I am a teapot")}, "group/odd", r"answers 418 \(it says: I am a teapot\)"),
    "no name": ({}, "group/a b", "a b"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_the_hub_refuses_is_said_in_one_line(hub, saved, reason, capfd):
    hub.refused, name, message = REFUSALS[reason]
    hub.repositories |= {refused: {} for refused in hub.refused}
    assert main(["push", str(saved), name]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lavit: error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines


def test_no_token_is_said_in_one_line(hub, saved, monkeypatch, capfd, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.needs_token = True
    assert main(["push", str(saved), "group/mine"]) == 2
    assert "group/mine: the token is missing or not valid: call `hf auth login`" in capfd.readouterr().err


def test_an_upload_that_broke_off_goes_on(hub, saved):
    hub.lost_uploads = 1
    assert main(["push", str(saved), "group/mine"]) == 2
    assert "config.json" not in hub.repositories["group/mine"]
    arrived = set(hub.blobs)
    hub.calls.clear()
    assert main(["push", str(saved), "group/mine"]) == 0
    sent = {call.rsplit("/", 1)[1] for call in hub.calls if call.startswith("PUT ")}
    assert not sent & arrived
    assert hub.repositories["group/mine"]["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_a_dry_run_lists_what_is_new(hub, saved, tmp_path, capfd):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    assert main(["push", str(folder), "group/mine", "--dry-run"]) == 0
    listed = capfd.readouterr().out
    assert "group/mine would be created" in listed and "new" in listed and "group/mine" not in hub.repositories
    assert main(["push", str(folder), "group/mine", "--private", "--message", "Mine"]) == 0
    assert capfd.readouterr().out.startswith(f"{hub.url}/group/mine/commit/")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert main(["push", str(folder), "group/mine", "--dry-run"]) == 0
    states = {line.split()[-1]: line.split()[0] for line in capfd.readouterr().out.splitlines()}
    assert states["config.json"] == "changed" and states["model.safetensors"] == states["tokenizer.json"] == "same"
    assert not list(folder.glob(".cache*"))


def test_an_adapter_says_what_it_was_trained_on_but_no_folder_of_its_owner(hub, saved, tmp_path, capfd):
    model = tiny_model()
    model.name_or_path = str(saved)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), "group/adapter"]) == 0
    pushed = hub.repositories["group/adapter"]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] is None
    assert str(saved) not in pushed["README.md"].decode()
    assert main(["push", str(tmp_path), "group/adapter", "--base-model", "group/base"]) == 0
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "group/base"
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("group/base", "adapter")
    assert 'from_pretrained("group/base")' in card.text
    assert main(["push", str(saved), "group/mine", "--base-model", "group/base"]) == 2
    assert "--base-model is of adapters" in capfd.readouterr().err


def test_what_is_no_saved_model_is_not_uploaded(hub, tmp_path, capfd):
    assert main(["push", str(tmp_path), "group/mine"]) == 2
    assert main(["push", str(tmp_path / "nowhere"), "group/mine"]) == 2
    error = capfd.readouterr().err
    assert "is no saved model" in error and "there is no folder" in error
    assert not hub.repositories


def test_reading_fetches_the_model_alone(hub, saved):
    upload_as_it_is(hub, saved, "group/mine")
    AutoModelForMultimodalLM.from_pretrained("group/mine")
    AutoProcessor.from_pretrained("group/mine")
    assert "model.safetensors" in fetched(hub)
    assert not [name for name in fetched(hub) if "/" in name or name.endswith((".py", ".png", ".md"))]


def test_a_pipeline_fetches_what_it_is_made_of_once(hub, saved):
    upload_as_it_is(hub, saved, "group/mine")
    hub.repositories["group/mine"] |= {"samples.png": b"", "training.log": b"", "unet/old.bin": b"", "lowres/x": b""}
    for loader in (LavitPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        assert type(loader.from_pretrained("group/mine")) is LavitPipeline
    names = fetched(hub)
    assert {"model.safetensors", "unet/diffusion_pytorch_model.safetensors", "detokenizer/model.safetensors"} <= names
    assert not names & {"samples.png", "training.log", "unet/old.bin", "lowres/x", "README.md"}
    assert "unet/diffusion_pytorch_model.mine.safetensors" not in names
    weights = [call for call in hub.calls if call.startswith("GET") and call.endswith(".safetensors")]
    assert len(weights) == len(set(weights))


def test_components_that_are_given_are_not_fetched(hub, saved, pipe):
    upload_as_it_is(hub, saved, "group/mine")
    loaded = LavitPipeline.from_pretrained("group/mine", model=pipe.model, processor=pipe.processor)
    assert loaded.model is pipe.model
    assert not fetched(hub) & {"model.safetensors", "tokenizer.json", "config.json"}


OPTIONAL = {"safety_checker", "feature_extractor"}
STAGES = {
    "drawing from codes": (("processor", "model"), {"detokenizer", "unet", "vae", "scheduler"}),
    "writing codes": (("detokenizer", "unet", "vae", "scheduler"), {""}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_fetches_nothing_of_the_other(hub, saved, stage):
    absent, folders = STAGES[stage]
    upload_as_it_is(hub, saved, "group/mine")
    LavitPipeline.from_pretrained("group/mine", **dict.fromkeys(absent))
    names = fetched(hub) - {"model_index.json", "lavit_diffusers.py", "lavit_transformers.py"}
    assert {name.rpartition("/")[0] for name in names} == folders
    assert ("model.safetensors" in names) == ("" in folders)


def test_a_pushed_pipeline_is_a_modular_one_whose_workflows_fetch_what_they_need(hub, pipe, saved):
    pipe.push_to_hub("group/pushed")
    assert main(["push", str(saved), "group/folder"]) == 0
    for name in ("group/pushed", "group/folder"):
        hub.calls.clear()
        modular = ModularPipeline.from_pretrained(name, workflow="decoding")
        modular.load_components()
        assert set(modular.null_component_names) == OPTIONAL
        assert {file.rpartition("/")[0] for file in fetched(hub)} == {"", "detokenizer", "unet", "vae", "scheduler"}
        assert not fetched(hub) & {"model.safetensors", "tokenizer.json", "lavit_diffusers.py"}
    before = len(hub.commits)
    assert main(["push", str(saved), "group/folder"]) == 0
    assert len(hub.commits) == before + 1


def test_a_variant_is_fetched_where_a_component_has_it(hub, saved):
    upload_as_it_is(hub, saved, "group/mine")
    LavitPipeline.from_pretrained("group/mine", variant="mine")
    names = fetched(hub)
    assert {"unet/diffusion_pytorch_model.mine.safetensors", "detokenizer/model.safetensors"} <= names
    assert "unet/diffusion_pytorch_model.safetensors" not in names


def test_a_revision_a_cache_and_a_lost_connection(hub, saved, tmp_path, monkeypatch):
    upload_as_it_is(hub, saved, "group/mine")
    hub.branches["group/mine", "next"] = dict(hub.repositories["group/mine"])
    hub.repositories["group/mine"].pop("model_index.json")
    cache = {"cache_dir": str(tmp_path / "other")}
    with pytest.raises(OSError, match="no model_index.json"):
        LavitPipeline.from_pretrained("group/mine", **cache)
    with pytest.raises(OSError, match="group/mine"):
        LavitPipeline.from_pretrained("group/mine", revision="never", **cache)
    with pytest.raises(OSError, match="group/nothing"):
        LavitPipeline.from_pretrained("group/nothing", **cache)
    first = LavitPipeline.from_pretrained("group/mine", revision="next", token="hf_other", **cache)
    hub.calls.clear()
    again = LavitPipeline.from_pretrained("group/mine", revision="next", local_files_only=True, **cache)
    assert not hub.calls
    assert torch.equal(first.unet.conv_in.weight, again.unet.conv_in.weight)
    LavitPipeline.from_pretrained("group/mine", revision="next", force_download=True, **cache)
    assert "model.safetensors" in fetched(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert type(DiffusionPipeline.from_pretrained("group/mine", revision="next", **cache)) is LavitPipeline
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("models--*/snapshots/*"))


def test_the_auto_classes_take_revisions_and_subfolders(hub, saved):
    upload_as_it_is(hub, saved, "group/main")
    hub.repositories["group/nested"] = {f"inner/{name}": c for name, c in hub.repositories["group/main"].items()}
    hub.branches["group/nested", "next"] = hub.repositories["group/nested"]
    where = {"subfolder": "inner", "revision": "next"}
    assert AutoConfig.from_pretrained("group/nested", **where).model_type == "lavit"
    assert (
        type(AutoModelForMultimodalLM.from_pretrained("group/nested", **where)).__name__
        == "LavitForConditionalGeneration"
    )
    assert type(AutoProcessor.from_pretrained("group/nested", **where)).__name__ == "LavitProcessor"
    assert type(AutoTokenizer.from_pretrained("group/nested", **where)).__name__ == "LlamaTokenizer"
    assert type(AutoImageProcessor.from_pretrained("group/nested", **where)).__name__ == "LavitImageProcessor"
    detokenizer = AutoModel.from_pretrained("group/main", subfolder="detokenizer")
    assert type(detokenizer).__name__ == "LavitDetokenizer"


def test_a_visual_tokenizer_is_a_repository_of_its_own(hub):
    tokenizer = LavitVisualTokenizer(tiny_visual_config()).eval()
    tokenizer.push_to_hub("group/tokenizer")
    loaded = AutoModel.from_pretrained("group/tokenizer")
    assert torch.equal(loaded.quantizer.codebook.weight, tokenizer.quantizer.codebook.weight)
    prepare = AutoImageProcessor.from_pretrained("group/tokenizer")
    assert type(prepare) is LavitImageProcessor
    pixels = prepare(an_image(), return_tensors="pt").pixel_values
    assert torch.equal(loaded.tokenize(pixels).codes, tokenizer.tokenize(pixels).codes)
    assert torch.equal(pixels, tiny_processor().image_processor(an_image(), return_tensors="pt").pixel_values)
    card = ModelCard(hub.repositories["group/tokenizer"]["README.md"].decode())
    assert card.data.pipeline_tag == "image-feature-extraction" and "tokenizer.tokenize(" in card.text
