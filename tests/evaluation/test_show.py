"""The command `lavit show`: sheets of images."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lavit import LavitConfig, LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI
from modeling_lavit.command_line import main
from modeling_lavit.evaluation.sheets import (
    BATCH_SIZE,
    FRAME,
    CodeUses,
    codebook_sheet,
    cut_out,
    draw_sheet,
    find_images,
    find_uses,
    kept_sheet,
    reconstructions_sheet,
)
from modeling_lavit.evaluation.show import build_parser
from modeling_lavit.processing import load_image
from modeling_lavit.show_lavit import show_kept_patches


IMAGES = Path(__file__).parents[1] / "fixtures" / "emoji" / "images"
IMAGE = IMAGES / "noto" / "cat-face.png"
RED = tuple(bytes.fromhex(FRAME[1:]))
CONFIG = LavitConfig.from_pretrained(LAVIT_EMOJI).visual_config
SIDE = CONFIG.image_size // CONFIG.patch_size


@pytest.fixture(scope="module")
def pipe() -> LavitPipeline:
    pipe = LavitPipeline.from_pretrained(LAVIT_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    return find_images([IMAGES])


@pytest.fixture(scope="module")
def uses(pipe, paths) -> CodeUses:
    return find_uses(pipe.model.model.visual_tokenizer, pipe.processor.image_processor, paths)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    try:
        return main(["show", *arguments])
    except SystemExit as end:
        return end.code


def place_of(part: Image.Image, whole: Image.Image) -> tuple[int, int] | None:
    """Row and column where an image lies in another, pixel for pixel."""
    part, whole = np.asarray(part), np.asarray(whole)
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)[:, :, 0]
    for row, column in np.argwhere((windows[..., 0, 0, :] == part[0, 0]).all(-1)):
        if np.array_equal(windows[row, column], part):
            return int(row), int(column)
    return None


def test_images_are_found_below_folders_and_among_many_a_choice_is_repeatable(here):
    assert find_images([IMAGE]) == [IMAGE]
    paths = find_images([IMAGES])
    assert len(paths) == 55 and paths == sorted(paths)
    some = find_images([IMAGES], 5, seed=1)
    assert len(some) == 5 and set(some) < set(paths) and some == sorted(some)
    assert some == find_images([IMAGES], 5, seed=1) != find_images([IMAGES], 5, seed=2)


def test_a_sheet_shows_every_image_whole_and_no_label_reaches_into_the_next_column():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]
    cells = [(f"label {i}\ntwo lines", Image.new("RGB", (40, 30), colour)) for i, colour in enumerate(colours)]
    sheet = draw_sheet(cells, columns=2, heading="a heading that is wider than the two columns of this sheet")
    places = [place_of(image, sheet) for _, image in cells]
    rows, columns = ({place[axis] for place in places} for axis in (0, 1))
    assert len(set(places)) == 5 and len(rows) == 3 and len(columns) == 2
    long = draw_sheet([("wide " * 50, cells[0][1])], columns=2)
    assert long.width < 2 * 40 and (np.asarray(long)[:, -5:] == 255).all()


@pytest.mark.parametrize("place", [(0, 0), (0, 11), (5, 6), (11, 0), (11, 11)])
def test_a_patch_is_cut_out_with_its_surroundings_and_framed(place):
    pixels = np.full((96, 96, 3), 255, dtype=np.uint8)
    row, column = place
    pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (0, 0, 255)
    cut = np.asarray(cut_out(Image.fromarray(pixels), place, side=12, size=100)).astype(int)
    framed = np.argwhere((cut == RED).all(-1))
    (top, left), (bottom, right) = framed.min(0), framed.max(0)
    inside = cut[top + 2 : bottom - 1, left + 2 : right - 1]
    blue = (cut[..., 2] > 200) & (cut[..., 0] < 100)
    assert 18 <= bottom - top <= 22 and 18 <= right - left <= 22
    assert blue.sum() > 250 and blue.sum() == blue[top : bottom + 1, left : right + 1].sum()
    assert (inside[3:-3, 3:-3, 0] < 50).all()


def test_uses_are_the_codes_of_the_tokenizer_with_their_images_and_patches(pipe, paths, uses):
    assert len(paths) > BATCH_SIZE
    for image in (0, BATCH_SIZE - 1, BATCH_SIZE, len(paths) - 1):
        pixel_values = pipe.processor.image_processor(load_image(paths[image]), return_tensors="pt").pixel_values
        with torch.no_grad():
            tokens = pipe.model.model.visual_tokenizer.tokenize(pixel_values)
        chosen = uses.images == image
        assert torch.equal(uses.codes[chosen], tokens.codes)
        assert torch.equal(uses.patches[chosen], tokens.keep_mask[0].nonzero()[:, 0])


def test_the_patches_of_a_code_are_those_closest_to_it_the_closest_first(uses):
    code = int(uses.codes.mode().values)
    closeness = uses.closeness[uses.codes == code]
    assert len(closeness) > 3

    def closeness_of(image: int, patch: int) -> float:
        return float(uses.closeness[(uses.images == image) & (uses.patches == patch)])

    found = [closeness_of(*use) for use in uses.closest(code, 3)]
    assert found == sorted(closeness.tolist(), reverse=True)[:3]
    unused = next(code for code in range(CONFIG.codebook_size) if code not in uses.codes)
    assert uses.closest(unused, 3) == []


def test_the_gallery_has_a_row_for_each_code_asked_for_or_for_the_most_used(pipe, paths, uses):
    tokenizer, prepare = pipe.model.model.visual_tokenizer, pipe.processor.image_processor
    code = int(torch.bincount(uses.codes).argmax())
    asked = codebook_sheet(tokenizer, prepare, paths, codes=[code], patches=2)
    for image, patch in uses.closest(code, 2):
        assert place_of(cut_out(load_image(paths[image]), divmod(patch, SIDE), SIDE, 70), asked)
    most_used = codebook_sheet(tokenizer, prepare, paths, top=3, patches=2, columns=1)
    assert np.array_equal(np.asarray(most_used)[: 70 + 40], np.asarray(asked)[: 70 + 40])
    assert most_used.height > 3 * 70 > asked.height


def test_kept_patches_are_shown_beside_the_image_the_fewest_first(pipe):
    tokenizer, prepare = pipe.model.model.visual_tokenizer, pipe.processor.image_processor
    paths = find_images([IMAGES], 5)
    sheet = kept_sheet(tokenizer, prepare, paths, columns=5)
    kept = {}
    for path in paths:
        image = load_image(path)
        mask = tokenizer.tokenize(prepare(image, return_tensors="pt").pixel_values).keep_mask[0]
        row, column = place_of(show_kept_patches(image, mask, 96), sheet)
        kept[column] = int(mask.sum())
    counts = [kept[column] for column in sorted(kept)]
    assert len(counts) == 5 and counts == sorted(counts) and counts[0] < counts[-1]


def test_reconstructions_are_those_of_the_pipeline_with_a_seed_for_each(pipe):
    paths, size = find_images([IMAGES], 2), pipe.default_size[0]
    sheet = reconstructions_sheet(pipe, paths, seed=3, size=size)
    for i, path in enumerate(paths):
        image = load_image(path)
        drawn = pipe.reconstruct(image, generator=torch.Generator().manual_seed(3 + i)).images[0]
        row, column = place_of(image.resize((size, size), Image.Resampling.BICUBIC), sheet)
        beside = sheet.crop((column + size + 2, row, column + 2 * size + 2, row + size))
        # equal up to the rounding of a batch or another
        assert np.abs(np.asarray(beside).astype(int) - np.asarray(drawn)).max() <= 1


@pytest.mark.parametrize("kind", ["codebook", "kept", "reconstructions"])
def test_sheets_are_written_by_the_command(here, capsys, kind):
    assert run(kind, "--data", str(IMAGE), str(IMAGES / "flat"), "--count", "3", "-o", "sheet.png") == 0
    assert capsys.readouterr().out == "sheet.png\n"
    assert Image.open("sheet.png").format == "PNG" and Image.open("sheet.png").width > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kept", "--data", str(IMAGE), "-o", "new.png", "--model", "empty"), "empty is no LaVIT checkpoint"),
        (("kept", "--data", "missing", "-o", "new.png"), "there is no image or folder at missing"),
        (("kept", "--data", "empty", "-o", "new.png"), "there is no image in the folder empty"),
        (("kept", "--data", "text.jsonl", "-o", "new.png"), "text.jsonl is not an image"),
        (("kept", "--data", str(IMAGE), "-o", "new.jpg"), "new.jpg has not the ending .png"),
        (("kept", "--data", str(IMAGE), "-o", "nowhere/new.png"), "there is no folder nowhere"),
        (("kept", "--data", str(IMAGE), "-o", "new.png", "--keep-ratio", "2"), "keep_ratio must be in (0, 1]"),
        (
            ("codebook", "--data", str(IMAGE), "-o", "new.png", "--codes", "-1"),
            f"codes are 0 to {CONFIG.codebook_size - 1}, got -1",
        ),
        (("codebook", "--data", str(IMAGE), "-o", "new.png", "--codes", "7", "--top", "3"), "not allowed with"),
        (("reconstructions", "--data", str(IMAGE), "-o", "new.png", "--count", "0"), "no positive whole number"),
        ((), "required: KIND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(here, capsys, arguments, message):
    (here / "empty").mkdir()
    (here / "text.jsonl").write_text("no record\n")
    before = sorted(here.rglob("*"))
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.split("\n") if line and "%|" not in line]
    assert line.startswith("lavit") and "error: " in line and message in line and captured.out == ""
    assert sorted(here.rglob("*")) == before


def test_every_kind_teaches_itself_by_an_example_that_parses(capsys):
    assert run("--help") == 0
    kinds = re.findall(r"^    (\w+)", capsys.readouterr().out, re.M)
    assert set(kinds) >= {"codebook", "reconstructions", "kept"}
    for kind in ("codebook", "reconstructions", "kept"):
        assert run(kind, "--help") == 0
        example = capsys.readouterr().out.split("example:\n")[1].splitlines()[0].strip()
        assert example.startswith(f"lavit show {kind}")
        assert build_parser().parse_args(shlex.split(example)[2:]).kind == kind
