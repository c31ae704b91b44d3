"""Puts the results of the emoji's stages together to the embedded checkpoint, in half precision.

`python -m modeling_lavit.training.emoji.assemble --language-model DIR --pixel-decoder DIR --output DIR [--default
name=value …]`
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
import yaml

from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.pipeline_lavit import LavitPipeline
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.emoji.samples import tokenize_all
from modeling_lavit.training.results import load_pixel_decoder, write_whole


@torch.no_grad()
def average(language_models: list[Path], shares: list[float], output: Path) -> None:
    """Writes the language model whose weights are the mean of those of several runs (arXiv 2203.05482): what runs on
    other samples have learnt, each keeps in part.

    Args:
        language_models: results of one training, or of runs that went on from one another.
        shares: of each in the mean.

    Raises:
        ValueError: the shares are not one each, or do not add up to 1; the runs have other parameters.
    """
    if len(shares) != len(language_models) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"give one share for each of the {len(language_models)} runs, adding up to 1: got {shares}")
    first, *others = language_models
    model = LavitForConditionalGeneration.from_pretrained(first, dtype=torch.float32)
    own = model.state_dict()
    mean = {key: value.clone() for key, value in own.items()}
    for other, share in zip(others, shares[1:], strict=True):
        state = LavitForConditionalGeneration.from_pretrained(other, dtype=torch.float32).state_dict()
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in mean.items()}:
            raise ValueError(f"{other} has other parameters than {first}: only runs of one training average")
        for key, value in mean.items():
            if value.is_floating_point():  # what is alike in all of them stays as it is, bit by bit
                value += share * (state[key] - own[key])
    model.load_state_dict(mean)
    model.save_pretrained(output)
    LavitProcessor.from_pretrained(first).save_pretrained(output)


def tidy(folder: Path) -> None:
    """Makes float32 the type in which half-precision files are loaded by default: what a CPU computes well. Takes out
    what says where the files were before."""

    def change(values: dict) -> None:
        values.pop("_name_or_path", None)
        for key, value in values.items():
            if key == "dtype" and value == "float16":
                values[key] = "float32"
            elif isinstance(value, dict):
                change(value)

    for path in folder.glob("**/config.json"):
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, nargs="+", required=True, help="of several the mean is taken")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of each language model in the mean")
    parser.add_argument("--scheduler", help="class of diffusers for drawing (default: DDIMScheduler)")
    parser.add_argument("--pixel-decoder", type=Path, required=True)
    parser.add_argument("--draft-images", help="image folder: drawing looks up its images' codes ahead")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--default", nargs="*", default=[], help="e.g. num_inference_steps=10")
    options = parser.parse_args(arguments)
    defaults = {name: yaml.safe_load(value) for name, _, value in (entry.partition("=") for entry in options.default)}
    with TemporaryDirectory() as folder:
        mean, whole = Path(folder) / "mean", Path(folder) / "whole"
        average(options.language_model, options.shares, mean)
        model = LavitForConditionalGeneration.from_pretrained(mean, dtype=torch.float32)
        if options.draft_images:  # in float32, as they will be read
            tokenizer = model.model.visual_tokenizer
            codes = tokenize_all(tokenizer, NamedImages(options.draft_images, tokenizer.config.image_size))
            model.set_draft_codes([views[0] for views in codes])
        decoder = load_pixel_decoder(options.pixel_decoder)
        decoder |= {f"default_{name}": value for name, value in defaults.items()}
        write_whole(model, LavitProcessor.from_pretrained(mean), whole, **decoder)
        pipe = LavitPipeline.from_pretrained(whole, dtype=torch.float16)
        if options.scheduler:
            pipe.scheduler = getattr(diffusers, options.scheduler).from_config(pipe.scheduler.config)
        pipe.save_pretrained(options.output)
    tidy(options.output)
    for name in ("training.json", "losses.png"):  # what the card shows
        if (options.language_model[0] / name).is_file():
            shutil.copyfile(options.language_model[0] / name, options.output / name)


if __name__ == "__main__":
    main()
