"""The command `lavit`, on a tiny real checkpoint."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    NUM_PATCHES,
    tiny_detokenizer,
    tiny_model,
    tiny_processor,
    tiny_scheduler,
    tiny_unet,
    tiny_visual_config,
)

import modeling_lavit
from modeling_lavit import LavitPipeline
from modeling_lavit.command_line import build_parser, main
from modeling_lavit.show_lavit import show_kept_patches
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder


IMAGE = str(Path(__file__).parents[1] / "fixtures/emoji/images/noto/cat-face.png")
SCRIPT = Path(modeling_lavit.__file__).parent / "bin" / "lavit"


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    detokenizer, unet = tiny_detokenizer(), tiny_unet(channels=48)
    for parameter in detokenizer.parameters():
        if parameter.ndim > 1:
            # so that visual tokens show in the pixels
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    pipe = LavitPipeline(
        processor=tiny_processor(),
        model=tiny_model(),
        detokenizer=detokenizer,
        unet=unet,
        vae=LavitPatchAutoencoder(patch_size=4),
        scheduler=tiny_scheduler(),
        default_num_inference_steps=2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def checkpoint(pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:
        return end.code


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def same(image: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to the rounding of one call or another."""
    return image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_generate_writes_the_image_that_the_pipeline_draws_with_that_seed(here, checkpoint, pipe, capsys):
    assert run("generate", "a red apple", "-o", "apple.png", "--seed", "3", "--model", checkpoint) == 0
    assert capsys.readouterr().out == "apple.png\n"
    expected = pipe("a red apple", generator=torch.Generator().manual_seed(3)).images[0]
    assert same(pixels(here / "apple.png"), np.asarray(expected))


def test_several_images_are_numbered_and_each_equals_the_one_drawn_alone_with_its_own_seed(here, checkpoint, capsys):
    assert run("generate", "two cats", "-o", "cat.png", "--n", "2", "--seed", "5", "--model", checkpoint) == 0
    assert capsys.readouterr().out.split() == ["cat-0.png", "cat-1.png"]
    assert run("generate", "two cats", "-o", "alone.png", "--seed", "6", "--model", checkpoint) == 0
    assert files(here) == ["alone.png", "cat-0.png", "cat-1.png"]
    assert same(pixels(here / "alone.png"), pixels(here / "cat-1.png"))
    assert not same(pixels(here / "cat-0.png"), pixels(here / "cat-1.png"))


def test_a_new_seed_is_drawn_and_printed_where_none_is_given(here, checkpoint, capsys):
    assert run("generate", "a red apple", "-o", "first.png", "--model", checkpoint) == 0
    seed = capsys.readouterr().err.split()[-1]
    assert run("generate", "a red apple", "-o", "second.png", "--seed", seed, "--model", checkpoint) == 0
    assert same(pixels(here / "first.png"), pixels(here / "second.png"))


def test_a_style_image_stands_in_front_of_the_text(here, checkpoint, pipe):
    arguments = ("--style-image", IMAGE, "--seed", "0", "--model", checkpoint)
    assert run("generate", "in snow", "-o", "snow.png", *arguments) == 0
    prompt = [Image.open(IMAGE).convert("RGB"), "in snow"]
    expected = pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0]
    assert same(pixels(here / "snow.png"), np.asarray(expected))


def test_steps_and_both_guidance_scales_change_the_image_and_enlarge_its_size(here, checkpoint):
    plain = ("generate", "a red apple", "--seed", "1", "--model", checkpoint, "--aspect-ratio", "1:1", "-o")
    options = (("--steps", "4"), ("--decoder-guidance-scale", "1"), ("--guidance-scale", "20"), ("--enlarge", "3"))
    assert run(*plain, "plain.png") == 0
    for i, option in enumerate(options):
        assert run(*plain, f"{i}.png", *option) == 0
    for i in range(3):
        assert not same(pixels(here / "plain.png"), pixels(here / f"{i}.png")), options[i]
    assert pixels(here / "3.png").shape == (96, 96, 3)


def test_caption_prints_a_line_for_each_image_and_its_name_where_there_are_several(checkpoint, capsys):
    assert run("caption", IMAGE, "--model", checkpoint) == 0
    alone = capsys.readouterr().out
    assert run("caption", IMAGE, IMAGE, "--model", checkpoint) == 0
    assert len(alone.splitlines()) == 1
    assert capsys.readouterr().out == f"{IMAGE}: {alone}" * 2


def test_ask_prints_what_the_model_answers_after_the_question(checkpoint, pipe, capsys):
    assert run("ask", IMAGE, "what colour is it?", "--model", checkpoint) == 0
    inputs = pipe.processor(images=IMAGE, text="<image>Question: what colour is it? Answer:")
    ids = pipe.model.generate(**inputs, generation_preset="answer")
    answer = pipe.processor.post_process_answer(ids, input_ids=inputs.input_ids)[0]
    assert capsys.readouterr().out.split() == answer.split()


