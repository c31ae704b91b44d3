"""Every stage trains through its real entry point, from recipe to result, and a cut run goes on where it was."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from modeling_lavit import LavitForConditionalGeneration, LavitPipeline, LavitVisualTokenizer
from modeling_lavit.training import ablations
from modeling_lavit.training.assemble import assemble, average
from modeling_lavit.training.codebook import EMACodebook, kmeans
from modeling_lavit.training.data import SampleNoise, augment, patchify
from modeling_lavit.training.run import load_recipe, main
from modeling_lavit.training.train_pixel_decoder import build as build_pixel_decoder


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
DATA = f"data.folder={Path(__file__).parent / 'fixtures' / 'emoji'}"
FEW_STEPS = [
    "training_arguments.max_steps=3",
    "training_arguments.per_device_train_batch_size=6",
    "training_arguments.logging_steps=1",
    "training_arguments.save_steps=2",
]


def train(stage: str, recipe: str, output: Path, *overrides: str) -> Path:
    main([stage, str(RECIPES / recipe), DATA, f"training_arguments.output_dir={output}", *FEW_STEPS, *overrides])
    return output / "final"


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """The results of all stages, each made from those before it."""
    folder = tmp_path_factory.mktemp("runs")
    done = {"guide": train("judge", "guide.yaml", folder / "guide")}
    done["wide_guide"] = train("judge", "guide.yaml", folder / "wide_guide", "model.width=2")
    done["style_guide"] = train("judge", "style_guide.yaml", folder / "style_guide", "model.width=1")
    guides = (f"guide={done['guide']}", f"name_guides=[{done['wide_guide']}]", f"style_guide={done['style_guide']}")
    done["encoder"] = train("encoder", "encoder.yaml", folder / "encoder", *guides)
    done["tokenizer"] = train(
        "tokenizer",
        "tokenizer.yaml",
        folder / "tokenizer",
        f"encoder={done['encoder']}",
        "model.codebook_size=32",
        "detokenizer.codebook_size=32",
    )
    done["language_model"] = train(
        "language-model",
        "language_model.yaml",
        folder / "language_model",
        f"tokenizer={done['tokenizer']}",
        "start=null",
        "text_model.num_hidden_layers=1",
        "mixture={caption: 0.5, draw: 0.3, restyle: 0.2}",
        "guided.number=12",
        f"guided.guides=[{done['guide']}, {done['wide_guide']}]",
    )
    smaller = ["unet.block_out_channels=[32, 32]", "unet.attention_head_dim=[2, 2]"]
    done["features"] = train(
        "pixel-decoder",
        "pixel_decoder_features.yaml",
        folder / "features",
        f"encoder={done['encoder']}",
        *smaller,
    )
    done["pixel_decoder"] = train(
        "pixel-decoder",
        "pixel_decoder.yaml",
        folder / "pixel_decoder",
        f"tokenizer={done['tokenizer']}",
        f"start={done['features']}",
    )
    return done


def test_the_stages_results_make_a_pipeline_that_draws_and_loads_again(stages, tmp_path):
    pipe = assemble(stages["language_model"], stages["pixel_decoder"], torch.float32, {"num_inference_steps": 2})
    pipe.save_pretrained(tmp_path)
    again = LavitPipeline.from_pretrained(tmp_path)
    for drawing in (pipe, again):
        drawing.set_progress_bar_config(disable=True)
    arrays = [p("eagle", generator=torch.Generator().manual_seed(0), output_type="np").images for p in (pipe, again)]
    assert arrays[0].shape == (1, 48, 48, 3)
    assert (arrays[0] == arrays[1]).all()


def test_stage_two_leaves_the_visual_tokenizer_as_it_was(stages):
    tokenizer = LavitVisualTokenizer.from_pretrained(stages["tokenizer"] / "visual_tokenizer")
    model = LavitForConditionalGeneration.from_pretrained(stages["language_model"])
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(model.model.visual_tokenizer.state_dict()[name], tensor), name
    assert not torch.equal(
        model.model.understanding.merger.layers[0].mlp.fc1.weight, tokenizer.merger.layers[0].mlp.fc1.weight
    )


def test_a_killed_run_ends_as_an_uncut_one(stages, tmp_path):
    whole, cut = stages["tokenizer"].parent, tmp_path / "cut"
    arguments = ["tokenizer", str(RECIPES / "tokenizer.yaml"), DATA, *FEW_STEPS, f"encoder={stages['encoder']}"]
    arguments += ["model.codebook_size=32", "detokenizer.codebook_size=32", f"training_arguments.output_dir={cut}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "modeling_lavit.training.run", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (cut / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cut / "final").is_dir()
    (cut / "log.jsonl").write_text(
        (cut / "log.jsonl").read_text() + '{"step": 3, "loss": 0.0}\n'
    )  # behind the checkpoint
    (cut / "checkpoint-3").mkdir()  # as if it had been killed while it wrote the next one
    main(arguments)
    name = "visual_tokenizer/model.safetensors"
    assert [record["step"] for record in read_log(cut)] == [1, 2, 3]
    assert json.loads((cut / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    expected = load_file(whole / "final" / name)
    for key, tensor in load_file(cut / "final" / name).items():
        assert torch.equal(tensor, expected[key]), key


def run_on_two_ranks(arguments: list[str], program: tuple[str, ...] = ("-m", "modeling_lavit.training.run")):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    return subprocess.run([*command, str(free_port()), *program, *arguments], cwd=ROOT, capture_output=True, text=True)


def assert_same_curves(one: Path, two: Path, steps: int) -> None:
    records = [read_log(run) for run in (one, two)]
    assert len(records[0]) == steps
    for first, second in zip(*records, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=5e-3)


@pytest.mark.parametrize("stage", ["tokenizer", "language-model", "pixel-decoder"])
def test_two_ranks_train_as_one_with_the_same_global_batch(stages, stage, tmp_path):
    name = stage.replace("-", "_")
    arguments = {
        "tokenizer": [f"encoder={stages['encoder']}", "model.codebook_size=32", "detokenizer.codebook_size=32"],
        "language-model": [
            *(f"tokenizer={stages['tokenizer']}", "start=null", "text_model.num_hidden_layers=1"),
            *("guided.number=12", f"guided.guides=[{stages['guide']}, {stages['wide_guide']}]"),
        ],
        "pixel-decoder": [
            *(f"tokenizer={stages['tokenizer']}", f"start={stages['features']}"),
            *("objective.perceptual_weight=0.1", "objective.condition_dropout=0.5"),
        ],
    }[stage]
    # the language model goes into a second epoch, in which its samples are others
    steps = 8 if stage == "language-model" else 4
    arguments += [DATA, *FEW_STEPS, f"training_arguments.max_steps={steps}", "training_arguments.bf16=false"]
    arguments = [stage, str(RECIPES / f"{name}.yaml"), *arguments, "training_arguments.save_steps=10"]
    main([*arguments, f"training_arguments.output_dir={tmp_path / 'one'}"])
    arguments += [f"training_arguments.output_dir={tmp_path / 'two'}"]
    done = run_on_two_ranks([*arguments, "training_arguments.per_device_train_batch_size=3"])
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", steps)


def test_shards_train_as_one_whole_and_come_together_again(stages, tmp_path):
    """FSDP: each rank holds a half of every parameter; a cut run goes on, and the result is that of one rank."""
    arguments = [f"tokenizer={stages['tokenizer']}", "start=null", "text_model.num_hidden_layers=2", "guided.number=0"]
    arguments += [DATA, *FEW_STEPS, "training_arguments.max_steps=4", "training_arguments.bf16=false"]
    arguments = ["language-model", str(RECIPES / "language_model.yaml"), *arguments]
    main([*arguments, f"training_arguments.output_dir={tmp_path / 'one'}"])
    arguments += [f"training_arguments.output_dir={tmp_path / 'two'}", "training_arguments.fsdp=true"]
    arguments += ["training_arguments.per_device_train_batch_size=3", "training_arguments.save_total_limit=2"]
    program = (str(Path(__file__).parent / "fsdp_on_processors.py"),)
    done = run_on_two_ranks(arguments, program)
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)
    for folder in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "two" / folder)
    done = run_on_two_ranks(arguments, program)  # from checkpoint-2
    assert not done.returncode, done.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", 4)
    expected = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "two" / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_a_stage_that_cannot_be_sharded_says_so(stages, tmp_path):
    arguments = ["tokenizer", str(RECIPES / "tokenizer.yaml"), DATA, *FEW_STEPS, f"encoder={stages['encoder']}"]
    arguments += [f"training_arguments.output_dir={tmp_path}", "training_arguments.fsdp=true"]
    done = run_on_two_ranks(arguments, (str(Path(__file__).parent / "fsdp_on_processors.py"),))
    assert done.returncode
    assert "run it by DDP, without FSDP" in done.stderr


def test_ablations_train_what_is_missing_and_write_their_table(stages, tmp_path):
    fixtures = Path(__file__).parent / "fixtures"
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n{ablations.BEGIN}\nold\n{ablations.END}\nafter\n")
    arguments = [
        "--data",
        str(fixtures / "emoji"),
        "--encoder",
        str(stages["encoder"]),
        "--judge",
        str(fixtures / "judge"),
    ]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results.json"), "--count", "3"]
    arguments += ["--readme", str(readme), "--tokenizer-steps", "2", "--language-steps", "1", "--codebook-size", "32"]
    ablations.main([*arguments, "--variants", "base", "--seeds", "0"])
    cost = tmp_path / "runs" / "tokenizer_base_0" / "cost.json"
    first = cost.stat().st_mtime_ns, (tmp_path / "results.json").read_text()
    ablations.main([*arguments, "--variants", "base", "regression", "--seeds", "0"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert cost.stat().st_mtime_ns == first[0]  # it was not trained again, and regression takes the same tokenizer
    assert results["base"] == json.loads(first[1])["base"]
    assert not (tmp_path / "runs" / "tokenizer_regression_0").exists()
    assert results["regression"]["0"]["train_top5"] == results["base"]["0"]["train_top5"]
    assert all(json.loads(cost.read_text())["processor_seconds"] > 0 for cost in tmp_path.glob("runs/*/cost.json"))
    text = readme.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith(f"{ablations.END}\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "variant" not in line]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        ablations.VARIANTS[name].title for name in ("base", "regression")
    ]


def test_the_perceptual_distance_is_small_at_the_true_picture_and_pulls_towards_it(stages):
    overrides = [DATA, f"tokenizer={stages['tokenizer']}", f"start={stages['features']}"]
    recipe = load_recipe(str(RECIPES / "pixel_decoder.yaml"), [*overrides, "objective.perceptual_weight=0.1"])
    model, dataset, _ = build_pixel_decoder(recipe)
    pictures = dataset.pictures[:4].float() / 255
    latents = model.vae.encode(pictures * 2 - 1).latent_dist.mode() * model.vae.config.scaling_factor
    shuffled = latents.roll(1, 0).requires_grad_(True)
    near, far = (model.perceptual_distances(x, pictures) for x in (latents, shuffled))
    assert (near < 0.5 * far).all()
    far.sum().backward()
    nearer = model.perceptual_distances(shuffled.detach() - 0.1 * shuffled.grad, pictures)
    assert nearer.sum() < far.sum()

    (stages["features"] / "scheduler").rename(stages["features"] / "its_scheduler")
    try:
        DDIMScheduler(prediction_type="epsilon").save_pretrained(stages["features"] / "scheduler")
        with pytest.raises(ValueError, match="prediction_type is 'sample', got 'epsilon'"):
            build_pixel_decoder(recipe)
    finally:
        shutil.rmtree(stages["features"] / "scheduler")
        (stages["features"] / "its_scheduler").rename(stages["features"] / "scheduler")


def read_log(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_an_unknown_override_is_refused():
    with pytest.raises(ValueError, match="modle"):
        load_recipe(str(RECIPES / "tokenizer.yaml"), ["modle.hidden_size=3"])
    with pytest.raises(ValueError, match="hiden_size"):
        load_recipe(str(RECIPES / "tokenizer.yaml"), ["model.hiden_size=3"])
    with pytest.raises(ValueError, match="key=value"):
        load_recipe(str(RECIPES / "tokenizer.yaml"), ["model"])


@pytest.mark.parametrize("number", ["8e-4", "8.0e-4", "0.0008"])
def test_numbers_with_an_exponent_are_numbers(number):
    recipe = load_recipe(str(RECIPES / "tokenizer.yaml"), [f"training_arguments.learning_rate={number}"])
    assert recipe["training_arguments"]["learning_rate"] == 0.0008


def test_the_codebook_follows_its_vectors_and_revives_dead_codes():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 4, generator=generator), dim=-1)
    vectors = torch.nn.functional.normalize(
        centres.repeat(50, 1) + 0.02 * torch.randn(400, 4, generator=generator), dim=-1
    )
    torch.manual_seed(0)
    found = kmeans(vectors, 8, iterations=20)
    assert (vectors @ found.T).amax(1).min() > 0.8

    codebook = found.clone()
    statistics = EMACodebook(8, 4, decay=0.5, revive_below=0.1)
    statistics.remember(vectors)
    statistics.start(codebook)
    only_first = vectors[(vectors @ codebook.T).argmax(1) == 0]
    for _ in range(8):
        statistics.update(only_first, (only_first @ codebook.T).argmax(1), codebook)
    # every other code was put on a vector that does occur
    assert (codebook @ only_first.T).amax(1).min() > 0.99


def test_augmentation_leaves_white_white_and_can_be_switched_off():
    white, noise = torch.ones(4, 3, 16, 16), SampleNoise(torch.arange(4), step=0)
    assert torch.allclose(augment(white, noise), white, atol=1e-5)
    pictures = torch.rand(4, 3, 16, 16)
    still = {"scale": 0.0, "shift": 0.0, "rotation": 0.0, "tint": 0.0, "flip": 0.0}
    torch.testing.assert_close(augment(pictures, noise, share=1.0, **still), pictures, atol=1e-4, rtol=0)
    assert torch.equal(augment(pictures, noise, share=0.0), pictures)
    assert not torch.allclose(augment(pictures, noise, share=1.0), pictures, atol=1e-2)


def test_noise_belongs_to_the_sample_whatever_the_batch():
    whole = SampleNoise(torch.tensor([3, 8, 5]), step=2, seed=1)
    alone = SampleNoise(torch.tensor([8]), step=2, seed=1)
    assert torch.equal(whole.of(torch.tensor([False, True, False])).uniform(4, 2), alone.uniform(4, 2))
    assert torch.equal(whole.uniform(4, 2)[1], alone.of(torch.tensor([True])).uniform(4, 2)[0])
    for other in (SampleNoise(torch.tensor([8]), step=3, seed=1), SampleNoise(torch.tensor([8]), step=2, seed=2)):
        assert not torch.equal(other.uniform(4), alone.of(torch.tensor([True])).uniform(4))


def test_patches_come_in_row_major_order():
    pictures = torch.arange(4.0).reshape(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 3, 4, 4)
    assert patchify(pictures, 2).mean(-1).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_the_mean_of_runs_is_the_mean_of_their_weights(stages, tmp_path):
    first = LavitForConditionalGeneration.from_pretrained(stages["language_model"])
    other = LavitForConditionalGeneration.from_pretrained(stages["language_model"])
    with torch.no_grad():
        for parameter in other.model.language_model.parameters():
            parameter.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    average([stages["language_model"], tmp_path / "other"], [0.75, 0.25], tmp_path / "mean")
    state = LavitForConditionalGeneration.from_pretrained(tmp_path / "mean").state_dict()
    for key, tensor in first.state_dict().items():
        shift = 0.25 if key.startswith("model.language_model.") else 0.0
        torch.testing.assert_close(state[key], tensor + shift if shift else tensor)
    with pytest.raises(ValueError, match="adding up to 1"):
        average([stages["language_model"], tmp_path / "other"], [0.75, 0.75], tmp_path / "mean")
    with pytest.raises(ValueError, match="one share for each"):
        average([stages["language_model"]], [0.5, 0.5], tmp_path / "mean")
