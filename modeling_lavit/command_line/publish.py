"""`lavit push`, `lavit verify`, `lavit lift` and `lavit put-back`: what is done with whole folders."""

import argparse
from pathlib import Path

from .common import model_source, one_line, read_image


def add_commands(add):
    """The subcommands of this file; `add` as in [`build_parser`]."""
    command = add(
        "push",
        push,
        "upload a saved folder as a repository on the Hub",
        "Uploads a folder with its model card. An interrupted upload resumes when it is called again.",
        "lavit push runs/mine me/mine --private",
        loads_model=False,
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="what save_pretrained or a training run wrote")
    command.add_argument("repo", metavar="REPO", help="repository, organisation/name; created if it does not exist")
    command.add_argument("--dry-run", action="store_true", help="only list the files, their sizes and what is new")
    command.add_argument("--private", action="store_true", default=None, help="create it as a private repository")
    command.add_argument("--revision", metavar="BRANCH", help="created if it does not exist (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--message", metavar="TEXT", help="commit message (default: Upload LaVIT)")
    command.add_argument("--tags", nargs="+", metavar="TAG", help="more tags of the model card")
    command.add_argument(
        "--base-model", metavar="REPO", help="what an adapter was trained on, written into its configuration"
    )
    command.add_argument("--token", help="of the Hub (default: that of hf auth login)")
    command = add(
        "verify",
        verify,
        "say whether the code in a folder or repository is this package's own",
        "Reads the code that trust_remote_code=True would run, without running it. Exit code 1 if it is not our own.",
        "lavit verify me/mine",
        loads_model=False,
    )
    command.add_argument("source", metavar="FOLDER_OR_REPO", help="saved folder, or repository on the Hub")
    command.add_argument("--revision", metavar="BRANCH_OR_COMMIT", help="of the repository (default: main)")
    command.add_argument("--token", help="of the Hub (default: that of hf auth login)")
    command = add(
        "lift",
        lift,
        "write the language model of a checkpoint as a stock one",
        "Writes a LlamaForCausalLM with its text tokenizer, for others to tune with their own tools.",
        "lavit lift llama --model me/mine",
        loads_model=False,
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="where the language model goes")
    command.add_argument("--model", metavar="PATH_OR_REPO", help="(default: the embedded checkpoint lavit-emoji)")
    command = add(
        "put-back",
        put_back,
        "write a checkpoint anew with a tuned language model in it",
        "Compares names and shapes of all weights, describes an image with the new checkpoint, and writes it.",
        "lavit put-back llama --model me/mine --image apple.png -o tuned",
        loads_model=False,
    )
    command.add_argument("language_model", metavar="LLAMA", help="folder or repository of the tuned language model")
    command.add_argument("--model", metavar="PATH_OR_REPO", help="what it was lifted out of (default: lavit-emoji)")
    command.add_argument("--image", metavar="IMG", required=True, help="what the new checkpoint describes at once")
    command.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="a new folder")


def push(options: argparse.Namespace):
    """Uploads, or lists what would be uploaded."""
    folder = options.folder
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    from modeling_lavit.publishing.upload import list_upload
    from modeling_lavit.saving_lavit import ADAPTER_CONFIG, edit_json, upload

    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG, "processor_config.json")):
        raise ValueError(f"{folder} is no saved model: it has no config.json")

    if options.base_model and not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"--base-model is of adapters: {folder} has no {ADAPTER_CONFIG}")
    if options.dry_run:
        for line in list_upload(folder, options.repo, options.revision, options.token):
            print(line)
        return
    if options.base_model:
        edit_json(folder / ADAPTER_CONFIG, lambda config: config.update(base_model_name_or_path=options.base_model))
    url = upload(
        folder,
        options.repo,
        tags=options.tags,
        commit_message=options.message,
        private=options.private,
        token=options.token,
        revision=options.revision,
        create_pr=options.create_pr,
    )
    print(url)


def verify(options: argparse.Namespace):
    """Prints the verdict."""
    from modeling_lavit.publishing.verify import verify

    verdict = verify(options.source, options.revision, options.token)
    for name in verdict.same:
        print(f"{name}: this package's own")
    for name, version in verdict.other_version.items():
        print(f"{name}: says that it is of lavit-hf {version}; that version can verify it")
    for name in verdict.changed:
        print(f"{name}: differs from this package's")
    for name in verdict.unknown:
        print(f"{name}: is not of this package")
    for reference in verdict.references:
        print(f"{reference}: names code that is not of this package")
    if not verdict.is_ours:
        raise SystemExit(1)


def lift(options: argparse.Namespace):
    """`lavit lift`"""
    source = model_source(options)
    from modeling_lavit.publishing.language_model import lift_language_model

    model = lift_language_model(source, options.folder)
    print(f"{options.folder}: {type(model).__name__}, {model.num_parameters():,} parameters")


def put_back(options: argparse.Namespace):
    """`lavit put-back`"""
    image, source = read_image(options.image), model_source(options)
    from modeling_lavit.publishing import language_model

    caption = language_model.put_back(options.language_model, source, options.output, image)
    print(f"{options.output}: it says of {options.image}: {one_line(caption)}")
