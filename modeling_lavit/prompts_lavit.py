"""Prompts as users give them to [`LavitPipeline`]."""

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image


# text, or an image: PIL's, a path object, an open file, the bytes of one, or {"bytes": ..., "path": ...} of datasets
Part = str | Image.Image | os.PathLike | io.IOBase | bytes | dict
Prompt = Part | Iterable[Part] | Iterable[Iterable[Part]]


def as_batch(prompt: Prompt | None) -> list[list[Part]]:
    """One list of text and images for each prompt, see [`split_batch`]."""
    return split_batch(prompt)[0]


def split_batch(prompt: Prompt | None) -> tuple[list[list[Part]], bool]:
    """One list of text and images for each prompt, and whether a batch was given (a list of one string is one).

    A collection of strings (a list, tuple, array, column or series) is a batch, and so is one of collections; any
    other is one multimodal prompt. Strings are always text: images are given by `pathlib.Path`, not by a string.

    Raises:
        ValueError: something that is no prompt, an empty one, or text that is no Unicode.
    """
    parts = [prompt] if _is_part(prompt) else _as_list(prompt)
    if not parts:
        raise ValueError(f"prompt must be a string, an image or a non-empty list of them, got {prompt!r:.80}")
    inner = [one for part in parts if not _is_part(part) and (one := _as_list(part)) is not None]
    prompts: list[list[Any]]
    if len(inner) == len(parts):
        prompts, batch = inner, True
    elif all(isinstance(part, str) for part in parts):
        prompts, batch = [[part] for part in parts], parts[0] is not prompt
    else:
        prompts, batch = [parts], False
    for i, one in enumerate(prompts):
        _check(f"prompt {i}", one)
    return prompts, batch


def as_negative_texts(negative_prompt: str | Iterable[str], count: int) -> list[str]:
    """One text for each of `count` prompts; a single one is for all.

    Raises:
        ValueError: something else than text, or another number of them.
    """
    texts = [negative_prompt] * count if isinstance(negative_prompt, str) else _as_list(negative_prompt)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"negative_prompt must be a string, or one for each prompt, got {negative_prompt!r:.80}")
    if len(texts) != count:
        raise ValueError(f"{len(texts)} negative prompts were given for {count} prompts")
    for i, text in enumerate(texts):
        _check_unicode(f"negative prompt {i}", text)
    return texts


def _is_part(value: Any) -> bool:
    return isinstance(value, str | Image.Image | os.PathLike | bytes | bytearray | memoryview | Mapping) or hasattr(
        value, "read"
    )


def _as_list(value: Any) -> list | None:
    """The elements of a collection (strings of numpy as strings), None of anything else."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim == 1 and value.dtype.kind in "UO" else None
    if isinstance(value, Mapping) or not isinstance(value, Iterable) or hasattr(value, "dtype"):
        # of what has a dtype, series hold prompts, and tensors numbers
        to_list = getattr(value, "to_list", None)
        return None if to_list is None else to_list()
    return list(value)


def _check(name: str, parts: list[Part]):
    wrong = [type(part).__name__ for part in parts if not _is_part(part)]
    if wrong:
        raise ValueError(
            f"{name} holds {', '.join(wrong)}: a prompt is made of strings and images (PIL images, pathlib paths, "
            'open files, bytes or {"bytes": ..., "path": ...})'
        )
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise ValueError(f"{name} is empty: it needs text or an image")
    for part in parts:
        if isinstance(part, str):
            _check_unicode(name, part)


def _check_unicode(name: str, text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end]
        raise ValueError(f"{name} is no Unicode text: it holds the lone surrogate {found!a}") from error
