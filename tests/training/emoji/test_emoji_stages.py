"""The stages of the embedded checkpoint through their real entry point, each made from those before it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from parts import EMOJI
from ranks import arguments, assert_same_curves, run_on_two_ranks

from modeling_lavit import LavitForConditionalGeneration, LavitPipeline, LavitVisualTokenizer
from modeling_lavit.training.emoji import ablations, assemble
from modeling_lavit.training.emoji.augmentation import patchify
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.recipe import EmojiPixelDecoderRecipe
from modeling_lavit.training.emoji.train import RECIPES, main
from modeling_lavit.training.emoji.train_pixel_decoder import EmojiPixelDecoderStage
from modeling_lavit.training.recipe_file import load_recipe


pytestmark = pytest.mark.slow


CLASSIFIER = EMOJI.parent / "classifier"
DATA = f"data.path={EMOJI}"
SMALL_CODEBOOK = ("model.codebook_size=32", "detokenizer.codebook_size=32")
ONLY_READING_AND_DRAWING = "mixture={style_question: 0, name_question: 0}"


def train(recipe: str, output: Path, *overrides: str) -> Path:
    main(
        [
            recipe,
            DATA,
            *arguments(output, max_steps=2, eval_strategy="no"),
            "data.validation=null",
            "data.more=null",
            *overrides,
        ]
    )
    return output / "final"


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """The results of all stages."""
    folder = tmp_path_factory.mktemp("runs")
    done = {"teacher": train("teacher", folder / "teacher")}
    done["wide_teacher"] = train("teacher", folder / "wide_teacher", "model.width=2")
    done["style_teacher"] = train("style_teacher", folder / "style_teacher", "model.width=1")
    teachers = f"teacher={done['teacher']}", f"name_teachers=[{done['wide_teacher']}]"
    done["encoder"] = train("encoder", folder / "encoder", *teachers, f"style_teacher={done['style_teacher']}")
    encoder = f"encoder={done['encoder']}"
    done["tokenizer"] = train("tokenizer", folder / "tokenizer", encoder, *SMALL_CODEBOOK)
    done["language_model"] = train(
        "language_model",
        folder / "language_model",
        f"tokenizer={done['tokenizer']}",
        "start=null",
        "text_model.num_hidden_layers=1",
        ONLY_READING_AND_DRAWING,
        f"mixup={{number: 12, teachers: [{done['teacher']}, {done['wide_teacher']}]}}",
    )
    smaller = "unet={block_out_channels: [32, 32], attention_head_dim: [2, 2]}"
    done["features"] = train("pixel_decoder_features", folder / "features", encoder, smaller)
    start = f"start={done['features']}"
    done["pixel_decoder"] = train("pixel_decoder", folder / "pixel_decoder", f"tokenizer={done['tokenizer']}", start)
    return done


def test_the_stages_results_make_a_checkpoint_that_draws_and_loads_again(stages, tmp_path):
    parts = ["--language-model", str(stages["language_model"]), "--pixel-decoder", str(stages["pixel_decoder"])]
    defaults = ["--default", "num_inference_steps=2", "guidance_scale=1.5", "--scheduler", "UniPCMultistepScheduler"]
    assemble.main([*parts, *defaults, "--draft-images", str(EMOJI), "--output", str(tmp_path / "whole")])
    drawn = []
    for _ in range(2):
        pipe = LavitPipeline.from_pretrained(tmp_path / "whole")
        pipe.set_progress_bar_config(disable=True)
        drawn.append(pipe("eagle", generator=torch.Generator().manual_seed(0), output_type="np").images)
    assert drawn[0].shape == (1, 48, 48, 3)
    assert (drawn[0] == drawn[1]).all()
    assert pipe.dtype == torch.float32 and type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert pipe.defaults.num_inference_steps == 2
    assert pipe.model.generation_config.generation_presets["image"]["guidance_scale"] == 1.5
    assert pipe.model.draft_codes is not None


def test_stage_two_leaves_the_visual_tokenizer_as_it_was(stages):
    tokenizer = LavitVisualTokenizer.from_pretrained(stages["tokenizer"] / "visual_tokenizer")
    model = LavitForConditionalGeneration.from_pretrained(stages["language_model"])
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(model.model.visual_tokenizer.state_dict()[name], tensor), name
    read = model.model.understanding.merger.layers[0].mlp.fc1.weight
    assert not torch.equal(read, tokenizer.merger.layers[0].mlp.fc1.weight)


def test_every_stage_reports_its_figures_of_held_out_images(stages, tmp_path):
    more = {
        "tokenizer": (
            [f"encoder={stages['encoder']}", *SMALL_CODEBOOK],
            {"cosine", "keep_rate", "style"},
        ),
        "language_model": (
            [f"start={stages['language_model']}", "tokenizer=null", "mixup.number=0"],
            {"text_loss", "code_loss"},
        ),
        "pixel_decoder": (
            [f"tokenizer={stages['tokenizer']}", f"start={stages['features']}"],
            {"error", "error_noisy"},
        ),
    }
    for recipe, (overrides, figures) in more.items():
        main([recipe, DATA, "data.more=null", *overrides, *arguments(tmp_path / recipe, max_steps=1)])
        records = [json.loads(line) for line in (tmp_path / recipe / "log.jsonl").read_text().splitlines()]
        (record,) = [record for record in records if "eval_loss" in record]
        assert {f"eval_{figure}" for figure in figures} <= record.keys(), recipe


def test_stage_one_on_two_ranks(stages, tmp_path):
    more = ["tokenizer", DATA, f"encoder={stages['encoder']}", *SMALL_CODEBOOK, "data.validation=held_out"]
    steps = {"max_steps": 4, "eval_steps": 4}
    main([*more, *arguments(tmp_path / "one", **steps)])
    program = ("-m", "modeling_lavit.training.emoji.train")
    done = run_on_two_ranks([*more, *arguments(tmp_path / "two", **steps, per_device_train_batch_size=3)], program)
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)


def test_ablations_train_what_is_missing(stages, tmp_path, capsys):
    more = ["--data", str(EMOJI), "--encoder", str(stages["encoder"]), "--classifier", str(CLASSIFIER)]
    more += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results.json"), "--count", "3"]
    more += ["--tokenizer-steps", "2", "--language-steps", "1", "--codebook-size", "32", "--seeds", "0"]
    ablations.main([*more, "--variants", "base"])
    cost = tmp_path / "runs" / "tokenizer_base_0" / "cost.json"
    first = cost.stat().st_mtime_ns, (tmp_path / "results.json").read_text()
    capsys.readouterr()
    ablations.main([*more, "--variants", "base", "regression"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert cost.stat().st_mtime_ns == first[0]  # it was not trained again, and regression takes the same tokenizer
    assert results["base"] == json.loads(first[1])["base"]
    assert not (tmp_path / "runs" / "tokenizer_regression_0").exists()
    assert results["regression"]["0"]["train_top5"] == results["base"]["0"]["train_top5"]
    assert all(json.loads(cost.read_text())["cpu_seconds"] > 0 for cost in tmp_path.glob("runs/*/cost.json"))
    rows = [line.split(" | ")[0][2:] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[-2:] == [ablations.VARIANTS[name].title for name in ("base", "regression")]


def test_the_perceptual_distance_is_small_at_the_true_image_and_pulls_towards_it(stages, tmp_path):
    shutil.copytree(stages["features"], tmp_path / "start")
    overrides = [DATA, "data.validation=null", f"tokenizer={stages['tokenizer']}", f"start={tmp_path / 'start'}"]
    overrides += ["objective.perceptual_weight=0.1"]
    recipe = load_recipe(RECIPES / "pixel_decoder.yaml", overrides, EmojiPixelDecoderRecipe)
    parts = EmojiPixelDecoderStage().build(recipe)
    model, images = parts.model, parts.dataset.images[:4].float() / 255
    latents = model.vae.encode(images * 2 - 1).latent_dist.mode() * model.vae.config.scaling_factor
    shuffled = latents.roll(1, 0).requires_grad_(True)
    near, far = (model.perceptual_distances(x, images) for x in (latents, shuffled))
    assert (near < 0.5 * far).all()
    far.sum().backward()
    nearer = model.perceptual_distances(shuffled.detach() - 0.1 * shuffled.grad, images)
    assert nearer.sum() < far.sum()
    DDIMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "start" / "scheduler")
    with pytest.raises(ValueError, match="prediction_type is 'sample', got 'epsilon'"):
        EmojiPixelDecoderStage().build(recipe)


def test_patches_come_in_row_major_order():
    images = torch.arange(4.0).reshape(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 3, 4, 4)
    assert patchify(images, 2).mean(-1).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_the_mean_of_runs_is_the_mean_of_their_weights(stages, tmp_path):
    first, other = (LavitForConditionalGeneration.from_pretrained(stages["language_model"]) for _ in range(2))
    with torch.no_grad():
        for parameter in other.model.language_model.parameters():
            parameter.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    assemble.average([stages["language_model"], tmp_path / "other"], [0.75, 0.25], tmp_path / "mean")
    state = LavitForConditionalGeneration.from_pretrained(tmp_path / "mean").state_dict()
    for key, tensor in first.state_dict().items():
        shift = 0.25 if key.startswith("model.language_model.") else 0.0
        torch.testing.assert_close(state[key], tensor + shift if shift else tensor)
    with pytest.raises(ValueError, match="adding up to 1"):
        assemble.average([stages["language_model"], tmp_path / "other"], [0.75, 0.75], tmp_path / "mean")
    with pytest.raises(ValueError, match="one share for each"):
        assemble.average([stages["language_model"]], [0.5, 0.5], tmp_path / "mean")


def test_a_folder_without_a_column_says_which(tmp_path):
    """Without `category` nothing can be repeated, and nothing else is missed."""
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()][:4]

    def folder(name: str, left_out: str) -> str:
        (tmp_path / name).mkdir()
        lines = []
        for i, row in enumerate(rows):
            shutil.copy(EMOJI / row["file_name"], tmp_path / name / f"{i}.png")
            kept = {key: value for key, value in row.items() if key != left_out} | {"file_name": f"{i}.png"}
            lines.append(json.dumps(kept) + "\n")
        (tmp_path / name / "metadata.jsonl").write_text("".join(lines))
        return str(tmp_path / name)

    plain = folder("plain", "category")
    splits = tuple({row["split"] for row in rows})
    assert len(NamedImages(plain, 48, splits)) == 4
    with pytest.raises(ValueError, match="has no column 'category'"):
        NamedImages(plain, 48, splits, {"Food & Drink": 2})
    with pytest.raises(ValueError, match="has no column 'style'"):
        NamedImages(folder("styleless", "style"), 48, splits)


def test_the_records_of_the_embedded_checkpoint_are_complete():
    """Each run of docs/emoji_checkpoint.md has its log."""
    logs = RECIPES.parent / "logs"
    steps = {"teacher": 2200, "wide_teacher": 2200, "style_teacher": 1200, "encoder": 3000, "tokenizer": 1300}
    for name, last in steps.items():
        records = [json.loads(line) for line in (logs / f"{name}.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == last
    assert {path.stem for path in logs.glob("language_model_*.jsonl")} == {f"language_model_{x}" for x in "mnpqrstu"}
