"""What goes into LaVIT and what comes out of it: images to pixel values, prompts to ids, ids to texts and codes."""

from .image_loading_lavit import load_image
from .image_processing_lavit import LavitImageProcessor
from .processing_lavit import LavitProcessor


__all__ = ["LavitImageProcessor", "LavitProcessor", "load_image"]
