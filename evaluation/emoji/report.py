"""Scores a checkpoint on an image folder with names and styles: reading, reconstruction, drawing, tokens, speed.

`lavit evaluate --model DIR --data data/emoji --judge runs/judge/final [--count 200] [--seeds 3] [--sheet sheet.png]`

Pixels are scored by an independent judge ([`Judge`]); its score on the real pictures stands beside them.
"""

import argparse
import io
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image

from .judge import Judge
from .pictures import samples_sheet


class PictureRows:
    """The rows of one split: pictures as PIL, names, styles, file sizes in bytes."""

    def __init__(self, folder: str, split: str, count: int | None = None, seed: int = 0):
        rows = load_dataset(
            "imagefolder", data_files={"train": f"{folder}/**"}, split="train"
        )  # no split by file names
        chosen = [i for i, value in enumerate(rows["split"]) if value == split]
        if not chosen:
            raise ValueError(f"{folder} has no picture of the split {split!r}")
        if count is not None and count < len(chosen):
            chosen = sorted(np.random.default_rng(seed).choice(chosen, count, replace=False).tolist())
        rows = rows.select(chosen)
        self.images = [image.convert("RGB") for image in rows["image"]]
        self.names, self.styles = list(rows["name"]), list(rows["style"])

    def __len__(self) -> int:
        return len(self.images)


def png_size(image: Image.Image) -> int:
    """Bytes of a picture as an optimised PNG: a measure of how busy it is."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.tell()


def to_tensor(images: list[Image.Image], size: int) -> torch.Tensor:
    """(B, 3, size, size) in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB").resize((size, size), Image.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


class Evaluation:
    """The measurements, each a method; all use the pipeline's own defaults."""

    def __init__(self, pipe, judge: Judge, batch_size: int = 32):
        self.pipe, self.judge, self.batch_size = pipe, judge, batch_size

    def batches(self, count: int):
        return (slice(start, start + self.batch_size) for start in range(0, count, self.batch_size))

    def read(self, rows: PictureRows, text: str, preset: str) -> list[str]:
        """The model's text for each picture."""
        processor, model, answers = self.pipe.processor, self.pipe.model, []
        for batch in self.batches(len(rows)):
            images = rows.images[batch]
            inputs = processor(images=images, text=[text] * len(images), return_tensors="pt")
            ids = model.generate(**inputs, generation_preset=preset)
            answers += processor.post_process_answer(ids, input_ids=inputs["input_ids"])
        return answers

    def caption(self, rows: PictureRows) -> float:
        """Share of captions that are the name, word for word."""
        return float(np.mean([a == b for a, b in zip(self.read(rows, "<image>", "caption"), rows.names, strict=True)]))

    def style_question(self, rows: PictureRows) -> float:
        """Share of right answers to "which style is this?"."""
        answers = self.read(rows, "<image>Question: which style is this? Answer:", "answer")
        return float(np.mean([a == b for a, b in zip(answers, rows.styles, strict=True)]))

    def real(self, rows: PictureRows) -> dict[str, float]:
        """The judge's scores of the real pictures: the ceiling."""
        return self.judge.score(to_tensor(rows.images, self.judge.image_size), rows.names, rows.styles)

    def reconstruct(self, rows: PictureRows, seed: int = 0) -> tuple[dict[str, float], list[Image.Image]]:
        """The judge's scores of reconstructions, with their PSNR in dB."""
        images = []
        for batch in self.batches(len(rows)):
            count = len(rows.images[batch])
            images += self.pipe.reconstruct(rows.images[batch], generator=generators(seed, count)).images
        drawn, real = (to_tensor(pictures, self.judge.image_size) for pictures in (images, rows.images))
        psnr = -10 * (drawn - real).square().mean((1, 2, 3)).log10()
        return self.judge.score(drawn, rows.names, rows.styles) | {"psnr": float(psnr.mean())}, images

    def draw(self, prompts: list, names: list[str], styles: list[str], seed: int = 0):
        """The judge's scores of what is drawn from prompts, and the pictures."""
        images = []
        for batch in self.batches(len(prompts)):
            count = len(prompts[batch])
            images += self.pipe(prompts[batch], generator=generators(seed, count)).images
        return self.judge.score(to_tensor(images, self.judge.image_size), names, styles), images

    def draw_from_text(self, rows: PictureRows, seed: int = 0):
        """ "NAME in STYLE style", one picture a row."""
        prompts = [f"{name} in {style} style" for name, style in zip(rows.names, rows.styles, strict=True)]
        return self.draw(prompts, rows.names, rows.styles, seed)

    def restyle(self, rows: PictureRows, sources: PictureRows, seed: int = 0):
        """[picture of the same name in another style, "in STYLE style"], one picture a row that has such a source."""
        by_name = defaultdict(list)
        for image, name, style in zip(sources.images, sources.names, sources.styles, strict=True):
            by_name[name].append((style, image))
        random = np.random.default_rng(seed)
        prompts, names, styles = [], [], []
        for name, style in zip(rows.names, rows.styles, strict=True):
            candidates = [image for other, image in by_name[name] if other != style]
            if candidates:
                prompts.append([candidates[random.integers(len(candidates))], f"in {style} style"])
                names.append(name)
                styles.append(style)
        return self.draw(prompts, names, styles, seed)

    @torch.no_grad()
    def tokens(self, rows: PictureRows) -> dict[str, float]:
        """Codebook use, keep rate, distinct codes per picture, and how the count follows the PNG's size."""
        tokenizer = self.pipe.model.model.visual_tokenizer
        codes, lengths = [], []
        for batch in self.batches(len(rows)):
            pixel_values = self.pipe.processor.image_processor(rows.images[batch], return_tensors="pt")["pixel_values"]
            tokens = tokenizer.tokenize(pixel_values.to(tokenizer.dtype))
            codes += tokens.split()
            lengths += tokens.lengths.tolist()
        counts = torch.bincount(torch.cat(codes), minlength=tokenizer.config.codebook_size).double()
        share = counts / counts.sum()
        perplexity = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
        side = tokenizer.config.image_size
        sizes = [png_size(image.resize((side, side), Image.BICUBIC)) for image in rows.images]
        return {
            "codes_used": float((counts > 0).double().mean()),
            "perplexity": perplexity,
            "perplexity_share": perplexity / len(counts),
            "distinct_per_kept": float(np.mean([len(c.unique()) / len(c) for c in codes])),
            "kept_mean": float(np.mean(lengths)),
            "kept_min": float(min(lengths)),
            "kept_max": float(max(lengths)),
            "keep_rate": float(np.mean(lengths)) / tokenizer.config.num_patches,
            "png_size_correlation": float(np.corrcoef(lengths, sizes)[0, 1]),
        }

    def seconds_from_text(self, prompt: str = "a tomato in noto style", repeats: int = 5) -> float:
        """Median seconds for one picture from text, after one to warm up."""
        times = []
        for seed in range(repeats + 1):
            start = time.perf_counter()
            self.pipe(prompt, generator=torch.Generator().manual_seed(seed))
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))


