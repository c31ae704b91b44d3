"""The command `lavit`: draw, caption, ask, tokenize, reconstruct, train, evaluate, convert.

Nothing heavy is imported before arguments are read and files are found, so that `--help` and mistakes answer at once.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


EPILOG = """\
examples:
  lavit generate "red apple" -o apple.png
  lavit generate "in flat style" --style-image apple.png -o flat.png
  lavit caption apple.png
  lavit ask apple.png "which style is this?"
  lavit tokenize apple.png --show kept.png

Pictures are files (first frame of an animation) or http(s) addresses. Every subcommand has its own --help.
Errors are one line on stderr and exit code 2; LAVIT_TRACEBACK=1 shows where they come from.
"""

# subcommand -> (module with main(arguments), help)
DELEGATED = {
    "train": ("modeling_lavit.training.run", "train one stage from its recipe file"),
    "evaluate": ("modeling_lavit.evaluation.report", "score a checkpoint on an image folder"),
    "show": ("modeling_lavit.evaluation.show", "show training curves, codes, kept patches, reconstructions"),
    "convert": (
        "modeling_lavit.conversion.__main__",
        "turn an official checkpoint directory into one that loads",
    ),
}

# options of `lavit tokenize` that go with --dataset
DATASET_OPTIONS = (
    "output",
    "data_files",
    "split",
    "image_column",
    "streaming",
    "batch_size",
    "shard_size",
    "keep_images",
    "ray",
)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """All subcommands; `parse_args(...).run(options)` runs one."""
    parser = Parser(
        prog="lavit",
        description="LaVIT: one model that reads pictures and draws them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run, help: str, description: str, example: str) -> Parser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{description}\n\nexample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="checkpoint folder, or repository on the Hub (default: the embedded checkpoint lavit-emoji)",
        )
        command.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)")
        return command

    command = add(
        "generate",
        generate,
        help="draw pictures from text, or from a picture and text",
        description="Draws pictures from text, or from a picture and text, and prints the names of the files.",
        example='lavit generate "red apple" -o apple.png --n 4 --seed 7',
    )
    command.add_argument("prompt", type=_text, help="what to draw")
    command.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write; with --n 4: NAME-0.png to NAME-3.png"
    )
    command.add_argument(
        "--style-image", metavar="IMG", help='a picture in front of the text, for prompts like "in flat style"'
    )
    command.add_argument("--n", type=positive_number, default=1, help="number of pictures (default: 1)")
    command.add_argument(
        "--seed",
        type=seed_number,
        help="picture i is drawn with seed + i, the same at any --n (default: a new one, which is printed)",
    )
    command.add_argument(
        "--aspect-ratio", metavar="W:H", help="such as 1:1, of those that the checkpoint has (default: its size)"
    )
    _add_decoding_options(command)
    command.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="how closely the language model follows the prompt; 1 is no guidance (default: the checkpoint's)",
    )

    command = add(
        "caption",
        caption,
        help="describe pictures in words",
        description="Describes pictures in words, one line for each.",
        example="lavit caption apple.png cat.png",
    )
    command.add_argument("images", nargs="+", metavar="IMG", help="pictures")

    command = add(
        "ask",
        ask,
        help="answer a question about a picture",
        description='Answers a question about a picture. The model reads "Question: ... Answer:".',
        example='lavit ask apple.png "which style is this?"',
    )
    command.add_argument("image", metavar="IMG", help="a picture")
    command.add_argument("question", type=_text, help="the question")

    command = add(
        "tokenize",
        tokenize,
        help="turn pictures into visual tokens, and show which patches they keep; or a whole data set",
        description="Prints how many patches of each picture are kept, and their codes. With --dataset it computes "
        "those of a whole data set, for training; a job that was cut goes on when it is started again.",
        example="lavit tokenize apple.png --show kept.png\n  lavit tokenize --dataset pictures --output tokens",
    )
    command.add_argument("images", nargs="*", metavar="IMG", help="pictures")
    command.add_argument(
        "--compare-kept-only",
        action="store_true",
        help="print how many codes change if the merger computes kept tokens only (the config's kept_only)",
    )
    command.add_argument("--show", type=Path, metavar="FILE", help="write the one picture with dropped patches faded")
    _add_keep_ratio(command)
    command.add_argument(
        "--dataset",
        metavar="SOURCE",
        help="instead of pictures: a folder, a builder of datasets such as parquet, or a repository on the Hub",
    )
    group = command.add_argument_group("with --dataset")
    group.add_argument("--output", type=Path, metavar="DIR", help="folder for the shards; what is there is kept")
    group.add_argument("--data-files", nargs="+", metavar="FILE", help="files, patterns or addresses of the source")
    group.add_argument("--split", help="of the source (default: train)")
    group.add_argument("--image-column", metavar="NAME", help="default: image, jpg, png or webp")
    group.add_argument("--streaming", action="store_true", default=None, help="read files while tokenizing them")
    group.add_argument("--batch-size", type=positive_number, metavar="N", help="pictures at once (default: 64)")
    group.add_argument("--shard-size", type=positive_number, metavar="N", help="rows for each file (default: 4096)")
    group.add_argument("--keep-images", action="store_true", default=None, help="write the pictures too")
    group.add_argument(
        "--ray",
        type=positive_number,
        metavar="N",
        help="run as a Ray Data job of N workers, where RAY_ADDRESS says or here",
    )

    command = add(
        "reconstruct",
        reconstruct,
        help="turn a picture into visual tokens and back",
        description="Draws a picture from nothing but its own visual tokens: what they keep of it.",
        example="lavit reconstruct apple.png -o again.png",
    )
    command.add_argument("image", metavar="IMG", help="a picture")
    command.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    command.add_argument("--seed", type=seed_number, default=0, help="of the noise (default: 0)")
    _add_keep_ratio(command)
    _add_decoding_options(command)

    add(
        "app",
        app,
        help="open the demo in a browser (needs gradio)",
        description="Serves a demo for the browser: drawing, reading, visual tokens. Needs gradio.",
        example="lavit app --model organisation/checkpoint",
    )
    for name, (_, help) in DELEGATED.items():
        commands.add_parser(name, help=f"{help} (lavit {name} --help)", add_help=False)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # libraries read these when they are imported; they warn about packages that are not needed here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        if arguments and arguments[0] in DELEGATED:
            return importlib.import_module(DELEGATED[arguments[0]][0]).main(arguments[1:]) or 0
        options = build_parser().parse_args(arguments)
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LAVIT_TRACEBACK"):
            raise
        print(f"lavit: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace):
    """`lavit generate`"""
    outputs = [options.output]
    if options.n > 1:
        outputs = [options.output.with_stem(f"{options.output.stem}-{i}") for i in range(options.n)]
    check_outputs(outputs)
    style_image = _load_image(options.style_image) if options.style_image else None
    pipe = load_pipeline(options)
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    images = pipe(
        options.prompt if style_image is None else [style_image, options.prompt],
        num_images_per_prompt=options.n,
        generator=_generators(seed, options.n),
        guidance_scale=options.guidance_scale,
        aspect_ratio=options.aspect_ratio,
        **_decoding(options),
    ).images
    save_pictures(images, outputs, options.enlarge)
    if options.seed is None:
        print(f"drawn with --seed {seed}", file=sys.stderr)


def caption(options: argparse.Namespace):
    """`lavit caption`"""
    from tqdm import tqdm

    images = [_load_image(source) for source in options.images]
    model, processor = load_reader(options)
    progress = tqdm(images, disable=len(images) == 1, desc="captions")
    for source, image in zip(options.images, progress, strict=True):
        inputs = processor(images=image)
        ids = model.generate(**inputs, generation_preset="caption")
        text = _one_line(processor.post_process_caption(ids, input_ids=inputs.input_ids)[0])
        tqdm.write(text if len(images) == 1 else f"{source}: {text}")


def ask(options: argparse.Namespace):
    """`lavit ask`"""
    image = _load_image(options.image)
    model, processor = load_reader(options)
    inputs = processor(images=image, text=f"<image>Question: {options.question} Answer:")
    ids = model.generate(**inputs, generation_preset="answer")
    print(_one_line(processor.post_process_answer(ids, input_ids=inputs.input_ids)[0]))


def tokenize(options: argparse.Namespace):
    """`lavit tokenize`"""
    if bool(options.images) == bool(options.dataset):
        raise ValueError("give pictures, or --dataset and --output, and not both")
    if options.dataset:
        return _tokenize_dataset(options)
    if given := [name for name in DATASET_OPTIONS if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --dataset")
    if options.show and len(options.images) > 1:
        raise ValueError(f"--show takes one picture, got {len(options.images)}")
    check_outputs([options.show] if options.show else [])
    images = [_load_image(source) for source in options.images]
    model, processor = load_reader(options)
    from modeling_lavit.show_lavit import show_kept_patches

    tokenizer = model.model.visual_tokenizer
    if options.compare_kept_only and not tokenizer.config.attention_epsilon:
        raise ValueError("the checkpoint's attention_epsilon is 0: kept tokens alone are exact, nothing can change")
    changed = total = 0
    for source, image in zip(options.images, images, strict=True):
        pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values.to(tokenizer.device)
        if options.compare_kept_only:
            tokenizer.config.kept_only = True
            fast_codes = tokenizer.tokenize(pixel_values, keep_ratio=options.keep_ratio).codes
            tokenizer.config.kept_only = False
        tokens = tokenizer.tokenize(pixel_values, keep_ratio=options.keep_ratio)
        kept, patches = len(tokens.codes), tokens.keep_mask.shape[1]
        prefix = "" if len(images) == 1 else f"{source}: "
        print(f"{prefix}{kept} of {patches} patches kept ({kept / patches:.0%})")
        if options.compare_kept_only:
            different = int((tokens.codes != fast_codes).sum())
            changed, total = changed + different, total + kept
            print(f"{prefix}{different} of {kept} codes change with kept tokens only")
        else:
            print(f"{prefix}codes:", *tokens.codes.tolist())
        if options.show:
            save_pictures([show_kept_patches(image, tokens.keep_mask[0])], [options.show])
    if options.compare_kept_only and len(images) > 1:
        print(f"{changed} of {total} codes ({changed / total:.2%}) change with kept tokens only")


def _tokenize_dataset(options: argparse.Namespace):
    if options.show or options.compare_kept_only:
        raise ValueError("--show and --compare-kept-only go with pictures, not with --dataset")
    if options.output is None:
        raise ValueError("--dataset needs --output, the folder to write to")
    if options.output.is_file():
        raise ValueError(f"{options.output} is a file: give the name of a folder")
    given = {name: value for name in DATASET_OPTIONS if (value := getattr(options, name)) is not None}
    given |= {"model": model_source(options, ("lavit", "lavit_visual_tokenizer")), "keep_ratio": options.keep_ratio}
    if workers := given.pop("ray", None):
        from modeling_lavit.training.tokenize_ray import tokenize_with_ray

        print(tokenize_with_ray(options.dataset, workers=workers, device=options.device, **given))
        return
    from modeling_lavit.training.sources import process_state
    from modeling_lavit.training.tokenize_dataset import tokenize_dataset

    # gives each process its GPU
    process_state()
    device, dtype = _device_and_dtype(options)
    with _loading(given["model"]):
        print(tokenize_dataset(options.dataset, device=device, dtype=dtype, **given))


def reconstruct(options: argparse.Namespace):
    """`lavit reconstruct`"""
    check_outputs([options.output])
    image = _load_image(options.image)
    pipe = load_pipeline(options)
    images = pipe.reconstruct(
        image, keep_ratio=options.keep_ratio, generator=_generators(options.seed, 1), **_decoding(options)
    ).images
    save_pictures(images, [options.output], options.enlarge)


def app(options: argparse.Namespace):
    """`lavit app`"""
    from modeling_lavit.app_lavit import build_app

    build_app(load_pipeline(options)).launch()


def _add_decoding_options(command: Parser):
    command.add_argument("--steps", type=positive_number, help="denoising steps (default: the checkpoint's)")
    command.add_argument(
        "--decoder-guidance-scale",
        type=float,
        metavar="S",
        help="how closely pixels follow the visual tokens; 1 is no guidance (default: the checkpoint's)",
    )
    command.add_argument(
        "--enlarge", type=positive_number, default=1, metavar="K", help="write pictures K times as large (default: 1)"
    )


def _add_keep_ratio(command: Parser):
    command.add_argument(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="keep this share of the patches, the best ones (default: as many as the checkpoint's selector keeps)",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(value: str) -> str:
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


def _generators(seed: int, count: int) -> list:
    import torch

    return [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(count)]


def _decoding(options: argparse.Namespace) -> dict:
    return {"num_inference_steps": options.steps, "decoder_guidance_scale": options.decoder_guidance_scale}


def _load_image(source: str):
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
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type not in model_types:
        raise ValueError(f"{source} is no LaVIT checkpoint: its model type is {model_type!r}")
    return source


def _device_and_dtype(options: argparse.Namespace) -> tuple:
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
def _loading(source: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source} has a weights file that is damaged or truncated: {error}") from error


def load_reader(options: argparse.Namespace) -> tuple:
    """The model and its processor, without what draws pixels."""
    from modeling_lavit import LavitForConditionalGeneration, LavitProcessor

    source, (device, dtype) = model_source(options), _device_and_dtype(options)
    with _loading(source):
        model = LavitForConditionalGeneration.from_pretrained(source, dtype=dtype).to(device).eval()
    return model, LavitProcessor.from_pretrained(source)


def load_pipeline(options: argparse.Namespace):
    from transformers.utils.logging import disable_progress_bar

    from modeling_lavit import LavitPipeline

    # the pipeline's own bar counts its components
    disable_progress_bar()
    source, (device, dtype) = model_source(options), _device_and_dtype(options)
    with _loading(source):
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
            raise ValueError(f"{path} has no ending of a picture format that can be written, such as .png or .jpg")


def save_pictures(images: list, paths: list[Path], factor: int = 1):
    """Writes all pictures or none: under temporary names first. Prints the names."""
    from modeling_lavit.show_lavit import enlarge

    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=".lavit-") as folder:
        for image, path in zip(images, paths, strict=True):
            enlarge(image, factor).save(Path(folder) / path.name)
        for path in paths:
            os.replace(Path(folder) / path.name, path)
            print(path)


if __name__ == "__main__":
    sys.exit(main())
