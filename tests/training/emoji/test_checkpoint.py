"""The embedded checkpoint from scratch by one command: every step at tiny size, in processes of their own."""

import subprocess
import sys

import pytest
import yaml
from parts import EMOJI
from ranks import arguments

from modeling_lavit import LavitPipeline
from modeling_lavit.training.emoji.checkpoint import STEPS, arguments_of, main, recipe_of, steps_left
from modeling_lavit.training.emoji.recipe import EmojiLanguageModelRecipe
from modeling_lavit.training.emoji.train import RECIPES, STAGES
from modeling_lavit.training.recipe_file import load_recipe, parse_yaml
from modeling_lavit.training.run import written


SMALL = [
    f"data.path={EMOJI}",
    "data.more=null",
    "data.validation=null",
    *(entry for entry in arguments("unused", max_steps=1, eval_strategy="no") if "output_dir" not in entry),
]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("name", STEPS)
def test_every_steps_recipe_is_valid_in_every_profile(name, profile, tmp_path):
    recipe, *overrides = arguments_of(name, tmp_path, profile, [])
    path = RECIPES / f"{recipe}.yaml"
    stage = STAGES[parse_yaml(path.read_bytes(), str(path))["stage"]]
    loaded = load_recipe(path, overrides, stage.recipe_class)
    assert loaded.training_arguments.output_dir == str(tmp_path / name)
    assert STEPS[name].before <= set(list(STEPS)[: list(STEPS).index(name)])
    if isinstance(loaded, EmojiLanguageModelRecipe) and name in ("language_model", "drawing"):
        assert loaded.mixup.teachers == [str(tmp_path / teacher / "final") for teacher in ("teacher", "wide_teacher")]


@pytest.mark.slow
def test_a_step_that_fails_says_so_in_a_line(tmp_path):
    command = [sys.executable, "-m", "modeling_lavit.command_line", "train", "emoji", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--jobs", "1", "data.path=nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode and "error: wide_teacher failed: " in done.stderr and "wide_teacher.log" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_what_is_complete_needs_nothing_before_it(tmp_path):
    assert set(steps_left(tmp_path, "cpu", [])) == set(STEPS)
    for name in ("language_model", "tokenizer", "wide_teacher"):
        (tmp_path / name / "final").mkdir(parents=True)
        recipe = written(recipe_of(name, tmp_path, "cpu", []))
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert set(steps_left(tmp_path, "cpu", [])) == {
        *("teacher", "style_teacher", "encoder", "pixel_decoder_features", "pixel_decoder", "drawing", "pixels"),
        "classifier",
    }
    with pytest.raises(ValueError, match="is the result of another recipe"):
        steps_left(tmp_path, "cpu", ["tokenizer:training_arguments.max_steps=7"])


def test_an_override_goes_to_every_step_or_to_one(tmp_path):
    more = ["threads=2", "teacher:model.width=3"]
    taken = {name: arguments_of(name, tmp_path, "cpu", more) for name in STEPS}
    assert all("threads=2" in entries for entries in taken.values())
    assert [name for name, entries in taken.items() if "model.width=3" in entries] == ["teacher"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_steps_make_a_checkpoint_that_draws(tmp_path):
    output = tmp_path / "lavit-emoji"
    smaller = ["language_model:mixup.number=12", "drawing:mixup.number=12", "tokenizer:model.codebook_size=32"]
    smaller += ["tokenizer:detokenizer.codebook_size=32"]
    main(["--runs", str(tmp_path / "runs"), "--output", str(output), *SMALL, *smaller])
    pipe = LavitPipeline.from_pretrained(output)
    assert pipe("eagle", max_image_tokens=8, min_image_tokens=4).images[0].size == (48, 48)
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
