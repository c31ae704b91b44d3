"""`lavit evaluate drawings`: images for the prompts of a suite, FID and CLIP score of them."""

import argparse
import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from modeling_lavit.command_line.common import device_and_dtype, load_pipeline, loading, model_source
from modeling_lavit.pipeline_lavit import LavitPipeline
from modeling_lavit.processing import load_image

from .clip_score import ClipScorer
from .fid import SIDE, Fid
from .files import Findings, ImageFolder, read_json
from .images import grid, save_png
from .output import OutputFolder
from .prompt_files import DrawingPrompt, read_prompts, write_extras
from .results import hash_ids, versions, write_results
from .run import choose, warn
from .tokens import token_items


IMAGES = "images"  # folder of the drawings in an output folder: nothing else lies there
CLIP_BATCH = 32


def seed_of(*parts) -> int:
    """A seed of its own for every image, whatever the batch it is drawn in."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class DrawingWorker:
    """Draws the images of prompts and writes their files.

    Args:
        model, device: of the checkpoint.
        folder: below which the files go.
        seed: of all.
        candidates: drawn for each image, of which the best by `rerank` is kept.
        rerank: folder or repository of a CLIP.
        pixel_decoder: of [`LavitPipeline.from_pretrained`].
        options: of the pipeline's call; those that are None are the checkpoint's.
    """

    def __init__(
        self,
        model: str,
        device: str | None,
        folder: str,
        seed: int = 0,
        candidates: int = 1,
        rerank: str | None = None,
        pixel_decoder: str | None = None,
        **options,
    ):
        given = argparse.Namespace(model=model, device=device)
        if pixel_decoder is None:
            self.pipe = load_pipeline(given)
        else:
            source, (torch_device, dtype) = model_source(given), device_and_dtype(given)
            with loading(source):
                self.pipe = LavitPipeline.from_pretrained(source, pixel_decoder=pixel_decoder, dtype=dtype)
            self.pipe.to(torch_device)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder, self.seed, self.candidates = Path(folder), seed, candidates
        self.reranker = ClipScorer.from_pretrained(rerank, self.pipe.device) if rerank else None
        self.options = {name: value for name, value in options.items() if value is not None}

    def __call__(self, items: list[dict]) -> list[dict]:
        texts = [item["text"] for item in items for _ in range(item["images"])]
        seeds = [
            seed_of(self.seed, item["key"], k, candidate)
            for item in items
            for k in range(item["images"])
            for candidate in range(self.candidates)
        ]
        images = self.pipe(
            texts,
            num_candidates=self.candidates,
            reranker=self.reranker,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self.options,
        ).images
        rows, start = [], 0
        for item in items:
            own = images[start : start + item["images"]]
            if len(item["files"]) == 1 and len(own) > 1:
                own = [grid(own, 2)]
            for image, name in zip(own, item["files"], strict=True):
                save_png(image, self.folder / name)
            rows.append({"prompt": item["text"], "files": item["files"]})
            start += item["images"]
        return rows


def evaluate_drawings(
    prompts: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    predictions: str | Path | None = None,
    inception: str | None = None,
    clip: str | None = None,
    rerank: str | None = None,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    run_model: Callable | None = None,
) -> dict | None:
    """Draws a suite's prompts, or takes images that exist already, and scores them as far as is asked.

    Args:
        prompts: see [`read_prompts`].
        output: folder of the evaluation; images go to its folder `images`.
        images: folder of real images, for FID.
        predictions: folder of drawings with the suite's file names, instead of a model.
        inception: see [`load_inception`]; with `images`.
        clip: folder or repository of a CLIP, for the CLIP score; `rerank`, the one that chooses, to mark it.
        n: images a prompt, where the suite's program takes other numbers.
        limit, seed: so many prompts, and of that choice.
        device: of Inception and CLIP.
        run_model: see [`evaluate_captions`].

    Returns:
        what results.json holds; None where `run_model` returned that.

    Raises:
        ValueError, OSError, ImportError: the files are not as they should be, or a package is missing.
    """
    if (images is None) != (inception is None):
        raise ValueError("FID needs both --images, the real ones, and --inception")
    findings = Findings()
    suite, every = read_prompts(prompts, seed, n)
    rows = choose(every, limit, seed)
    # what scores is loaded first, so that a mistake in it shows before anything is drawn
    fid = None if inception is None else Fid(inception, device or "cpu")
    scorer = None if clip is None else ClipScorer.from_pretrained(clip, device or "cpu")
    real = [] if images is None else real_images(rows, images, findings)
    if fid is not None and min(len(real), sum(len(row.files) for row in rows)) < 2:
        raise ValueError("FID compares two drawings or more with two real images or more: raise --limit")
    settings = {"prompts": str(prompts), "suite": suite, "limit": limit, "seed": seed, "n": n}
    if predictions is not None:
        folder = Path(predictions)
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no folder of drawings at {folder}")
        settings["predictions"] = str(predictions)
        OutputFolder(output)
    else:
        folder, settings = Path(output) / IMAGES, _draw(suite, rows, Path(output), settings, run_model)
        if settings is None:
            return None
    drawn = drawn_prompts(rows, folder, findings)
    warn(findings)
    results, notes = _scores(suite, drawn, folder, fid, real, scorer)
    if scorer is not None and str(rerank) == str(clip):
        results["clip_score_by_the_clip_that_chose"] = True
        notes.append("the CLIP score is by the CLIP that chose the drawings: not comparable with others")
    if fid is not None:
        results["fid_settings"]["inception"] = inception
    results |= {
        "protocol": f"{suite} prompts" + (f", best of candidates by {rerank}" if rerank else ""),
        "complete": len(drawn) == len(every),
        "settings": settings,
        "versions": versions("torch", "transformers", "diffusers", "torchmetrics"),
        "counts": {"prompts": len(rows), "drawn": len(drawn), **findings.counts()},
        "ids": hash_ids(row.id for row in drawn),
    }
    write_results(Path(output), results, notes)
    return results


def _draw(suite: str, rows: list[DrawingPrompt], output: Path, settings: dict, run_model: Callable) -> dict | None:
    """Has the images drawn that are missing; the settings that were written down, on the main process."""
    items = [{"key": row.id, "text": row.text, "files": row.files, "images": row.images} for row in rows]
    pinned = {
        "samples": hash_ids(row.id for row in rows),
        "text_hash": hash_ids(f"{row.id} {row.text}" for row in rows),
    }
    if run_model(output, settings | pinned, items) is None:
        return None
    write_extras(suite, rows, output / IMAGES if suite == "geneval" else output)
    return read_json(output / "settings.json")


def drawn_prompts(rows: list[DrawingPrompt], folder: Path, findings: Findings) -> list[DrawingPrompt]:
    """The prompts all of whose files are there; names the others.

    Raises:
        ValueError: there are none.
    """
    drawn = []
    for row in rows:
        if all((folder / name).is_file() for name in row.files):
            drawn.append(row)
        else:
            findings.add("prompts without drawing, not scored", row.id)
    if not drawn:
        raise ValueError(f"{folder} has none of the drawings, such as {rows[0].files[0]}")
    return drawn


def _scores(
    suite: str, rows: list[DrawingPrompt], folder: Path, fid: Fid | None, real: list[Path], scorer: ClipScorer | None
) -> tuple[dict, list[str]]:
    """The figures that were asked for, and notes on them."""
    results: dict = {"task": "drawings", "dataset": suite, "metric": "no score asked", "score": None}
    if scorer is not None:
        results |= clip_scores(scorer, rows, folder)
    if fid is not None:
        files = [folder / name for row in rows for name in row.files]
        fid.add(files, real=False)
        fid.add(real, real=True)
        value = fid.compute()
        results |= {"FID": value, "score": value, "metric": "FID"}
        results["dataset"] = "coco-fid" if suite == "coco" else suite
        results["fid_settings"] = {
            "real_images": len(real),
            "drawings": len(files),
            "resized": f"both kinds to {SIDE}x{SIDE}, bicubic with antialiasing (Pillow), aspect ratio not kept",
            "then": "as the extractor of torchmetrics does: 299x299, bilinear as in TensorFlow 1",
        }
    return results, [f"the folder that the program of {suite} reads: {folder}"]


def real_images(rows: list[DrawingPrompt], images: str | Path, findings: Findings) -> list[Path]:
    """The images that the prompts are captions of; all of the folder where they are of none."""
    if not any(row.real for row in rows):
        return [Path(item["image"]) for item in token_items(images)]
    folder = ImageFolder(Path(images))
    found = []
    for row in rows:
        path = folder.find(row.real)
        if path is None:
            findings.add("missing real images", row.real[0] if row.real else row.id)
        else:
            found.append(path)
    if not found:
        raise ValueError(
            f"{images} has none of the {len(rows)} real images, such as {(rows[0].real or [rows[0].id])[0]}"
        )
    return found


def clip_scores(scorer: ClipScorer, rows: list[DrawingPrompt], folder: Path) -> dict:
    """The mean CLIP score; of grids that of each of their images."""
    total, count = 0.0, 0
    pairs = ((image, row.text) for row in rows for image in _single_images(row, folder))
    while batch := list(islice(pairs, CLIP_BATCH)):
        images, texts = zip(*batch, strict=True)
        total, count = total + float(scorer(images, texts).sum()), count + len(texts)
    return {"clip_score": total / count, "clip": scorer.name, "score": total / count, "metric": "CLIP score"}


def _single_images(row: DrawingPrompt, folder: Path) -> list[Image.Image]:
    images = [load_image(folder / name) for name in row.files]
    if len(images) == row.images:
        return images
    sheet = images[0]
    width, height = sheet.width // 2, sheet.height // 2
    return [sheet.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]
