"""The allowed versions of transformers and diffusers, and names that differ between them, each with when it can go.

Whatever else of ours is imported comes after this file, so that another version is named in one sentence instead of
failing at some name that it lacks. setup.py says the same range.
"""

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from huggingface_hub.errors import HfHubHTTPError
from packaging.specifiers import SpecifierSet

# `transformers.AutoImageProcessor` needs torchvision before 5.18, the class itself does not
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llama.modeling_llama import LlamaModel


__all__ = [
    "ALLOWED_VERSIONS",
    "CACHE_NAME",
    "AutoImageProcessor",
    "cache_kwargs",
    "check_versions",
    "pop_cache",
    "httpx",
]

# the HTTP client of huggingface_hub: httpx before 2.0, httpx2 since; can go with 2.0 as the oldest version
httpx = import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])

ALLOWED_VERSIONS = {"transformers": ">=5.16,<6", "diffusers": ">=0.40,<1"}


def check_versions(allowed: dict[str, str] = ALLOWED_VERSIONS) -> None:
    """Raises ImportError if a library is installed in a version outside its range; one that is absent passes."""
    for library, wanted in allowed.items():
        try:
            installed = version(library)
        except PackageNotFoundError:
            continue
        if not SpecifierSet(wanted).contains(installed, prereleases=True):
            raise ImportError(
                f"LaVIT works with {library}{wanted}, and {installed} is installed: pip install '{library}{wanted}'"
            )


check_versions()

# transformers 5.24 calls a model's cache `cache`, in what forward takes, in what it gives, and in generate's kwargs;
# before, `cache` was the paged cache of continuous batching alone. Can go with 5.24 as the oldest version.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def cache_kwargs(past_key_values=None, cache=None) -> dict:
    """What a language model is given: the cache that a caller named either way."""
    return {CACHE_NAME: past_key_values} if cache is None else {"cache": cache}


def pop_cache(kwargs: dict):
    """Takes the cache out of `generate`'s keyword arguments, under whichever name it stands there; or None."""
    found = [kwargs.pop(name) for name in ("past_key_values", "cache") if name in kwargs]
    return next((cache for cache in found if cache is not None), None)
