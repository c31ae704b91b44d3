"""What goes into LaVIT and what comes out of it: pictures to pixel values, prompts to ids, ids to texts and codes."""

from .image_processing_lavit import LavitImageProcessor, load_image
from .processing_lavit import LavitProcessor


__all__ = ["LavitImageProcessor", "LavitProcessor", "load_image"]
