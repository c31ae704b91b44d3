"""The paper's ablations on the emoji (Table 3, and the merger's design, section 3.1), small and twice each:

`python -m modeling_lavit.training.emoji.ablations --classifier tests/fixtures/classifier --output ablations.json`

Every variant trains a tokenizer of its own for the same steps, and a small language model that only draws, on its
codes. What is compared are images that the tokenizer's decoder and the linear pixel head of stage 0 make: they are
blurred, but need no trained UNet. The classifier, which takes part in no loss, scores them. Finished runs are kept: a
second call trains what is missing. Costs are CPU seconds of one thread.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from modeling_lavit.evaluation.emoji.classifier import Classifier
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.augmentation import normalize_images
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.pretrain_encoder import load_pretrained
from modeling_lavit.training.emoji.text import NAME_AND_STYLE
from modeling_lavit.training.regression import RegressionHead, draw_by_regression


# What suits a short run on a CPU better than the recipe's own settings.
SMALL_TOKENIZER = [
    "training_arguments.per_device_train_batch_size=32",
    "training_arguments.learning_rate=1.2e-3",
    "objective.weights.name=0.1",
    "objective.weights.style=0.2",
    "augmentation.tint=0.08",
]
GUIDANCE_SCALE, TOP_K = 3.0, 50


@dataclass(frozen=True)
class Variant:
    """One row: what it changes in the recipes of tokenizer and language model."""

    title: str
    tokenizer: tuple[str, ...] = ()
    language_model: tuple[str, ...] = ()


VARIANTS = {
    "base": Variant("dynamic, causal, merged; classification"),
    "regression": Variant("regression instead of classification", (), ("objective.visual_loss=regression",)),
    "fixed": Variant("every patch kept, fixed length", ("model.selection=all",)),
    "bidirectional": Variant("bidirectional merger", ("model.merger_is_causal=false",)),
    "dropped": Variant("dropped patches not merged", ("model.merge_dropped=false",)),
}


def folders(runs: Path, name: str, seed: int) -> tuple[Path, Path]:
    """Where the tokenizer and the language model of a variant are; variants with the same tokenizer share it."""
    tokenizer = "base" if not VARIANTS[name].tokenizer else name
    return runs / f"tokenizer_{tokenizer}_{seed}", runs / f"language_model_{name}_{seed}"


def train(recipe: str, output: Path, overrides: list[str]) -> None:
    """Trains one stage in a process of its own, unless it is done, and notes its CPU seconds."""
    if (output / "cost.json").is_file():
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", f"{__package__}.train", recipe, f"training_arguments.output_dir={output}", *overrides],
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (output / "cost.json").write_text(json.dumps({"cpu_seconds": round(seconds, 1)}))


def train_variant(name: str, seed: int, options: argparse.Namespace) -> None:
    """Trains the tokenizer and the language model of a variant."""
    tokenizer, language_model = folders(options.runs, name, seed)
    shared = [f"data.path={options.data}", "data.repeat={}", "data.more=null", "data.validation=null"]
    shared += [f"training_arguments.seed={seed}", "training_arguments.report_to=none"]
    train(
        "tokenizer",
        tokenizer,
        [
            *shared,
            f"encoder={options.encoder}",
            f"model.codebook_size={options.codebook_size}",
            f"detokenizer.codebook_size={options.codebook_size}",
            f"training_arguments.max_steps={options.tokenizer_steps}",
            *SMALL_TOKENIZER,
            *VARIANTS[name].tokenizer,
        ],
    )
    train(
        "language_model",
        language_model,
        [
            *shared,
            "start=null",
            f"tokenizer={tokenizer / 'final'}",
            "text_model.hidden_size=192",
            "text_model.intermediate_size=512",
            "text_model.num_hidden_layers=4",
            "text_model.num_attention_heads=6",
            "text_model.num_key_value_heads=6",
            "mixture={caption: 0, style_question: 0, name_question: 0, draw: 1, restyle: 0}",
            "mixup.number=0",
            f"training_arguments.max_steps={options.language_steps}",
            *VARIANTS[name].language_model,
        ],
    )


@torch.no_grad()
def linear_images(
    vectors: torch.Tensor, mask: torch.Tensor, detokenizer: LavitDetokenizer, heads, patch_size: int
) -> torch.Tensor:
    """Padded code vectors (B, n, D) and their mask (B, n) to images (B, 3, S, S) in [0, 1], by the linear pixel head
    of stage 0."""
    pixels = heads(detokenizer.decode(vectors, mask))[2]
    side = int(pixels.shape[1] ** 0.5)
    maps = pixels.transpose(1, 2).unflatten(2, (side, side))
    return (torch.nn.functional.pixel_shuffle(maps, patch_size) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def evaluate_variant(name: str, seed: int, options: argparse.Namespace, classifier: Classifier) -> dict[str, float]:
    """The figures of one run of a variant."""
    tokenizer_run, language_run = folders(options.runs, name, seed)
    tokenizer = LavitVisualTokenizer.from_pretrained(tokenizer_run / "final" / "visual_tokenizer")
    detokenizer = LavitDetokenizer.from_pretrained(tokenizer_run / "final" / "detokenizer")
    model = LavitForConditionalGeneration.from_pretrained(language_run / "final").eval()
    processor = LavitProcessor.from_pretrained(language_run / "final")
    head = None
    if (language_run / "final" / RegressionHead.file_name).is_file():
        head = RegressionHead.load(language_run / "final")
    patch_size = tokenizer.config.patch_size
    figures = {
        "tokenizer_seconds": json.loads((tokenizer_run / "cost.json").read_text())["cpu_seconds"],
        "language_seconds": json.loads((language_run / "cost.json").read_text())["cpu_seconds"],
    }
    for split in ("train", "held_out"):
        data = NamedImages(options.data, tokenizer.config.image_size, (split,))
        heads, _ = load_pretrained(options.encoder, tokenizer, data.styles)
        heads.eval()
        rows = torch.randperm(len(data.name), generator=torch.Generator().manual_seed(0))[: options.count]
        names, styles = [data.names[i] for i in data.name[rows]], [data.styles[i] for i in data.style[rows]]
        images = data.images[rows].float() / 255
        tokens = tokenizer.tokenize(normalize_images(images))
        shown = linear_images(*detokenizer.pad(tokens.codes, tokens.lengths), detokenizer, heads, patch_size)
        figures[f"{split}_tokens"] = float(tokens.lengths.float().mean())
        figures[f"{split}_psnr"] = float(-10 * (shown - images).square().mean().log10())
        figures[f"{split}_top5"] = classifier.score(shown, names)["name_top5"]

        drawn = []
        for start in range(0, len(rows), 25):
            part = slice(start, start + 25)
            prompts = [NAME_AND_STYLE.format(name=n, style=s) for n, s in zip(names[part], styles[part], strict=True)]
            if head is not None:
                drawn += draw_by_regression(model, head, processor, prompts, GUIDANCE_SCALE)
                continue
            inputs = processor(text=prompts, generation_mode="image", return_tensors="pt", padding=True)
            ids = model.generate(
                **inputs,
                generation_mode="image",
                guidance_scale=GUIDANCE_SCALE,
                top_k=TOP_K,
                temperature=1.0,
                max_image_tokens=tokenizer.config.num_patches,
                min_image_tokens=1,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts))],
            )
            drawn += processor.post_process_multimodal_output(ids, generation_mode="image")
        lengths = torch.tensor([len(codes) for codes in drawn])
        shown = linear_images(*detokenizer.pad(torch.cat(drawn), lengths), detokenizer, heads, patch_size)
        figures[f"{split}_drawn_top5"] = classifier.score(shown, names)["name_top5"]
        figures[f"{split}_drawn_tokens"] = float(lengths.float().mean())
    return {key: round(value, 4) for key, value in figures.items()}


COLUMNS = (
    ("tokens an image", "{train_tokens:.0f}"),
    ("tokenizer, CPU s", "{tokenizer_seconds:.0f}"),
    ("language model, CPU s", "{language_seconds:.0f}"),
    ("reconstruction, PSNR", "{train_psnr:.1f} / {held_out_psnr:.1f}"),
    ("reconstruction, top-5", "{train_top5:.2f} / {held_out_top5:.2f}"),
    ("drawing from text, top-5", "{train_drawn_top5:.2f} / {held_out_drawn_top5:.2f}"),
    ("tokens drawn", "{train_drawn_tokens:.0f}"),
)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: one row a variant, the mean over seeds, and each seed's drawing score behind it."""
    lines = [
        "| variant | " + " | ".join(title for title, _ in COLUMNS) + " | seeds: drawing, seen |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, runs in results.items():
        average = {key: mean(run[key] for run in runs.values()) for key in next(iter(runs.values()))}
        cells = [form.format(**average) for _, form in COLUMNS]
        seeds = ", ".join(f"{run['train_drawn_top5']:.2f}" for run in runs.values())
        lines.append(f"| {VARIANTS[name].title} | " + " | ".join(cells) + f" | {seeds} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/emoji", help="image folder of the emoji")
    parser.add_argument("--encoder", default="runs/encoder/final", help="result of stage 0")
    parser.add_argument("--classifier", default="runs/classifier/final")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where the runs are, or will be")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--tokenizer-steps", type=int, default=450)
    parser.add_argument("--language-steps", type=int, default=350)
    parser.add_argument("--count", type=int, default=150, help="images and prompts of each split, at most")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations/results.json"))
    options = parser.parse_args(arguments)
    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    classifier = Classifier.load(options.classifier)
    for seed in options.seeds:
        for name in options.variants:
            train_variant(name, seed, options)
            if str(seed) not in results.setdefault(name, {}):
                results[name][str(seed)] = evaluate_variant(name, seed, options, classifier)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
