"""Scores a checkpoint on an image folder with names and styles: reading, reconstruction, drawing, tokens, speed.

`lavit evaluate emoji --model DIR --data data/emoji --classifier tests/fixtures/classifier [--sheet sheet.png]`

Pixels are scored by an independent [`Classifier`]; its score on the real images stands beside them.
"""

import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image

from modeling_lavit.command_line.common import Parser, check_outputs, load_pipeline
from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.evaluation.sheets import samples_sheet


class ImageRows:
    """The rows of one split: images as PIL, names, styles, file sizes in bytes."""

    def __init__(self, folder: str, split: str, count: int | None = None, seed: int = 0):
        rows = load_dataset(
            "imagefolder", data_files={"train": f"{folder}/**"}, split="train"
        )  # no split by file names
        if missing := [column for column in ("name", "style", "split") if column not in rows.column_names]:
            raise ValueError(
                f"{folder} has no column {missing[0]!r} in its metadata.jsonl; it has {rows.column_names}"
            )
        chosen = [i for i, value in enumerate(rows["split"]) if value == split]
        if not chosen:
            raise ValueError(f"{folder} has no image of the split {split!r}")
        if count is not None and count < len(chosen):
            chosen = sorted(np.random.default_rng(seed).choice(chosen, count, replace=False).tolist())
        rows = rows.select(chosen)
        self.images = [image.convert("RGB") for image in rows["image"]]
        self.names, self.styles = list(rows["name"]), list(rows["style"])

    def __len__(self) -> int:
        return len(self.images)

    def of_names(self, names: set[str]) -> "ImageRows":
        """Those whose name is one of `names`."""
        kept = copy(self)
        chosen = [i for i, name in enumerate(self.names) if name in names]
        kept.images, kept.names, kept.styles = (
            [values[i] for i in chosen] for values in (self.images, self.names, self.styles)
        )
        return kept


def png_size(image: Image.Image) -> int:
    """Bytes of an image as an optimised PNG: a measure of how busy it is."""
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

    def __init__(self, pipe, classifier: Classifier, batch_size: int = 32):
        self.pipe, self.classifier, self.batch_size = pipe, classifier, batch_size

    def batches(self, count: int):
        return (slice(start, start + self.batch_size) for start in range(0, count, self.batch_size))

    def read(self, rows: ImageRows, text: str, preset: str) -> list[str]:
        """The model's text for each image."""
        processor, model, answers = self.pipe.processor, self.pipe.model, []
        for batch in self.batches(len(rows)):
            images = rows.images[batch]
            inputs = processor(images=images, text=[text] * len(images), return_tensors="pt").to(model.device)
            ids = model.generate(**inputs, generation_preset=preset)
            answers += processor.post_process_answer(ids, input_ids=inputs["input_ids"])
        return answers

    def caption(self, rows: ImageRows) -> float:
        """Share of captions that are the name, word for word."""
        return float(np.mean([a == b for a, b in zip(self.read(rows, "<image>", "caption"), rows.names, strict=True)]))

    def style_question(self, rows: ImageRows) -> float:
        """Share of right answers to "which style is this?"."""
        answers = self.read(rows, "<image>Question: which style is this? Answer:", "answer")
        return float(np.mean([a == b for a, b in zip(answers, rows.styles, strict=True)]))

    def real(self, rows: ImageRows) -> dict[str, float]:
        """The classifier's scores of the real images: the ceiling."""
        return self.classifier.score(to_tensor(rows.images, self.classifier.image_size), rows.names, rows.styles)

    def reconstruct(self, rows: ImageRows, seed: int = 0) -> tuple[dict[str, float], list[Image.Image]]:
        """The classifier's scores of reconstructions, with their PSNR in dB."""
        images = []
        for batch in self.batches(len(rows)):
            count = len(rows.images[batch])
            images += self.pipe.reconstruct(rows.images[batch], generator=generators(seed, count)).images
        drawn, real = (to_tensor(shown, self.classifier.image_size) for shown in (images, rows.images))
        psnr = -10 * (drawn - real).square().mean((1, 2, 3)).log10()
        return self.classifier.score(drawn, rows.names, rows.styles) | {"psnr": float(psnr.mean())}, images

    def draw(self, prompts: list, names: list[str], styles: list[str], seed: int = 0):
        """The classifier's scores of what is drawn from prompts, and the images."""
        images = []
        for batch in self.batches(len(prompts)):
            count = len(prompts[batch])
            images += self.pipe(prompts[batch], generator=generators(seed, count)).images
        return self.classifier.score(to_tensor(images, self.classifier.image_size), names, styles), images

    def draw_from_text(self, rows: ImageRows, seed: int = 0):
        """ "NAME in STYLE style", one image a row."""
        prompts = [f"{name} in {style} style" for name, style in zip(rows.names, rows.styles, strict=True)]
        return self.draw(prompts, rows.names, rows.styles, seed)

    def restyle(self, rows: ImageRows, sources: ImageRows, seed: int = 0):
        """[image of the same name in another style, "in STYLE style"], one image a row that has such a source."""
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
    def tokens(self, rows: ImageRows) -> dict[str, float]:
        """Codebook use, keep rate, distinct codes per image, and how the count follows the PNG's size."""
        tokenizer = self.pipe.model.model.visual_tokenizer
        codes, lengths = [], []
        for batch in self.batches(len(rows)):
            pixel_values = self.pipe.processor.image_processor(rows.images[batch], return_tensors="pt")["pixel_values"]
            tokens = tokenizer.tokenize(pixel_values.to(tokenizer.device))
            codes += [row.cpu() for row in tokens.split()]
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
        """Median seconds for one image from text, after one to warm up."""
        times = []
        for seed in range(repeats + 1):
            start = time.perf_counter()
            self.pipe(prompt, generator=torch.Generator().manual_seed(seed))
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:]))


