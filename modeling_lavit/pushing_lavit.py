"""Uploading a folder as a repository on the Hub, with errors in one line."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from .atomic_lavit import stale_files
from .compat_lavit import httpx


README = "README.md"
# never part of a repository
IGNORED = [".cache/**", ".*.saving-*/**", "__pycache__/**", "**/__pycache__/**"]


def push_folder(
    source: str | os.PathLike | Callable[[Path], object],
    repo_id: str,
    *,
    make_card: Callable[[Path, str], str],
    merge_cards: Callable[[str, str], str],
    named_files: Callable[[Path, str], dict[str, str]],
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder, or what `source(folder)` writes into an empty one; the repository is created if there is none.

    What was interrupted goes on when called again: data that has arrived is not sent twice.

    Args:
        repo_id: "organisation/name".
        make_card: `make_card(folder, repo_id)` -> the README.
        merge_cards: `merge_cards(theirs, ours)` -> the README, where the repository has one.
        named_files: `named_files(folder, repo_id)` -> further files that say the repository's name, path -> text.
        commit_message: "Upload LaVIT" by default.
        private: of a repository that is created: whether its owners alone see it.
        token: of the Hub; by default that of `hf auth login`.
        revision: a branch, created if it does not exist; "main" by default.
        create_pr: opens a pull request instead of committing.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        OSError: no token, no right, no space, no connection.
        ValueError: a name that the Hub does not take; `revision` together with `create_pr`.
    """
    if create_pr and revision:
        raise ValueError("a pull request goes to the main branch: give either create_pr or revision, not both")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        if callable(source):
            source(Path(temporary))
            source = temporary
        with hub_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            where: dict[str, Any] = {
                "repo_id": repo_id,
                "revision": revision,
                "commit_message": commit_message or "Upload LaVIT",
            }
            folder = Path(source)
            texts = {README: make_card(folder, repo_id), **named_files(folder, repo_id)}
            theirs = {name: read_file(api, repo_id, name, revision) for name in texts}
            card = theirs[README]
            if card is not None:
                texts[README] = merge_cards(card, texts[README])
            if source == temporary:
                for name, text in texts.items():
                    (folder / name).write_text(text, encoding="utf-8")
            ours = {name: (folder / name).read_text(encoding="utf-8") for name in texts if (folder / name).is_file()}
            other = {name: text for name, text in texts.items() if text != ours.get(name)}
            ignored = [*IGNORED, *other]
            # weights in one file now, in several before, or the other way: libraries would load those that were there
            sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            stale = stale_files(sent, set(api.list_repo_files(repo_id, revision=revision)))
            commit = api.upload_folder(
                folder_path=folder,
                create_pr=create_pr,
                ignore_patterns=ignored,
                delete_patterns=sorted(stale) or None,
                **where,
            )
            changed = {name: text for name, text in other.items() if text != theirs[name]}
            if changed:
                # the folder stays as it is, what says the repository's name does not, nor its card with edits
                where["revision"] = commit.pr_revision or revision
                api.create_commit(
                    operations=[CommitOperationAdd(name, text.encode()) for name, text in changed.items()], **where
                )
    return commit.pr_url or commit.commit_url


def read_file(api: HfApi, repo_id: str, name: str, revision: str | None) -> str | None:
    """The text of a file in a repository, if there is one.

    Raises:
        OSError: the Hub does not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
            return Path(path).read_text(encoding="utf-8")
    except LocalEntryNotFoundError as error:
        raise OSError(f"{repo_id}: {name} could not be read from the Hub: call again to go on") from error
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Makes one line of what goes wrong between here and the Hub."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(f"{repo_id}: the Hub asks for a token: call `hf auth login`, or pass token=") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: HF_HUB_OFFLINE=1 is set, nothing can be uploaded") from error
    except HfHubHTTPError as error:
        raise OSError(f"{repo_id}: {_reason(error)}") from error
    except RuntimeError as error:
        # an upload of data that failed
        cause = error.__cause__
        reason = _reason(cause) if isinstance(cause, HfHubHTTPError) else " ".join(str(cause or error).split())
        raise OSError(f"{repo_id}: {error}: {reason}; call again to go on") from error
    except httpx.HTTPError as error:
        raise OSError(f"{repo_id}: no connection to the Hub ({error}); call again to go on") from error


def _reason(error: HfHubHTTPError) -> str:
    """What an answer of the Hub means for whoever uploads."""
    status = error.response.status_code if error.response is not None else None
    reasons = {
        401: "the token is missing or not valid: call `hf auth login`, or pass token=",
        403: "the token may not write there: take a name of your own, a token with the right, or create_pr=True",
        404: "there is no such repository or branch, or the token may not see it",
        409: "the name is taken",
        413: "a file is larger than the Hub takes",
        429: "too many requests: try again later",
        507: "there is no space left on the account",
    }
    reason = reasons.get(status or 0, f"the Hub answers {status}")
    said = " ".join((error.server_message or "").split())
    return f"{reason} (it says: {said})" if said else reason
