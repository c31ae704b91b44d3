"""The emoji data set: how sets are fetched, joined, drawn and split. No test needs the network."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_lavit.training.emoji import prepare_images as emoji


ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "tests" / "fixtures" / "emoji"
HELD_OUT = ROOT / "checkpoints" / "lavit-emoji" / "held_out.json"

SQUARE = '<path fill="{color}" d="M4 4h8v8h-8z"/>'
LEFT_HALF = '<path fill="#f00" d="M0 0h8v16h-8z"/>'


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def icon_set(icons: dict[str, str], chars: dict | None = None, aliases: dict | None = None, **categories) -> dict:
    """An icon set as `read_set` returns it, 16 x 16 units."""
    drawn = {name: {"body": body} for name, body in icons.items()}
    return {
        "icons": {"icons": drawn, "aliases": aliases or {}, "width": 16, "height": 16},
        "chars": chars or {},
        "metadata": {"categories": categories},
    }


def sets_with(**others: dict) -> dict[str, dict]:
    """A canonical set of a cat, a cat face, a dark-skinned hand and a flag, and the given other sets."""
    chars = {"1f408": "cat", "1f431": "cat-face", "1f44b-1f3ff": "waving-hand-dark", "1f3c1": "chequered-flag"}
    canonical = icon_set(
        {icon: SQUARE.format(color="#c80") for icon in chars.values()},
        chars,
        Animals=["cat", "cat-face"],
        People=["waving-hand-dark"],
        Flags=["chequered-flag"],
    )
    return {"noto": canonical, **others}


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, list[str]]]:
    """(name, category, styles) of every emoji in the default categories."""
    return [(row["name"], row["category"], row["styles"]) for row in read_lines(SAMPLES / "pairs.jsonl")]


@pytest.fixture
def local_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[emoji.IconPackage, ...]:
    """Six tiny packages in the npm cache, pinned by their own hashes; the blob style's cat is a broken drawing."""
    (tmp_path / "npm").mkdir()
    packages = []
    for index, package in enumerate(emoji.PACKAGES):
        bodies = {name: SQUARE.format(color=f"#{index}{shade}0") for shade, name in enumerate(["cat", "dog", "fox"])}
        if package.style == "blob":
            bodies["cat"] = "<path d="
        chars = {"1f408": "cat", "1f415": "dog", "1f98a": "fox"}
        content = icon_set(bodies, chars, Animals=["cat", "dog"], Forest=["fox"])
        path = tmp_path / "npm" / package.tarball
        with tarfile.open(path, "w:gz") as archive:
            for part, value in content.items():
                data = json.dumps(value).encode()
                info = tarfile.TarInfo(f"package/{part}.json")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        packages.append(replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(emoji, "PACKAGES", tuple(packages))
    return tuple(packages)


# ---- splits ----


def test_the_committed_held_out_list_is_what_the_seed_gives(pairs):
    committed = json.loads(HELD_OUT.read_text())
    splits = emoji.split_pairs(pairs)
    assert emoji.held_out_summary(splits, emoji.DEFAULT_CATEGORIES) == committed


def test_unseen_names_are_three_percent_and_unseen_in_every_style(pairs):
    splits = emoji.split_pairs(pairs)
    unseen = {name for (name, _), split in splits.items() if split == "unseen"}
    assert len(unseen) / len(pairs) == pytest.approx(0.03, abs=0.004)
    assert all(splits[name, style] == "unseen" for name, _, styles in pairs if name in unseen for style in styles)


def test_held_out_pairs_are_five_percent_one_per_name_and_seen_in_three_other_styles(pairs):
    splits = emoji.split_pairs(pairs)
    held_out = [name for (name, _), split in splits.items() if split == "held_out"]
    seen = sum(split != "unseen" for split in splits.values())
    assert len(held_out) / seen == pytest.approx(0.05, abs=0.004)
    assert len(set(held_out)) == len(held_out)
    train_styles = Counter(name for (name, _), split in splits.items() if split == "train")
    assert all(train_styles[name] >= emoji.MIN_STYLES_TO_HOLD_OUT - 1 for name in held_out)


def test_held_out_pairs_are_spread_evenly_over_the_styles(pairs):
    counts = Counter(style for (_, style), split in emoji.split_pairs(pairs).items() if split == "held_out")
    assert set(counts) == set(emoji.STYLES)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_splits_ignore_the_order_of_the_names_and_which_other_categories_there_are(pairs):
    splits = emoji.split_pairs(pairs)
    other = [(f"thing {index}", "Objects", list(emoji.STYLES)) for index in range(50)]
    with_more = emoji.split_pairs([*other, *reversed(pairs)])
    assert {pair: split for pair, split in with_more.items() if pair in splits} == splits


def test_another_seed_gives_another_split(pairs):
    assert emoji.split_pairs(pairs) != emoji.split_pairs(pairs, seed=emoji.SEED + 1)


# ---- joining ----


@pytest.mark.parametrize(
    ("codepoint", "icon", "wanted"),
    [
        ("1f34e", "red-apple", True),
        ("1f408-200d-2b1b", "black-cat", True),
        ("1f9d1-200d-1f680", "astronaut", True),
        ("1f44b-1f3ff", "waving-hand-dark-skin-tone", False),
        ("1f1eb-1f1f7", "flag-france", False),
        ("1f1e6", "regional-indicator-a", False),
        ("1f3f4-e0067-e0062-e007f", "flag-scotland", False),
        ("1f46a", "family", False),
        ("1f48f", "kiss", False),
        ("1f9d1-200d-1f91d-200d-1f9d1", "people-holding-hands", False),
        ("1f468-200d-1f680", "man-astronaut", False),
        ("1f3c3-200d-2640", "woman-running", False),
        ("1f57a", "man-dancing", False),
    ],
)
def test_only_emoji_of_their_own_are_wanted(codepoint, icon, wanted):
    assert emoji.is_wanted(codepoint, icon) is wanted


def test_sets_that_list_code_points_are_joined_by_them_whatever_they_call_the_icon():
    twemoji = icon_set({"house-cat": "", "cat": ""}, {"1f408": "house-cat", "1f42f": "cat"})
    cat, cat_face = emoji.join(sets_with(twemoji=twemoji), ["Animals"])
    assert cat.icons == {"noto": "cat", "twemoji": "house-cat"}
    assert cat_face.icons == {"noto": "cat-face"}


def test_sets_without_code_points_are_joined_by_exact_name_or_alias_only():
    blob = icon_set({"cat-face": ""})
    emojitwo = icon_set({"kitten": ""}, aliases={"cat": {"parent": "kitten"}})
    cat, cat_face = emoji.join(sets_with(blob=blob, emojitwo=emojitwo), ["Animals"])
    assert cat.icons == {"noto": "cat", "emojitwo": "cat"}
    assert cat_face.icons == {"noto": "cat-face", "blob": "cat-face"}


def test_a_reviewed_exception_overrides_the_join(monkeypatch):
    monkeypatch.setattr(emoji, "JOIN_EXCEPTIONS", {("blob", "1f408"): None, ("blob", "1f431"): "cat"})
    cat, cat_face = emoji.join(sets_with(blob=icon_set({"cat": "", "cat-face": ""})), ["Animals"])
    assert cat.icons == {"noto": "cat"}
    assert cat_face.icons == {"noto": "cat-face", "blob": "cat"}


def test_all_categories_are_joined_by_default_without_flags_and_skin_tones():
    joined = emoji.join(sets_with())
    assert [(entry.name, entry.category) for entry in joined] == [("cat", "Animals"), ("cat face", "Animals")]


def test_an_unknown_category_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown categories \['Cats'\].*'Animals'"):
        emoji.join(sets_with(), ["Cats"])


def test_only_the_six_licensed_sets_are_ever_fetched():
    packages = {package.package for package in emoji.PACKAGES}
    assert packages == {"noto", "noto-v1", "twemoji", "emojione", "fluent-emoji", "fluent-emoji-flat"}
    notice = (HELD_OUT.parent / "NOTICE").read_text()
    assert all(f"{package.package} {package.version}" in notice for package in emoji.PACKAGES)


# ---- drawing ----


def test_images_are_rgb_on_white_at_the_asked_size():
    image = emoji.rasterise(emoji.icon_to_svg(icon_set({"x": SQUARE.format(color="#00f")})["icons"], "x", 32))
    assert image.mode == "RGB" and image.size == (32, 32)
    assert image.getpixel((1, 1)) == (255, 255, 255) and image.getpixel((16, 16)) == (0, 0, 255)


def test_an_icon_that_is_not_square_keeps_its_proportions():
    icons = icon_set({"x": '<path fill="#f00" d="M0 0h32v16h-32z"/>'})["icons"]
    icons["icons"]["x"]["width"] = 32
    pixels = np.asarray(emoji.rasterise(emoji.icon_to_svg(icons, "x", 32)))
    red = (pixels == (255, 0, 0)).all(-1)
    assert red[8:24].all() and not red[:8].any() and not red[24:].any()


def test_a_flipped_alias_is_the_mirrored_image():
    icons = icon_set({"x": LEFT_HALF}, aliases={"y": {"parent": "x", "hFlip": True}})["icons"]
    original, mirrored = (np.asarray(emoji.rasterise(emoji.icon_to_svg(icons, name, 32))) for name in "xy")
    assert not np.array_equal(original, mirrored)
    np.testing.assert_array_equal(original[:, ::-1], mirrored)


@pytest.mark.parametrize("body", ["<path d=", ""], ids=["broken", "empty"])
def test_a_drawing_that_shows_nothing_is_an_error(body):
    icons = icon_set({"x": "placeholder"})["icons"]
    icons["icons"]["x"]["body"] = body
    with pytest.raises(ValueError):
        emoji.rasterise(emoji.icon_to_svg(icons, "x", 32))


# ---- fetching and the whole run ----


def test_without_npm_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="npm is needed.*install Node.js"):
        emoji.fetch(emoji.PACKAGES[0], tmp_path)


