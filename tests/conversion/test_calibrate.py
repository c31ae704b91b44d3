"""`lavit convert --calibrate`: a faster merger where images show that no code changes by it."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_processor, tiny_visual_config

from modeling_lavit.conversion.__main__ import main
from modeling_lavit.conversion.calibrate import calibrate, changed_codes
from modeling_lavit.evaluation.sheets import find_images
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration


FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINT, EMOJI = FIXTURES / "e2e" / "checkpoint", FIXTURES / "emoji"
IMAGES = find_images([EMOJI])[:6]


def saved(folder: Path, **visual: float) -> LavitForConditionalGeneration:
    model = tiny_model(visual_config=tiny_visual_config(**visual))
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return model


def test_a_leak_that_changes_codes_keeps_the_exact_merger(tmp_path):
    model, said = saved(tmp_path, attention_epsilon=0.3), []
    before = (tmp_path / "config.json").read_bytes()
    assert not calibrate(tmp_path, model.config.visual_config, IMAGES, said.append, batch_size=4)
    assert (tmp_path / "config.json").read_bytes() == before
    pixel_values = tiny_processor().image_processor([str(path) for path in IMAGES], return_tensors="pt").pixel_values
    tokenizer = model.model.visual_tokenizer
    exact = tokenizer.tokenize(pixel_values).codes
    tokenizer.config.kept_only = True
    changed = int((exact != tokenizer.tokenize(pixel_values).codes).sum())
    assert changed and changed_codes(tokenizer, pixel_values) == (changed, len(exact))
    assert tokenizer.config.kept_only  # as it was
    assert said == [
        f"calibration: {changed} of {len(exact)} codes of 6 images change where the merger computes kept patches "
        "alone; kept_only is left off"
    ]


def test_a_leak_that_changes_no_code_sets_the_faster_merger(tmp_path):
    model, said = saved(tmp_path, attention_epsilon=1e-12), []
    assert calibrate(tmp_path, model.config.visual_config, IMAGES, said.append)
    assert "calibration: 0 of " in said[0] and said[0].endswith("kept_only is set")
    loaded = LavitForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.visual_config.kept_only
    pixel_values = torch.rand(2, 3, 56, 56)
    size = model.config.visual_config.image_size
    pixel_values = torch.nn.functional.interpolate(pixel_values, size=size)
    assert torch.equal(loaded.get_image_tokens(pixel_values).codes, model.get_image_tokens(pixel_values).codes)


def test_a_merger_without_a_leak_has_nothing_to_choose(tmp_path):
    model, said = saved(tmp_path, attention_epsilon=0), []
    assert not calibrate(tmp_path, model.config.visual_config, IMAGES, said.append)
    assert said == ["calibration: nothing to choose, the merger leaks no attention"]


def test_conversion_calibrates_and_refuses_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = [str(CHECKPOINT), str(tmp_path / "out"), "--pixel-decoder", "none", "--calibrate"]
    assert main([*arguments, str(tmp_path / "empty")]) == 2
    assert "there is no image in the folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*arguments, str(EMOJI)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("calibration: ")]
    changed = int(line.split()[1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["visual_config"].get("kept_only", False) is (changed == 0)
    LavitForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_is_as_it_was_even_after_an_error(flag, tmp_path):
    tokenizer = saved(tmp_path, attention_epsilon=0.3).model.visual_tokenizer
    tokenizer.config.kept_only = flag
    with pytest.raises(ValueError):
        changed_codes(tokenizer, torch.rand(1, 3, 5, 5))
    assert tokenizer.config.kept_only is flag