def test_tokenize_prints_the_codes_and_shows_the_kept_patches(here, checkpoint, pipe, capsys):
    assert run("tokenize", IMAGE, "--show", "kept.png", "--model", checkpoint) == 0
    count, codes, name = capsys.readouterr().out.splitlines()
    pixel_values = pipe.processor.image_processor(IMAGE, return_tensors="pt").pixel_values
    tokens = pipe.model.model.visual_tokenizer.tokenize(pixel_values)
    assert count.startswith(f"{len(tokens.codes)} of {NUM_PATCHES} patches kept")
    assert codes.split()[1:] == [str(code) for code in tokens.codes.tolist()]
    assert name == "kept.png" and pixels(here / "kept.png").shape == (480, 480, 3)


def test_tokenize_counts_the_codes_that_change_with_kept_tokens_only(tmp_path, capsys):
    leaky = tiny_model(visual_config=tiny_visual_config(attention_epsilon=0.3))
    leaky.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert run("tokenize", IMAGE, IMAGE, "--compare-kept-only", "--model", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()

    pixel_values = tiny_processor().image_processor(IMAGE, return_tensors="pt").pixel_values
    exact = leaky.get_image_tokens(pixel_values).codes
    leaky.config.visual_config.kept_only = True
    changed = int((exact != leaky.get_image_tokens(pixel_values).codes).sum())
    assert changed
    assert [line for line in lines if "change" in line][:2] == [
        f"{IMAGE}: {changed} of {len(exact)} codes change with kept tokens only"
    ] * 2
    assert lines[-1].startswith(f"{2 * changed} of {2 * len(exact)} codes (")


def test_keep_ratio_says_how_many_patches_are_kept(checkpoint, capsys):
    assert run("tokenize", IMAGE, "--keep-ratio", "0.5", "--model", checkpoint) == 0
    assert capsys.readouterr().out.startswith(f"{NUM_PATCHES // 2} of {NUM_PATCHES} patches kept (50%)")


def test_the_map_leaves_kept_patches_as_they_are_and_fades_the_others():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 60, (8, 8, 3), dtype=np.uint8))
    shown = np.asarray(show_kept_patches(image, torch.tensor([True, False, False, True]), size=8)).astype(int)
    original = np.asarray(image).astype(int)
    assert np.array_equal(shown[:4, :4], original[:4, :4]) and np.array_equal(shown[4:, 4:], original[4:, 4:])
    assert (shown[:4, 4:] > 150).all() and (shown[4:, :4] > 150).all()


def test_reconstruct_draws_the_image_from_its_own_tokens(here, checkpoint, pipe):
    assert run("reconstruct", IMAGE, "-o", "again.png", "--model", checkpoint) == 0
    expected = pipe.reconstruct(Image.open(IMAGE), generator=torch.Generator().manual_seed(0)).images[0]
    assert same(pixels(here / "again.png"), np.asarray(expected))


