"""`lavit evaluate tokens`: how many visual tokens the images of a folder become, and what they keep of them."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig

from modeling_lavit.command_line.common import load_detokenizer, load_pipeline, load_reader
from modeling_lavit.keeping_lavit import decoded_cosine

from .files import read_json
from .images import to_tensor
from .reading import open_images
from .results import hash_ids, versions, write_results
from .run import choose


class TokenWorker:
    """Tokenizes images; decodes their tokens to features, and to pixels if asked.

    Args:
        model, device: of the checkpoint.
        shares: of the patches to keep, for the rate-quality curve.
        reconstruct: draw every image from its tokens, too.
        seed: of what is drawn.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str | None = None,
        shares: tuple[float, ...] = (),
        reconstruct: bool = False,
        seed: int = 0,
    ):
        options = argparse.Namespace(model=model, device=device)
        self.shares, self.seed, self.pipe = shares, seed, None
        if reconstruct:
            self.pipe = load_pipeline(options)
            self.pipe.set_progress_bar_config(disable=True)
            self.model, self.processor, self.detokenizer = self.pipe.model, self.pipe.processor, self.pipe.detokenizer
        else:
            self.model, self.processor = load_reader(options)
            self.detokenizer = load_detokenizer(options, self.model)
        self.tokenizer = self.model.model.visual_tokenizer

    @torch.no_grad()
    def __call__(self, items: list[dict]) -> list[dict]:
        images, usable, errors = open_images(items)
        rows = [{"error": errors[i]} if i in errors else {} for i in range(len(items))]
        if images:
            for i, row in zip(usable, self.measure(images, [items[i] for i in usable]), strict=True):
                rows[i] = row
        return rows

    def measure(self, images: list[Image.Image], items: list[dict]) -> list[dict]:
        prepared = self.processor.image_processor(images, return_tensors="pt").pixel_values
        prepared = prepared.to(self.tokenizer.device)
        features = self.tokenizer.encode_patches(prepared)
        tokens = self.tokenizer.tokenize(prepared)
        rows = [{"codes": codes.tolist()} for codes in tokens.split()]
        for row, cosine in zip(rows, self.cosines(features, tokens.keep_mask), strict=True):
            row["cosine"] = cosine
        for share in self.shares:
            kept, _ = self.tokenizer.select(features, keep=share)
            for row, length, cosine in zip(rows, kept.sum(1).tolist(), self.cosines(features, kept), strict=True):
                row.setdefault("curve", []).append([length, cosine])
        if self.pipe is not None:
            generators = [torch.Generator().manual_seed((self.seed + item["number"]) % 2**63) for item in items]
            drawn = self.pipe(visual_tokens=tokens, generator=generators).images
            for row, image, other in zip(rows, images, drawn, strict=True):
                row |= compare_pixels(image, other)
        return rows

    def cosines(self, features: torch.Tensor, keep_mask: torch.BoolTensor) -> list[float]:
        return decoded_cosine(self.tokenizer, features, keep_mask, self.detokenizer).tolist()


def compare_pixels(image: Image.Image, drawn: Image.Image) -> dict[str, float]:
    """PSNR in dB, at most 100, and SSIM of a reconstruction, at its own size."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("--reconstruct needs torchmetrics: pip install torchmetrics") from error
    target, other = to_tensor(image, drawn.size)[None], to_tensor(drawn, drawn.size)[None]
    return {
        "psnr": min(100.0, float(peak_signal_noise_ratio(other, target, data_range=1.0))),
        "ssim": float(structural_similarity_index_measure(other, target, data_range=1.0)),
    }


def token_items(images: str | Path) -> list[dict]:
    """One item for each image file in a folder or below it, in the order of their names.

    Raises:
        ValueError: there is none.
        OSError: there is no such folder.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder of images at {folder}")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not paths:
        raise ValueError(f"there is no image in the folder {folder}")
    names = [str(path.relative_to(folder)) for path in paths]
    return [
        {"key": name, "image": str(path), "number": number}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ]


