"""Sheets of images that explain a checkpoint: kept patches, codes, reconstructions, drawings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from ..processing import LavitImageProcessor, load_image
from ..show_lavit import show_kept_patches


INK, FONT_SIZE, GAP = "#222222", 13, 10
FRAME, AROUND = "#e00000", 2  # of a code's patch: its frame, and the patches shown on each side of it
BATCH_SIZE = 32


def find_images(sources: list[str | Path], count: int | None = None, seed: int = 0) -> list[Path]:
    """Image files, given as such or in folders (those below them too), these in the order of their names.

    Args:
        sources: files and folders.
        count: a random choice of so many where there are more; all when None.
        seed: of the choice.

    Raises:
        ValueError: a source does not exist, or is a folder without an image.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"there is no image or folder at {source}")
        found = [source]
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix.lower() in endings and path.is_file())
        if not found:
            raise ValueError(f"there is no image in the folder {source}")
        paths += found
    if count is None or count >= len(paths):
        return paths
    return [paths[i] for i in sorted(np.random.default_rng(seed).choice(len(paths), count, replace=False))]


def join(images: list[Image.Image], down: bool = False, gap: int = 2) -> Image.Image:
    """Images side by side, or one below the other, on white."""
    widths, heights = [image.width for image in images], [image.height for image in images]
    if down:
        joined = Image.new("RGB", (max(widths), sum(heights) + gap * (len(images) - 1)), "white")
    else:
        joined = Image.new("RGB", (sum(widths) + gap * (len(images) - 1), max(heights)), "white")
    offset = 0
    for image in images:
        joined.paste(image, (0, offset) if down else (offset, 0))
        offset += gap + (image.height if down else image.width)
    return joined


