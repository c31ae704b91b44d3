"""Saving all files of a folder together or none: written beside it, then swapped in one step."""

import ctypes
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Whoever loads a folder begins with one of these: they come last, in this order.
INDEX_FILES = ("processor_config.json", "config.json", "model_index.json")
# beside what they belong to these files may be absent, and must be then
OPTIONAL_FILES = {
    "model": ("draft_codes.safetensors", "generation_config.json"),
    "processor_config": ("chat_template.jinja",),
}
WEIGHTS_FILE = re.compile(
    r"(model|diffusion_pytorch_model)"
    r"(?:(\.[\w-]+?)??(?:-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index(\.[\w-]+)?\.json)"
)
STAGE = re.compile(r"\..+\.saving-.+-\d+-[0-9a-f]{8}")
# of renameat2 and renamex_np
SWAP = 2
CURRENT_FOLDER = -100


@contextmanager
def replaced_together(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder whose files become those of `folder` at the end; nothing changes if anything fails.

    Files of `folder` that are not written again stay, but for what belonged to those that are: shards and an index of
    weights that are in one file now. A process that is killed leaves either the old files or the new ones: the two
    folders are swapped in one step. Where that cannot be (Windows, a mount point, the working directory), the index
    files are removed first and written last, so that what is half done does not load.

    Inside a temporary folder of its own it gives the folder itself: a pipeline saves its components together.

    Raises:
        ValueError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name a folder")
    folder = folder.resolve()
    if is_stage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.saving-{platform.node()}-"
    for place in (folder.parent, folder):
        for stale in place.glob(f"{prefix}*"):
            if not _is_running(stale.name.removeprefix(prefix).split("-")[0]):
                shutil.rmtree(stale, ignore_errors=True)
    stage = folder.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        stage.mkdir()
    except PermissionError:
        # the folder is the user's, what it lies in is not
        stage = folder / stage.name
        stage.mkdir()
    try:
        yield stage
        _commit(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_stage(folder: Path) -> bool:
    """Whether a folder is a temporary one of [`replaced_together`], or lies in one."""
    return any(STAGE.fullmatch(part.name) for part in (folder, *folder.parents))


def _commit(stage: Path, folder: Path) -> None:
    written = _files(stage)
    if not written:
        # another process of a distributed run writes
        return
    if not folder.exists():
        stage.rename(folder)
        return
    stale = stale_files(written, _files(folder))
    loads = any((folder / name).is_file() for name in INDEX_FILES)
    # a shell that stands in the folder would stand in the one that goes
    if loads and stage.parent == folder.parent and not Path.cwd().is_relative_to(folder):
        _keep(folder, stage, stale)
        if _swap(stage, folder):
            # what came while the others were kept
            _keep(stage, folder, stale)
            return
        written = _files(stage)
    for name in INDEX_FILES:
        if name in written:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: INDEX_FILES.index(name) if name in INDEX_FILES else -1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def stale_files(written: set[str], found: set[str]) -> set[str]:
    """What of the files `found` in a folder belonged to those that are `written` again, and does not any more."""
    stale = set()
    for name in written:
        path = Path(name)
        siblings = {other for other in found - written if Path(other).parent == path.parent}
        stem, variant = weights_of(path.name)
        if stem:
            stale |= {other for other in siblings if weights_of(Path(other).name) == (stem, variant)}
        stale |= {other for other in siblings if Path(other).name in OPTIONAL_FILES.get(stem or path.stem, ())}
    return stale


def weights_of(name: str) -> tuple[str | None, str | None]:
    """Stem and variant of a weights file, or of an index of some; `None` of other files."""
    match = WEIGHTS_FILE.fullmatch(name)
    return (match[1], match[2] or match[3]) if match else (None, None)


def _files(folder: Path) -> set[str]:
    """Names of all files in a folder and its folders, relative to it."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and not is_stage(path.parent.relative_to(folder))
    }


def _keep(source: Path, target: Path, stale: set[str]) -> None:
    """Links the files of `source` that `target` has not into it."""
    for name in sorted(_files(source) - _files(target) - stale):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except OSError:
            # a file system without links
            shutil.copy2(source / name, target / name, follow_symlinks=False)
    for path in source.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            (target / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
    shutil.copystat(source, target)


def _swap(one: Path, other: Path) -> bool:
    """Swaps two folders in one step where the system can, and says whether it could."""
    system = ctypes.CDLL(None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(system, "renameat2"):
        return system.renameat2(CURRENT_FOLDER, names[0], CURRENT_FOLDER, names[1], SWAP) == 0
    if hasattr(system, "renamex_np"):
        return system.renamex_np(*names, SWAP) == 0
    return False


def _is_running(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
