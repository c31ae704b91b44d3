"""The result of every stage is a folder that the next command takes; a fine-tuned model is a whole one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import write_image_folder, write_parts
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from modeling_lavit import LavitForConditionalGeneration, LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.command_line import main as lavit
from modeling_lavit.publishing.card import model_card
from modeling_lavit.training import results


ARGUMENTS = {"max_steps": 1, "save_steps": 1, "warmup_steps": 0, "bf16": False, "report_to": "none"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def train(output: Path, recipe: str, *overrides: str) -> Path:
    values = [f"training_arguments.{key}={json.dumps(value)}" for key, value in ARGUMENTS.items()]
    assert lavit(["train", recipe, *values, f"training_arguments.output_dir={output}", *overrides]) == 0
    return output / "final"


def rows(parts: Path) -> str:
    return f"data={{path: parquet, data_files: {parts / 'rows.parquet'}}}"


def test_a_folder_of_images_becomes_a_model_that_reads_and_draws(tmp_path, capsys):
    """The three commands of docs/training.md, one step instead of many."""
    images = write_image_folder(tmp_path / "my_images")
    final = train(tmp_path / "run", "finetune", f"data.path={images}", "data.validation=0.5")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any({"eval_text_loss", "eval_code_loss"} <= record.keys() for record in records)
    record = json.loads((final / "training.json").read_text())
    assert record["stage"] == "language-model" and record["steps"] == 1 and "torch " in record["versions"]
    assert record["validation loss"].endswith("at step 1)") and Image.open(final / "losses.png").width > 100
    card = model_card(final, repository="me/mine")
    assert "- steps: 1\n" in card and "![losses](losses.png)" in card
    capsys.readouterr()
    drawing = tmp_path / "drawn.png"
    assert lavit(["generate", "a cat face", "--model", str(final), "-o", str(drawing), "--seed", "0"]) == 0
    assert Image.open(drawing).size == (48, 48)
    assert lavit(["caption", str(images / "0.png"), "--model", str(final)]) == 0
    assert capsys.readouterr().out.splitlines()[-1]
    whole, start = (LavitPipeline.from_pretrained(folder) for folder in (final, LAVIT_EMOJI))
    assert whole.defaults == start.defaults and type(whole.scheduler) is type(start.scheduler)
    for name in ("unet", "vae", "detokenizer"):
        for key, tensor in getattr(start, name).state_dict().items():
            assert torch.equal(getattr(whole, name).state_dict()[key], tensor), key


def test_the_adapter_lies_beside_the_model_and_gives_the_same(parts, tmp_path):
    adapters = ["lora={modules_to_save: [embed_tokens, lm_head]}", "training_arguments.learning_rate=0.1"]
    start = f"start={parts / 'lavit'}"
    more = ["early_stopping_patience=null", "training_arguments.load_best_model_at_end=false"]
    final = train(tmp_path, "finetune", rows(parts), start, *adapters, *more)
    base = LavitForConditionalGeneration.from_pretrained(parts / "lavit")
    base.model.understanding.load_state_dict(load_file(final / "adapter" / "understanding.safetensors"))
    adapted = PeftModel.from_pretrained(base, final / "adapter").merge_and_unload()
    merged = LavitForConditionalGeneration.from_pretrained(final)
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[key], tensor, msg=key)
    before = LavitForConditionalGeneration.from_pretrained(parts / "lavit")
    assert not torch.equal(merged.lm_head.weight, before.lm_head.weight)


@pytest.mark.slow
def test_the_papers_stages_end_in_a_checkpoint_that_draws(parts, tmp_path):
    """Stage 3 puts its pixel decoder to a language model, and goes on from the whole that this makes."""
    more = [rows(parts), "resolution=16", "training_arguments.per_device_train_batch_size=2"]
    stage_one, diffusion = f"tokenizer={parts / 'highres'}", f"start={parts / 'diffusion_highres'}"
    language_model = f"language_model={parts / 'lavit'}"
    whole = train(tmp_path / "one", "paper_pixel_decoder", *more, stage_one, diffusion, language_model)
    pipe = LavitPipeline.from_pretrained(whole)
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe.generate_visual_tokens("a", generator=torch.Generator().manual_seed(0))
    assert pipe(visual_tokens=tokens, num_inference_steps=2).images[0].size == (16, 16)

    names = [f"{key}={whole}" for key in ("tokenizer", "start", "language_model")]
    again = train(tmp_path / "two", "paper_pixel_decoder", *more, *names)
    one, two = (LavitPipeline.from_pretrained(folder) for folder in (whole, again))
    assert not torch.equal(one.unet.conv_in.weight, two.unet.conv_in.weight)
    assert torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)

    parted = train(tmp_path / "three", "paper_pixel_decoder", *more, stage_one, diffusion, "language_model=null")
    assert not results.is_whole(parted)
    arguments = ["--language-model", str(parts / "lavit"), "--pixel-decoder", str(parted)]
    results.main([*arguments, "--output", str(tmp_path / "four")])
    assert results.is_whole(tmp_path / "four")


def test_a_pixel_decoder_of_other_codes_is_refused(parts, tmp_path):
    shutil.copytree(parts / "diffusion_highres", tmp_path / "decoder")
    shutil.copytree(parts / "highres" / "detokenizer", tmp_path / "decoder" / "detokenizer")
    arguments = ["--pixel-decoder", str(tmp_path / "decoder"), "--output", str(tmp_path / "whole")]
    model = LavitForConditionalGeneration.from_pretrained(parts / "lavit")
    with torch.no_grad():
        model.model.visual_tokenizer.quantizer.codebook.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(parts / "lavit" / name, tmp_path / "other" / name)
    with pytest.raises(ValueError, match="trained on other codes"):
        results.main(["--language-model", str(tmp_path / "other"), *arguments])
    with pytest.raises(OSError, match="train the stage pixel-decoder first"):
        decoder = ["--pixel-decoder", str(tmp_path), "--output", str(tmp_path / "whole")]
        results.main(["--language-model", str(parts / "lavit"), *decoder])


def test_a_stage_that_is_missing_is_named(parts, tmp_path, capsys):
    nowhere = "training_arguments.report_to=none"
    stage_three = ["train", "paper_pixel_decoder", nowhere, rows(parts), f"start={parts / 'diffusion_lowres'}"]
    assert lavit([*stage_three, f"tokenizer={tmp_path / 'nothing'}"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert lavit(["train", "finetune", nowhere, "data.path=x", "start=no_such_checkpoint"]) == 2
    assert "no_such_checkpoint" in capsys.readouterr().err
