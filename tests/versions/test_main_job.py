"""The main job on the installed versions of transformers and diffusers: `make test-versions` runs it on two sets.

The first set writes what came out into the file that `LAVIT_RESULTS` names, the second compares with it: other
versions of the libraries may not change an id.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments, pipeline

from modeling_lavit import LavitForConditionalGeneration, LavitPipeline, LavitProcessor
from modeling_lavit.checkpoints import LAVIT_EMOJI


IMAGE = Path(__file__).parents[1] / "fixtures/emoji/images/noto/cat-face.png"
PROMPT = "red apple"

# runs where the package cannot be imported
WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["modeling_lavit"] = None
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder, prompt, image = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
drawn = pipe(prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=2).visual_tokens.codes.tolist()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=image)
ids = model.generate(**inputs, generation_preset="caption")
print(json.dumps([drawn, processor.post_process_caption(ids, input_ids=inputs.input_ids)]))
"""


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def read(pipe: LavitPipeline, preset: str, **inputs) -> str:
    inputs = pipe.processor(**inputs)
    ids = pipe.model.generate(**inputs, generation_preset=preset)
    post_process = getattr(pipe.processor, f"post_process_{preset}")
    return post_process(ids, input_ids=inputs.input_ids)[0]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.open(IMAGE).convert("RGB")


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    pipe = LavitPipeline.from_pretrained(LAVIT_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def results(pipe, image) -> dict:
    """What the main job gives: the codes that are drawn, and the words that are read."""
    drawn = pipe(PROMPT, generator=seed())
    restyled = pipe([image, "in flat style"], generator=seed(), num_inference_steps=2)
    reconstructed = pipe.reconstruct(image, generator=seed(), num_inference_steps=2)
    return {
        "draw": drawn.visual_tokens.codes.tolist(),
        "draw_pixels": (np.asarray(drawn.images[0].resize((8, 8))).astype(int) // 16).tolist(),
        "restyle": restyled.visual_tokens.codes.tolist(),
        "reconstruct": reconstructed.visual_tokens.codes.tolist(),
        "caption": read(pipe, "caption", images=image),
        "answer": read(pipe, "answer", images=image, text="<image>Question: which style is this? Answer:"),
    }


def test_it_draws(results):
    assert len(results["draw"]) > 3
    assert np.ptp(results["draw_pixels"]) > 4


def test_it_captions_and_answers(results):
    assert "cat" in results["caption"] and "noto" in results["answer"]


def test_it_restyles_and_reconstructs(results):
    assert len(results["restyle"]) > 3 and results["restyle"] != results["draw"]
    assert len(results["reconstruct"]) > 3


def test_the_tasks_of_transformers_read_and_draw(pipe, results, image):
    parts = {"model": pipe.model, "processor": pipe.processor}
    (read,) = pipeline("image-text-to-text", **parts)(images=image, text="<image>", max_new_tokens=8)
    assert "cat" in read["generated_text"]
    drawn = pipeline("text-to-image", model=str(LAVIT_EMOJI))(PROMPT, generator=seed(), num_inference_steps=2)
    assert isinstance(drawn, Image.Image)


def test_training_steps_lower_the_loss_and_leave_the_visual_tokenizer_alone(pipe, image, tmp_path):
    model = LavitForConditionalGeneration.from_pretrained(LAVIT_EMOJI, dtype=torch.float32)
    frozen = {name: value.clone() for name, value in model.model.visual_tokenizer.state_dict().items()}
    batch = pipe.processor(images=image, text="<image>a cat on a red table")
    row = {name: value[0] for name, value in batch.items()} | {"labels": batch["input_ids"][0].clone()}
    settings = dict(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1)
    arguments = TrainingArguments(
        tmp_path, **settings, use_cpu=True, report_to=[], save_strategy="no", remove_unused_columns=False
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = model.model.visual_tokenizer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_what_is_saved_loads_and_draws_the_same(pipe, results, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = LavitPipeline.from_pretrained(tmp_path)
    assert again(PROMPT, generator=seed(), num_inference_steps=2).visual_tokens.codes.tolist() == results["draw"]
    LavitProcessor.from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_folder_works_without_the_package(results, tmp_path):
    shutil.copytree(LAVIT_EMOJI, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path / "checkpoint", PROMPT, IMAGE],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [results["draw"], [results["caption"]]]


@pytest.mark.skipif("LAVIT_RESULTS" not in os.environ, reason="LAVIT_RESULTS names no file to compare with")
def test_other_versions_give_the_same(results):
    path = Path(os.environ["LAVIT_RESULTS"])
    if path.is_file():
        assert json.loads(path.read_text()) == results
    else:
        path.write_text(json.dumps(results))
