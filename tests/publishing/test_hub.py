"""The saved folder: with the package, without it in a fresh process, from a cache, and through a stand-in Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import tiny_detokenizer, tiny_model, tiny_processor, tiny_scheduler, tiny_unet
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

import modeling_lavit
from modeling_lavit import (
    LavitForConditionalGeneration,
    LavitImageProcessor,
    LavitModel,
    LavitPipeline,
    LavitProcessor,
    LavitTextToImagePipeline,
)
from modeling_lavit.compat_lavit import AutoImageProcessor
from modeling_lavit.publishing.deploying import deploying_files
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


PROMPT = "a red apple"
DEPLOYING = set(deploying_files())

# Runs where the package cannot be imported, as on a machine that does not have it.
FRESH_PROCESS = """
import json, sys
sys.modules["modeling_lavit"] = None
import numpy, torch, transformers
from diffusers import DiffusionPipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

source, only_model, save_to = json.loads(sys.argv[1])
try:
    DiffusionPipeline.from_pretrained(source)
    refused = False
except ValueError as error:
    refused = "trust_remote_code" in str(error)
trust = {"trust_remote_code": True}
classes = {}
for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM",
             "AutoImageProcessor", "AutoProcessor"):
    auto_class = AutoImageProcessor if name == "AutoImageProcessor" else getattr(transformers, name)
    loaded = auto_class.from_pretrained(only_model or source, **trust)
    classes[name] = f"{type(loaded).__module__.split('.')[0]}.{type(loaded).__name__}"

seed = lambda: torch.Generator().manual_seed(3)
draw = transformers.pipeline("text-to-image", model=source, **trust)
by_task = numpy.asarray(draw("a red apple", generator=seed(), num_inference_steps=2)).tolist()
pipe = DiffusionPipeline.from_pretrained(source, **trust)
by_pipeline = numpy.asarray(pipe("a red apple", generator=seed(), num_inference_steps=2).images[0]).tolist()
from diffusers import ModularPipeline
modular = ModularPipeline.from_pretrained(source, **trust)
modular.load_components(pretrained_model_name_or_path=source)
arguments = {"prompt": "a red apple", "num_inference_steps": 2, "generator": seed()}
by_blocks = numpy.asarray(modular(**arguments, output="images")[0]).tolist()
again = pipe.reconstruct(draw("two cats", num_inference_steps=1), num_inference_steps=1).visual_tokens.lengths.tolist()
if save_to and save_to.startswith("hub:"):
    pipe.push_to_hub(save_to.removeprefix("hub:"))
elif save_to:
    (draw if save_to.endswith("task") else pipe).save_pretrained(save_to)
package = [name for name, module in sys.modules.items() if name.startswith("modeling_lavit") and module]
print("RESULT" + json.dumps([classes, by_task, by_pipeline, by_blocks, refused, package]))
"""

WITH_PACKAGE = """
import sys
sys.path.insert(0, sys.argv[1])
from modeling_lavit import LavitPipeline

pipe = LavitPipeline.from_pretrained(sys.argv[2])
pipe.push_to_hub("group/pipeline", commit_message="First")
pipe.model.push_to_hub("group/model")
pipe.processor.push_to_hub("group/model")
"""


@pytest.fixture(scope="module")
def pipe():
    pipe = LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(),
        detokenizer=tiny_detokenizer(),
        unet=tiny_unet(channels=12),
        vae=LavitPatchAutoencoder(patch_size=2, latent_channels=12, block_out_channels=(1, 1)),
        scheduler=tiny_scheduler("sample"),
        default_num_inference_steps=7,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "lavit-tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(pipe) -> list:
    return draw(pipe)


def draw(pipe) -> list:
    images = pipe(PROMPT, generator=torch.Generator().manual_seed(3), num_inference_steps=2).images
    return np.asarray(images[0]).tolist()


def run(script: str, *arguments: str, home: Path, **environment: str) -> str:
    """A fresh process far from this checkout; what it prints."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "HF_HOME": str(home), **environment}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**inherited, **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_fresh(drawn: list, source: str, home: Path, save_to: str = "", only_model: str = "", **environment: str):
    arguments = json.dumps([str(source), only_model, str(save_to)])
    output = run(FRESH_PROCESS, arguments, home=home, **environment)
    classes, by_task, by_pipeline, by_blocks, refused, package = json.loads(output.split("RESULT")[1])
    generation = "transformers_modules.LavitForConditionalGeneration"
    assert classes == {
        "AutoModel": "transformers_modules.LavitModel",
        "AutoModelForImageTextToText": generation,
        "AutoModelForCausalLM": generation,
        "AutoModelForMultimodalLM": generation,
        "AutoImageProcessor": "transformers_modules.LavitImageProcessor",
        "AutoProcessor": "transformers_modules.LavitProcessor",
    }
    assert by_task == drawn
    assert by_pipeline == drawn
    assert by_blocks == drawn
    assert refused and package == []


