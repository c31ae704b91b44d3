"""Swaps the visual tokenizer under stages 2 and 3, which then go on instead of starting from scratch.

`python -m modeling_lavit.training.emoji.swap_tokenizer --tokenizer DIR --language-model DIR --data FOLDER --output DIR
[--pixel-decoder DIR]`

A better encoder gives other features and other codes, which what was trained on the former ones cannot read. Both
tokenizers look at the same images: where both keep a patch, the code of one stands for what the code of the other
stands for. So the language model's embedding and output row of a new code become the mean of those of the old codes
that were seen at its positions, weighted by how often; what reads features (the understanding's projection, the
readout of the detokenizer) is fitted by least squares to give of the new ones what it gave of the old. The results
are `start`s for the two stages, not finished models."""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.training.data.augmentation import normalize_images
from modeling_lavit.training.emoji.images import NamedImages
from modeling_lavit.training.results import result_of
from modeling_lavit.training.train_pixel_decoder import readout


LONGEST = 1.5  # how much means of embeddings, which are shorter than what they are means of, are lengthened at most


class LeastSquares:
    """A linear layer's weights from many inputs and what it should give of them, some at a time."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        size = layer.in_features + 1
        self.inputs = torch.zeros(size, size, dtype=torch.float64)
        self.products = torch.zeros(size, layer.out_features, dtype=torch.float64)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Inputs (M, I) and what is wanted of them, (M, O)."""
        inputs = F.pad(inputs.double(), (0, 1), value=1.0)
        self.inputs += inputs.T @ inputs
        self.products += inputs.T @ outputs.double()

    def solve(self) -> None:
        """Writes the solution into the layer."""
        ridge = 1e-6 * self.inputs.diagonal().mean() * torch.eye(len(self.inputs), dtype=torch.float64)
        solution = torch.linalg.solve(self.inputs + ridge, self.products)
        self.layer.weight.copy_(solution[:-1].T)
        self.layer.bias.copy_(solution[-1])


def batches(images: NamedImages, size: int = 64) -> Iterator[torch.Tensor]:
    """Pixel values (B, 3, S, S) of all images, as often as an epoch has them."""
    for rows in torch.tensor(images.order).split(size):
        yield normalize_images(images.images[rows].float() / 255)


