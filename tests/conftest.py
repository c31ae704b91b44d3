"""Models that several test files share."""

import pytest
import torch
from tiny import BOI, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def talkative():
    """A model that likes to open images, so that interleaved sequences have some."""
    likes_images = tiny_model()
    with torch.no_grad():
        likes_images.lm_head.weight[:BOI] *= 0.3
        likes_images.lm_head.weight[BOI] *= 3
    return likes_images
