"""What the subcommands share: arguments, loading, writing images. Nothing heavy is imported before it is used."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_decoding_options(command: Parser):
    command.add_argument("--steps", type=positive_number, help="denoising steps (default: the checkpoint's)")
    command.add_argument(
        "--decoder-guidance-scale",
        type=float,
        metavar="S",
        help="how closely pixels follow the visual tokens; 1 is no guidance (default: the checkpoint's)",
    )
    command.add_argument(
        "--enlarge", type=positive_number, default=1, metavar="K", help="write images K times as large (default: 1)"
    )


def add_keep_ratio(command) -> None:
    command.add_argument(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="keep this share of the patches, the most probable ones (default: what the checkpoint's selector keeps)",
    )


def add_keep_dial(command: Parser):
    """`--keep-ratio`, `--keep` and `--target-quality`, one of which may be given."""
    dials = command.add_mutually_exclusive_group()
    add_keep_ratio(dials)
    dials.add_argument(
        "--keep",
        type=keep_number,
        metavar="K",
        help="keep the most probable patches: a share (0.3), a number (40), or threshold=0.7, a probability",
    )
    dials.add_argument(
        "--target-quality",
        type=float,
        metavar="Q",
        help="keep as few of the most probable patches as are decoded to features of this cosine with the image's own",
    )


def keep_number(value: str) -> float | int | str:
    """A number of patches, a share of them, or a threshold as it is written."""
    if value.startswith("threshold="):
        return value
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no share, number or threshold=0.7") from None


def keep_options(options: argparse.Namespace) -> dict:
    """Those of [`add_keep_dial`] for `tokenize` and `reconstruct`."""
    return {name: getattr(options, name) for name in ("keep_ratio", "keep", "target_quality")}


def one_line(text: str) -> str:
    return " ".join(text.split())


def non_empty_text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return value


def positive_number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no positive whole number")
    return int(value)


def seed_number(value: str) -> int:
    if not value.isdecimal() or int(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number from 0 to 2**63 - 1")
    return int(value)


def generators(seed: int, count: int) -> list:
    import torch

    return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]


def decoding_options(options: argparse.Namespace) -> dict:
    return {"num_inference_steps": options.steps, "decoder_guidance_scale": options.decoder_guidance_scale}


def read_image(source: str):
    """The image of a file, an http(s) address, or stdin (`-`)."""
    if source == "-":
        content = sys.stdin.buffer.read()
        if not content:
            raise ValueError("stdin has no image: it is empty")
        from modeling_lavit.processing import load_image

        return load_image(content)
    is_address = source.startswith(("http://", "https://"))
    if not is_address and not Path(source).is_file():
        raise ValueError(f"there is no image file at {source}")
    from modeling_lavit.processing import load_image

    return load_image(source)


def model_source(options: argparse.Namespace, model_types: tuple[str, ...] = ("lavit",)) -> str:
    """The checkpoint to load; refuses folders that are none of these types."""
    from modeling_lavit.checkpoints import LAVIT_EMOJI

    source = options.model or str(LAVIT_EMOJI)
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; a checkpoint is a folder, or a repository on the Hub")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no LaVIT checkpoint: it has no config.json")
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ValueError(f"there is no checkpoint folder {source}, nor is that the name of a repository on the Hub")
    from modeling_lavit.loading_lavit import read_config

    model_type = read_config(source).model_type
    if model_type not in model_types:
        raise ValueError(f"{source} is no LaVIT checkpoint: its model type is {model_type!r}")
    return source


def device_and_dtype(options: argparse.Namespace) -> tuple:
    """Half precision on an accelerator; on the CPU single, which is faster there whatever the files hold."""
    import torch

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device} cannot be used here: {error}") from error
    if device.type == "cpu":
        return device, torch.float32
    return device, torch.bfloat16


@contextmanager
def loading(source: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source} has a weights file that is damaged or truncated: {error}") from error


def load_reader(options: argparse.Namespace) -> tuple:
    """The model and its processor, without what draws pixels."""
    from modeling_lavit import LavitForConditionalGeneration, LavitProcessor

    source, (device, dtype) = model_source(options), device_and_dtype(options)
    with loading(source):
        model = LavitForConditionalGeneration.from_pretrained(source, dtype=dtype).to(device).eval()
    return model, LavitProcessor.from_pretrained(source)


def load_detokenizer(options: argparse.Namespace, model):
    """What decodes the checkpoint's visual tokens, beside its model."""
    from modeling_lavit import LavitDetokenizer

    source = model_source(options)
    with loading(source):
        detokenizer = LavitDetokenizer.from_pretrained(source, subfolder="detokenizer", dtype=model.dtype)
    return detokenizer.to(model.device).eval()


def load_pipeline(options: argparse.Namespace):
    from transformers.utils.logging import disable_progress_bar

    from modeling_lavit import LavitPipeline

    # the pipeline's own bar counts its components
    disable_progress_bar()
    source, (device, dtype) = model_source(options), device_and_dtype(options)
    with loading(source):
        return LavitPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True).to(device)


def check_outputs(paths: list[Path]):
    """Refuses files that cannot be written, before any work is done."""
    from PIL import Image

    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"{path} has no ending of an image format that can be written, such as .png or .jpg")


def save_images(images: list, paths: list[Path], factor: int = 1):
    """Writes all images or none: under temporary names first. Prints the names."""
    from modeling_lavit.show_lavit import enlarge

    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=".lavit-") as folder:
        for image, path in zip(images, paths, strict=True):
            enlarge(image, factor).save(Path(folder) / path.name)
        for path in paths:
            os.replace(Path(folder) / path.name, path)
            print(path, flush=True)