def evaluate(pipe, judge: Judge, data: str, count: int, seeds: int) -> tuple[dict, dict]:
    """All figures, and the pictures of the sheet."""
    evaluation = Evaluation(pipe, judge)
    everything = PictureRows(data, "train")
    splits = {"seen": PictureRows(data, "train", count), "held_out": PictureRows(data, "held_out")}
    report: dict = {"tokens": evaluation.tokens(everything)}
    report |= {"seconds_from_text": evaluation.seconds_from_text(), "threads": torch.get_num_threads()}
    pictures = {}
    for split, rows in splits.items():
        figures = {"pictures": len(rows), "judge_on_real": evaluation.real(rows)}
        figures["caption_exact"] = evaluation.caption(rows)
        figures["style_question"] = evaluation.style_question(rows)
        figures["reconstruction"], reconstructed = evaluation.reconstruct(rows)
        runs = seeds if split == "held_out" else 1
        drawn = [evaluation.draw_from_text(rows, seed) for seed in range(runs)]
        figures["text_to_image"] = mean_scores([scores for scores, _ in drawn]) | {"prompts": runs * len(rows)}
        restyled = [evaluation.restyle(rows, everything, seed)[0] for seed in range(runs)]
        figures["image_and_text_to_image"] = mean_scores(restyled)
        report[split] = figures
        pictures[split] = (rows, drawn[0][1], reconstructed)
        print(split, json.dumps(figures), flush=True)
    return report, pictures


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}


def main(arguments: list[str] | None = None) -> None:
    from ..command_line.common import check_outputs, load_pipeline

    parser = argparse.ArgumentParser(prog="lavit evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder, or repository (default: the embedded checkpoint)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
    parser.add_argument("--data", required=True, help="image folder with name, style and split columns")
    parser.add_argument("--judge", required=True, help="folder of the judge")
    parser.add_argument("--count", type=int, default=200, help="pictures of the train split (default 200)")
    parser.add_argument("--seeds", type=int, default=3, help="draws for each held-out prompt (default 3)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--sheet", type=Path, help="PNG: prompts, originals, drawings, reconstructions")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    judge = Judge.load(options.judge)
    check_outputs([options.sheet] if options.sheet else [])
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    report, pictures = evaluate(pipe, judge, options.data, options.count, options.seeds)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    if options.sheet:
        samples_sheet(pictures).quantize(256).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
