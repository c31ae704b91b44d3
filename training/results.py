"""The results of stages as the next ones take them: folders with parts of a checkpoint, and whole checkpoints.

`python -m modeling_lavit.training.results --language-model DIR --pixel-decoder DIR --output DIR` puts the results of
stages 2 and 3 together to a checkpoint that reads and draws.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig

from modeling_lavit.command_line.common import Parser
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration
from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.pipeline_lavit import LavitPipeline
from modeling_lavit.processing import LavitImageProcessor, LavitProcessor
from modeling_lavit.small_decoder_lavit import LavitPatchAutoencoder, LavitUNet2DConditionModel


# The classes of components that a folder may hold, by the name in their config.
UNETS = {cls.__name__: cls for cls in (LavitUNet2DConditionModel, UNet2DConditionModel)}
AUTOENCODERS = {cls.__name__: cls for cls in (LavitPatchAutoencoder, AutoencoderKL)}


def result_of(stage: str, folder: str | Path, name: str) -> Path:
    """The file or folder `name` in the result of an earlier stage.

    Raises:
        OSError: it is not there.
    """
    path = Path(folder) / name
    if not path.exists():
        raise OSError(f"there is no {path}: train the stage {stage} first (lavit train), or name its result")
    return path


def load_visual_tokenizer(model: str | Path, dtype: torch.dtype) -> tuple[LavitVisualTokenizer, LavitImageProcessor]:
    """The visual tokenizer of a result of stage 1 or of a LaVIT checkpoint, or a visual tokenizer itself, and what
    prepares images for it."""
    if (Path(model) / "visual_tokenizer").is_dir():
        model = Path(model) / "visual_tokenizer"
    config = AutoConfig.from_pretrained(model)
    if config.model_type == "lavit":
        tokenizer = LavitVisualTokenizer.from_pretrained(
            model, config=config.visual_config, key_mapping={r"^model\.visual_tokenizer\.": ""}, dtype=dtype
        )
        return tokenizer, LavitImageProcessor.from_pretrained(model)
    size = {"height": config.image_size, "width": config.image_size}
    return LavitVisualTokenizer.from_pretrained(model, dtype=dtype), LavitImageProcessor(size=size)


def load_component(folder: Path, classes: dict[str, type]) -> nn.Module:
    """A component of a diffusers folder, in float32.

    Raises:
        OSError: there is none.
        ValueError: its class is not one of `classes`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"there is no {path}: it must be a result of stage 3, or a folder of Stable Diffusion 1.5 or XL")
    name = json.loads(path.read_text()).get("_class_name")
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}; known here are {sorted(classes)}")
    return classes[name].from_pretrained(folder, dtype=torch.float32)


def load_pixel_decoder(folder: Path) -> dict:
    """Detokenizer, UNet, autoencoder and scheduler of a result of stage 3, in float32.

    Raises:
        OSError: one of them is not there.
    """
    detokenizer = result_of("pixel-decoder", folder, "detokenizer")
    return {
        "detokenizer": LavitDetokenizer.from_pretrained(detokenizer, dtype=torch.float32),
        "unet": load_component(folder / "unet", UNETS),
        "vae": load_component(folder / "vae", AUTOENCODERS),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint, a folder or a repository, draws pixels too."""
    if Path(checkpoint).is_dir():
        return (Path(checkpoint) / "model_index.json").is_file()
    try:
        LavitPipeline.load_config(checkpoint)
    except OSError:
        return False
    return True


def write_whole(
    model: LavitForConditionalGeneration,
    processor: LavitProcessor,
    output: Path,
    base: str | Path | None = None,
    **pixel_decoder,
) -> None:
    """Writes a checkpoint that reads and draws.

    Args:
        model: with its adapters merged.
        base: a whole checkpoint, of which settings and missing parts of the pixel decoder are taken.
        pixel_decoder: `detokenizer`, `unet`, `vae`, `scheduler`, and `default_…` settings of [`LavitPipeline`]; a
            base keeps its own scheduler.

    Raises:
        ValueError: the pixel decoder was trained on other codes than the model's.
    """
    parts = {"model": model, "processor": processor} | pixel_decoder
    if base is None:
        pipe = LavitPipeline(**parts)
    else:
        parts.pop("scheduler", None)
        pipe = LavitPipeline.from_pretrained(base, **parts)
    codebooks = model.model.visual_tokenizer.quantizer.codebook.weight, pipe.detokenizer.codebook.weight
    if not torch.equal(*(codebook.float() for codebook in codebooks)):
        raise ValueError("the pixel decoder was trained on other codes than those of the language model")
    pipe.save_pretrained(output)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m modeling_lavit.training.results", description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", required=True, metavar="DIR", help="result of stage 2")
    parser.add_argument("--pixel-decoder", required=True, metavar="DIR", help="result of stage 3 on the same codes")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    options = parser.parse_args(arguments)
    model = LavitForConditionalGeneration.from_pretrained(options.language_model, dtype=torch.float32)
    processor = LavitProcessor.from_pretrained(options.language_model)
    write_whole(model, processor, options.output, **load_pixel_decoder(Path(options.pixel_decoder)))


if __name__ == "__main__":
    sys.exit(main())
