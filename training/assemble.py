"""Puts the stages' results together into one checkpoint folder, in half precision.

`python -m modeling_lavit.training.assemble --language-model DIR --pixel-decoder DIR --output DIR [--default
name=value …]`
"""

import argparse
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel

from ..autoencoder_lavit import LavitPatchAutoencoder
from ..modeling_lavit import LavitForConditionalGeneration
from ..modeling_lavit_detokenizer import LavitDetokenizer
from ..pipeline_lavit import LavitPipeline
from ..processing import LavitProcessor


def assemble(language_model: Path, pixel_decoder: Path, dtype: torch.dtype, defaults: dict) -> LavitPipeline:
    """The pipeline made of both stages' results; `defaults` are the pipeline's `default_…` settings."""
    model = LavitForConditionalGeneration.from_pretrained(language_model, dtype=dtype)
    detokenizer = LavitDetokenizer.from_pretrained(pixel_decoder / "detokenizer", dtype=dtype)
    codebooks = model.model.visual_tokenizer.quantizer.codebook.weight, detokenizer.codebook.weight
    if not torch.equal(*codebooks):
        raise ValueError(f"{language_model} and {pixel_decoder} were trained with different codebooks")
    return LavitPipeline(
        processor=LavitProcessor.from_pretrained(language_model),
        model=model,
        detokenizer=detokenizer,
        unet=UNet2DConditionModel.from_pretrained(pixel_decoder / "unet", torch_dtype=dtype),
        vae=LavitPatchAutoencoder.from_pretrained(pixel_decoder / "vae", torch_dtype=dtype),
        scheduler=DDIMScheduler.from_pretrained(pixel_decoder / "scheduler"),
        **{f"default_{name}": value for name, value in defaults.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument("--pixel-decoder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--default", nargs="*", default=[], help="e.g. num_inference_steps=10")
    options = parser.parse_args()
    defaults = {name: yaml.safe_load(value) for name, _, value in (entry.partition("=") for entry in options.default)}
    assemble(options.language_model, options.pixel_decoder, torch.float16, defaults).save_pretrained(options.output)


if __name__ == "__main__":
    main()