def test_the_folder_has_the_files_of_both_libraries_and_no_pickle(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "model_index.json",
        "detokenizer/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "README.md",
        "lavit_transformers.py",
        "lavit_diffusers.py",
    }
    ours = files - DEPLOYING
    assert files >= DEPLOYING and sum(name.endswith(".py") for name in ours) == 2
    assert {Path(name).suffix for name in ours} == {".json", ".safetensors", ".py", ".md", ".jinja"}


def test_with_the_package_everything_loads_without_a_flag(folder, drawn):
    for auto_class, wanted in (
        (AutoModel, LavitModel),
        (AutoModelForImageTextToText, LavitForConditionalGeneration),
        (AutoModelForMultimodalLM, LavitForConditionalGeneration),
        (AutoModelForCausalLM, LavitForConditionalGeneration),
        (AutoProcessor, LavitProcessor),
        (AutoImageProcessor, LavitImageProcessor),
    ):
        assert type(auto_class.from_pretrained(folder)) is wanted
    for pipeline_class in (LavitPipeline, DiffusionPipeline):
        loaded = pipeline_class.from_pretrained(folder)
        assert type(loaded) is LavitPipeline
        assert draw(loaded) == drawn
        assert loaded.defaults.num_inference_steps == 7
    assert type(pipeline("text-to-image", model=str(folder))) is LavitTextToImagePipeline


def test_the_package_wins_over_a_folders_code_also_with_the_flag(folder):
    assert type(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) is LavitPipeline
    assert type(pipeline("text-to-image", model=str(folder), trust_remote_code=True)) is LavitTextToImagePipeline


def test_components_can_be_handed_in_and_keep_their_identity(folder, pipe):
    loaded = LavitPipeline.from_pretrained(folder, model=pipe.model, processor=pipe.processor, unet=pipe.unet)
    assert loaded.model is pipe.model and loaded.processor is pipe.processor and loaded.unet is pipe.unet


def test_a_dtype_goes_to_every_model(folder):
    loaded = LavitPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert {loaded.model.dtype, loaded.unet.dtype, loaded.vae.dtype} == {torch.bfloat16}


def test_half_precision_files_load_in_single_precision_unless_asked_otherwise(folder, tmp_path):
    LavitPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    loaded = LavitPipeline.from_pretrained(tmp_path)
    parts = (loaded.model, loaded.detokenizer, loaded.unet, loaded.vae)
    assert {part.dtype for part in parts} == {torch.float32}
    assert LavitPipeline.from_pretrained(tmp_path, dtype=torch.float16).model.dtype == torch.float16


def test_a_variant_lies_beside_the_other_weights_and_loads_again(folder, drawn, tmp_path):
    pipe = LavitPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    for name in ("model", "unet/diffusion_pytorch_model", "detokenizer/model"):
        dtypes = [load_file(tmp_path / f"{name}{variant}.safetensors") for variant in ("", ".bf16")]
        assert [next(iter(weights.values())).dtype for weights in dtypes] == [torch.float32, torch.bfloat16]
    assert draw(LavitPipeline.from_pretrained(tmp_path)) == drawn
    halved = LavitPipeline.from_pretrained(tmp_path, variant="bf16")
    assert halved.model.dtype == torch.float32
    assert torch.equal(halved.model.lm_head.weight, pipe.model.lm_head.weight.float())
    assert LavitPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path, variant="bf16")
    assert torch.equal(model.lm_head.weight, pipe.model.lm_head.weight)
    detokenizer = AutoModel.from_pretrained(tmp_path, subfolder="detokenizer", variant="bf16", dtype=torch.bfloat16)
    assert detokenizer.config.variant == "highres"
    assert torch.equal(detokenizer.query_embedding, pipe.detokenizer.query_embedding)
    (tmp_path / "detokenizer" / "model.safetensors").unlink()
    assert AutoModel.from_pretrained(tmp_path / "detokenizer", variant="bf16").num_parameters()