def draw_sheet(cells: list[tuple[str, Image.Image]], columns: int, heading: str = "") -> Image.Image:
    """Labelled images in rows on white; a label is cut where it is wider than the widest image.

    Args:
        cells: label, of any number of lines, and image.
        columns: cells of a row.
        heading: one line above all; "" for none.
    """
    columns = min(columns, len(cells))
    width = max(image.width for _, image in cells)
    line = FONT_SIZE + 4
    label = line * max(text.count("\n") + 1 for text, _ in cells)
    height = label + max(image.height for _, image in cells) + GAP
    top = line + GAP if heading else 0
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    inner = columns * (width + GAP) - GAP
    if heading:
        inner = max(inner, int(measure.textlength(heading, font_size=FONT_SIZE)) + 1)
    sheet = Image.new("RGB", (inner + 2 * GAP, top + -(-len(cells) // columns) * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), heading, fill=INK, font_size=FONT_SIZE)
    for position, (text, image) in enumerate(cells):
        x, y = GAP + position % columns * (width + GAP), top + GAP // 2 + position // columns * height
        for i, words in enumerate(text.split("\n")):
            pen.text((x, y + i * line), _fit(pen, words, width), fill=INK, font_size=FONT_SIZE)
        sheet.paste(image, (x, y + label))
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    if pen.textlength(text, font_size=FONT_SIZE) <= width:
        return text
    while text and pen.textlength(text + "…", font_size=FONT_SIZE) > width:
        text = text[:-1]
    return text + "…"


def samples_sheet(images: dict, count: int = 24, seed: int = 0, size: int = 96, columns: int = 12) -> Image.Image:
    """What `lavit evaluate` drew, a random choice of each split, good and bad ones alike: original, drawn from text,
    reconstructed, one below the other.

    Args:
        images: split to (rows with `images`, `names`, `styles`; drawn images; reconstructed images).
        count: images of each split.
        seed: of the choice.
        size: side of an image in pixels.
        columns: of the sheet.
    """
    cells = []
    for split, (rows, drawn, reconstructed) in images.items():
        chosen = np.random.default_rng(seed).choice(len(rows.names), min(count, len(rows.names)), replace=False)
        for i in chosen:
            label = f"{rows.names[i]}\n{rows.styles[i]}" + ("\nheld out" if split == "held_out" else "")
            column = [_square(image, size) for image in (rows.images[i], drawn[i], reconstructed[i])]
            cells.append((label, join(column, down=True)))
    return draw_sheet(cells, columns)


def reconstructions_sheet(pipe, paths: list[Path], seed: int = 0, size: int = 96, columns: int = 4) -> Image.Image:
    """Images beside what the pipeline draws from their visual tokens, with the number of these.

    Args:
        pipe: a [`LavitPipeline`].
        paths: of the images.
        seed: of the noise; image i has `seed + i`.
        size: side of an image in pixels.
        columns: pairs of a row.
    """
    cells = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        images = [load_image(path) for path in batch]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        output = pipe.reconstruct(images, generator=noise)
        for path, image, drawn, length in zip(
            batch, images, output.images, output.visual_tokens.lengths.tolist(), strict=True
        ):
            pair = join([_square(image, size), _square(drawn, size)])
            cells.append((f"{path.stem}\n{_count(length, 'token')}", pair))
    return draw_sheet(cells, columns, "left: the image; right: drawn from its visual tokens alone")


@torch.no_grad()
def kept_sheet(
    tokenizer: LavitVisualTokenizer,
    image_processor: LavitImageProcessor,
    paths: list[Path],
    keep_ratio: float | None = None,
    size: int = 96,
    columns: int = 4,
) -> Image.Image:
    """Images beside their kept patches, from the one that keeps fewest to the one that keeps most.

    Args:
        paths: of the images.
        keep_ratio: see [`LavitVisualTokenizer.select`].
        size: least side of an image in pixels; every patch gets the same whole number of them.
        columns: pairs of a row.
    """
    cells = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        images = [load_image(path) for path in batch]
        pixel_values = image_processor(images, return_tensors="pt").pixel_values.to(tokenizer.device)
        masks = tokenizer.select(tokenizer.encode_patches(pixel_values), keep_ratio=keep_ratio)[0]
        for path, image, mask in zip(batch, images, masks, strict=True):
            shown = show_kept_patches(image, mask, size)
            kept = int(mask.sum())
            cells.append((kept, f"{path.stem}\n{kept} of {len(mask)}", join([_square(image, shown.width), shown])))
    cells = [cell for _, *cell in sorted(cells, key=lambda cell: cell[0])]
    return draw_sheet(cells, columns, "left: the image; right: the patches that are kept, the others faded")


@dataclass
class CodeUses:
    """Every use of a code in a list of images, U of them.

    Args:
        codes: (U,) int64.
        closeness: (U,) float32, cosine of the angle between the merged feature and its code.
        images: (U,) int64, index of the image.
        patches: (U,) int64, index of the kept patch in row-major order.
    """

    codes: torch.Tensor
    closeness: torch.Tensor
    images: torch.Tensor
    patches: torch.Tensor

    def closest(self, code: int, count: int) -> list[tuple[int, int]]:
        """Image and patch of the `count` uses of a code that are closest to it."""
        uses = (self.codes == code).nonzero()[:, 0]
        best = uses[self.closeness[uses].argsort(descending=True, stable=True)[:count]]
        return list(zip(self.images[best].tolist(), self.patches[best].tolist(), strict=True))


@torch.no_grad()
def find_uses(tokenizer: LavitVisualTokenizer, image_processor: LavitImageProcessor, paths: list[Path]) -> CodeUses:
    """Tokenizes images and notes who uses which code, and how close to it."""
    quantizer, found = tokenizer.quantizer, []
    for start in tqdm(range(0, len(paths), BATCH_SIZE), desc="tokenizing", leave=False):
        images = [load_image(path) for path in paths[start : start + BATCH_SIZE]]
        encoded = tokenizer.encode(image_processor(images, return_tensors="pt").pixel_values.to(tokenizer.device))
        projected = quantizer.project(encoded.features)
        codes = quantizer.nearest(projected)
        closeness = F.cosine_similarity(projected.float(), quantizer.codebook.weight[codes].float(), dim=-1)
        images, patches = encoded.keep_mask.nonzero(as_tuple=True)
        found.append([one.cpu() for one in (codes, closeness, images + start, patches)])
    return CodeUses(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def codebook_sheet(
    tokenizer: LavitVisualTokenizer,
    image_processor: LavitImageProcessor,
    paths: list[Path],
    codes: list[int] | None = None,
    top: int = 12,
    patches: int = 6,
    size: int = 70,
    columns: int = 2,
) -> Image.Image:
    """What codes stand for (paper Fig. 5): for each a row of the patches closest to it, framed, in their surroundings.

    Args:
        paths: of the images that are searched.
        codes: `0 … K-1`; the `top` most used ones when None.
        patches: of a row.
        size: side of a patch with its surroundings in pixels.
        columns: rows of patches beside each other.

    Raises:
        ValueError: a code is none of the codebook.
    """
    codebook_size = tokenizer.config.codebook_size
    wrong = [code for code in codes or [] if not 0 <= code < codebook_size]
    if wrong:
        raise ValueError(f"codes are 0 to {codebook_size - 1}, got {', '.join(map(str, wrong))}")
    uses = find_uses(tokenizer, image_processor, paths)
    counts = torch.bincount(uses.codes, minlength=codebook_size)
    if codes is None:
        codes = [code for code in counts.argsort(descending=True, stable=True)[:top].tolist() if counts[code]]
    side = tokenizer.config.image_size // tokenizer.config.patch_size
    cells = []
    for code in codes:
        row = [
            cut_out(load_image(paths[image]), divmod(patch, side), side, size)
            for image, patch in uses.closest(code, patches)
        ]
        row += [Image.new("RGB", (size, size), "white")] * (patches - len(row))
        cells.append((f"code {code}, used {_count(int(counts[code]), 'time')}", join(row)))
    return draw_sheet(cells, columns, f"framed: the patches closest to a code, in {_count(len(paths), 'image')}")


def cut_out(image: Image.Image, place: tuple[int, int], side: int, size: int) -> Image.Image:
    """A patch in a red frame with the patches around it, as far as the image goes.

    Args:
        image: RGB, any size.
        place: row and column of the patch.
        side: patches of a row of the image, which is a square grid.
        size: side of the result in pixels.
    """
    window = min(side, 2 * AROUND + 1)
    top, left = (min(max(0, index - AROUND), side - window) for index in place)
    scale_x, scale_y = image.width / side, image.height / side
    box = (left * scale_x, top * scale_y, (left + window) * scale_x, (top + window) * scale_y)
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    cell = size / window
    x, y = (place[1] - left) * cell, (place[0] - top) * cell
    ImageDraw.Draw(cut).rectangle((x - 1, y - 1, x + cell, y + cell), outline=FRAME, width=2)
    return cut


def _square(image: Image.Image, size: int) -> Image.Image:
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