def evaluate_tokens(
    images: str | Path,
    output: str | Path,
    model: str,
    limit: int | None = None,
    seed: int = 0,
    run_model: Callable | None = None,
) -> dict | None:
    """Tokenizes the images of a folder, and says what became of them.

    Args:
        images: the folder.
        output: folder of the evaluation.
        model: the checkpoint that `run_model` uses.
        limit, seed, run_model: see [`evaluate_captions`].

    Raises:
        ValueError, OSError: there are no images, or none can be read.
    """
    items = choose(token_items(images), limit, seed)
    settings = {"images": str(images), "limit": limit, "seed": seed}
    rows = run_model(output, settings | {"samples": hash_ids(item["key"] for item in items)}, items)
    if rows is None:
        return None
    config = AutoConfig.from_pretrained(model).visual_config
    settings = read_json(Path(output) / "settings.json")
    return summarize_tokens(Path(output), rows, settings, config.num_patches, config.codebook_size)


def summarize_tokens(output: Path, rows: list[dict], settings: dict, num_patches: int, codebook_size: int) -> dict:
    """Writes results.json, results.md, and the rate-quality curve as rate_quality.png if there is one.

    Raises:
        ValueError: no image could be read.
    """
    read = [row for row in rows if "error" not in row]
    if not read:
        raise ValueError(f"no image can be read; the first: {rows[0]['error']}")
    lengths = torch.tensor([len(row["codes"]) for row in read], dtype=torch.float64)
    counts = torch.bincount(torch.tensor([code for row in read for code in row["codes"]]), minlength=codebook_size)
    share = counts.double() / counts.sum()
    perplexity = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
    results = {
        "task": "tokens",
        "dataset": "tokens",
        "metric": "mean number of visual tokens",
        "score": float(lengths.mean()),
        "mean_length": float(lengths.mean()),
        "min_length": int(lengths.min()),
        "max_length": int(lengths.max()),
        "keep_rate": float(lengths.mean()) / num_patches,
        "codes_used": int((counts > 0).sum()),
        "codes_used_share": float((counts > 0).double().mean()),
        "perplexity": perplexity,
        "feature_cosine": _mean(read, "cosine"),
    }
    if "psnr" in read[0]:
        results |= {"psnr": _mean(read, "psnr"), "ssim": _mean(read, "ssim")}
    if "curve" in read[0]:
        points = torch.tensor([row["curve"] for row in read], dtype=torch.float64).mean(0)
        names = ("share", "mean_length", "feature_cosine")
        results["curve"] = [
            dict(zip(names, (share, *point), strict=True))
            for share, point in zip(settings["shares"], points.tolist(), strict=True)
        ]
        draw_curve(results, output / "rate_quality.png")
    results |= {
        "protocol": "feature cosine: mean over patches, encoder against detokenizer; PSNR and SSIM: torchmetrics",
        "complete": len(read) == len(rows) and settings["limit"] is None,
        "settings": settings,
        "versions": versions("torch", "transformers", "diffusers", "torchmetrics"),
        "counts": {"images": len(rows), "read": len(read)},
        "ids": hash_ids(row["key"] for row in read),
    }
    notes = [f"{name}: {value:.4g}" for name, value in results.items() if isinstance(value, float)]
    write_results(output, results, notes)
    return results


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def draw_curve(results: dict, path: Path) -> None:
    """Cosine over the mean number of tokens at each share, and where the selector itself stands, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    curve = results["curve"]
    axes.plot([point["mean_length"] for point in curve], [point["feature_cosine"] for point in curve], marker="o")
    axes.plot([results["mean_length"]], [results["feature_cosine"]], marker="*", markersize=14, linestyle="none")
    for point in curve:
        axes.annotate(
            f"{point['share']:.0%}", (point["mean_length"], point["feature_cosine"]), (4, -10), "data", "offset points"
        )
    axes.legend(["share kept, best patches first", "the checkpoint's selector"])
    axes.set(xlabel="visual tokens an image", ylabel="cosine of decoded features")
    figure.savefig(path)
