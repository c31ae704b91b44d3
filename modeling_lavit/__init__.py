"""LaVIT for the Hugging Face Hub: importing this package registers everything with the Auto classes and pipelines."""

from pathlib import Path as _Path


# Lets a plain checkout work without being installed: its sibling folders are subpackages of this one.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "processing" / "__init__.py").is_file():
    __path__.append(str(_root))

from . import compat_lavit as _  # noqa: E402, F401  # isort: skip  (first: it checks the versions)

from typing import TYPE_CHECKING  # noqa: E402

from transformers import AutoModelForMultimodalLM  # noqa: E402
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from modeling_lavit.processing import LavitImageProcessor, LavitProcessor  # noqa: E402

from .configuration_lavit import (  # noqa: E402
    LavitConfig,
    LavitDetokenizerConfig,
    LavitVisualTokenizerConfig,
)
from .lazy_lavit import DIFFUSERS_CLASSES, load, register_with_diffusers  # noqa: E402
from .modeling_lavit import LavitForConditionalGeneration, LavitModel  # noqa: E402
from .modeling_lavit_detokenizer import LavitDetokenizer  # noqa: E402
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer  # noqa: E402
from .pipeline_text_to_image import LavitTextToImagePipeline  # noqa: E402
from .publishing import use_package  # noqa: E402
from .registering_lavit import register_models  # noqa: E402
from .visual_tokens_lavit import LavitVisualTokens  # noqa: E402
from .vocabulary_lavit import LavitVocabulary  # noqa: E402


if TYPE_CHECKING:
    from .blocks_lavit import LavitBlocks
    from .pipeline_lavit import LavitPipeline
    from .small_decoder_lavit import LavitPatchAutoencoder, LavitUNet2DConditionModel

__version__ = "0.1.0"

register_models(
    model=LavitModel,
    generation_model=LavitForConditionalGeneration,
    visual_tokenizer=LavitVisualTokenizer,
    detokenizer=LavitDetokenizer,
    image_processor=LavitImageProcessor,
    processor=LavitProcessor,
)
use_package()
register_with_diffusers()
PIPELINE_REGISTRY.register_pipeline(
    "text-to-image", pipeline_class=LavitTextToImagePipeline, pt_model=AutoModelForMultimodalLM, type="multimodal"
)

__all__ = [
    "LavitBlocks",
    "LavitConfig",
    "LavitDetokenizer",
    "LavitDetokenizerConfig",
    "LavitForConditionalGeneration",
    "LavitImageProcessor",
    "LavitModel",
    "LavitPatchAutoencoder",
    "LavitPipeline",
    "LavitProcessor",
    "LavitTextToImagePipeline",
    "LavitUNet2DConditionModel",
    "LavitVisualTokenizer",
    "LavitVisualTokenizerConfig",
    "LavitVisualTokens",
    "LavitVocabulary",
]


def __getattr__(name: str):
    if name not in DIFFUSERS_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