def test_only_safetensors_are_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub=True only"):
        pipe.save_pretrained(tmp_path / "misspelt", max_shard_sise="1GB")
    assert not any(tmp_path.iterdir())


def test_what_was_loaded_can_be_saved_and_loaded_again(folder, drawn, tmp_path):
    LavitPipeline.from_pretrained(folder).save_pretrained(tmp_path / "first", max_shard_size="100kB")
    assert (tmp_path / "first" / "model.safetensors.index.json").is_file()
    draw_task = pipeline("text-to-image", model=str(tmp_path / "first"))
    draw_task.save_pretrained(tmp_path / "second")
    assert draw(LavitPipeline.from_pretrained(tmp_path / "second")) == drawn


def test_missing_weights_are_an_error_in_every_component(folder, tmp_path):
    for part, file in (("model", "model.safetensors"), ("detokenizer", "detokenizer/model.safetensors")):
        broken = tmp_path / part
        shutil.copytree(folder, broken)
        weights = load_file(broken / file)
        removed = sorted(weights)[0]
        del weights[removed]
        save_file(weights, broken / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="has no weights for"):
            LavitPipeline.from_pretrained(broken)
    with pytest.raises(OSError, match="model_index.json"):
        LavitPipeline.from_pretrained(tmp_path)


def test_a_weights_file_that_was_cut_short_is_an_error_that_says_so(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="damaged or truncated"):
        LavitPipeline.from_pretrained(broken)


def test_a_folder_without_its_tokenizer_is_an_error(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        LavitPipeline.from_pretrained(broken)


def test_a_file_is_no_place_for_a_folder(pipe, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        pipe.save_pretrained(tmp_path / "taken")


@pytest.mark.slow
def test_without_the_package_the_folder_loads_is_saved_and_serves_an_offline_cache(folder, drawn, tmp_path):
    check_fresh(drawn, folder, tmp_path / "home1", save_to=tmp_path / "saved-by-task")
    fill_cache(tmp_path / "home2" / "hub" / "models--group--tiny", tmp_path / "saved-by-task")
    last = tmp_path / "saved-by-pipeline"
    check_fresh(drawn, "group/tiny", tmp_path / "home2", save_to=last)
    for name in ("model_index.json", "lavit_diffusers.py", "lavit_transformers.py", "processor_config.json"):
        assert (last / name).read_text() == (folder / name).read_text(), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folder, last))
    assert before["auto_map"] == after["auto_map"] and before["custom_pipelines"] == after["custom_pipelines"]
    assert draw(LavitPipeline.from_pretrained(last)) == drawn


def fill_cache(repository: Path, folder: Path):
    """Writes `folder` as huggingface_hub would have cached it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder)
            blob = repository / "blobs" / str(name).replace("/", "-")
            shutil.copyfile(path, blob)
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.slow
def test_what_is_pushed_arrives_and_loads_from_the_hub(folder, drawn, tmp_path):
    checkout = str(Path(modeling_lavit.__file__).parent.parent)
    with HubServer() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_nobody"}
        run(WITH_PACKAGE, checkout, str(folder), home=tmp_path / "sender", **online)
        pushed = hub.repositories["group/pipeline"]
        assert set(pushed) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert [commit["summary"] for commit in hub.commits][0] == "First"
        assert {"model.safetensors", "tokenizer.json", "lavit_transformers.py"} <= set(hub.repositories["group/model"])
        assert not any("diffusers" in name or "unet" in name for name in hub.repositories["group/model"])

        receiver = tmp_path / "receiver"
        check_fresh(drawn, "group/pipeline", receiver, save_to="hub:group/again", only_model="group/model", **online)
        # without the package there is nothing to write a handler and a Space from
        assert set(hub.repositories["group/again"]) == set(pushed) - DEPLOYING