GENERATE = ("generate", "a red apple", "-o", "new.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "missing.png"), "there is no image file at missing.png"),
        (("caption", "folder"), "there is no image file at folder"),
        (("caption", "text.png"), "text.png is not an image"),
        (("ask", "cut.png", "what is it?"), "cut.png cannot be decoded, it is truncated or damaged"),
        (("reconstruct", "cut.png", "-o", "new.png"), "cut.png cannot be decoded"),
        (("ask", IMAGE, "[IMG]"), "mark images by <image>"),
        (("ask", IMAGE, " "), "argument question: it is empty"),
        (("generate", "", "-o", "new.png"), "argument prompt: it is empty"),
        (("generate", "two cats " * 200, "-o", "new.png"), "shorten"),
        ((*GENERATE, "--aspect-ratio", "7:1"), "aspect_ratio must be one of ['1:1'], got '7:1'"),
        ((*GENERATE, "--n", "0"), "argument --n: '0' is no positive whole number"),
        ((*GENERATE, "--seed", "-1"), "argument --seed"),
        ((*GENERATE, "--device", "toaster"), "--device toaster cannot be used here"),
        ((*GENERATE, "--style-image", "missing.png"), "there is no image file at missing.png"),
        (("generate", "a red apple"), "the following arguments are required: -o/--output"),
        (("generate", "a red apple", "-o", "nowhere/new.png"), "there is no folder nowhere to write new.png to"),
        (("generate", "a red apple", "-o", "folder"), "folder is a folder: give the name of a file"),
        (("generate", "a red apple", "-o", "new.txt"), "new.txt has no ending of an image format"),
        (("tokenize", IMAGE, "--show", "nowhere/kept.png"), "there is no folder nowhere"),
        (("tokenize", IMAGE, "--keep-ratio", "2"), "keep_ratio must be in (0, 1], got 2.0"),
        (("tokenize", IMAGE, IMAGE, "--show", "kept.png"), "--show takes one image, got 2"),
        (("tokenize", IMAGE, "--compare-kept-only"), "attention_epsilon is 0"),
        (("paint",), "invalid choice: 'paint'"),
        ((), "required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(here, checkpoint, capsys, arguments, message):
    (here / "folder").mkdir()
    (here / "text.png").write_text("no image")
    (here / "cut.png").write_bytes(Path(IMAGE).read_bytes()[:500])
    before = files(here)
    model = ("--model", checkpoint) if arguments and arguments[0] != "paint" else ()
    assert run(*arguments, *model) == 2
    assert_one_line(capsys.readouterr(), message)
    assert files(here) == before


def test_a_folder_that_is_no_checkpoint_is_named(here, capsys):
    (here / "empty").mkdir()
    (here / "other").mkdir()
    (here / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for model, message in (
        ("empty", "empty is no LaVIT checkpoint: it has no config.json"),
        ("other", "other is no LaVIT checkpoint: its model type is 'bert'"),
        ("./missing", "there is no checkpoint folder ./missing"),
        (IMAGE, "is a file; a checkpoint is a folder"),
    ):
        for command in (GENERATE, ("caption", IMAGE)):
            assert run(*command, "--model", model) == 2
            assert_one_line(capsys.readouterr(), message)
    assert files(here) == ["config.json", "empty", "other"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "diffusion_pytorch_model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "damaged or truncated"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_an_error(here, checkpoint, capsys, damage, message):
    shutil.copytree(checkpoint, here / "damaged")
    damage(here / "damaged")
    assert run(*GENERATE, "--model", "damaged") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "new.png").exists()


def test_an_existing_file_survives_a_call_that_fails(here, checkpoint):
    (here / "new.png").write_bytes(b"precious")
    assert run(*GENERATE, "--aspect-ratio", "7:1", "--model", checkpoint) == 2
    assert (here / "new.png").read_bytes() == b"precious"


def test_train_evaluate_and_convert_run_their_own_command_lines(here, capsys):
    assert run("train", "tokenizer", "missing.yaml") == 2
    assert_one_line(capsys.readouterr(), "missing.yaml")
    assert run("convert", "missing", "converted") == 2
    assert_one_line(capsys.readouterr(), "missing")
    for command in ("train", "evaluate", "convert"):
        assert run(command, "--help") == 0
        assert f"usage: lavit {command}" in capsys.readouterr().out


def test_the_app_without_gradio_says_what_to_install(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "modeling_lavit.app_lavit", raising=False)
    assert run("app", "--model", checkpoint) == 2
    assert_one_line(capsys.readouterr(), "pip install gradio")


def test_every_subcommand_teaches_itself_by_an_example_that_parses(capsys):
    for command in ("generate", "caption", "ask", "tokenize", "reconstruct", "app"):
        assert run(command, "--help") == 0
        text = capsys.readouterr().out
        example = text.split("example:\n")[1].splitlines()[0].strip()
        assert example.startswith(f"lavit {command}") and "default" in text
        assert build_parser().parse_args(shlex.split(example)[1:]).command == command


def test_help_and_mistakes_answer_without_importing_torch():
    code = f"import runpy, sys; sys.argv = ['lavit', *sys.argv[1:]]; runpy.run_path({str(SCRIPT)!r})"
    code = f"try:\n {code}\nexcept SystemExit as end:\n print(end.code, 'torch' in sys.modules)"
    root = Path(modeling_lavit.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for arguments, expected in ((["--help"], "0 False"), (["caption", "missing.png"], "2 False")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected


def assert_one_line(captured, message: str):
    (line,) = [line for line in captured.err.split("\n") if line and "%|" not in line]
    assert line.startswith("lavit") and "error: " in line and message in line
    assert captured.out == ""


def lavit(*arguments: str, shell: str = "{}", **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, within a line of a shell."""
    environment = {**os.environ, "PYTHONPATH": str(Path(modeling_lavit.__file__).parent.parent)}
    command = shell.format(shlex.join([sys.executable, str(SCRIPT), *arguments]))
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_a_dash_reads_the_image_from_stdin(checkpoint):
    want = lavit("caption", IMAGE, "--model", checkpoint).stdout
    done = lavit("caption", "-", "--model", checkpoint, shell=f"{{}} < {shlex.quote(IMAGE)}")
    assert done.returncode == 0 and done.stdout == want
    empty = lavit("caption", "-", shell="{} < /dev/null")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert empty.stderr == "lavit: error: stdin has no image: it is empty\n"


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error(checkpoint):
    images = [IMAGE] * 4
    done = lavit("tokenize", *images, "--model", checkpoint, shell="{} | head -1; echo ${{PIPESTATUS[0]}}")
    first, code = done.stdout.splitlines()
    assert first.startswith(IMAGE) and code == "0" and "rror" not in done.stderr
    full = lavit("tokenize", IMAGE, "--model", checkpoint, shell="{} > /dev/full")
    assert full.returncode == 2 and full.stderr.splitlines()[-1].startswith("lavit: error: [Errno 28]")


def test_file_names_that_begin_with_a_dash_follow_two_dashes(here, checkpoint, capsys):
    shutil.copy(IMAGE, here / "-cat.png")
    assert run("caption", "--model", checkpoint, "--", "-cat.png") == 0
    assert run("ask", "--model", checkpoint, "--", "-cat.png", "what is it?") == 0
    capsys.readouterr()
    assert run("caption", "-cat.png", "--model", checkpoint) == 2
