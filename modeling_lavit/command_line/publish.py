"""`lavit push` and `lavit verify`: a folder to the Hub, and the code of one from there."""

import argparse
from pathlib import Path


def add_commands(add):
    """The two subcommands; `add` as in [`build_parser`]."""
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


def push(options: argparse.Namespace):
    """Uploads, or lists what would be uploaded."""
    folder = options.folder
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "processor_config.json")):
        raise ValueError(f"{folder} is no saved model: it has no config.json")
    from modeling_lavit.publishing.upload import list_upload
    from modeling_lavit.saving_lavit import upload

    if options.dry_run:
        for line in list_upload(folder, options.repo, options.revision, options.token):
            print(line)
        return
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
