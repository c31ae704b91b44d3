"""A sheet of prompts, originals, drawings and reconstructions, good and bad ones alike."""

import numpy as np
from PIL import Image, ImageDraw


CELL, LABEL, COLUMNS = 96, 26, 12


def draw_sheet(pictures: dict, count: int = 24, seed: int = 0) -> Image.Image:
    """Rows of cells, a random choice of each split: label, original, drawn from text, reconstructed.

    Args:
        pictures: split to (rows with `images`, `names`, `styles`; drawn pictures; reconstructed pictures).
        count: pictures of each split.
        seed: of the choice.
    """
    cells = []
    for split, (rows, drawn, reconstructed) in pictures.items():
        chosen = np.random.default_rng(seed).choice(len(rows.names), min(count, len(rows.names)), replace=False)
        for i in chosen:
            label = f"{rows.names[i]}\n{rows.styles[i]}" + (" (held out)" if split == "held_out" else "")
            cells.append((label, (rows.images[i], drawn[i], reconstructed[i])))
    lines = -(-len(cells) // COLUMNS)
    height = LABEL + 3 * CELL + 8
    sheet = Image.new("RGB", (COLUMNS * (CELL + 6), lines * height), "white")
    pen = ImageDraw.Draw(sheet)
    for position, (label, column) in enumerate(cells):
        left, top = (position % COLUMNS) * (CELL + 6) + 3, (position // COLUMNS) * height
        pen.multiline_text((left, top), label, fill="black", font_size=10, spacing=1)
        for row, image in enumerate(column):
            sheet.paste(image.resize((CELL, CELL), Image.BICUBIC), (left, top + LABEL + row * CELL))
    return sheet