def at_patches(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (M, …) of kept patches, mask (B, N), at their patches, (B, N, …); zero elsewhere."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)


@torch.no_grad()
def swap_in_language_model(
    model: LavitForConditionalGeneration, tokenizer: LavitVisualTokenizer, images: NamedImages
) -> None:
    """Gives the model another tokenizer, whose codes it reads and writes as the corresponding old ones, roughly.

    Raises:
        ValueError: the sizes of the two tokenizers differ, or they keep no patch in common.
    """
    old = model.model.visual_tokenizer
    if {k: v.shape for k, v in old.state_dict().items()} != {k: v.shape for k, v in tokenizer.state_dict().items()}:
        raise ValueError("the tokenizer has other sizes than that of the language model: train a new one on it")
    understanding = model.model.understanding
    counts = torch.zeros(tokenizer.config.codebook_size, tokenizer.config.codebook_size)
    projection = LeastSquares(understanding.projection)
    for pixels in batches(images):
        before, after = old.tokenize(pixels), tokenizer.tokenize(pixels)
        both = before.keep_mask & after.keep_mask
        codes = at_patches(after.keep_mask, after.codes)[both], at_patches(before.keep_mask, before.codes)[both]
        counts.index_put_(codes, torch.ones(len(codes[0])), accumulate=True)
        read, features = old.encode(pixels, merger=understanding.merger), tokenizer.encode(pixels)
        read = at_patches(read.keep_mask, understanding.projection(read.features))
        projection.add(at_patches(features.keep_mask, features.features)[both], read[both])
    if not counts.any():
        raise ValueError("the two tokenizers keep no patch in common: there is nothing to go by")
    projection.solve()
    if understanding.merger is not None:
        understanding.merger.load_state_dict(tokenizer.merger.state_dict())
    seen = counts.any(1)
    codebook = F.normalize(tokenizer.quantizer.codebook.weight, dim=-1)
    nearest = (codebook @ codebook[seen].T).argmax(1)  # of codes that never came, the most similar one that did
    shares = F.normalize(counts[seen][nearest], p=1, dim=1)
    visual = slice(model.config.vocabulary.visual_offset, model.config.vocabulary.visual_offset + len(shares))
    for table in {id(x): x for x in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
        means, lengths = shares @ table[visual], shares @ table[visual].norm(dim=1)
        table[visual] = means * (lengths / means.norm(dim=1)).clamp(max=LONGEST)[:, None]
    old.load_state_dict(tokenizer.state_dict())
    model.set_draft_codes([])
    print(f"codes of the new tokenizer that were seen beside old ones: {int(seen.sum())} of {len(seen)}")


@torch.no_grad()
def swap_in_detokenizer(
    old: tuple[LavitVisualTokenizer, LavitDetokenizer],
    new: tuple[LavitVisualTokenizer, LavitDetokenizer],
    images: NamedImages,
) -> None:
    """Gives a new tokenizer's detokenizer the readout that a UNet knows from the old one's.

    Raises:
        ValueError: the old detokenizer is not of the old tokenizer.
    """
    codebooks = old[0].quantizer.codebook.weight, old[1].codebook.weight
    if not torch.equal(*codebooks):
        raise ValueError("language model and pixel decoder were trained with different codebooks")

    def rebuilt(tokenizer: LavitVisualTokenizer, detokenizer: LavitDetokenizer, pixels: torch.Tensor) -> torch.Tensor:
        tokens = tokenizer.tokenize(pixels)
        return detokenizer.decode(*detokenizer.pad(tokens.codes, tokens.lengths)).flatten(0, 1)

    detokenizer = new[1]
    detokenizer.load_state_dict({key: value.data for key, value in readout(old[1]).items()}, strict=False)
    fits = [LeastSquares(projection) for projection in detokenizer.prompt_projections]
    for pixels in batches(images):
        known, features = rebuilt(*old, pixels), rebuilt(*new, pixels)
        for fit, projection in zip(fits, old[1].prompt_projections, strict=True):
            fit.add(features, projection(known))
    for fit in fits:
        fit.solve()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="result of stage 1 to go on with")
    parser.add_argument("--language-model", type=Path, required=True, help="result of stage 2, or a LaVIT checkpoint")
    parser.add_argument(
        "--pixel-decoder", type=Path, help="result of stage 3 on the same codes, or a LaVIT checkpoint"
    )
    parser.add_argument("--data", required=True, help="image folder with metadata.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="gets language_model and pixel_decoder")
    options = parser.parse_args(arguments)

    def load(kind: type, folder: Path, part: str) -> nn.Module:
        return kind.from_pretrained(result_of("tokenizer", str(folder), part), dtype=torch.float32).eval()

    tokenizer = load(LavitVisualTokenizer, options.tokenizer, "visual_tokenizer")
    images = NamedImages(options.data, tokenizer.config.image_size)
    model = LavitForConditionalGeneration.from_pretrained(options.language_model, dtype=torch.float32).eval()
    if options.pixel_decoder:
        former = model.model.visual_tokenizer, load(LavitDetokenizer, options.pixel_decoder, "detokenizer")
        detokenizer = load(LavitDetokenizer, options.tokenizer, "detokenizer")
        swap_in_detokenizer(former, (tokenizer, detokenizer), images)
        for part in ("unet", "vae", "scheduler"):
            path = result_of("pixel-decoder", str(options.pixel_decoder), part)
            shutil.copytree(path, options.output / "pixel_decoder" / part, dirs_exist_ok=True)
        detokenizer.save_pretrained(options.output / "pixel_decoder" / "detokenizer")
    swap_in_language_model(model, tokenizer, images)  # after which the former tokenizer is gone
    model.save_pretrained(options.output / "language_model")
    LavitProcessor.from_pretrained(options.language_model).save_pretrained(options.output / "language_model")


if __name__ == "__main__":
    main()