def evaluate(
    pipe, classifier: Classifier, data: str, count: int, seeds: int, foreign: str | None = None
) -> tuple[dict, dict]:
    """All figures, and the images of the sheet."""
    evaluation = Evaluation(pipe, classifier)
    everything = ImageRows(data, "train")
    strangers = ImageRows(foreign, "foreign").of_names(set(everything.names)) if foreign else None
    if strangers is not None and not len(strangers):
        raise ValueError(f"no image of the split 'foreign' of {foreign} has a name of those in {data}")
    splits = {"seen": ImageRows(data, "train", count), "held_out": ImageRows(data, "held_out")}
    report: dict = {"tokens": evaluation.tokens(everything)}
    report |= {"seconds_from_text": evaluation.seconds_from_text(), "threads": torch.get_num_threads()}
    drawings = {}
    for split, rows in splits.items():
        figures = {"images": len(rows), "classifier_on_real": evaluation.real(rows)}
        figures["caption_exact"] = evaluation.caption(rows)
        figures["style_question"] = evaluation.style_question(rows)
        figures["reconstruction"], reconstructed = evaluation.reconstruct(rows)
        runs = seeds if split == "held_out" else 1
        drawn = [evaluation.draw_from_text(rows, seed) for seed in range(runs)]
        figures["text_to_image"] = mean_scores([scores for scores, _ in drawn]) | {"prompts": runs * len(rows)}
        restyled = [evaluation.restyle(rows, everything, seed) for seed in range(runs)]
        prompts = sum(len(images) for _, images in restyled)
        figures["image_and_text_to_image"] = mean_scores([scores for scores, _ in restyled]) | {"prompts": prompts}
        report[split] = figures
        drawings[split] = (rows, drawn[0][1], reconstructed)
        print(split, json.dumps(figures), flush=True)
    if strangers is not None:
        report["foreign"] = {"images": len(strangers), "caption_exact": evaluation.caption(strangers)}
    return report, drawings


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="lavit evaluate emoji", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder, or repository (default: the embedded checkpoint)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
    parser.add_argument("--data", required=True, help="image folder with name, style and split columns")
    parser.add_argument("--foreign", help="folder whose split `foreign` has images in a style that was never seen")
    parser.add_argument("--classifier", required=True, help="folder of the classifier")
    parser.add_argument("--count", type=int, default=200, help="images of the train split (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="drawings for each held-out prompt (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument(
        "--sheet", type=Path, help="PNG file for a sheet of prompts, originals, drawings and reconstructions"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    classifier = Classifier.load(options.classifier)
    check_outputs([options.sheet] if options.sheet else [])
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    report, drawings = evaluate(pipe, classifier, options.data, options.count, options.seeds, options.foreign)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        write_whole(options.output, lambda path: path.write_text(text + "\n"))
    if options.sheet:
        sheet = samples_sheet(drawings).quantize(256)
        write_whole(options.sheet, lambda path: sheet.save(path, optimize=True))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Puts a file in place when it is whole."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(partial)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
