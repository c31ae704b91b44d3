"""Names that differ between the allowed versions of transformers and diffusers, each with when its line can go."""

import inspect

from transformers.models.llama.modeling_llama import LlamaModel


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