def test_a_tarball_with_the_wrong_hash_is_refused(tmp_path):
    path = tmp_path / emoji.PACKAGES[0].tarball
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256 .* expected .*delete the file and run again"):
        emoji.fetch(emoji.PACKAGES[0], tmp_path)


def test_a_run_writes_an_image_folder_and_reports_what_it_left_out(tmp_path, local_packages, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # the cached packages need no npm
    rows = emoji.prepare(tmp_path / "emoji", ["Animals"], size=32)
    assert rows == read_lines(tmp_path / "emoji" / "metadata.jsonl")
    assert Counter(row["name"] for row in rows) == {"cat": 5, "dog": 6}
    assert all(Image.open(tmp_path / "emoji" / row["file_name"]).size == (32, 32) for row in rows)
    errors = capsys.readouterr().err
    assert "1 icons left out" in errors and "blob cat" in errors


def test_a_second_run_keeps_finished_images_and_draws_missing_ones(tmp_path, local_packages):
    output = tmp_path / "emoji"
    first = emoji.prepare(output, ["Animals"], size=32)
    kept, missing = (output / row["file_name"] for row in first[:2])
    missing.unlink()
    written_at = kept.stat().st_mtime_ns
    assert emoji.prepare(output, ["Animals"], size=32) == first
    assert missing.exists() and kept.stat().st_mtime_ns == written_at


def test_the_same_image_twice_is_kept_once(tmp_path, local_packages, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "JOIN_EXCEPTIONS", {("flat", "1f415"): "cat"})
    rows = emoji.prepare(tmp_path / "emoji", ["Animals"], size=32)
    assert ("dog", "flat") not in {(row["name"], row["style"]) for row in rows}
    assert "flat dog: the same image as flat cat" in capsys.readouterr().err


def test_the_command_prints_counts_and_turns_errors_into_one_line(tmp_path, local_packages, capsys):
    emoji.main(["--output", str(tmp_path / "emoji"), "--categories", "all", "--size", "32"])
    assert "17 images of 3 names" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: Unknown categories"):
        emoji.main(["--output", str(tmp_path / "emoji"), "--categories", "Nonsense"])


# ---- the committed samples ----


def test_the_samples_cover_every_style_and_split_and_agree_with_the_held_out_list(pairs):
    rows, splits = read_lines(SAMPLES / "metadata.jsonl"), emoji.split_pairs(pairs)
    assert 45 <= len(rows) <= 60
    assert {row["style"] for row in rows} == set(emoji.STYLES)
    assert {row["split"] for row in rows} == {"train", "held_out", "unseen"}
    assert all(splits[row["name"], row["style"]] == row["split"] for row in rows)


def test_the_samples_are_96_pixel_rgb_images_under_400_kilobytes_in_all():
    for row in read_lines(SAMPLES / "metadata.jsonl"):
        with Image.open(SAMPLES / row["file_name"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (96, 96))
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 400_000


def test_the_samples_load_as_a_datasets_image_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    samples = datasets.load_dataset("imagefolder", data_dir=str(SAMPLES), cache_dir=str(tmp_path), split="train")
    rows = read_lines(SAMPLES / "metadata.jsonl")
    assert {(row["name"], row["style"]) for row in samples} == {(row["name"], row["style"]) for row in rows}
    assert samples[0]["image"].size == (96, 96)
