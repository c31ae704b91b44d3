"""What an upload would do: `lavit push FOLDER REPO --dry-run`."""

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from modeling_lavit.pushing_lavit import IGNORED, hub_errors


def list_upload(folder: Path, repo_id: str, revision: str | None = None, token: str | None = None) -> Iterator[str]:
    """A line for each file of a folder: whether it is new, changed or the same in the repository, its size, its name.

    Raises:
        OSError: no connection, no right.
    """
    theirs = _remote_files(repo_id, revision, token)
    total = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(fnmatch(name, pattern) for pattern in [*IGNORED, ".git/**"]):
            continue
        size = path.stat().st_size
        state = "new" if theirs is None or name not in theirs else "same" if theirs[name](path) else "changed"
        total += size if state != "same" else 0
        yield f"{state:8}{_readable(size):>10}  {name}"
    what = "created" if theirs is None else "updated"
    yield f"{_readable(total)} to upload; {repo_id} would be {what}"


def _remote_files(repo_id: str, revision: str | None, token: str | None) -> dict | None:
    """Name -> whether a local file is the same; None where the repository or branch does not exist."""
    api = HfApi(token=token)
    try:
        with hub_errors(repo_id):
            return {
                file.path: (lambda path, file=file: _is_same(path, file))
                for file in api.list_repo_tree(repo_id, recursive=True, revision=revision)
                if hasattr(file, "size")
            }
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return None
        raise


def _is_same(path: Path, file) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.lfs is None:
        return git_hash(path.read_bytes()) == file.blob_id
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256


def git_hash(content: bytes) -> str:
    """How git names a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
