"""`lavit tokenize`, of images and of whole data sets."""

import argparse
from pathlib import Path

from .common import (
    add_keep_dial,
    check_outputs,
    device_and_dtype,
    keep_options,
    load_detokenizer,
    load_reader,
    loading,
    model_source,
    positive_number,
    read_image,
    save_images,
)


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
    "allow_local_paths",
    "ray",
)


def add_commands(add) -> None:
    """Adds the subcommands of this file; `add` is that of [`build_parser`]."""
    command = add(
        "tokenize",
        tokenize,
        help="turn images into visual tokens, and show which patches they keep; or a whole data set",
        description="Prints how many patches of each image are kept, and their codes. With --dataset it computes "
        "the codes of a whole data set, for training; an interrupted job resumes when it is started again.",
        example="lavit tokenize apple.png --show kept.png\n  lavit tokenize --dataset images --output tokens",
    )
    command.add_argument("images", nargs="*", metavar="IMG", help="images")
    command.add_argument(
        "--compare-kept-only",
        action="store_true",
        help="print how many codes change if the merger computes kept tokens only (the config's kept_only)",
    )
    command.add_argument(
        "--show", type=Path, metavar="FILE", help="write the image (a single one) with dropped patches faded"
    )
    add_keep_dial(command)
    command.add_argument(
        "--dataset",
        metavar="SOURCE",
        help="instead of images: a folder, a builder of datasets such as parquet, or a repository on the Hub",
    )
    group = command.add_argument_group("with --dataset")
    group.add_argument("--output", type=Path, metavar="DIR", help="folder for the shards; finished ones are kept")
    group.add_argument("--data-files", nargs="+", metavar="FILE", help="files, patterns or addresses of the source")
    group.add_argument("--split", help="of the source (default: train)")
    group.add_argument("--image-column", metavar="NAME", help="default: image, jpg, jpeg, png or webp")
    group.add_argument("--streaming", action="store_true", default=None, help="read files while tokenizing them")
    group.add_argument("--batch-size", type=positive_number, metavar="N", help="images at once (default: 64)")
    group.add_argument("--shard-size", type=positive_number, metavar="N", help="rows for each file (default: 4096)")
    group.add_argument("--keep-images", action="store_true", default=None, help="write the images too")
    group.add_argument(
        "--allow-local-paths",
        action="store_true",
        default=None,
        help="also read images that rows name by paths outside the folder of the data",
    )
    group.add_argument(
        "--ray",
        type=positive_number,
        metavar="N",
        help="run as a Ray Data job of N workers, where RAY_ADDRESS says or here",
    )


def tokenize(options: argparse.Namespace):
    """`lavit tokenize`"""
    if bool(options.images) == bool(options.dataset):
        raise ValueError("give images, or --dataset and --output, and not both")
    if options.dataset:
        return _tokenize_dataset(options)
    if given := [name for name in DATASET_OPTIONS if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --dataset")
    if options.show and len(options.images) > 1:
        raise ValueError(f"--show takes one image, got {len(options.images)}")
    check_outputs([options.show] if options.show else [])
    images = [read_image(source) for source in options.images]
    model, processor = load_reader(options)
    from modeling_lavit.conversion.calibrate import changed_codes
    from modeling_lavit.show_lavit import show_kept_patches

    tokenizer = model.model.visual_tokenizer
    dial = keep_options(options)
    if options.target_quality is not None:
        dial["detokenizer"] = load_detokenizer(options, model)
    changed = total = 0
    for source, image in zip(options.images, images, strict=True):
        pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values.to(tokenizer.device)
        if options.compare_kept_only:
            different, _ = changed_codes(tokenizer, pixel_values, **dial)
        tokens = tokenizer.tokenize(pixel_values, **dial)
        kept, patches = len(tokens.codes), tokens.keep_mask.shape[1]
        prefix = "" if len(images) == 1 else f"{source}: "
        print(f"{prefix}{kept} of {patches} patches kept ({kept / patches:.0%})")
        if options.compare_kept_only:
            changed, total = changed + different, total + kept
            print(f"{prefix}{different} of {kept} codes change with kept tokens only")
        else:
            print(f"{prefix}codes:", *tokens.codes.tolist())
        if options.show:
            save_images([show_kept_patches(image, tokens.keep_mask[0])], [options.show])
    if options.compare_kept_only and len(images) > 1:
        print(f"{changed} of {total} codes ({changed / total:.2%}) change with kept tokens only")


def _tokenize_dataset(options: argparse.Namespace):
    if options.show or options.compare_kept_only:
        raise ValueError("--show and --compare-kept-only go with images, not with --dataset")
    if options.keep is not None or options.target_quality is not None:
        raise ValueError("--keep and --target-quality go with images; --dataset takes --keep-ratio")
    if options.output is None:
        raise ValueError("--dataset needs --output, the folder to write to")
    if options.output.is_file():
        raise ValueError(f"{options.output} is a file: give the name of a folder")
    given = {name: value for name in DATASET_OPTIONS if (value := getattr(options, name)) is not None}
    if options.model and (Path(options.model) / "visual_tokenizer" / "config.json").is_file():  # a result of stage 1
        options.model = str(Path(options.model) / "visual_tokenizer")
    given |= {"model": model_source(options, ("lavit", "lavit_visual_tokenizer")), "keep_ratio": options.keep_ratio}
    if workers := given.pop("ray", None):
        from modeling_lavit.training.data.tokenize_ray import tokenize_with_ray

        print(tokenize_with_ray(options.dataset, workers=workers, device=options.device, **given))
        return
    from modeling_lavit.training.data.tokenize_dataset import tokenize_dataset
    from modeling_lavit.training.distributed import process_state

    # gives each process its GPU
    process_state()
    device, dtype = device_and_dtype(options)
    with loading(given["model"]):
        print(tokenize_dataset(options.dataset, device=device, dtype=dtype, **given))
