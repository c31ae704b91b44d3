"""What all tests of training share."""

import sys
from pathlib import Path

import pytest


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # parts, tiny


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps what it reads, here and in processes that are started here."""
    import os

    import datasets.config

    folder = tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE, os.environ["HF_DATASETS_CACHE"] = folder, str(folder)
